"""Random-weight models and files for the rewards, in the very forms in which a user has the real ones."""

from __future__ import annotations

import functools
import io
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from rewards.config import ClipConfig
from tests.tiny import BEGIN, END, local_bpe, shared_folder, tiny_clip

PROMPTS = ("a red circle", "a toxic sign", "a house", "a hazard")
#: the tiny CLIP as a folder
FOLDER = f"local-dir:{tiny_clip()}"
#: the tiny CLIP as open_clip's own architectures are named
NAME = "tiny-named-clip"


def images(n: int, size: int = 32, seed: int = 0) -> np.ndarray:
    """uint8 [n, size, size, 3] of noise."""
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), np.uint8)


def through(file_format: str, pictures: np.ndarray) -> np.ndarray:
    """Images written to a file format and read again."""
    read = []
    for picture in pictures:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, file_format)
        read.append(np.asarray(Image.open(buffer)))
    return np.stack(read)


def unit(n: int, d: int = 32, seed: int = 0) -> np.ndarray:
    """float32 [n, d] of random directions."""
    z = np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)
    return z / np.linalg.norm(z, axis=1, keepdims=True)


@functools.cache
def state_dict() -> dict[str, torch.Tensor]:
    """Weights of the tiny CLIP."""
    from safetensors.torch import load_file

    return load_file(tiny_clip() / "open_clip_model.safetensors")


@functools.cache
def tiny_weights() -> Path:
    """The tiny CLIP as HPS v2.1 comes: a checkpoint with an entry "state_dict", for an architecture named ``NAME``."""
    import open_clip

    folder = Path(tempfile.mkdtemp(dir=shared_folder()))
    config = json.loads((tiny_clip() / "open_clip_config.json").read_text())["model_cfg"]
    (folder / f"{NAME}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{NAME}.json")
    torch.save({"epoch": 3, "state_dict": state_dict()}, folder / "HPS_tiny.pt")
    return folder / "HPS_tiny.pt"


def named_clip(batch_size: int = 16) -> ClipConfig:
    """The tiny CLIP by name and weights file, as HPS v2.1 is configured."""
    return ClipConfig(model=NAME, pretrained=str(tiny_weights()), batch_size=batch_size)


def build_tiny_pickscore(folder: Path, *, seed: int = 0) -> Path:
    """Save a random ``CLIPModel`` with tokenizer and preprocessor, the form of PickScore_v1 (32x32 images)."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    vocabulary, merges = local_bpe()
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": vocabulary[BEGIN], "eos_token_id": vocabulary[END], "pad_token_id": vocabulary[END]}
    text = {**size, **ends, "vocab_size": len(vocabulary), "max_position_embeddings": 16, "projection_dim": 24}
    vision = {**size, "image_size": 32, "patch_size": 8, "projection_dim": 24}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
        model.logit_scale.data.fill_(4.6)
    model.eval().save_pretrained(folder)
    CLIPTokenizer(vocabulary, merges, model_max_length=16).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@functools.cache
def tiny_pickscore() -> Path:
    """The tiny PickScore, built once per test process. Read it, never change it."""
    return build_tiny_pickscore(shared_folder() / "pickscore")


@functools.cache
def tiny_q16_prompts() -> Path:
    """Two random prompts for the tiny CLIP, not of unit length, as an .npy file; near each other, or noise would
    always cost 0 or 1.
    """
    file = shared_folder() / "q16.npy"
    first = unit(1, seed=5)
    np.save(file, 3 * np.concatenate([first, first + 0.02 * unit(1, seed=6)]))
    return file
