"""Random-weight models small enough for a test: a real diffusers pipeline and a real open_clip folder.

They are ordinary saved models, loaded by the very code that loads Stable Diffusion and CLIP; only the sizes are
small. A forward of either takes a few milliseconds on one thread.
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

import raysteer  # noqa: F401  (installs the torchvision guard before anything imports torchvision)

torch.set_num_threads(1)  # two threads on a busy machine are a hundred times slower than one on models this small

_TEXT = """
a an the of in on with and two three small large safe unsafe red blue green yellow circle square triangle
cross ring diamond sign image photo place hazard toxic content person people dog cat house tree
"""
WORDS = _TEXT.split()

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
MAX_TOKENS = 16


def local_bpe() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A byte-level BPE vocabulary in which every word of ``WORDS`` is one token and any other text still encodes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    alphabet = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(hidden))]
    tokens = alphabet + [symbol + "</w>" for symbol in alphabet]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        symbols = [*word[:-1], word[-1] + "</w>"]
        left = symbols[0]
        for right in symbols[1:]:
            if (left, right) not in merges:
                merges.append((left, right))
            left += right
            if left not in tokens:
                tokens.append(left)
    tokens += [BEGIN, END]
    return {token: i for i, token in enumerate(tokens)}, merges


def build_tiny_pipeline(folder: str | Path, *, seed: int = 0, prediction_type: str = "epsilon") -> Path:
    """Save a seeded random-weight ``StableDiffusionPipeline`` (8x8x4 latents, 32x32 images) and return its folder."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextModel

    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {
            "unet": unet(attention_head_dim=4),
            "vae": autoencoder(),
            "text_encoder": clip_text(CLIPTextModel, 32, projection_dim=32),
            "tokenizer": clip_tokenizer(),
        }
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    pipeline = StableDiffusionPipeline(
        **parts,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def build_tiny_clip(folder: str | Path, *, seed: int = 0) -> Path:
    """Save a seeded random-weight open_clip model (32x32 images, 32 dimensions); load as ``local-dir:<folder>``."""
    import open_clip
    from safetensors.torch import save_file

    model_cfg = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
        "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.CLIP(**model_cfg)
    preprocess_cfg = {
        "size": 32,
        "mode": "RGB",
        "mean": open_clip.OPENAI_DATASET_MEAN,
        "std": open_clip.OPENAI_DATASET_STD,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "fill_color": 0,
    }
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


def unet(**config: Any) -> torch.nn.Module:
    """A UNet for 8x8x4 latents with random weights."""
    from diffusers import UNet2DConditionModel

    usual: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
        "norm_num_groups": 8,
    }
    model: torch.nn.Module = UNet2DConditionModel(**(usual | config))
    return model.eval()


def autoencoder(**config: Any) -> torch.nn.Module:
    """A VAE of 4x4 pixels to a latent, with random weights."""
    from diffusers import AutoencoderKL

    model: torch.nn.Module = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=8,
        sample_size=32,
        **config,
    )
    return model.eval()


def clip_tokenizer() -> Any:
    """A CLIP tokenizer over ``WORDS``."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer(*local_bpe(), model_max_length=MAX_TOKENS)


def clip_text(model: Any, width: int, projection_dim: int = 16, hidden_act: str = "quick_gelu") -> torch.nn.Module:
    """A CLIP text encoder of class ``model`` with random weights."""
    from transformers import CLIPTextConfig

    vocabulary, _ = local_bpe()
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=projection_dim,
        hidden_act=hidden_act,
        bos_token_id=vocabulary[BEGIN],
        eos_token_id=vocabulary[END],
        pad_token_id=vocabulary[END],
    )
    encoder: torch.nn.Module = model(config)
    return encoder.eval()


@functools.cache
def shared_folder() -> Path:
    """Where this test process keeps its models."""
    folder = Path(tempfile.mkdtemp(prefix="raysteer-tiny-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def tiny_pipeline() -> Path:
    """The tiny pipeline, built once per test process. Read it, never change it."""
    return build_tiny_pipeline(shared_folder() / "pipeline")


@functools.cache
def tiny_clip() -> Path:
    """The tiny CLIP, built once per test process. Read it, never change it."""
    return build_tiny_clip(shared_folder() / "clip")
