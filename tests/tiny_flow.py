"""Random-weight rectified-flow pipelines small enough for a test: Stable Diffusion 3.5 and FLUX.1 in real classes.

As in ``tests.tiny``, they are ordinary saved pipelines, loaded by the code that loads the real ones. The shapes keep
what makes the real models special: SD3.5's dual attention and query-key norms, FLUX's packed latents and rotary
positions, autoencoders with a shift and without quantisation convolutions. FLUX's pipeline draws 128x128 latents
unless told otherwise, so its tests say ``model.resolution: 32``.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from tests.tiny import WORDS, autoencoder, clip_text, clip_tokenizer, shared_folder

RESOLUTION = 32  # pixels; 8x8 latents, of which both transformers make 16 tokens
LATENT_CHANNELS = 4
_VAE: dict[str, Any] = {
    "scaling_factor": 1.5,
    "shift_factor": 0.06,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def build_tiny_sd3(folder: str | Path, *, with_t5: bool = True, seed: int = 0) -> Path:
    """Save a seeded random-weight ``StableDiffusion3Pipeline`` (8x8x4 latents, 32x32 images); returns its folder.

    Without T5 its place in ``model_index.json`` is null, as in a folder saved after loading with
    ``text_encoder_3=None``.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_projection_dim=16,
            joint_attention_dim=32,  # width of T5, and at least the two CLIPs side by side
            pooled_projection_dim=32,
            pos_embed_max_size=12,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        )
        pipeline = StableDiffusion3Pipeline(
            transformer=transformer.eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=autoencoder(**_VAE),
            text_encoder=clip_text(CLIPTextModelWithProjection, 16),
            tokenizer=clip_tokenizer(),
            text_encoder_2=clip_text(CLIPTextModelWithProjection, 16),
            tokenizer_2=clip_tokenizer(),
            text_encoder_3=_t5() if with_t5 else None,
            tokenizer_3=_t5_tokenizer(256) if with_t5 else None,
        )
    pipeline.save_pretrained(folder)
    return folder


def build_tiny_flux(folder: str | Path, *, guidance_embeds: bool = True, seed: int = 0) -> Path:
    """Save a seeded random-weight ``FluxPipeline`` and return its folder: the form of FLUX.1-dev, with its guidance
    input and resolution-dependent shift, or without both that of FLUX.1-schnell.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=4 * LATENT_CHANNELS,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 6, 6),
        )
        pipeline = FluxPipeline(
            transformer=transformer.eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(
                shift=3.0 if guidance_embeds else 1.0, use_dynamic_shifting=guidance_embeds
            ),
            vae=autoencoder(**_VAE),
            text_encoder=clip_text(CLIPTextModel, 32),
            tokenizer=clip_tokenizer(),
            text_encoder_2=_t5(),
            tokenizer_2=_t5_tokenizer(512),
        )
    pipeline.save_pretrained(folder)
    return folder


@functools.cache
def tiny_sd3(with_t5: bool = True) -> Path:
    """The tiny Stable Diffusion 3, built once per test process. Read it, never change it."""
    return build_tiny_sd3(shared_folder() / ("sd3" if with_t5 else "sd3-without-t5"), with_t5=with_t5)


@functools.cache
def tiny_flux(guidance_embeds: bool = True) -> Path:
    """The tiny FLUX.1, built once per test process. Read it, never change it."""
    return build_tiny_flux(
        shared_folder() / ("flux-dev" if guidance_embeds else "flux-schnell"), guidance_embeds=guidance_embeds
    )


def _t5_vocabulary() -> list[tuple[str, float]]:
    """A unigram vocabulary in which every word of ``WORDS`` is one token and other words are spelt out."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -5.0)]
    words = [("▁" + word, -1.0) for word in dict.fromkeys(WORDS)]
    return special + words + [(chr(code), -10.0) for code in range(33, 127)]


def _t5_tokenizer(max_tokens: int) -> Any:
    from transformers import T5TokenizerFast

    return T5TokenizerFast(vocab=_t5_vocabulary(), extra_ids=0, model_max_length=max_tokens)


def _t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(_t5_vocabulary()), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, is_gated_act=True
    )
    return T5EncoderModel(config).eval()
