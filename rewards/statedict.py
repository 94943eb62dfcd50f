"""Does a weights file belong to an architecture? Found out from names and shapes alone, before anything is loaded.

Only tensors are ever read from a file (safetensors, or ``torch.load(weights_only=True)``), and every tensor of the
model must be there with its shape: open_clip itself would stretch positional embeddings that do not fit.
"""

from __future__ import annotations

import logging
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from raysteer.errors import ConfigError


def check_state_dict(model: str, file: Path, key: str) -> None:
    """Refuse a weights file that is not a whole state dict of an open_clip architecture.

    Args:
        model: open_clip name, or ``local-dir:/folder``.
        file: a state dict, or a checkpoint with an entry ``state_dict``.
        key: of the recipe, named in the error.

    Raises:
        ConfigError: naming the file, the first key that does not fit, and the architecture it looks like.
    """
    if file.suffix in (".npz", ".npy"):
        return  # big_vision weights: open_clip converts them
    state = read_state_dict(file, key)
    expected = architecture(model)
    if expected is None:
        return  # its text tower is described on the hub
    state = _as_open_clip(state, expected)
    problem = first_mismatch({name: tuple(t.shape) for name, t in state.items()}, expected.state_dict())
    if problem is not None:
        alike = ", ".join(_look_alikes(state)[:3])
        remedy = f"set clip.model to what it was made for ({alike})" if alike else "give weights of that model"
        raise ConfigError(key, str(file), f"it is no state dict of {model}: {problem}; {remedy}")


def read_state_dict(file: Path, key: str) -> dict[str, torch.Tensor]:
    """Names and tensors of a weights file; shapes only (safetensors) or mapped into memory where the format allows.

    Raises:
        ConfigError: naming the file, when it is torn, of another kind, or holds more than tensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
            return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, ValueError, OSError, EOFError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise ConfigError(
            key,
            str(file),
            f"the weights cannot be loaded ({reason}): give a file of tensors alone, or download it again",
        ) from error
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping) or not loaded or not all(torch.is_tensor(t) for t in loaded.values()):
        raise ConfigError(key, str(file), "it is no state dict: give names and tensors, or {'state_dict': ...} of them")
    prefix = "module." if all(name.startswith("module.") for name in loaded) else ""
    return {name.removeprefix(prefix): tensor for name, tensor in loaded.items()}


def first_mismatch(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, torch.Tensor]) -> str | None:
    """What is wrong with the first key, in the model's order, that is missing, of another shape, or too many."""
    for name, tensor in expected.items():
        shape = tuple(tensor.shape)
        if name not in found:
            return f"{name} is missing"
        if found[name] != shape and tensor.numel() != 1:  # logit_scale is [] here and [1] there
            return f"{name} is {list(found[name])}, not {list(shape)}"
    extra = next((name for name in found if name not in expected), None)
    return None if extra is None else f"{extra} is too many"


def architecture(model: str) -> Any:
    """The architecture without memory behind it; None when describing it would need the hub."""
    import open_clip

    config = open_clip.get_model_config(model) if ":" not in model else None
    if config is not None and "hf_model_name" in config.get("text_cfg", {}):
        return None
    quiet = logging.root.manager.disable
    logging.disable(logging.WARNING)  # "Model initialized randomly": nobody will use it
    try:
        with torch.device("meta"):
            return open_clip.create_model(model, device="meta", load_weights=False)
    finally:
        logging.disable(quiet)


def _as_open_clip(state: dict[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    """The conversions open_clip makes when it loads."""
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    state = convert_state_dict(model, state)
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    return {name: tensor for name, tensor in state.items() if not name.endswith("embeddings.position_ids")}


def _look_alikes(state: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the open_clip ViT architectures with these shapes, shortest first."""
    import open_clip

    names = ("visual.conv1.weight", "visual.positional_embedding", "text_projection", "positional_embedding")
    if not all(name in state for name in names):
        return []
    patches, positions, text, context = (tuple(state[name].shape) for name in names)
    layers = sum(name.startswith("visual.transformer.resblocks.") and name.endswith("ln_1.weight") for name in state)
    alike = []
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name) or {}
        vision, words = config.get("vision_cfg", {}), config.get("text_cfg", {})
        side, patch = vision.get("image_size"), vision.get("patch_size")
        if not isinstance(side, int) or not isinstance(patch, int):
            continue
        if (
            (vision.get("width"), 3, patch, patch) == patches
            and ((side // patch) ** 2 + 1, vision.get("width")) == positions
            and vision.get("layers") == layers
            and (words.get("width"), config.get("embed_dim")) == text
            and (words.get("context_length"), words.get("width")) == context
        ):
            alike.append(name)
    return sorted(alike, key=len)
