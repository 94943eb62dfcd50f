"""What a model folder says about itself without loading a single weight: parameter counts, shapes, schedule."""

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raysteer.errors import ModelError

_MAX_HEADER_BYTES = 100 * 2**20


@dataclass(frozen=True)
class PipelineFacts:
    """Parameters by component, and the shapes that decide memory.

    Attributes:
        parameters: component name -> number of parameters (only components with safetensors weights).
        adapter_parameters: LoRA parameters for the given rank and targets.
        latent_shape: (C, h, w) or None if the configs do not say.
        image_size: height = width in pixels, or None.
    """

    parameters: dict[str, int]
    adapter_parameters: int
    latent_shape: tuple[int, int, int] | None
    image_size: int | None


def read_pipeline(folder: Path, rank: int, targets: Sequence[str], variant: str | None = None) -> PipelineFacts:
    """Facts of a diffusers pipeline folder.

    Raises:
        ModelError: a weights file is torn.
    """
    parameters: dict[str, int] = {}
    adapter = 0
    for component in sorted(path for path in folder.iterdir() if path.is_dir()):
        shapes: dict[str, tuple[int, ...]] = {}
        for file in _weight_files(component, variant):
            shapes |= tensor_shapes(file)
        if shapes:
            parameters[component.name] = sum(_size(shape) for shape in shapes.values())
        if component.name in ("unet", "transformer"):
            adapter = sum(_lora_size(name, shape, rank, targets) for name, shape in shapes.items())
    latent, image = _sizes(folder)
    return PipelineFacts(parameters, adapter, latent, image)


def count_parameters(folder: Path) -> int:
    """Parameters in all safetensors files of a folder (a CLIP model)."""
    return sum(_size(shape) for file in sorted(folder.glob("*.safetensors")) for shape in tensor_shapes(file).values())


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Shapes by tensor name, from the header of a safetensors file.

    Raises:
        ModelError: the file is torn or of another format.
    """
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > _MAX_HEADER_BYTES:
                raise ValueError("its header is too long")
            header = json.loads(stream.read(length))
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        if file.stat().st_size < 8 + length + end:
            raise ValueError("it ends too early")
        return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise ModelError(
            str(file), f"not a whole safetensors file ({error})", "download or save the model again"
        ) from None


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object, or {} if there is no such file.

    Raises:
        ModelError: not JSON.
    """
    if not file.is_file():
        return {}
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(str(file), f"not valid JSON ({error})", "download or save the model again") from None
    return data if isinstance(data, dict) else {}


def _weight_files(component: Path, variant: str | None) -> list[Path]:
    files = sorted(component.glob("*.safetensors"))
    chosen = [file for file in files if variant and f".{variant}" in file.name]
    plain = [file for file in files if not any(f".{name}" in file.stem for name in ("fp16", "bf16", "non_ema"))]
    return chosen or plain or files[:1]


def _size(shape: Sequence[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _lora_size(name: str, shape: tuple[int, ...], rank: int, targets: Sequence[str]) -> int:
    module, _, kind = name.rpartition(".")
    if kind != "weight" or len(shape) < 2 or not any(module == t or module.endswith(f".{t}") for t in targets):
        return 0
    return rank * (_size(shape[1:]) + shape[0])


def _sizes(folder: Path) -> tuple[tuple[int, int, int] | None, int | None]:
    denoiser = read_json(folder / "unet" / "config.json") or read_json(folder / "transformer" / "config.json")
    blocks = read_json(folder / "vae" / "config.json").get("block_out_channels")
    channels, size = denoiser.get("in_channels"), denoiser.get("sample_size")
    if not (isinstance(channels, int) and isinstance(size, int) and isinstance(blocks, list) and blocks):
        return None, None
    return (channels, size, size), size * 2 ** (len(blocks) - 1)
