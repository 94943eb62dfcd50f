"""Stable Diffusion 1.x and 2.x: one UNet, one CLIP text encoder, epsilon or v prediction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from diffusion.conditioning import Conditioning
from diffusion.families.base import Encoded, PipelineFamily, is_too_long, square_unet_latents
from diffusion.steps import DDIMEta, Stepper

if TYPE_CHECKING:
    from diffusion.policy import ModelConfig
    from diffusion.sampling import SamplingConfig

_LEFT_OUT = {"safety_checker": None, "feature_extractor": None, "image_encoder": None, "requires_safety_checker": False}


class StableDiffusion(PipelineFamily):
    """The family of ``StableDiffusionPipeline``.

    The pipeline's post-hoc safety checker is not loaded: it blacks images out after the fact, and a reward must see
    what the model really drew.
    """

    component = "unet"
    default_targets = ("to_q", "to_k", "to_v", "to_out.0")

    @classmethod
    def load(cls, config: ModelConfig, dtypes: Mapping[str, torch.dtype]) -> StableDiffusion:
        from diffusers import StableDiffusionPipeline

        return cls(cls.read(StableDiffusionPipeline, config, dtypes, **_LEFT_OUT), config.resolution)

    def encode(self, prompt: str) -> Encoded:
        device = self.pipeline.text_encoder.device
        embeds, _ = self.pipeline.encode_prompt(prompt, device, 1, do_classifier_free_guidance=False)
        return Encoded({"embeds": embeds[0]}, is_too_long(self.pipeline.tokenizer, prompt))

    def denoise(
        self, x_t: torch.Tensor, timestep: float, cond: Conditioning, guidance_scale: float | None
    ) -> torch.Tensor:
        return self.denoiser(x_t, int(timestep), encoder_hidden_states=cond["embeds"], return_dict=False)[0]

    @staticmethod
    def schedule(
        scheduler_config: Mapping[str, Any],
        sampling: SamplingConfig,
        latent_shape: tuple[int, int, int],
        deterministic: bool = False,
    ) -> Stepper:
        # StableDiffusionPipeline overrides these two in any config it loads. A value it puts in place of a default is
        # still listed as a default, and from_config would drop it again: hence no list.
        defaults = ("_use_default_values", *scheduler_config.get("_use_default_values", ()))
        given = {key: value for key, value in scheduler_config.items() if key not in defaults}
        eta = 0.0 if deterministic else sampling.eta
        return DDIMEta.from_scheduler(given | {"clip_sample": False, "steps_offset": 1}, sampling.steps, eta)

    @staticmethod
    def native_latent_shape(configs: Mapping[str, Mapping[str, Any]], resolution: int | None) -> tuple[int, int, int]:
        return square_unet_latents(configs, resolution)
