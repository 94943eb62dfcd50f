"""Adapter state as plain numpy: checksum, and files that plain diffusers loads.

An adapter state is ``{"unet.<module>.lora_A.weight": float32, "unet.<module>.lora_B.weight": float32, ...,
"unet.lora_alpha": float32 [1]}``. It carries its own alpha, because the same matrices under another alpha are another
adapter: whoever moves a state moves the whole truth, and the checksum covers it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from raysteer.errors import ModelError

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"  # the name plain diffusers looks for
ALPHA_SUFFIX = ".lora_alpha"
_METADATA_KEY = "lora_adapter_metadata"  # header entry in which diffusers keeps rank and alpha

AdapterState = dict[str, np.ndarray]


def checksum(state: Mapping[str, np.ndarray]) -> str:
    """sha256 (hex) over names, dtypes, shapes and bytes; independent of insertion order."""
    digest = hashlib.sha256()
    for name in sorted(state):
        array = np.ascontiguousarray(state[name])
        digest.update(f"{name}|{array.dtype.str}|{state[name].shape}|".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def save_adapter(
    state: Mapping[str, np.ndarray], folder: str | Path, metadata: Mapping[str, str] | None = None
) -> Path:
    """Write ``folder/pytorch_lora_weights.safetensors`` so that ``pipe.load_lora_weights(folder)`` restores it exactly.

    Args:
        state: a whole adapter state (see the module's docstring).
        folder: created if needed; an existing file is replaced atomically.
        metadata: extra text for the file's header (run, version, checksum ...).

    Returns:
        Path of the file.
    """
    from safetensors.numpy import save

    component, alpha = _component_and_alpha(state, str(folder))
    weights = {name: np.ascontiguousarray(array) for name, array in state.items() if not name.endswith(ALPHA_SUFFIX)}
    modules = sorted(
        name.removeprefix(f"{component}.").removesuffix(".lora_A.weight")
        for name in weights
        if name.endswith(".lora_A.weight")
    )
    ranks = {array.shape[0] for name, array in weights.items() if name.endswith(".lora_A.weight")}
    if not modules or len(ranks) != 1:
        raise ModelError(str(folder), "the adapter state holds no LoRA matrices of one rank", "pass a whole adapter")
    lora = {"r": ranks.pop(), "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none", "target_modules": modules}
    # Without the header diffusers would assume alpha = rank and scale the adapter wrongly.
    header = dict(metadata or {}) | {
        _METADATA_KEY: json.dumps({f"{component}.{k}": v for k, v in lora.items()}, sort_keys=True),
        "format": "pt",
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    target, beside = folder / WEIGHTS_NAME, folder / f".{WEIGHTS_NAME}.{os.getpid()}"
    beside.write_bytes(save(weights, metadata=header))
    os.replace(beside, target)
    return target


def load_adapter_file(path: str | Path) -> AdapterState:
    """Read an adapter file, or the folder it lies in, back into an adapter state (the inverse of ``save_adapter``).

    Files saved by diffusers itself are accepted too; without a header alpha equals the rank, as diffusers has it.

    Raises:
        ModelError: there is no such file, or it holds no LoRA adapter.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    file = path / WEIGHTS_NAME if path.is_dir() else path
    if not file.is_file():
        raise ModelError(str(file), "no such adapter file", f"give a folder with {WEIGHTS_NAME} or the file itself")
    try:
        with safe_open(file, framework="numpy") as opened:
            header: dict[str, str] = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name).astype(np.float32) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, TypeError, ValueError) as error:
        raise ModelError(str(file), f"not a readable safetensors file ({error})", "export the adapter again") from error
    state: AdapterState = {_peft_name(name): array for name, array in tensors.items()}
    first = next((name for name in sorted(state) if name.endswith(".lora_A.weight")), None)
    if first is None:
        raise ModelError(str(file), "holds no LoRA matrices (…lora_A.weight)", "export it with save_adapter")
    component = first.split(".", 1)[0]
    lora: dict[str, Any] = json.loads(header.get(_METADATA_KEY, "{}"))
    alpha = lora.get(f"{component}.lora_alpha") or state[first].shape[0]
    state[component + ALPHA_SUFFIX] = np.array([alpha], np.float32)
    return state


def adapter_metadata(path: str | Path) -> dict[str, str]:
    """The header texts given to ``save_adapter`` (empty when there are none)."""
    from safetensors import safe_open

    path = Path(path)
    with safe_open(path / WEIGHTS_NAME if path.is_dir() else path, framework="numpy") as opened:
        header: dict[str, str] = opened.metadata() or {}
    return {key: value for key, value in header.items() if key not in (_METADATA_KEY, "format")}


def _peft_name(name: str) -> str:
    """The name diffusers' own training scripts give a matrix, as peft names it."""
    return name.replace(".lora.down.weight", ".lora_A.weight").replace(".lora.up.weight", ".lora_B.weight")


def _component_and_alpha(state: Mapping[str, np.ndarray], subject: str) -> tuple[str, float]:
    keys = [name for name in state if name.endswith(ALPHA_SUFFIX)]
    if len(keys) != 1:
        raise ModelError(subject, "the adapter state has no single …lora_alpha entry", "pass policy.adapter_state()")
    return keys[0].removesuffix(ALPHA_SUFFIX), float(np.asarray(state[keys[0]]).reshape(-1)[0])
