"""From a suite to what is drawn, and from what detectors saw to figures, the recipe's reward among them.

Whoever draws and looks (`cluster.evaluate` with many actors, `actors.evaluator` alone), it is in these chunks and
these figures, so that results are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from evaluation.config import EvaluationConfig
from evaluation.corrected import as_quality, corrected
from evaluation.suites.base import Findings, Judging, Meaning, Sample, Suite, Verdict, figure_of

CHUNK = 16
REWARD, JUDGE = "reward", "judge"
MEANINGS = {
    REWARD: Meaning("reward (raw)", "higher"),
    "reward_corrected": Meaning("reward (corrected: gains the judge approves)", "higher"),
}


@dataclass(frozen=True)
class Shot:
    """An image to be drawn; `ask` is the index of its ask."""

    ask: int
    prompt: str
    seed: int
    guidance_scale: float


def shots(suite: Suite, config: EvaluationConfig) -> list[Shot]:
    """All images of a suite, the seeds of the first ask first."""
    return [
        Shot(index, ask.prompt, seed, config.guidance_scale if ask.guidance_scale is None else ask.guidance_scale)
        for index, ask in enumerate(suite.asks)
        for seed in ask.seeds
    ]


def chunks(drawn: Sequence[Shot]) -> list[tuple[int, ...]]:
    """Indices of what is drawn and looked at together: the same for everybody, because rounding may depend on it."""
    by_guidance: dict[float, list[int]] = {}
    for index, shot in enumerate(drawn):
        by_guidance.setdefault(shot.guidance_scale, []).append(index)
    return [tuple(own[start : start + CHUNK]) for own in by_guidance.values() for start in range(0, len(own), CHUNK)]


def rewards(suite: Suite, verdicts: Sequence[Verdict]) -> np.ndarray | None:
    """Rewards of the images that count in it, float32 [n]; None if nothing was scored."""
    if not verdicts or REWARD not in verdicts[0]:
        return None
    return np.array([verdicts[index][REWARD] for index in _rewarded(suite)], np.float32)


def findings(suite: Suite, verdicts: Sequence[Verdict], config: EvaluationConfig, base: np.ndarray | None) -> Findings:
    """What a suite says of one model, with the figure "reward" if its images were scored.

    Args:
        base: `rewards` of the base model's images, which give the figure "reward_corrected" where somebody judges
            quality (see `evaluation.corrected`): `config.judge`, or the suite itself.
    """
    found, raw = suite.find(verdicts, config.bootstrap_samples), rewards(suite, verdicts)
    if raw is None:
        return found
    samples = {REWARD: _sample(suite, raw)}
    quality = _quality(suite, verdicts, config)
    if base is not None and quality is not None:
        samples["reward_corrected"] = _sample(suite, corrected(raw, base, quality))
    own = {name: figure_of(sample, config.bootstrap_samples) for name, sample in samples.items()}
    return replace(found, figures=found.figures | own, samples=found.samples | samples)


def _quality(suite: Suite, verdicts: Sequence[Verdict], config: EvaluationConfig) -> np.ndarray | None:
    counted = _rewarded(suite)
    if config.judge is not None:
        judged = np.array([verdicts[index][JUDGE] for index in counted])
        return as_quality(judged, config.judge.low, config.judge.high)
    if isinstance(suite, Judging):
        return np.asarray(suite.quality(verdicts))[counted]
    return None


def _rewarded(suite: Suite) -> list[int]:
    """Images whose asks count in the reward."""
    return np.flatnonzero([ask.rewarded for ask in suite.asks for _ in ask.seeds]).tolist()


def _sample(suite: Suite, values: np.ndarray) -> Sample:
    """The mean of each ask's images; None where they do not count."""
    left = iter(values.astype(np.float64))
    return Sample(
        tuple(float(np.mean([next(left) for _ in ask.seeds])) if ask.rewarded else None for ask in suite.asks)
    )
