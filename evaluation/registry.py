"""Suites and detectors by name: one line of registration for each."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from raysteer.errors import ConfigError

if TYPE_CHECKING:
    from pydantic import BaseModel

    from evaluation.config import EvaluationConfig
    from evaluation.suites.base import Suite
    from rewards.config import RewardConfig

SUITES = {
    "glyphs": ("evaluation.suites.glyphs", "Glyphs"),
    "i2p": ("evaluation.suites.i2p", "I2P"),
    "nudity": ("evaluation.suites.nudity", "Nudity"),
    "attacks": ("evaluation.suites.attacks", "Attacks"),
    "geneval": ("evaluation.suites.geneval", "GenEval"),
    "coco": ("evaluation.suites.coco", "Coco"),
    "refusal": ("evaluation.suites.refusal", "Refusal"),
}
DETECTORS = {
    "glyphs": ("evaluation.detectors.glyphs", "GlyphsDetector"),
    "nudenet": ("evaluation.detectors.nudenet", "NudeNetDetector"),
    "q16": ("evaluation.detectors.q16", "Q16Detector"),
    "objects": ("evaluation.detectors.objects", "ObjectsDetector"),
    "clip": ("evaluation.detectors.clip", "ClipDetector"),
    "perceptual": ("evaluation.detectors.perceptual", "PerceptualDetector"),
    "inception": ("evaluation.detectors.inception", "InceptionDetector"),
}
_REWARD = ("evaluation.detectors.reward", "RewardDetector")

Detectors = Mapping[str, tuple[str, str, "BaseModel"]]
"""Name in the verdicts to module, class and config: what an actor builds a detector from."""


def build_suite(config: EvaluationConfig) -> Suite:
    """The suite that a recipe asks for.

    Raises:
        ConfigError: it asks for none, or for what the suite has not.
        PromptError: a prompt file cannot be used.
    """
    if config.suite is None:
        raise ConfigError("evaluation.suite", None, f"name one: {', '.join(SUITES)}")
    own = getattr(config, config.suite)
    if own is None:
        key = f"evaluation.{config.suite}"
        raise ConfigError(key, None, "the suite needs this section, with the file of its prompts (docs/suites.md)")
    module, kind = SUITES[config.suite]
    suite: Suite = getattr(import_module(module), kind)(own, config.seed, config.limit)
    return suite


def detectors_of(suite: Suite, config: EvaluationConfig, reward: RewardConfig | None) -> Detectors:
    """Who looks at the images of a suite: its own detectors, then the reward and the judge of quality.

    Raises:
        ConfigError: a detector has no section.
    """
    found: dict[str, tuple[str, str, BaseModel]] = {
        name: (*DETECTORS[name], config.detectors.section(name)) for name in suite.detectors
    }
    if reward is not None and config.reward:
        found["reward"] = (*_REWARD, reward)
        if config.judge is not None:
            found["judge"] = (*_REWARD, config.judge.reward)
    return found


def check_detectors(detectors: Detectors, config: EvaluationConfig) -> None:
    """Everything about them that can be wrong without loading a model.

    Raises:
        ConfigError: the first thing that is, with its key.
    """
    for module, _, own in detectors.values():
        import_module(module).check(own)
    inception = config.detectors.inception
    if inception is not None and config.suite == "coco" and config.coco is not None and config.coco.reference:
        from evaluation.detectors.inception import check_reference

        check_reference(inception, config.coco.reference, "evaluation.coco.reference")


def meanings(suite: Suite) -> Mapping[str, Any]:
    """How the figures of an evaluation are read: those of the suite, and those of the reward."""
    from evaluation.scored import MEANINGS

    return {**suite.meanings, **MEANINGS}
