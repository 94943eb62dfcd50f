"""Stable Diffusion XL: one UNet, two CLIP text encoders side by side, a pooled embedding and the image's size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from diffusion.conditioning import Conditioning
from diffusion.families.base import (
    Encoded,
    PipelineFamily,
    is_too_long,
    square_unet_latents,
    vae_factor,
    whole_timesteps,
)
from diffusion.noising import BetaNoising, Noising
from diffusion.steps import DDIMEta, Stepper

if TYPE_CHECKING:
    from diffusion.policy import ModelConfig
    from diffusion.sampling import SamplingConfig


class StableDiffusionXL(PipelineFamily):
    """The family of ``StableDiffusionXLPipeline``.

    The UNet is told the size of the image as the pipeline's defaults have it: original and target size are those of
    the image that is drawn, nothing is cropped. The VAE overflows in half precision, which its config says
    (``force_upcast``); it is then kept in float32 unless ``model.component_dtypes`` names another dtype.
    """

    component = "unet"
    default_targets = ("to_q", "to_k", "to_v", "to_out.0")

    def __init__(self, pipeline: Any, resolution: int | None = None) -> None:
        super().__init__(pipeline, resolution)
        factor = vae_factor(pipeline.vae.config)
        height, width = (side * factor for side in self.latent_shape[1:])
        self._time_ids = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32)

    @classmethod
    def load(cls, config: ModelConfig, dtypes: Mapping[str, torch.dtype]) -> StableDiffusionXL:
        from diffusers import AutoencoderKL, StableDiffusionXLPipeline

        vae = AutoencoderKL.load_config(
            config.path, subfolder="vae", revision=config.revision, local_files_only=config.local_files_only
        )
        # The pipeline itself upcasts float16 only, and after loading, when digits are lost; hence before.
        if "vae" not in dtypes and vae.get("force_upcast", True):
            dtypes = {**dtypes, "vae": torch.float32}
        left_out = {"feature_extractor": None, "image_encoder": None, "add_watermarker": False}
        return cls(cls.read(StableDiffusionXLPipeline, config, dtypes, **left_out), config.resolution)

    def encode(self, prompt: str) -> Encoded:
        pipeline = self.pipeline
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompt, device=pipeline.text_encoder_2.device, do_classifier_free_guidance=False
        )
        if not prompt and pipeline.config.force_zeros_for_empty_prompt:
            embeds, pooled = torch.zeros_like(embeds), torch.zeros_like(pooled)
        too_long = any(is_too_long(tokenizer, prompt) for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2))
        return Encoded({"embeds": embeds[0], "pooled": pooled[0], "time_ids": self._time_ids}, too_long)

    def denoise(
        self, x_t: torch.Tensor, timestep: float | torch.Tensor, cond: Conditioning, guidance_scale: float | None
    ) -> torch.Tensor:
        added = {"text_embeds": cond["pooled"], "time_ids": cond["time_ids"]}
        return self.denoiser(
            x_t,
            whole_timesteps(timestep),
            encoder_hidden_states=cond["embeds"],
            added_cond_kwargs=added,
            return_dict=False,
        )[0]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        vae = self.pipeline.vae
        mean, std = vae.config.latents_mean, vae.config.latents_std
        if mean is None or std is None:
            return super().decode(latents)
        latents = latents.to(vae.dtype)
        mean, std = (latents.new_tensor(values).view(1, -1, 1, 1) for values in (mean, std))
        return vae.decode(latents * std / vae.config.scaling_factor + mean, return_dict=False)[0]

    @staticmethod
    def schedule(
        scheduler_config: Mapping[str, Any],
        sampling: SamplingConfig,
        latent_shape: tuple[int, int, int],
        deterministic: bool = False,
    ) -> Stepper:
        eta = 0.0 if deterministic else sampling.eta
        return DDIMEta.from_scheduler(as_loaded(scheduler_config), sampling.steps, eta)

    @staticmethod
    def noising(scheduler_config: Mapping[str, Any]) -> Noising:
        return BetaNoising.from_scheduler(as_loaded(scheduler_config))

    @staticmethod
    def native_latent_shape(configs: Mapping[str, Mapping[str, Any]], resolution: int | None) -> tuple[int, int, int]:
        return square_unet_latents(configs, resolution)


def as_loaded(scheduler_config: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's config with the defaults of its class, as a loaded pipeline has it, whether they are in or not."""
    import diffusers

    scheduler = getattr(diffusers, str(scheduler_config.get("_class_name")), None)
    return dict(scheduler_config if scheduler is None else scheduler.from_config(dict(scheduler_config)).config)
