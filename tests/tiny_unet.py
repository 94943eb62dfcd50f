"""Random-weight UNet pipelines small enough for a test: Stable Diffusion 2.x (v prediction) and XL in real classes.

As in ``tests.tiny``, they are ordinary saved pipelines, loaded by the code that loads the real ones. The shapes keep
what makes the real models special: SD 2.x's v prediction and linear projections, XL's two text encoders of different
width, its pooled embeddings and time ids, and the depth of its transformer blocks.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from tests.tiny import autoencoder, clip_text, clip_tokenizer, shared_folder, unet

_SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}


def build_tiny_sd2(folder: str | Path, *, seed: int = 0) -> Path:
    """Save a seeded ``StableDiffusionPipeline`` with v prediction (8x8x4 latents, 32x32 images); returns its folder."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextModel

    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusionPipeline(
            vae=autoencoder(scaling_factor=0.18215),
            text_encoder=clip_text(CLIPTextModel, 32, hidden_act="gelu"),
            tokenizer=clip_tokenizer(),
            unet=unet(attention_head_dim=(2, 4), use_linear_projection=True),
            scheduler=DDIMScheduler(
                **_SCHEDULE, clip_sample=False, set_alpha_to_one=False, prediction_type="v_prediction"
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder)
    return folder


def build_tiny_sdxl(folder: str | Path, *, force_zeros_for_empty_prompt: bool = True, seed: int = 0) -> Path:
    """Save a seeded ``StableDiffusionXLPipeline`` (8x8x4 latents, 32x32 images); returns its folder."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        denoiser = unet(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            cross_attention_dim=16 + 24,
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 20,
        )
        pipeline = StableDiffusionXLPipeline(
            vae=autoencoder(scaling_factor=0.13025),
            text_encoder=clip_text(CLIPTextModel, 16),
            tokenizer=clip_tokenizer(),
            text_encoder_2=clip_text(CLIPTextModelWithProjection, 24, hidden_act="gelu", projection_dim=20),
            tokenizer_2=clip_tokenizer(),
            unet=denoiser,
            scheduler=EulerDiscreteScheduler(**_SCHEDULE),
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
            add_watermarker=False,
        )
    pipeline.save_pretrained(folder)
    return folder


@functools.cache
def tiny_sd2() -> Path:
    """The tiny SD 2.x pipeline, built once per test process. Read it, never change it."""
    return build_tiny_sd2(shared_folder() / "sd2")


@functools.cache
def tiny_sdxl(force_zeros_for_empty_prompt: bool = True) -> Path:
    """The tiny SDXL pipeline, built once per test process. Read it, never change it."""
    name = "sdxl" if force_zeros_for_empty_prompt else "sdxl-encoded-empty-prompt"
    return build_tiny_sdxl(shared_folder() / name, force_zeros_for_empty_prompt=force_zeros_for_empty_prompt)
