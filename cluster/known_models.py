"""What is published about a few models on the hub, for a plan where none of their files are at hand.

Sizes are the numbers of stored tensor elements (a positional table counts). They follow from the configurations; the
tests build every denoiser from its configuration without memory and count. Sources: the model cards' "860M UNet and
123M text encoder" (huggingface.co/stable-diffusion-v1-5), table 1 of the SDXL paper (arXiv 2307.01952), the 4.94 GB
transformer file of stabilityai/stable-diffusion-3.5-medium, the 12B of black-forest-labs/FLUX.1-dev, and diffusers'
conversion scripts (scripts/convert_sd3_to_diffusers.py, convert_flux_to_diffusers.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]


@dataclass(frozen=True)
class KnownModel:
    """A published model.

    Attributes:
        pipeline: its diffusers class.
        parameters: stored tensor elements by component.
        adapter_per_rank: LoRA parameters with the family's default targets, for each unit of rank.
        configs: component name -> its config, as far as shapes depend on it.
    """

    pipeline: str
    parameters: Mapping[str, int]
    adapter_per_rank: int
    configs: Mapping[str, Config]


_CLIP_L, _CLIP_L_PROJECTED, _CLIP_BIG_G, _T5_XXL = 123_060_480, 123_650_304, 694_659_840, 4_762_310_656
_CROSS, _PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
_CROSS_UP, _PLAIN_UP = "CrossAttnUpBlock2D", "UpBlock2D"

_VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "latent_channels": 4,
}

_SD1 = KnownModel(
    pipeline="StableDiffusionPipeline",
    parameters={"unet": 859_520_964, "text_encoder": _CLIP_L, "vae": 83_653_863},
    adapter_per_rank=199_296,
    configs={
        "unet": {
            "_class_name": "UNet2DConditionModel",
            "sample_size": 64,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": [320, 640, 1280, 1280],
            "layers_per_block": 2,
            "down_block_types": [_CROSS, _CROSS, _CROSS, _PLAIN],
            "up_block_types": [_PLAIN_UP, _CROSS_UP, _CROSS_UP, _CROSS_UP],
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
        },
        "vae": _VAE,
    },
)

_SDXL = KnownModel(
    pipeline="StableDiffusionXLPipeline",
    parameters={
        "unet": 2_567_463_684,
        "text_encoder": _CLIP_L,
        "text_encoder_2": _CLIP_BIG_G,
        "vae": 83_653_863,
    },
    adapter_per_rank=1_451_520,
    configs={
        "unet": {
            "_class_name": "UNet2DConditionModel",
            "sample_size": 128,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": [320, 640, 1280],
            "layers_per_block": 2,
            "down_block_types": [_PLAIN, _CROSS, _CROSS],
            "up_block_types": [_CROSS_UP, _CROSS_UP, _PLAIN_UP],
            "transformer_layers_per_block": [1, 2, 10],
            "cross_attention_dim": 2048,
            "attention_head_dim": [5, 10, 20],
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "vae": _VAE | {"force_upcast": True},
    },
)

_FLOW_VAE: dict[str, Any] = _VAE | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}

_SD35_MEDIUM = KnownModel(
    pipeline="StableDiffusion3Pipeline",
    parameters={
        "transformer": 2_469_663_936,
        "text_encoder": _CLIP_L_PROJECTED,
        "text_encoder_2": _CLIP_BIG_G,
        "text_encoder_3": _T5_XXL,
        "vae": 83_819_683,
    },
    adapter_per_rank=586_752,
    configs={
        "transformer": {
            "_class_name": "SD3Transformer2DModel",
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 24,
            "attention_head_dim": 64,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 384,
            "dual_attention_layers": list(range(13)),
            "qk_norm": "rms_norm",
        },
        "vae": _FLOW_VAE,
    },
)

_FLUX_DEV = KnownModel(
    pipeline="FluxPipeline",
    parameters={
        "transformer": 11_901_408_320,
        "text_encoder": _CLIP_L,
        "text_encoder_2": _T5_XXL,
        "vae": 83_819_683,
    },
    adapter_per_rank=1_634_304,
    configs={
        "transformer": {
            "_class_name": "FluxTransformer2DModel",
            "patch_size": 1,
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
        },
        "vae": _FLOW_VAE,
    },
)

#: hub name -> what is known of it
KNOWN: dict[str, KnownModel] = {
    "CompVis/stable-diffusion-v1-4": _SD1,
    "stable-diffusion-v1-5/stable-diffusion-v1-5": _SD1,
    "stabilityai/stable-diffusion-xl-base-1.0": _SDXL,
    "stabilityai/stable-diffusion-3.5-medium": _SD35_MEDIUM,
    "black-forest-labs/FLUX.1-dev": _FLUX_DEV,
}
