"""The tiny models of the glyph world: real classes of diffusers, transformers and open_clip at toy size.

`save_pipeline` writes a folder that plain `StableDiffusionPipeline.from_pretrained` loads; `save_clip` writes one that
`open_clip.create_model_and_transforms("local-dir:...")` loads. Weights are stored in fp16 and loaded in fp32.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import open_clip
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from glyphs.grammar import EMPTY_PHRASES, PREFIXES, SAFE_PHRASES, UNSAFE_PHRASES, requests

WEIGHTS = Path(__file__).parent / "weights"
PIPELINE = WEIGHTS / "pipeline"
CLIP = WEIGHTS / "clip"

CONTEXT_LENGTH = 16
VOCABULARY = 400
START, END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Byte-pair vocabulary learnt from the captions, as a CLIP tokenizer saved in ``folder``."""
    corpus = [prefix + r.text for r in requests("train") for prefix in PREFIXES]
    corpus += [*SAFE_PHRASES, *UNSAFE_PHRASES, *EMPTY_PHRASES] * 50
    bpe = Tokenizer(BPE(unk_token=END, end_of_word_suffix="</w>", fuse_unk=False))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    alphabet = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    trainer = BpeTrainer(
        vocab_size=VOCABULARY, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(corpus, trainer)
    learnt = json.loads(bpe.to_str())["model"]
    tokens = sorted(
        set(learnt["vocab"]) | {c + "</w>" for c in alphabet}, key=lambda t: learnt["vocab"].get(t, 1 << 30)
    )
    vocabulary = {token: index for index, token in enumerate(tokens)}
    # The two special tokens come last: CLIP pools the text at the highest token id.
    for token in (START, END):
        vocabulary[token] = len(vocabulary)
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in learnt["merges"]]
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CONTEXT_LENGTH)
    tokenizer.save_pretrained(folder)
    return tokenizer


def build_autoencoder() -> AutoencoderKL:
    """3x32x32 pixels to 4x8x8 latents, 0.7 M parameters."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
    )


def build_text_encoder(vocab_size: int) -> CLIPTextModel:
    """Two layers of width 96."""
    config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT_LENGTH,
        projection_dim=96,
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
        pad_token_id=vocab_size - 1,
    )
    return CLIPTextModel(config)


def build_unet() -> UNet2DConditionModel:
    """Epsilon prediction on 4x8x8 latents, cross-attention at both resolutions, 2.8 M parameters."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 96),
        layers_per_block=1,
        cross_attention_dim=96,
        attention_head_dim=8,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """The noise schedule of Stable Diffusion 1.x."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
        prediction_type="epsilon",
    )


def save_pipeline(
    folder: Path,
    autoencoder: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
) -> None:
    """Write a Stable Diffusion folder with fp16 weights."""
    pipeline = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16)
    shutil.rmtree(folder, ignore_errors=True)
    pipeline.save_pretrained(folder, safe_serialization=True)


def clip_config(vocab_size: int) -> dict:
    """open_clip model configuration: a small residual network beside a two-layer text transformer."""
    return {
        "embed_dim": 96,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None},
        "text_cfg": {
            "context_length": CONTEXT_LENGTH,
            "vocab_size": vocab_size,
            "width": 96,
            "heads": 4,
            "layers": 2,
            "hf_tokenizer_name": "clip",
        },
    }


def build_clip(vocab_size: int) -> open_clip.CLIP:
    """The reward model, to be trained; `save_clip` writes it."""
    config = clip_config(vocab_size)
    text = {k: v for k, v in config["text_cfg"].items() if k != "hf_tokenizer_name"}
    return open_clip.CLIP(embed_dim=config["embed_dim"], vision_cfg=config["vision_cfg"], text_cfg=text)


def save_clip(folder: Path, model: open_clip.CLIP, tokenizer: CLIPTokenizer) -> None:
    """Write a folder that open_clip loads as ``local-dir:``, with its tokenizer."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tokenizer.save_pretrained(folder)
    size = 64
    preprocess = {
        "size": [size, size],
        "mode": "RGB",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bilinear",
        "resize_mode": "squash",
        "fill_color": 0,
    }
    config = {"model_cfg": clip_config(len(tokenizer)), "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    state = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
