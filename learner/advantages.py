"""Group-relative advantages: how much better an image is than its siblings of the same prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

StdMode = Literal["group", "batch", "mixed"]


def group_advantages(
    rewards: np.ndarray, std: StdMode = "group", floor: float = 1e-4, clip: float | None = None
) -> np.ndarray:
    """A = (r - mean_group) / max(std, floor), clamped to +-clip (Shao et al. 2024, GRPO).

    Args:
        rewards: [n_groups, G], finite; a row is one group.
        std: ``group`` divides by the group's own standard deviation, ``batch`` by the pooled within-group one,
            ``mixed`` by sqrt((var_group + var_batch) / 2), which keeps a nearly constant group from shouting.
            All are population deviations (divided by G, not G - 1).
        floor: least standard deviation, in units of the reward; set it to the reward's resolution.
        clip: bound on |A|, or None.

    Returns:
        float32 [n_groups, G]. A group of equal rewards (or of one image) gets exactly 0.

    Raises:
        ValueError: not a table, or a reward is NaN or infinite (such a group must be dropped, not averaged).
    """
    r = np.asarray(rewards, np.float64)
    if r.ndim != 2 or r.size == 0:
        raise ValueError(f"rewards must be [n_groups, group_size], got shape {r.shape}")
    if not np.isfinite(r).all():
        raise ValueError("rewards must be finite: drop poisoned groups before normalising")
    equal = r.max(1, keepdims=True) == r.min(1, keepdims=True)
    centred = np.where(equal, 0.0, r - r.mean(1, keepdims=True))
    var_group = (centred**2).mean(1, keepdims=True)
    var_batch = var_group.mean()
    variance = {"group": var_group, "batch": var_batch, "mixed": (var_group + var_batch) / 2}[std]
    advantages = centred / np.maximum(np.sqrt(variance), floor)
    if clip is not None:
        advantages = advantages.clip(-clip, clip)
    return advantages.astype(np.float32)


def mixed_rewards(
    parts: Mapping[str, np.ndarray], weights: Mapping[str, float], std: StdMode = "group", floor: float = 1e-4
) -> np.ndarray:
    """Several rewards as one whose scales do not matter: each is normalised inside its group, then weighted.

    r = floor sum_k w_k A_k / max |w|, A_k the advantages of component k. The factor makes the floor count twice as it
    should: ``group_advantages`` of r with the same ``std`` and ``floor`` shrinks what deviates by more than one unit
    of the heaviest component, and never blows up what all components call noise.

    Args:
        parts: raw components by name, each [n_groups, G], finite; those without a weight are passed over.
        weights: by name; a cost has a negative one. Only their proportions matter.
        std, floor: as in ``group_advantages``, for each component; a component below the floor fades out.

    Returns:
        float64 [n_groups, G]. A component that is equal in a whole group adds exactly 0 there.

    Raises:
        ValueError: no weight differs from 0, or a component is not a finite table.
        KeyError: a weight has no component.
    """
    heaviest = max((abs(weight) for weight in weights.values()), default=0.0)
    if not (np.isfinite(heaviest) and heaviest > 0.0):
        raise ValueError(f"weights must be finite and one of them not 0, got {dict(weights)}")
    terms = [weight / heaviest * group_advantages(parts[name], std, floor) for name, weight in weights.items()]
    return floor * np.stack(terms).sum(axis=0, dtype=np.float64)
