"""What travels between buffer, samplers and reward workers. Small, picklable, no tensors: data goes by reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np


class TicketLike(Protocol):
    """A ticket as a sampler sees it (see cluster.tickets)."""

    @property
    def id(self) -> int: ...
    @property
    def prompt(self) -> str: ...
    @property
    def seeds(self) -> tuple[int, ...]: ...
    @property
    def step_seed(self) -> int: ...
    @property
    def step(self) -> int: ...


@dataclass(frozen=True)
class Lease:
    """Leave to draw one group under one adapter version.

    `adapter` holds one object reference: inside a list Ray passes it on instead of fetching it, and a sampler that
    has these weights already never does. `reward_worker` scores the group first; None: none is alive, the buffer will
    find one.
    """

    ticket: TicketLike
    lease_id: int
    version: int
    checksum: str
    adapter: list[Any]
    reward_worker: Any


@dataclass(frozen=True)
class Preview:
    """Leave to draw the preview images of one adapter version, for people to look at."""

    version: int
    checksum: str
    adapter: list[Any]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Wait:
    """Nothing may be leased yet; ask again."""


@dataclass(frozen=True)
class Stop:
    """The run is over; the reason is for the log."""

    reason: str


@dataclass(frozen=True)
class Outcome:
    """What became of scoring a group.

    `scored`: rewards are there. `retryable`: the attempt failed, another may not. `poisoned`: no attempt will help (a
    reward that is not a number). `untried`: the worker ended before this group's turn. There is no silent zero. Times
    are wall-clock seconds (time.time()).
    """

    kind: Literal["scored", "retryable", "poisoned", "untried"]
    reward: np.ndarray | None = None  # float32 [G]
    parts: Mapping[str, np.ndarray] = field(default_factory=dict)  # each float32 [G]
    reason: str = ""
    detail: str = ""
    started: float = 0.0
    ended: float = 0.0
    worker_id: str = ""
