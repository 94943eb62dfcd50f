"""The samplers a buffer knows: when it last heard of each, who waits for a lease, who was given up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class SamplerRecord:
    """One sampler: its process, when it was last heard (clock seconds), groups leased to it, whether it waits."""

    pid: int
    last_heard: float
    groups: int = 0
    waiting: bool = False


class Roster:
    """Samplers by name. Args: clock, monotonic seconds; silence_limit_s, after which a silent one counts as mute."""

    def __init__(self, clock: Callable[[], float], silence_limit_s: float) -> None:
        self.clock, self.silence_limit_s = clock, silence_limit_s
        self.there: dict[str, SamplerRecord] = {}
        self._given_up: set[str] = set()

    @property
    def waiting(self) -> int:
        """How many wait for a lease."""
        return sum(1 for sampler in self.there.values() if sampler.waiting)

    def hear(self, name: str, pid: int | None = None) -> SamplerRecord | None:
        """A sign of life; with `pid` a newcomer is entered. None for one that was given up or is unknown."""
        if name not in self._given_up and pid is not None:
            self.there.setdefault(name, SamplerRecord(pid, self.clock()))
        if name in self.there:
            self.there[name].last_heard = self.clock()
        return self.there.get(name)

    def give_up(self, name: str) -> None:
        """This sampler is dead. Whatever still comes from it is refused: its tickets have gone to others."""
        self._given_up.add(name)
        self.there.pop(name, None)

    def is_given_up(self, name: str) -> bool:
        return name in self._given_up

    @contextmanager
    def waits(self, sampler: SamplerRecord) -> Iterator[None]:
        """While it waits for a lease; silence does not count meanwhile."""
        sampler.waiting = True
        try:
            yield
        finally:
            sampler.waiting = False

    def mute(self) -> list[str]:
        """Samplers that neither draw nor ask."""
        return [name for name in self.there if self._silent_s(name) > self.silence_limit_s]

    def as_dict(self) -> dict[str, dict[str, float]]:
        """For a snapshot: pid, groups, waiting and seconds of silence by name."""
        return {
            name: {"pid": s.pid, "groups": s.groups, "waiting": s.waiting, "silent_s": self._silent_s(name)}
            for name, s in self.there.items()
        }

    def _silent_s(self, name: str) -> float:
        sampler = self.there[name]
        return 0.0 if sampler.waiting else self.clock() - sampler.last_heard
