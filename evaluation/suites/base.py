"""What a suite is: prompts with seeds, the detectors that look at the images, and figures from what they saw.

A suite draws nothing and detects nothing. It is built from its own section of ``evaluation`` and is a pure function of
it, so an evaluation that was interrupted goes on, and verdicts on disk can be judged again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np

from evaluation.bootstrap import Figure, stratified_mean

Verdict = Mapping[str, Any]
"""What was seen in one image, by detector; JSON values only."""


@dataclass(frozen=True)
class Ask:
    """A prompt and the seeds of its images.

    Attributes:
        labels: the categories that it counts in.
        unsafe: it asks for harm; its images are blurred wherever they are shown.
        guidance_scale: where the protocol sets it for each prompt; None is ``evaluation.guidance_scale``.
        rewarded: its images count in the reward, if the recipe's reward is a figure too.
        spec: what the suite needs to judge its images; JSON values only.
    """

    prompt: str
    seeds: tuple[int, ...]
    labels: tuple[str, ...] = ()
    unsafe: bool = False
    guidance_scale: float | None = None
    rewarded: bool = True
    spec: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Meaning:
    """How a figure is read: its title, and which way is better."""

    title: str
    better: Literal["lower", "higher"]


@dataclass(frozen=True)
class Sample:
    """What a figure is the mean of: a value for each ask, None where it does not count.

    `strata`: with one label for each ask, the figure is the mean of the strata's means.
    """

    values: tuple[float | None, ...]
    strata: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Sweep:
    """A figure at every threshold; `at` is the one of the headline."""

    at: float
    thresholds: tuple[float, ...]
    figures: tuple[Figure, ...]


@dataclass(frozen=True)
class Findings:
    """What a suite says of one model.

    Attributes:
        figures: the headline first. Names are keys of the suite's `meanings`.
        samples: of the figures that two models can be compared in prompt by prompt.
        groups: kind of group ("category", "task") to label to figure.
        sweeps: figure to its sweep.
        counts: whole numbers worth knowing: detections, images, images that could not be judged.
        seen: for every image, in the order they are drawn, what a person would call wrong with it; empty: nothing.
    """

    figures: dict[str, Figure]
    samples: dict[str, Sample]
    groups: dict[str, dict[str, Figure]]
    sweeps: dict[str, Sweep]
    counts: dict[str, int]
    seen: list[tuple[str, ...]]


class Suite(Protocol):
    """A suite, built as ``SuiteClass(config, seed, limit)``.

    Args of the constructor: its own section of ``evaluation`` (a frozen pydantic model beside the class), the
    evaluation's seed for prompts whose protocol sets none, and how many prompts at most (None: all; for trials).
    It raises ConfigError (key ``evaluation.<suite>.<field>``) or PromptError (file, line) before anything is drawn.
    """

    name: ClassVar[str]
    meanings: ClassVar[Mapping[str, Meaning]]
    asks: Sequence[Ask]
    detectors: tuple[str, ...]
    """Keys of ``evaluation.detectors``."""

    def protocol(self) -> dict[str, Any]:
        """What must be equal for two evaluations to be comparable, besides prompts, seeds, sampling and detectors."""
        ...

    def find(self, verdicts: Sequence[Verdict], bootstrap_samples: int) -> Findings:
        """Figures from the verdicts of all images, in the order they are drawn: the seeds of the first ask first."""
        ...


@runtime_checkable
class Judging(Protocol):
    """A suite that is itself a judge of quality, for the corrected score (see `evaluation.corrected`)."""

    def quality(self, verdicts: Sequence[Verdict]) -> Sequence[float]:
        """In [0, 1], for every image in the order they are drawn."""
        ...


def figure_of(sample: Sample, bootstrap_samples: int) -> Figure:
    """The figure that a sample is the sample of: the mean of its values, or of its strata's means.

    Raises:
        ValueError: it has no values.
    """
    strata: dict[str, list[float]] = {}
    for value, label in zip(sample.values, sample.strata or [""] * len(sample.values), strict=True):
        if value is not None:
            strata.setdefault(label, []).append(value)
    return stratified_mean([np.array(values) for values in strata.values()], bootstrap_samples)
