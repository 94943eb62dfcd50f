"""What to evaluate, on how many prompts, and how the images are sampled."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field, model_validator

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


class EvaluationConfig(BaseModel, frozen=True, extra="forbid"):
    """Held-out evaluation of the base model and of the adapter at equal prompts and seeds.

    ``suite`` None turns evaluation off. Counts are prompts, one image each; ``diversity_prompts`` get
    ``images_per_diversity_prompt`` images each. With ``reward`` the images are also scored by the recipe's reward, raw
    and corrected by ``judge``; None is the suite's own detector.
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
