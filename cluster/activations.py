"""How much memory a forward and a backward take, from a model's config alone: a formula, not a measurement.

Counted in tensors of one block: a *unit* is [tokens, width] in the model's dtype. What PyTorch keeps for the backward
pass of a frozen denoiser with LoRA on its attention projections, and how much is alive at the worst moment, is a fixed
number of units for each kind of block, because attention is never stored as a matrix (scaled_dot_product_attention):

    training      blocks x units kept, and the work of one block
    checkpointed  blocks x 1 (their inputs), the units of the largest block, and the work of one
    inference     the work of the largest block, and in a UNet all skip connections

Half precision keeps more units than float32: adapters are float32, so every adapted projection keeps a copy of its
input. ``python -m benchmarks.memory`` counts the real modules and compares; docs/performance.md has the table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Activations:
    """Bytes beside the weights for one sample of a batch, at the worst moment.

    Attributes:
        inference: a forward without gradient.
        training: forward and backward, adapter trained, base frozen.
        checkpointed: the same with gradient checkpointing.
    """

    inference: float
    training: float
    checkpointed: float


@dataclass(frozen=True)
class _Block:
    """Tensors that one kind of block keeps for the backward pass, by the bytes of the model's dtype."""

    half: float
    full: float

    def kept(self, element_bytes: int) -> float:
        return self.full if element_bytes == 4 else self.half


# Counted with benchmarks.memory on diffusers 0.42, peft 0.21, torch 2.13, default LoRA targets.
_UNET_BLOCK = _Block(half=33.0, full=23.0)
_UNET_WORK, _UNET_INFERENCE = 8.0, 20.0
_SD3_JOINT, _SD3_DUAL = _Block(half=24.2, full=14.1), _Block(half=31.8, full=18.7)
_FLUX_DOUBLE, _FLUX_SINGLE = _Block(half=22.1, full=13.1), _Block(half=19.1, full=12.0)
_CLIP_TOKENS = 77
_FLUX_TEXT = {True: 512, False: 256}  # dev, schnell


def denoiser_activations(
    config: Config, latents: tuple[int, int, int], element_bytes: int, t5_tokens: int = 256
) -> Activations | None:
    """Memory of one sample of a denoiser.

    Args:
        config: of the denoiser, with its ``_class_name``.
        latents: (C, h, w).
        element_bytes: of the model's dtype, 2 or 4.
        t5_tokens: of Stable Diffusion 3; zeros fill T5's place when it is left out.

    Returns:
        None for a class that nothing was counted for.
    """
    _, height, width = latents
    kind = config.get("_class_name")
    if kind == "UNet2DConditionModel":
        return _unet(config, height, width, element_bytes)
    tokens = height * width // 4  # both take 2x2 latents as one token
    inner = float(element_bytes * config.get("num_attention_heads", 0) * config.get("attention_head_dim", 0))
    if kind == "SD3Transformer2DModel":
        layers, dual = int(config["num_layers"]), len(config.get("dual_attention_layers") or ())
        blocks = [(_SD3_JOINT, layers - dual), (_SD3_DUAL, dual)]
        return _transformer(
            blocks, inner * (tokens + _CLIP_TOKENS + t5_tokens), element_bytes, work=6.0, inference=13.0
        )
    if kind == "FluxTransformer2DModel":
        text = _FLUX_TEXT[bool(config.get("guidance_embeds"))]
        blocks = [(_FLUX_DOUBLE, int(config["num_layers"])), (_FLUX_SINGLE, int(config["num_single_layers"]))]
        return _transformer(blocks, inner * (tokens + text), element_bytes, work=13.0, inference=18.0)
    return None


def decoder_bytes(vae_config: Config, image_size: int, element_bytes: int) -> int:
    """Memory of decoding one square image: three tensors of the last but one width at full resolution."""
    channels = vae_config["block_out_channels"]
    return 3 * int(channels[min(1, len(channels) - 1)]) * image_size**2 * element_bytes


