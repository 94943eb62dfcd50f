"""Stable Diffusion 1.x and 2.x: one UNet, one CLIP text encoder, epsilon or v prediction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from diffusion.steps import DDIMEta, Stepper

if TYPE_CHECKING:
    from diffusion.policy import ModelConfig


class StableDiffusion:
    """The family of ``StableDiffusionPipeline``.

    The pipeline's post-hoc safety checker is not loaded: it blacks images out after the fact, and a reward must see
    what the model really drew.
    """

    component = "unet"

    def __init__(self, pipeline: Any) -> None:
        self.pipeline: Any = pipeline
        self.denoiser: nn.Module = pipeline.unet
        size = pipeline.unet.config.sample_size
        h, w = (size, size) if isinstance(size, int) else size
        self.latent_shape: tuple[int, int, int] = (pipeline.unet.config.in_channels, h, w)
        for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            part.requires_grad_(False)
            part.eval()

    @classmethod
    def load(cls, config: ModelConfig, dtype: torch.dtype) -> StableDiffusion:
        from diffusers import StableDiffusionPipeline

        pipeline = StableDiffusionPipeline.from_pretrained(
            config.path,
            revision=config.revision,
            variant=config.variant,
            local_files_only=config.local_files_only,
            torch_dtype=dtype,
            safety_checker=None,
            feature_extractor=None,
            image_encoder=None,
            requires_safety_checker=False,
        )
        return cls(pipeline)

    def to(self, device: torch.device) -> None:
        self.pipeline.to(device)

    def encode(self, prompt: str) -> torch.Tensor:
        text_encoder = self.pipeline.text_encoder
        embeds, _ = self.pipeline.encode_prompt(prompt, text_encoder.device, 1, do_classifier_free_guidance=False)
        return embeds[0]

    def denoise(self, x_t: torch.Tensor, timestep: int, embeds: torch.Tensor) -> torch.Tensor:
        return self.denoiser(x_t, timestep, encoder_hidden_states=embeds, return_dict=False)[0]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        vae = self.pipeline.vae
        return vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]

    @staticmethod
    def schedule(scheduler_config: Mapping[str, Any], steps: int, eta: float) -> Stepper:
        # StableDiffusionPipeline overrides these two in any config it loads. A value it puts in place of a default is
        # still listed as a default, and from_config would drop it again: hence no list.
        defaults = ("_use_default_values", *scheduler_config.get("_use_default_values", ()))
        given = {key: value for key, value in scheduler_config.items() if key not in defaults}
        return DDIMEta.from_scheduler(given | {"clip_sample": False, "steps_offset": 1}, steps, eta)

    def stepper(self, steps: int, eta: float) -> Stepper:
        return self.schedule(self.pipeline.scheduler.config, steps, eta)
