"""What to evaluate, on how many prompts, and how the images are sampled."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class EvaluationConfig(BaseModel, frozen=True, extra="forbid"):
    """Held-out evaluation of the base model and of the adapter at equal prompts and seeds.

    ``suite`` None turns evaluation off. Counts are prompts, one image each; ``diversity_prompts`` get
    ``images_per_diversity_prompt`` images each.
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
