"""``raysteer export``: an adapter in the form in which other programs take it.

    diffusers   FOLDER/pytorch_lora_weights.safetensors, for pipe.load_lora_weights
    kohya       one file with the keys of kohya's sd-scripts, for other programs (and diffusers)
    merged      a whole pipeline folder with the adapter added to the denoiser's weights

Whatever the form, run, step and checksum of the adapter are in it: in the header of the file, or in raysteer.json.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.modelfiles import tensor_shapes, weight_files
from cluster.source import Source, base_model, find_adapter
from diffusion.adapters import checksum, fuse, layout, load_adapter_file, save_adapter, save_kohya
from diffusion.loading import part_dtypes, quiet_loading
from raysteer.errors import ExportError, ModelError

if TYPE_CHECKING:
    from diffusion.policy import ModelConfig

NOTE_NAME = "raysteer.json"


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the file or folder to load.
        load_line: the line of Python that loads it.
        source: where the adapter came from, in words.
        checksum: sha256 (hex) of the adapter.
    """

    path: Path
    load_line: str
    source: str
    checksum: str


def export(
    source: str | Path,
    target: str | Path,
    form: str = "diffusers",
    *,
    storage: str | Path = "runs",
    model: str | None = None,
    force: bool = False,
) -> Exported:
    """Write the adapter of ``source`` into the folder ``target`` and check what was written.

    Args:
        source: run, checkpoint or adapter (see ``find_adapter``).
        target: folder to write into; for kohya the name of a .safetensors file will do too.
        form: a key of ``FORMS``.
        storage: where runs given by name are.
        model: base model of the merged form; None takes the one of the run's recipe.
        force: replace what is there. Nothing else in the folder is touched.

    Raises:
        ExportError: an unknown form, one this family does not have, a target that is taken or cannot be written, or
            what was written reads back differently.
        ModelError: the adapter does not fit the base model.
    """
    from safetensors import SafetensorError

    if form not in FORMS:
        raise ExportError(f"--to {form}", "there is no such form", f"use one of: {', '.join(FORMS)}")
    if model is not None and form != "merged":
        raise ExportError(
            f"--model {model}", f"the {form} form needs no base model", "leave it out, or use --to merged"
        )
    place = Path(target)
    one_file = form == "kohya" and place.suffix == ".safetensors"
    if not one_file and (place.is_file() or place.suffix == ".safetensors"):
        raise ExportError(str(place), "is a file", f"choose a folder: --to {form} names its files itself")
    found = find_adapter(source, storage)
    if (place.exists() if one_file else place.is_dir() and any(place.iterdir())) and not force:
        raise ExportError(
            str(place), "is not empty", "choose another place, or say --force to replace an export that is there"
        )
    try:
        written, load_line = FORMS[form](found, place, model)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ExportError(
            str(place), f"cannot be written ({reason})", "choose another place or free some space"
        ) from None
    return Exported(written, load_line, found.words, found.metadata["checksum"])


def _to_diffusers(found: Source, place: Path, model: str | None) -> tuple[Path, str]:
    _read_back(save_adapter(found.state, place, found.metadata), found)
    return place, f'pipe.load_lora_weights("{place}")'


def _to_kohya(found: Source, place: Path, model: str | None) -> tuple[Path, str]:
    file = place if place.suffix == ".safetensors" else place / f"{found.name}.safetensors"
    _read_back(save_kohya(found.state, file, found.metadata), found)
    return file, f'pipe.load_lora_weights("{file}")'


def _read_back(file: Path, found: Source) -> None:
    if checksum(load_adapter_file(file)) != found.metadata["checksum"]:
        raise ExportError(str(file), "reads back differently from what was written", "check the disk and export again")


# ---- a whole pipeline -----------------------------------------------------------------------------------------------


def _to_merged(found: Source, place: Path, model: str | None) -> tuple[Path, str]:
    """Every part of the user's pipeline, safety checker included, in the dtypes of the run; the denoiser is another."""
    config = base_model(found, model)
    _check_room(config, place)
    lora = layout(found.state)
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{place.name}.", dir=place.parent) as beside:
        pipeline = _load_whole(config)
        fuse(found.state, getattr(pipeline, lora.component))
        whole = Path(beside) / place.name
        with quiet_loading():
            pipeline.save_pretrained(whole)
        for file in whole.rglob("*.safetensors"):
            tensor_shapes(file)  # refuses a torn file
        note = found.metadata | {"base_model": config.path, "rank": str(lora.rank), "alpha": f"{lora.alpha:g}"}
        (whole / NOTE_NAME).write_text(json.dumps(note, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        _move_into(whole, place)
    return place, _load_line(place, config)


def _check_room(config: ModelConfig, place: Path) -> None:
    base, here = Path(config.path), place.resolve()
    if base.is_dir() and (here == base.resolve() or here in base.resolve().parents or base.resolve() in here.parents):
        raise ExportError(str(place), f"is where the base model is ({base})", "choose a folder of its own")
    if not base.is_dir():
        return
    parent = next(folder for folder in (here, *here.parents) if folder.is_dir())
    needed = 0
    for part in (path for path in base.iterdir() if path.is_dir()):
        size = part_dtypes(config).get(part.name, part_dtypes(config)["default"]).itemsize
        for file in weight_files(part, config.variant):
            needed += size * sum(math.prod(shape) for shape in tensor_shapes(file).values())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ExportError(
            str(place), f"needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free", "free some space"
        )


def _load_whole(config: ModelConfig) -> Any:
    """The pipeline with all its parts, those included that training leaves out."""
    from diffusers import DiffusionPipeline

    try:
        with quiet_loading():
            return DiffusionPipeline.from_pretrained(
                config.path,
                revision=config.revision,
                variant=config.variant,
                local_files_only=config.local_files_only,
                torch_dtype=part_dtypes(config),
            )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            config.path, f"cannot be loaded as a whole ({reason})", "download or save the whole pipeline"
        ) from error


def _load_line(folder: Path, config: ModelConfig) -> str:
    """How to load a merged pipeline: diffusers makes float32 of half precision unless told otherwise, and
    transformers does not.
    """
    names = {"default": config.dtype, **config.component_dtypes}
    dtypes = ", ".join(f'"{name}": torch.{dtype}' for name, dtype in names.items())
    alike = "" if config.dtype == "float32" else f", torch_dtype=torch.{config.dtype}"
    option = alike if len(set(names.values())) == 1 else f", torch_dtype={{{dtypes}}}"
    return f'DiffusionPipeline.from_pretrained("{folder}"{option})'


def _move_into(whole: Path, place: Path) -> None:
    """Replace what a pipeline folder has in common with a new one, its index last; leave everything else alone."""
    if not place.exists():
        os.rename(whole, place)
        return
    for entry in sorted(whole.iterdir(), key=lambda path: path.name == "model_index.json"):
        old = place / entry.name
        if old.is_dir():
            shutil.rmtree(old)
        os.replace(entry, old)


FORMS: dict[str, Callable[[Source, Path, str | None], tuple[Path, str]]] = {
    "diffusers": _to_diffusers,
    "kohya": _to_kohya,
    "merged": _to_merged,
}
