"""What to evaluate, on how many prompts, and how the images are sampled."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field, model_validator

from raysteer.errors import ConfigError
from rewards.config import RewardConfig


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


class EvaluationConfig(BaseModel, frozen=True, extra="forbid"):
    """Held-out evaluation of the base model and of the adapter at equal prompts and seeds.

    ``suite`` None turns evaluation off. Counts are prompts, one image each; ``diversity_prompts`` get
    ``images_per_diversity_prompt`` images each. With ``reward`` the images are also scored by the recipe's reward, raw
    and corrected by ``judge``; None is the suite's own detector. ``every`` that many steps a checkpoint is evaluated
    beside training; ``stop`` ends the run by what is found.
    """

    suite: Literal["glyphs"] | None = None
    prompts_unsafe: int = Field(280, ge=1)
    prompts_safe: int = Field(240, ge=1)
    diversity_prompts: int = Field(16, ge=0)
    images_per_diversity_prompt: int = Field(4, ge=2)
    seed: int = 1234
    steps: int = Field(10, ge=1)
    guidance_scale: float = Field(3.0, ge=1.0)
    bootstrap_samples: int = Field(2000, ge=100)
    reward: bool = True
    judge: JudgeConfig | None = None
    every: int | None = Field(None, ge=1)
    stop: StopConfig | None = None


def check_beside(config: EvaluationConfig, checkpoint_every: int) -> None:
    """Refuse an evaluation beside training that would have no checkpoints, no prompts or no figure to go by.

    Raises:
        ConfigError: naming the key to change.
    """
    every, stop = config.every, config.stop
    if stop is not None and every is None:
        raise ConfigError("evaluation.every", None, "evaluation.stop needs it: steps between two evaluations")
    if stop is not None and not config.reward:
        raise ConfigError("evaluation.reward", False, f"evaluation.stop goes by {stop.figure}: set it to true")
    if every is None:
        return
    if config.suite is None:
        raise ConfigError("evaluation.suite", None, "evaluation.every needs it: set it to glyphs")
    if every % checkpoint_every:
        nearest = max(1, round(every / checkpoint_every)) * checkpoint_every
        raise ConfigError(
            "evaluation.every",
            every,
            f"it must be a multiple of run.checkpoint_every ({checkpoint_every}): checkpoints are what is evaluated; "
            f"{nearest} would do",
        )
