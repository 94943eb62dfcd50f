"""FLUX.1 dev and schnell: a transformer over packed latents, guidance as an input, pooled CLIP and T5 embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from diffusion.conditioning import Conditioning
from diffusion.families.base import Encoded, PipelineFamily, float_timesteps, is_too_long, latents_on_side
from diffusion.flow_steps import flow_sigmas, flow_stepper
from diffusion.noising import FlowNoising, Noising
from diffusion.steps import Stepper
from raysteer.errors import ConfigError

if TYPE_CHECKING:
    from diffusion.policy import ModelConfig
    from diffusion.sampling import SamplingConfig

_NATIVE_LATENTS = 128  # on a side; FluxPipeline's own default, whatever the transformer
_DEV_TOKENS, _SCHNELL_TOKENS = 512, 256  # of T5, as Black Forest Labs' own code has them


class Flux(PipelineFamily):
    """The family of ``FluxPipeline``.

    FLUX.1-dev was distilled with guidance as an input, so a guided prediction is one forward. FLUX.1-schnell knows no
    guidance at all: a recipe for it has ``sampling.guidance_scale: 1``.

    The transformer takes 2x2 latents as one token. That packing happens inside ``denoise``; everybody else sees
    ordinary latents [n, C, h, w].
    """

    component = "transformer"
    # the single-stream blocks' output projection mixes attention and MLP and is left alone
    default_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    )

    def __init__(self, pipeline: Any, resolution: int | None = None) -> None:
        super().__init__(pipeline, resolution)
        self.embedded_guidance = bool(pipeline.transformer.config.guidance_embeds)
        self._tokens = _DEV_TOKENS if self.embedded_guidance else _SCHNELL_TOKENS

    @classmethod
    def load(cls, config: ModelConfig, dtypes: Mapping[str, torch.dtype]) -> Flux:
        from diffusers import FluxPipeline

        return cls(
            cls.read(FluxPipeline, config, dtypes, image_encoder=None, feature_extractor=None), config.resolution
        )

    def encode(self, prompt: str) -> Encoded:
        pipe = self.pipeline
        embeds, pooled, _ = pipe.encode_prompt(
            prompt, device=pipe.text_encoder.device, max_sequence_length=self._tokens
        )
        truncated = is_too_long(pipe.tokenizer, prompt, pipe.tokenizer_max_length)
        truncated |= is_too_long(pipe.tokenizer_2, prompt, self._tokens)
        return Encoded({"embeds": embeds[0], "pooled": pooled[0]}, truncated)

    def denoise(
        self, x_t: torch.Tensor, timestep: float | torch.Tensor, cond: Conditioning, guidance_scale: float | None
    ) -> torch.Tensor:
        n, _, h, w = x_t.shape
        guidance = None
        if self.embedded_guidance:
            if guidance_scale is None:
                raise ValueError("this denoiser takes guidance as an input: give guidance_scale")
            guidance = torch.full((n,), guidance_scale, dtype=torch.float32, device=x_t.device)
        text_tokens = cond["embeds"].shape[1]
        tokens = self.denoiser(
            hidden_states=pack(x_t),
            # through the latents' dtype, as the pipeline sends it: in bfloat16 that rounds
            timestep=float_timesteps(timestep, x_t).to(x_t.dtype) / 1000,
            guidance=guidance,
            pooled_projections=cond["pooled"],
            encoder_hidden_states=cond["embeds"],
            txt_ids=torch.zeros(text_tokens, 3, device=x_t.device),
            img_ids=_image_ids(h // 2, w // 2, x_t.device),
            return_dict=False,
        )[0]
        return unpack(tokens, h, w)

    def stepper(self, sampling: SamplingConfig, deterministic: bool = False) -> Stepper:
        if not deterministic:
            self.check_guidance(self.embedded_guidance, sampling.guidance_scale)
        return super().stepper(sampling, deterministic)

    @staticmethod
    def check_guidance(embedded: bool, guidance_scale: float) -> None:
        if not embedded and guidance_scale != 1.0:
            raise ConfigError(
                "sampling.guidance_scale", guidance_scale, "this model knows no guidance (schnell): use 1"
            )

    @staticmethod
    def schedule(
        scheduler_config: Mapping[str, Any],
        sampling: SamplingConfig,
        latent_shape: tuple[int, int, int],
        deterministic: bool = False,
    ) -> Stepper:
        tokens = (latent_shape[1] // 2) * (latent_shape[2] // 2)
        times = flow_sigmas(scheduler_config, sampling.steps, tokens, sampling.shift, spacing="uniform")
        train_timesteps = int(scheduler_config.get("num_train_timesteps", 1000))
        return flow_stepper(sampling.flow, times, deterministic, train_timesteps)

    @staticmethod
    def noising(scheduler_config: Mapping[str, Any]) -> Noising:
        return FlowNoising.from_scheduler(scheduler_config)

    @staticmethod
    def native_latent_shape(configs: Mapping[str, Mapping[str, Any]], resolution: int | None) -> tuple[int, int, int]:
        side = _NATIVE_LATENTS if resolution is None else latents_on_side(resolution, configs["vae"], packing=2)
        return int(configs["transformer"]["in_channels"]) // 4, side, side


def pack(latents: torch.Tensor) -> torch.Tensor:
    """[n, C, h, w] -> [n, (h/2) (w/2), 4 C]: every 2x2 square of latents is one token."""
    n, c, h, w = latents.shape
    return latents.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, c * 4)


def unpack(tokens: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """The inverse of ``pack``, to latents [n, C, h, w]."""
    n, c = len(tokens), tokens.shape[2] // 4
    return tokens.reshape(n, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(n, c, h, w)


def _image_ids(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """Rotary positions [rows * columns, 3] of the image tokens: (0, row, column)."""
    row, column = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).reshape(-1, 3).float()
