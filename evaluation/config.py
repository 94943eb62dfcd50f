"""What to evaluate, on how many prompts, and how the images are sampled."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field, model_validator

from evaluation.detectors.glyphs import GlyphsDetectorConfig
from evaluation.detectors.inception import InceptionConfig
from evaluation.detectors.nudenet import NudeNetDetectorConfig
from evaluation.detectors.objects import ObjectsDetectorConfig
from evaluation.detectors.perceptual import PerceptualConfig
from evaluation.detectors.q16 import Q16DetectorConfig
from evaluation.guards import KL, GuardConfig, check_guards
from evaluation.suites.attacks import AttacksConfig
from evaluation.suites.coco import CocoConfig
from evaluation.suites.geneval import GenEvalConfig
from evaluation.suites.glyphs import GlyphsConfig
from evaluation.suites.i2p import I2PConfig
from evaluation.suites.nudity import NudityConfig
from evaluation.suites.refusal import RefusalConfig
from raysteer.errors import ConfigError
from rewards.config import ClipConfig, RewardConfig

#: suites whose detectors see the base model's image beside each
PAIRED = frozenset({"refusal"})


class JudgeConfig(BaseModel, frozen=True, extra="forbid"):
    """A judge of quality that training does not see, for the corrected score: any ``reward``, such as another CLIP.

    Scores of ``low`` and less are quality 0, of ``high`` and more 1.
    """

    reward: RewardConfig
    low: float = Field(allow_inf_nan=False)
    high: float = Field(allow_inf_nan=False)

    @model_validator(mode="after")
    def _a_range(self) -> JudgeConfig:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low:g}) must be below high ({self.high:g})")
        return self


class StopConfig(BaseModel, frozen=True, extra="forbid"):
    """When a run ends before its last step: ``figure`` had no new best in ``patience`` evaluations in a row.

    A new best exceeds the old one by more than ``least``.
    """

    figure: Literal["reward_corrected"] = "reward_corrected"
    patience: int = Field(2, ge=1)
    least: float = Field(0.0, ge=0.0, allow_inf_nan=False)


class DetectorsConfig(BaseModel, frozen=True, extra="forbid"):
    """A section for each detector; those that the suite does not need are not read.

    ``perceptual`` None looks through ``clip``.
    """

    glyphs: GlyphsDetectorConfig = GlyphsDetectorConfig()
    nudenet: NudeNetDetectorConfig = NudeNetDetectorConfig()
    q16: Q16DetectorConfig | None = None
    objects: ObjectsDetectorConfig = ObjectsDetectorConfig()
    clip: ClipConfig | None = None
    perceptual: PerceptualConfig | None = None
    inception: InceptionConfig | None = None

    def section(self, name: str) -> BaseModel:
        """What a detector is built from.

        Raises:
            ConfigError: it has no section, and no default.
        """
        found: BaseModel | None = getattr(self, name)
        if name == "perceptual" and found is None and self.clip is not None:
            found = PerceptualConfig.model_validate(self.clip.model_dump())
        if found is None:
            key = f"evaluation.detectors.{name}"
            raise ConfigError(key, None, "the suite looks through it: add the section (docs/suites.md shows one)")
        return found


class EvaluationConfig(BaseModel, frozen=True, extra="forbid"):
    """Evaluation of the base model and of the adapter at equal prompts and seeds.

    ``suite`` None turns evaluation off; its own section has its name. ``limit``: at most so many of its prompts, for
    trials. ``steps`` and ``guidance_scale`` are the sampler's, where the suite does not set guidance for each prompt.
    With ``reward`` the images are also scored by the recipe's reward, raw and corrected by ``judge``; None is the
    suite, if it can judge. ``every`` that many steps a checkpoint is evaluated beside training; ``stop`` and
    ``guards`` end the run by what is found.
    """

    suite: Literal["glyphs", "i2p", "nudity", "attacks", "geneval", "coco", "refusal"] | None = None
    limit: int | None = Field(None, ge=1)
    seed: int = 1234
    steps: int = Field(10, ge=1)
    guidance_scale: float = Field(3.0, ge=1.0)
    bootstrap_samples: int = Field(2000, ge=100)
    reward: bool = True
    judge: JudgeConfig | None = None
    glyphs: GlyphsConfig = GlyphsConfig()
    i2p: I2PConfig | None = None
    nudity: NudityConfig | None = None
    attacks: AttacksConfig | None = None
    geneval: GenEvalConfig | None = None
    coco: CocoConfig | None = None
    refusal: RefusalConfig | None = None
    detectors: DetectorsConfig = DetectorsConfig()
    every: int | None = Field(None, ge=1)
    stop: StopConfig | None = None
    guards: tuple[GuardConfig, ...] = ()

    @property
    def may_end(self) -> bool:
        """Evaluations may end a run before its last step."""
        return self.stop is not None or bool(self.guards)

    @property
    def with_kl(self) -> bool:
        """A guard goes by the KL to the base model, which nobody measures otherwise."""
        return any(guard.figure == KL for guard in self.guards)


def check_beside(config: EvaluationConfig, checkpoint_every: int) -> None:
    """Refuse an evaluation beside training that would have no checkpoints, no prompts or no figure to go by.

    Raises:
        ConfigError: naming the key to change.
    """
    every, stop = config.every, config.stop
    if stop is not None and every is None:
        raise ConfigError("evaluation.every", None, "evaluation.stop needs it: steps between two evaluations")
    if config.guards and every is None:
        raise ConfigError("evaluation.every", None, "evaluation.guards needs it: steps between two evaluations")
    if stop is not None and not config.reward:
        raise ConfigError("evaluation.reward", False, f"evaluation.stop goes by {stop.figure}: set it to true")
    if every is None:
        return
    if config.suite is None:
        raise ConfigError("evaluation.suite", None, "evaluation.every needs it: name a suite, such as glyphs")
    if config.suite in PAIRED:
        why = "it compares with the base model's images, which nobody keeps beside training"
        raise ConfigError("evaluation.suite", config.suite, f"{why}: use another, or set evaluation.every to null")
    if every % checkpoint_every:
        nearest = max(1, round(every / checkpoint_every)) * checkpoint_every
        raise ConfigError(
            "evaluation.every",
            every,
            f"it must be a multiple of run.checkpoint_every ({checkpoint_every}): checkpoints are what is evaluated; "
            f"{nearest} would do",
        )
    check_guards(config)
