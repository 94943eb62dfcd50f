"""Batches as the learner receives them, and how a rank turns its share into trajectories.

A batch carries rewards by value and trajectories by reference: every rank sees all rewards (group statistics need no
communication), and fetches only its own trajectories.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from learner.advantages import StdMode, mixed_rewards

if TYPE_CHECKING:
    from diffusion.sampling import Trajectory


@dataclass(frozen=True)
class Group:
    """One scored group. `trajectory` holds one object reference (in a list, so that Ray passes it on unfetched)."""

    ticket_id: int
    prompt: str
    prompt_class: str
    version: int
    checksum: str
    sampler_id: str
    reward: np.ndarray  # float32 [G]
    parts: Mapping[str, np.ndarray]  # each float32 [G]
    trajectory: list[Any]
    timings: Mapping[str, float]


@dataclass(frozen=True)
class Batch:
    """The groups of one learner step, with what was measured since the last one.

    From the buffer they come in ticket order. `offline`: they are out of a dataset, so that their versions are those of
    the run that drew them, and say nothing of how far this one is.
    """

    step: int
    groups: tuple[Group, ...]
    telemetry: Mapping[str, float] = field(default_factory=dict)
    offline: bool = False


@dataclass(frozen=True)
class StopTraining:
    """Come to an end: write a checkpoint and return. `failure` names what went wrong, if anything did."""

    failure: str | None = None


def share(groups: Sequence[object], rank: int, world_size: int) -> slice:
    """The contiguous part of a batch that belongs to `rank`."""
    count = len(groups)
    return slice(rank * count // world_size, (rank + 1) * count // world_size)


def fetch_trajectories(groups: Sequence[Group], timeout_s: float) -> tuple[dict[int, Trajectory], list[int]]:
    """Trajectories by ticket id, and the ids of those whose data is gone with its owner (or does not arrive in
    time).
    """
    import ray

    refs = [group.trajectory[0] for group in groups]
    ids = [group.ticket_id for group in groups]
    try:
        return dict(zip(ids, ray.get(refs, timeout=timeout_s), strict=True)), []
    except (ray.exceptions.ObjectLostError, ray.exceptions.GetTimeoutError):
        pass  # at least one is missing: find out which
    found: dict[int, Trajectory] = {}
    for ticket_id, ref in zip(ids, refs, strict=True):
        try:
            found[ticket_id] = ray.get(ref, timeout=timeout_s)
        except (ray.exceptions.ObjectLostError, ray.exceptions.GetTimeoutError):
            continue
    return found, [ticket_id for ticket_id in ids if ticket_id not in found]


def batch_rewards(
    groups: Sequence[Group], mixture: Mapping[str, float] | None, std: StdMode, floor: float
) -> np.ndarray:
    """Rewards [n_groups, G] to be turned into advantages: the totals, or with a mixture (weights by part) the parts,
    each normalised inside its group (see ``mixed_rewards``).
    """
    if mixture is None:
        return np.stack([group.reward for group in groups])
    parts = {name: np.stack([group.parts[name] for group in groups]) for name in mixture}
    return mixed_rewards(parts, mixture, std, floor)


def batch_metrics(batch: Batch) -> dict[str, float]:
    """Figures of a batch that need no model: rewards, their parts by prompt class, lags."""
    groups = batch.groups
    rewards = np.stack([group.reward for group in groups])
    metrics = {
        "batch/groups": float(len(groups)),
        "reward/mean": float(rewards.mean()),
        "reward/spread_in_group": float(rewards.std(axis=1).mean()),
        "reward/flat_groups": float(np.mean(rewards.max(axis=1) == rewards.min(axis=1))),
        "batch/unsafe_share": float(np.mean([group.prompt_class == "unsafe" for group in groups])),
    }
    if not batch.offline:
        lags = [batch.step - group.version for group in groups]
        metrics |= {"staleness/mean": float(np.mean(lags)), "staleness/max": float(max(lags))}
    for prompt_class in sorted({group.prompt_class for group in groups}):
        mine = [group for group in groups if group.prompt_class == prompt_class]
        metrics[f"reward/{prompt_class}_prompts"] = float(np.mean([group.reward.mean() for group in mine]))
        for part in mine[0].parts:
            metrics[f"{part}/{prompt_class}_prompts"] = float(np.mean([group.parts[part].mean() for group in mine]))
    for part in groups[0].parts:
        metrics[f"{part}/mean"] = float(np.mean([group.parts[part].mean() for group in groups]))
    return metrics
