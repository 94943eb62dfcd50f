"""What the policy needs to know about one kind of pipeline, and the table of the kinds we have.

To add a family: one file with a class that satisfies ``Family``, one line in ``FAMILIES``.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from diffusion.steps import Stepper

if TYPE_CHECKING:
    from diffusion.policy import ModelConfig

#: diffusers pipeline class -> "module:class" of its family (imported only when such a model is loaded)
FAMILIES: dict[str, str] = {
    "StableDiffusionPipeline": "diffusion.families.stable_diffusion:StableDiffusion",
}


class Family(Protocol):
    """One kind of pipeline. Guidance, adapters, caching and rounding are the policy's business, not the family's.

    Attributes:
        pipeline: the diffusers pipeline itself.
        component: name of the trained module inside the pipeline and prefix of its adapter keys ("unet").
        denoiser: that module.
        latent_shape: (C, h, w) of one latent.
    """

    pipeline: Any
    component: str
    denoiser: nn.Module
    latent_shape: tuple[int, int, int]

    @classmethod
    def load(cls, config: ModelConfig, dtype: torch.dtype) -> Family:
        """Load the pipeline's parts on the CPU in ``dtype``, frozen and in eval mode."""
        ...

    def to(self, device: torch.device) -> None:
        """Move every part."""
        ...

    def encode(self, prompt: str) -> torch.Tensor:
        """Embedding [L, D] of one prompt. A family with pooled embeddings packs them into extra rows."""
        ...

    def denoise(self, x_t: torch.Tensor, timestep: int, embeds: torch.Tensor) -> torch.Tensor:
        """Model output [n, C, h, w] for latents [n, C, h, w] and embeddings [n, L, D]; no guidance."""
        ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images [n, 3, H, W] in [-1, 1] (may overshoot)."""
        ...

    @staticmethod
    def schedule(scheduler_config: Mapping[str, Any], steps: int, eta: float) -> Stepper:
        """The stochastic schedule of a scheduler's config: the same whether read from the model's folder or from the
        loaded pipeline, so that a preflight and the samplers agree."""
        ...

    def stepper(self, steps: int, eta: float) -> Stepper:
        """The stochastic schedule of this pipeline."""
        ...


def family_for(pipeline_class: str) -> type[Any] | None:
    """The family class for a diffusers pipeline class name, or None when there is none."""
    target = FAMILIES.get(pipeline_class)
    if target is None:
        return None
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)