def vision_bytes(tokens: int, width: int, image_size: int, element_bytes: int) -> int:
    """Memory of embedding one image with a vision transformer, the float32 pixels of the drawn image included."""
    return 12 * tokens * width * element_bytes + 2 * 3 * image_size**2 * 4


def _transformer(
    blocks: list[tuple[_Block, int]], unit: float, element_bytes: int, work: float, inference: float
) -> Activations:
    kept = sum(block.kept(element_bytes) * count for block, count in blocks)
    largest = max(block.kept(element_bytes) for block, count in blocks if count)
    inputs = sum(count for _, count in blocks) + 1
    return Activations(inference * unit, (kept + work) * unit, (inputs + largest + work) * unit)


@dataclass(frozen=True)
class _Piece:
    """A residual block (``depth`` 0; ``width`` in, ``out`` out) or a stack of ``depth`` transformer blocks, on
    ``pixels`` latents.
    """

    pixels: int
    width: int
    out: int
    depth: int = 0


def _unet(config: Config, height: int, width: int, element_bytes: int) -> Activations:
    pieces, skips = _pieces(config, height * width)
    convolved = 1.0 if config.get("use_linear_projection") else 3.0  # what the way in and out of a stack keeps
    widths = list(config["block_out_channels"])
    outside = 3.0 * widths[0] * height * width  # the last norm, activation and convolution
    for level, (upper, lower) in enumerate(pairwise(widths)):
        outside += (upper + lower) * height * width / 4**level  # inputs of the convolutions that resample
    kept = inputs = outside
    largest = working = 0.0
    for piece in pieces:
        unit = float(piece.pixels * piece.width)
        if piece.depth:
            one = _UNET_BLOCK.kept(element_bytes) * unit
            kept += convolved * unit + piece.depth * one
            inputs += (convolved + piece.depth) * unit
            largest = max(largest, one + _UNET_WORK * unit)
            working = max(working, _UNET_INFERENCE * unit)
        else:
            one = 3.0 * (unit + piece.pixels * piece.out)
            kept += one
            inputs += unit
            largest = max(largest, one)
            working = max(working, 3.0 * unit)
    e = element_bytes
    return Activations((working + skips) * e, kept * e, (inputs + largest) * e)


def _pieces(config: Config, pixels: int) -> tuple[list[_Piece], int]:
    """The blocks of a UNet in their order, and the elements of all its skip connections."""
    widths, layers = [int(w) for w in config["block_out_channels"]], config.get("layers_per_block", 2)
    levels = len(widths)
    repeated = config.get("transformer_layers_per_block", 1)
    depths = [repeated] * levels if isinstance(repeated, int) else list(repeated)
    per_level = [layers] * levels if isinstance(layers, int) else list(layers)
    down = [depth if "CrossAttn" in kind else 0 for kind, depth in zip(config["down_block_types"], depths, strict=True)]
    up = [
        depth if "CrossAttn" in kind else 0
        for kind, depth in zip(config["up_block_types"], reversed(depths), strict=True)
    ]
    found: list[_Piece] = []
    width, skipped = widths[0], [(widths[0], pixels)]

    def stage(to: int, depth: int) -> Iterator[_Piece]:
        yield _Piece(pixels, width, to)
        if depth:
            yield _Piece(pixels, to, to, depth)

    for level in range(levels):
        for _ in range(per_level[level]):
            found += stage(widths[level], down[level])
            width = widths[level]
            skipped.append((width, pixels))
        if level < levels - 1:
            pixels //= 4
            skipped.append((width, pixels))
    elements = sum(channels * size for channels, size in skipped)
    found += [*stage(width, depths[-1]), _Piece(pixels, width, width)]
    for index, level in enumerate(reversed(range(levels))):
        for _ in range(per_level[level] + 1):
            width += skipped.pop()[0]
            found += stage(widths[level], up[index])
            width = widths[level]
        if level:
            pixels *= 4
    return found, elements
