"""Stable Diffusion 3 and 3.5: an MMDiT over rectified flow, two CLIP text encoders and, if wanted, T5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from diffusion.conditioning import Conditioning
from diffusion.families.base import (
    Encoded,
    PipelineFamily,
    float_timesteps,
    is_too_long,
    latents_on_side,
    vae_factor,
)
from diffusion.flow_steps import flow_sigmas, flow_stepper
from diffusion.noising import FlowNoising, Noising
from diffusion.steps import Stepper
from raysteer.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from diffusion.policy import ModelConfig
    from diffusion.sampling import SamplingConfig

_PATCH = 2  # of every published model; a schedule is worked out before the transformer's config is at hand


class StableDiffusion3(PipelineFamily):
    """The family of ``StableDiffusion3Pipeline``.

    T5 is two thirds of the parameters and matters for long prompts and lettering; without it
    (``model.use_t5: false``) the pipeline gives the denoiser zeros in its place, and so do we: ``model.t5_tokens`` of
    them (the pipeline's ``max_sequence_length``), which is also what T5 pads and cuts to.
    """

    component = "transformer"
    # joint attention only: SD3.5-medium's second, image-only attention stays as it is (Flow-GRPO's choice)
    default_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    )

    def __init__(self, pipeline: Any, resolution: int | None = None, t5_tokens: int = 256) -> None:
        super().__init__(pipeline, resolution)
        self._t5_tokens = t5_tokens

    @classmethod
    def load(cls, config: ModelConfig, dtypes: Mapping[str, torch.dtype]) -> StableDiffusion3:
        from diffusers import StableDiffusion3Pipeline

        left_out: dict[str, None] = {"image_encoder": None, "feature_extractor": None}
        if not config.use_t5:
            left_out |= {"text_encoder_3": None, "tokenizer_3": None}
        pipeline = cls.read(StableDiffusion3Pipeline, config, dtypes, **left_out)
        return cls(pipeline, config.resolution, config.t5_tokens)

    def encode(self, prompt: str) -> Encoded:
        pipe = self.pipeline
        embeds, _, pooled, _ = pipe.encode_prompt(
            prompt,
            None,
            None,
            device=pipe.text_encoder.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self._t5_tokens,
        )
        truncated = is_too_long(pipe.tokenizer, prompt, pipe.tokenizer_max_length)
        truncated |= is_too_long(pipe.tokenizer_2, prompt, pipe.tokenizer_max_length)
        if pipe.tokenizer_3 is not None:
            truncated |= is_too_long(pipe.tokenizer_3, prompt, self._t5_tokens)
        return Encoded({"embeds": embeds[0], "pooled": pooled[0]}, truncated)

    def denoise(
        self, x_t: torch.Tensor, timestep: float | torch.Tensor, cond: Conditioning, guidance_scale: float | None
    ) -> torch.Tensor:
        return self.denoiser(
            hidden_states=x_t,
            timestep=float_timesteps(timestep, x_t),
            encoder_hidden_states=cond["embeds"],
            pooled_projections=cond["pooled"],
            return_dict=False,
        )[0]

    @staticmethod
    def schedule(
        scheduler_config: Mapping[str, Any],
        sampling: SamplingConfig,
        latent_shape: tuple[int, int, int],
        deterministic: bool = False,
    ) -> Stepper:
        tokens = (latent_shape[1] // _PATCH) * (latent_shape[2] // _PATCH)
        times = flow_sigmas(scheduler_config, sampling.steps, tokens, sampling.shift)
        train_timesteps = int(scheduler_config.get("num_train_timesteps", 1000))
        return flow_stepper(sampling.flow, times, deterministic, train_timesteps)

    @staticmethod
    def noising(scheduler_config: Mapping[str, Any]) -> Noising:
        return FlowNoising.from_scheduler(scheduler_config)

    @staticmethod
    def native_latent_shape(configs: Mapping[str, Mapping[str, Any]], resolution: int | None) -> tuple[int, int, int]:
        transformer, vae = configs["transformer"], configs["vae"]
        channels, side, patch = int(transformer["in_channels"]), int(transformer["sample_size"]), _PATCH
        if transformer["patch_size"] != patch:
            raise ModelError("transformer", f"patch_size {transformer['patch_size']} is not supported", "use 2")
        if resolution is not None:
            side, largest = latents_on_side(resolution, vae, patch), int(transformer["pos_embed_max_size"]) * patch
            if side > largest:
                limit = largest * vae_factor(vae)
                raise ConfigError("model.resolution", resolution, f"this model has positions for at most {limit}")
        return channels, side, side
