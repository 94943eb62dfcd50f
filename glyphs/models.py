"""The tiny models of the glyph world: real classes of diffusers, transformers and open_clip at toy size.

`save_pipeline` writes a folder that plain `StableDiffusionPipeline.from_pretrained` loads, `save_flow_pipeline` one for
`StableDiffusion3Pipeline`, which wants to be told that there is no T5, and `save_clip` one that
`open_clip.create_model_and_transforms("local-dir:...")` loads. Weights are stored in fp16 and loaded in fp32.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path

import open_clip
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from glyphs.grammar import EMPTY_PHRASES, PREFIXES, SAFE_PHRASES, UNSAFE_PHRASES, requests

WEIGHTS = Path(__file__).parent / "weights"
PIPELINE = WEIGHTS / "pipeline"
FLOW_PIPELINE = WEIGHTS / "flow-pipeline"
CLIP = WEIGHTS / "clip"

CONTEXT_LENGTH = 16
T5_TOKENS = 1
"""Zeros that the flow model sees in the place of T5: the recipe's ``model.t5_tokens``."""
START, END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Byte-pair vocabulary learnt from the captions, as a CLIP tokenizer saved in ``folder``.

    Every word of the grammar becomes one token. Learnt here because the tokenizers library breaks ties in the order of
    a hash table, so that token ids would differ from run to run.
    """
    phrases = [prefix + r.text for r in requests("train") for prefix in PREFIXES]
    phrases += [*SAFE_PHRASES, *UNSAFE_PHRASES, *EMPTY_PHRASES]
    words = sorted({word for phrase in phrases for word in phrase.split()})
    merges = _learn_merges([(*word[:-1], word[-1] + "</w>") for word in words])
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    # The two special tokens come last: CLIP pools the text at the highest token id.
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges), START, END]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CONTEXT_LENGTH)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _learn_merges(words: list[tuple[str, ...]]) -> list[tuple[str, str]]:
    """Byte-pair merges (Sennrich et al. 2016) until every word is one symbol; ties go to the smaller pair."""
    merges: list[tuple[str, str]] = []
    while any(len(word) > 1 for word in words):
        pairs = Counter(pair for word in words for pair in pairwise(word))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = [_merged(word, best) for word in words]
    return merges


def _merged(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    symbols: list[str] = []
    for symbol in word:
        if symbols and (symbols[-1], symbol) == pair:
            symbols[-1] += symbol
        else:
            symbols.append(symbol)
    return tuple(symbols)


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


def _text_config(vocab_size: int, width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT_LENGTH,
        projection_dim=width,
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
        pad_token_id=vocab_size - 1,
    )


def build_text_encoder(vocab_size: int) -> CLIPTextModel:
    """Two layers of width 96."""
    return CLIPTextModel(_text_config(vocab_size, 96))


def build_flow_text_encoders(first: CLIPTextModel) -> tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection]:
    """The flow model's text encoders: the trained ``first`` with a random projection, and two layers of width 64."""
    with_projection = CLIPTextModelWithProjection(first.config)
    state = with_projection.state_dict()
    with_projection.load_state_dict(state | {f"text_model.{name}": value for name, value in first.state_dict().items()})
    return with_projection, CLIPTextModelWithProjection(_text_config(first.config.vocab_size, 64))


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


def build_transformer() -> SD3Transformer2DModel:
    """Velocity prediction on 4x8x8 latents, which are 16 tokens: four joint blocks of width 128, 2.3 M parameters.

    Every block begins as the identity and the output as zero (adaLN-Zero, Peebles & Xie 2023); diffusers leaves that to
    whoever trains.
    """
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=160,
        caption_projection_dim=128,
        pooled_projection_dim=160,
        pos_embed_max_size=4,
        qk_norm="rms_norm",
    )
    norms = (m for m in transformer.modules() if isinstance(m, AdaLayerNormZero | AdaLayerNormContinuous))
    for layer in (*(norm.linear for norm in norms), transformer.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return transformer


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
    _save_half(folder, pipeline)


def save_flow_pipeline(
    folder: Path,
    autoencoder: AutoencoderKL,
    text_encoders: tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection],
    tokenizer: CLIPTokenizer,
    transformer: SD3Transformer2DModel,
) -> None:
    """Write a Stable Diffusion 3 folder without T5, with fp16 weights; both text encoders read the same tokens."""
    autoencoder.register_to_config(shift_factor=0.0)  # Stable Diffusion 3 adds it, and None is no number
    pipeline = StableDiffusion3Pipeline(
        vae=autoencoder,
        text_encoder=text_encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=text_encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    _save_half(folder, pipeline)


def _save_half(folder: Path, pipeline: StableDiffusionPipeline | StableDiffusion3Pipeline) -> None:
    pipeline.to(torch.float16)
    shutil.rmtree(folder, ignore_errors=True)
    pipeline.save_pretrained(folder, safe_serialization=True)
    for file in folder.glob("*/config.json"):
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)  # where its weights lay on the machine that trained it
        if file.parent.name.startswith("text_encoder"):
            config["dtype"] = "float32"  # transformers would take its file's, while diffusers loads the rest in fp32
        file.write_text(json.dumps(config, indent=2) + "\n")


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
