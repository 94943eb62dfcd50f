"""Finding and checking a pipeline before its weights are read: its class, its parts and their dtypes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from raysteer.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from diffusion.policy import ModelConfig

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
T5_TOKENS = 256  # what StableDiffusion3Pipeline pads and cuts to, unless told otherwise
_NEVER_LOADED = ("safety_checker", "feature_extractor", "image_encoder")
_T5 = ("text_encoder_3", "tokenizer_3")
_WEIGHTS = ("*.safetensors", "*.bin")


def read_index(cfg: ModelConfig) -> dict[str, Any]:
    """The ``model_index.json`` of the pipeline at ``cfg.path``, without loading any weights.

    Raises:
        ModelError: no such folder or cached model, or it is not a diffusers pipeline.
    """
    from diffusers import DiffusionPipeline

    folder = Path(cfg.path)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise ModelError(
            cfg.path, "is not a diffusers pipeline (no model_index.json)", "save one there with pipe.save_pretrained"
        )
    looks_local = cfg.path.startswith((".", "/", "~")) or cfg.path.count("/") != 1
    if looks_local and not folder.is_dir():
        raise ModelError(cfg.path, "no such folder", "set model.path to a folder made with pipe.save_pretrained")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of huggingface_hub about what diffusers passes to it
            index = DiffusionPipeline.load_config(
                cfg.path, revision=cfg.revision, local_files_only=cfg.local_files_only and not folder.is_dir()
            )
    except (OSError, ValueError) as error:
        remedy = "give a folder, or download the model first"
        if cfg.local_files_only:
            remedy += " (or set model.local_files_only=false)"
        raise ModelError(cfg.path, "neither a folder nor a model in the local hub cache", remedy) from error
    if not isinstance(index.get("_class_name"), str):
        raise ModelError(cfg.path, "its model_index.json names no pipeline class", "save the pipeline again")
    return dict(index)


def is_loaded(cfg: ModelConfig, part: str) -> bool:
    """Whether a part that a pipeline's index names is loaded at all."""
    return part not in _NEVER_LOADED and (cfg.use_t5 or part not in _T5)


def loaded_parts(cfg: ModelConfig, index: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the parts of a pipeline that are loaded, sorted."""
    entries = {name: entry for name, entry in index.items() if isinstance(entry, list | tuple) and len(entry) == 2}
    return tuple(sorted(name for name, entry in entries.items() if entry[0] is not None and is_loaded(cfg, name)))


def check_parts(cfg: ModelConfig, index: Mapping[str, Any]) -> None:
    """Refuse a folder that lacks a part its index names, or the variant asked for. A hub name is not looked into.

    Raises:
        ConfigError: a dtype for a part that there is not, T5 left out of a model that has it for good, or a number of
            its tokens for a model that takes none.
        ModelError: naming folder and part.
    """
    parts = loaded_parts(cfg, index)
    is_sd3 = index["_class_name"] == "StableDiffusion3Pipeline"
    if not cfg.use_t5 and not is_sd3:
        name = index["_class_name"]
        raise ConfigError("model.use_t5", False, f"only Stable Diffusion 3 can do without; {name} cannot")
    if cfg.t5_tokens != T5_TOKENS and not is_sd3:
        name = index["_class_name"]
        raise ConfigError("model.t5_tokens", cfg.t5_tokens, f"only Stable Diffusion 3 takes it; {name} does not")
    if cfg.use_t5 and is_sd3 and not set(_T5) <= set(parts):
        raise ModelError(cfg.path, "was saved without its T5 (text_encoder_3)", "set model.use_t5=false")
    for name in cfg.component_dtypes:
        if name not in parts:
            raise ConfigError("model.component_dtypes", name, f"this pipeline's parts are {', '.join(parts)}")
    folder = Path(cfg.path)
    if not folder.is_dir():
        return
    for name in parts:
        if not (folder / name).is_dir():
            remedy = "download or save the whole pipeline"
            if name in _T5:
                remedy += ", or set model.use_t5=false"
            raise ModelError(str(folder), f"its part {name} is missing", remedy)
    if cfg.variant is not None:
        for name in ("unet", "transformer"):
            files = [file.name for pattern in _WEIGHTS for file in (folder / name).glob(pattern)]
            if files and not any(f".{cfg.variant}." in file or f".{cfg.variant}-" in file for file in files):
                raise ModelError(
                    f"model.variant {cfg.variant}",
                    f"{folder / name} has no weights of this variant ({', '.join(sorted(files)[:3])})",
                    "leave model.variant out, or download that variant",
                )


def part_dtypes(cfg: ModelConfig) -> dict[str, torch.dtype]:
    """dtype by part; "default" for the parts not named."""
    return {"default": DTYPES[cfg.dtype], **{name: DTYPES[dtype] for name, dtype in cfg.component_dtypes.items()}}


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No progress bars while loading: a cluster has many loaders and one terminal."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        diffusers_logging.enable_progress_bar()
        transformers_logging.enable_progress_bar()
