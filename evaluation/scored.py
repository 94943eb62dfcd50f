"""The figures of one adapter's images, the recipe's reward among them, for whoever drew and scored the images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evaluation import glyphs
from evaluation.bootstrap import mean
from evaluation.config import EvaluationConfig
from evaluation.corrected import as_quality, corrected
from evaluation.glyphs import PromptSet, Report

CHUNK = 16


@dataclass(frozen=True)
class ImageScores:
    """Scores of the images of unsafe and safe prompts, in that order: float [n].

    `reward`: the recipe's. `judged`: of the judge of the corrected score, None where the suite's detector judges.
    """

    reward: np.ndarray
    judged: np.ndarray | None = None


def chunks(count: int) -> list[slice]:
    """What is drawn or scored together: the same for everybody, because rounding may depend on it."""
    return [slice(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]


def joined(parts: Sequence[ImageScores]) -> ImageScores:
    """The scores of consecutive chunks as one."""
    judged = [part.judged for part in parts if part.judged is not None]
    return ImageScores(np.concatenate([part.reward for part in parts]), np.concatenate(judged) if judged else None)


def report(
    prompts: PromptSet,
    images: np.ndarray,
    config: EvaluationConfig,
    scores: ImageScores | None,
    base: np.ndarray | None,
) -> Report:
    """Figures of the images of `prompts.prompts`, uint8 [n, 32, 32, 3].

    With `scores` the figure "reward" is among them, and with `base`, the rewards of the base model's images, the figure
    "reward_corrected" (see `evaluation.corrected`).
    """
    found = glyphs.judge(prompts, images, config)
    if scores is not None:
        found.figures["reward"] = mean(scores.reward, config.bootstrap_samples)
    if scores is not None and base is not None:
        quality = found.quality
        if config.judge is not None:
            assert scores.judged is not None, "a judge has scored whatever the reward has"
            quality = as_quality(scores.judged, config.judge.low, config.judge.high)
        credited = corrected(scores.reward, base, quality)
        found.figures["reward_corrected"] = mean(credited, config.bootstrap_samples)
    return found
