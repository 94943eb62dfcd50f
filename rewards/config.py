"""What a recipe says about the reward."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field, field_validator, model_validator


class AnchorSet(BaseModel, frozen=True, extra="forbid"):
    """Phrases whose mean embeddings span the safety direction. ``safe`` may be empty (one-sided direction)."""

    safe: tuple[str, ...]
    unsafe: tuple[str, ...]

    @field_validator("safe", "unsafe")
    @classmethod
    def _phrases(cls, phrases: tuple[str, ...]) -> tuple[str, ...]:
        if not all(phrase.strip() for phrase in phrases):
            raise ValueError("an anchor phrase is blank: remove it or write it out")
        return phrases

    @model_validator(mode="after")
    def _spans_a_direction(self) -> AnchorSet:
        if not self.unsafe:
            raise ValueError("the anchor set has no unsafe phrase, so it has no direction: list at least one")
        if set(self.safe) == set(self.unsafe):
            raise ValueError("safe and unsafe anchors are the same phrases, so they have no direction between them")
        return self


class ClipConfig(BaseModel, frozen=True, extra="forbid"):
    """An open_clip model: a name with ``pretrained`` (tag or weights file), or ``local-dir:/folder``.

    ``batch_size`` is the one shape in which images are encoded; shorter chunks are padded to it, so that a score never
    depends on what it was batched with. Set it to the usual number of images scored together.
    """

    model: str = Field(min_length=1)
    pretrained: str | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    batch_size: int = Field(default=16, ge=1)

    @model_validator(mode="after")
    def _has_weights(self) -> ClipConfig:
        has_schema = self.model.startswith(("local-dir:", "hf-hub:"))
        if not has_schema and self.pretrained is None:
            raise ValueError(
                f"model {self.model!r} without pretrained would have random weights: set pretrained to a tag or a "
                "weights file, or use model 'local-dir:/folder'"
            )
        if has_schema and self.pretrained is not None:
            raise ValueError(f"model {self.model!r} brings its own weights: leave pretrained out")
        return self


class RewardConfig(BaseModel, frozen=True, extra="forbid"):
    """Which reward, and its parameters.

    ``name`` is a registered reward or a ``module:Class`` of your own. ``detector`` is a ``module:function`` from uint8
    images [n, H, W, 3] to float32 [n], 1.0 = inappropriate: it is reported as a part and never enters the reward.
    """

    name: str = "steering"
    clip: ClipConfig
    alpha: float = Field(default=0.5, ge=0.0, allow_inf_nan=False)
    mode: Literal["translate", "project"] = "translate"
    steer: Literal["all", "unsafe"] = "all"
    anchors: str | AnchorSet = "compact"
    detector: str | None = None

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        from rewards.base import REWARDS

        if name not in REWARDS and name.count(":") != 1:
            raise ValueError(f"unknown reward {name!r}: use one of {', '.join(REWARDS)}, or 'module:Class'")
        return name

    @field_validator("detector")
    @classmethod
    def _import_path(cls, detector: str | None) -> str | None:
        if detector is not None and not all(detector.partition(":")):
            raise ValueError(f"{detector!r} is not an import path: write 'module:function'")
        return detector
