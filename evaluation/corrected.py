"""Corrected score: the reward that training raised, credited only as far as a judge that it never saw approves.

A reward can be raised by what it measures or by what it overlooks. Against the base model's image of the same prompt
and seed,

    corrected = base + quality * gain    where there is a gain over the base,
    corrected = reward                   where there is none: a loss counts in full,

with quality in [0, 1] from a judge outside the reward. An adapter that learns what is wanted has a corrected score near
its reward; one that games the reward leaves it behind. GDRO's authors discount theirs by a vision-language model's
verdict (arXiv 2601.02036); this form has no constants, and needs no reward of a certain sign.
"""

from __future__ import annotations

import numpy as np


def corrected(reward: np.ndarray, base: np.ndarray, quality: np.ndarray) -> np.ndarray:
    """Corrected score of each image, float64 [n].

    Args:
        reward: [n], of the model in question.
        base: [n], of the base model at equal prompts and seeds.
        quality: [n] in [0, 1], of the model in question.

    Raises:
        ValueError: shapes differ, or a quality outside [0, 1].
    """
    reward, base, quality = (np.asarray(values, np.float64) for values in (reward, base, quality))
    if not reward.shape == base.shape == quality.shape:
        raise ValueError(f"reward {reward.shape}, base {base.shape} and quality {quality.shape} must have one shape")
    if not ((quality >= 0.0) & (quality <= 1.0)).all():
        raise ValueError("quality must lie in [0, 1]")
    gain = reward - base
    return base + np.where(gain > 0.0, quality * gain, gain)


def as_quality(score: np.ndarray, low: float, high: float) -> np.ndarray:
    """A judge's score as quality: 0 at ``low`` or below, 1 at ``high`` or above, linear between."""
    return np.clip((np.asarray(score, np.float64) - low) / (high - low), 0.0, 1.0)
