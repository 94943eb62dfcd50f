"""What a model folder says about itself without loading a single weight: parameter counts, shapes, schedule."""

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.known_models import KNOWN
from diffusion.families.base import family_for, vae_factor
from raysteer.errors import ModelError

_MAX_HEADER_BYTES = 100 * 2**20


@dataclass(frozen=True)
class PipelineFacts:
    """Parameters by component, and the shapes that decide memory.

    Attributes:
        pipeline: name of the pipeline's class.
        component: the trained component, "unet" or "transformer"; "" for a class without a family.
        parameters: component name -> number of parameters (only components with safetensors weights).
        adapter_parameters: LoRA parameters for the given rank and targets; None: unknown.
        embedded_guidance: guidance is an input of the denoiser.
        matched_targets: those of the targets that some module of the denoiser has.
        default_targets: what the model's family adapts when no targets are given.
        latent_shape: (C, h, w) or None if the configs do not say.
        image_size: height = width in pixels, or None.
        configs: component name -> config, of the denoiser and the VAE ({} where there is none).
    """

    pipeline: str
    component: str
    parameters: dict[str, int]
    adapter_parameters: int | None
    embedded_guidance: bool
    matched_targets: tuple[str, ...]
    default_targets: tuple[str, ...]
    latent_shape: tuple[int, int, int] | None
    image_size: int | None
    configs: Mapping[str, Mapping[str, Any]]


def read_pipeline(
    folder: Path,
    rank: int,
    targets: Sequence[str] | None = None,
    variant: str | None = None,
    resolution: int | None = None,
    own_family: str | None = None,
) -> PipelineFacts:
    """Facts of a diffusers pipeline folder; without ``targets`` those of its family, without ``resolution`` its own.

    Args:
        own_family: "module:Class" in place of the family its class would have (``model.family``).

    Raises:
        ConfigError: the model cannot draw that resolution, or there is no such family.
        ModelError: a weights file is torn, or a config says too little.
    """
    pipeline = str(read_json(folder / "model_index.json").get("_class_name"))
    family = family_for(pipeline, own_family)
    defaults: tuple[str, ...] = () if family is None else family.default_targets
    targets = defaults if targets is None else tuple(targets)
    parameters: dict[str, int] = {}
    adapter, matched = 0, set()
    for component in sorted(path for path in folder.iterdir() if path.is_dir()):
        shapes: dict[str, tuple[int, ...]] = {}
        for file in weight_files(component, variant):
            shapes |= tensor_shapes(file)
        if shapes:
            parameters[component.name] = sum(_size(shape) for shape in shapes.values())
        if component.name in ("unet", "transformer"):
            adapter = sum(_lora_size(name, shape, rank, targets) for name, shape in shapes.items())
            matched = {target for target in targets if any(_lora_size(n, s, rank, [target]) for n, s in shapes.items())}
    configs = {name: read_json(folder / name / "config.json") for name in ("unet", "transformer", "vae")}
    return _facts(str(folder), pipeline, family, parameters, adapter, matched, configs, resolution, targets)


def known_pipeline(path: str, rank: int, targets: Sequence[str] | None, resolution: int | None) -> PipelineFacts | None:
    """Facts of a published model by its hub name, without any of its files; None when nothing is known of it.

    Raises:
        ConfigError: the model cannot draw that resolution.
    """
    known = KNOWN.get(path)
    if known is None:
        return None
    family = family_for(known.pipeline)
    assert family is not None, "only models that we support are listed"
    wanted = family.default_targets if targets is None else tuple(targets)
    adapter = rank * known.adapter_per_rank if set(wanted) == set(family.default_targets) else None
    return _facts(
        path, known.pipeline, family, dict(known.parameters), adapter, set(wanted), known.configs, resolution, wanted
    )


def cached_folder(path: str, revision: str | None) -> Path | None:
    """The folder of a hub name in the local cache, or None when it is not there (no network is used)."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        index = try_to_load_from_cache(path, "model_index.json", revision=revision)
    except HFValidationError:
        return None
    return Path(index).parent if isinstance(index, str) else None


def _facts(
    subject: str,
    pipeline: str,
    family: Any,
    parameters: dict[str, int],
    adapter: int | None,
    matched: set[str],
    configs: Mapping[str, Mapping[str, Any]],
    resolution: int | None,
    targets: Sequence[str],
) -> PipelineFacts:
    latent, image = None, None
    if family is not None and configs.get(family.component) and configs["vae"]:
        try:
            latent = family.native_latent_shape(configs, resolution)
        except KeyError as key:
            problem = f"a config.json of its parts lacks {key}"
            raise ModelError(subject, problem, "download or save the model again") from None
        image = latent[1] * vae_factor(configs["vae"])
    embedded = bool(configs.get("transformer", {}).get("guidance_embeds"))
    return PipelineFacts(
        pipeline=pipeline,
        component="" if family is None else family.component,
        parameters=parameters,
        adapter_parameters=adapter,
        embedded_guidance=embedded or bool(family is not None and family.embedded_guidance),
        matched_targets=tuple(target for target in targets if target in matched),
        default_targets=() if family is None else family.default_targets,
        latent_shape=latent,
        image_size=image,
        configs=configs,
    )


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


def weight_files(component: Path, variant: str | None) -> list[Path]:
    """The safetensors files of one component that a load of ``variant`` reads."""
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
