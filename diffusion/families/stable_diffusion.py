"""Stable Diffusion 1.x and 2.x: one UNet, one CLIP text encoder, epsilon or v prediction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from diffusion.conditioning import Conditioning
from diffusion.families.base import Encoded, PipelineFamily, is_too_long, square_unet_latents, whole_timesteps
from diffusion.noising import BetaNoising, Noising
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
        self, x_t: torch.Tensor, timestep: float | torch.Tensor, cond: Conditioning, guidance_scale: float | None
    ) -> torch.Tensor:
        return self.denoiser(x_t, whole_timesteps(timestep), encoder_hidden_states=cond["embeds"], return_dict=False)[0]

    @staticmethod
    def schedule(
        scheduler_config: Mapping[str, Any],
        sampling: SamplingConfig,
        latent_shape: tuple[int, int, int],
        deterministic: bool = False,
    ) -> Stepper:
        # StableDiffusionPipeline overrides these two in any config it loads.
        given = without_defaults(scheduler_config) | {"clip_sample": False, "steps_offset": 1}
        eta = 0.0 if deterministic else sampling.eta
        return DDIMEta.from_scheduler(given, sampling.steps, eta)

    @staticmethod
    def noising(scheduler_config: Mapping[str, Any]) -> Noising:
        return BetaNoising.from_scheduler(without_defaults(scheduler_config))

    @staticmethod
    def native_latent_shape(configs: Mapping[str, Mapping[str, Any]], resolution: int | None) -> tuple[int, int, int]:
        return square_unet_latents(configs, resolution)


def without_defaults(scheduler_config: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's config without the values it lists as defaults, and without that list: the pipeline may have put
    another value in a default's place, which is listed all the same and which from_config would drop again.
    """
    defaults = ("_use_default_values", *scheduler_config.get("_use_default_values", ()))
    return {key: value for key, value in scheduler_config.items() if key not in defaults}
