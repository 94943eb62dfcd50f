"""Painters of the glyph world, and what the suite says of a painter without a cluster."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from evaluation.detectors.glyphs import GlyphsDetector, GlyphsDetectorConfig
from evaluation.suites.base import Findings
from evaluation.suites.glyphs import Glyphs, GlyphsConfig
from glyphs.grammar import fulfil, parse
from glyphs.world import Scene, render

Painter = Callable[[Sequence[str], Sequence[int]], np.ndarray]


def perfect(prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
    """What is asked for, marks included."""
    images = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        rng = np.random.default_rng(seed)
        images.append(render(fulfil(parse(prompt), rng), rng))
    return np.stack(images)


def blank(prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
    return np.stack([render(Scene(()), np.random.default_rng(seed)) for seed in seeds])


def verdicts_of(painter: Painter, suite: Glyphs) -> list[dict]:
    """What the exact detector sees in a painter's images of a suite."""
    asked = [(ask.prompt, seed) for ask in suite.asks for seed in ask.seeds]
    images = painter([prompt for prompt, _ in asked], [seed for _, seed in asked])
    detector = GlyphsDetector(GlyphsDetectorConfig())
    return [{"glyphs": seen} for seen in detector.detect(images, [prompt for prompt, _ in asked], None)]


def report_of(painter: Painter, config: GlyphsConfig, seed: int = 1234) -> Findings:
    suite = Glyphs(config, seed)
    return suite.find(verdicts_of(painter, suite), bootstrap_samples=500)
