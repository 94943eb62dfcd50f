"""Adapter state as plain numpy: checksum, the files it comes from and goes to, and fusing it into a model.

An adapter state is ``{"unet.<module>.lora_A.weight": float32, "unet.<module>.lora_B.weight": float32, ...,
"unet.lora_alpha": float32 [1]}``. It carries its own alpha, because the same matrices under another alpha are another
adapter: whoever moves a state moves the whole truth, and the checksum covers it.

Two file forms are written, and both read back bit for bit: the one of diffusers (``save_adapter``; alpha in the
header) and the one of kohya's sd-scripts (``save_kohya``; alpha beside every pair of matrices), which other programs
know. Keys of the latter are converted by diffusers in both directions.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from raysteer.errors import ExportError, ModelError

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"  # the name plain diffusers looks for
ALPHA_SUFFIX = ".lora_alpha"
_METADATA_KEY = "lora_adapter_metadata"  # header entry in which diffusers keeps rank and alpha
_KOHYA_PREFIXES = ("lora_unet_", "lora_te")
_KOHYA_COMPONENT = "unet"  # the one denoiser whose keys diffusers converts
_SGM_BLOCKS = ("input_blocks", "middle_block", "output_blocks")
# What peft can do to a LoRA beyond one rank and one alpha. It changes the model, and we would not reproduce it.
_BEYOND_US = ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias")

AdapterState = dict[str, np.ndarray]


@dataclass(frozen=True)
class LoRALayout:
    """What an adapter adapts: the pipeline's ``component``, its ``modules`` (full names, sorted), with which rank and
    alpha.
    """

    component: str
    rank: int
    alpha: float
    modules: tuple[str, ...]

    @property
    def scaling(self) -> float:
        """The factor of B A: alpha / rank."""
        return self.alpha / self.rank

    def pair(self, state: Mapping[str, np.ndarray], module: str) -> tuple[np.ndarray, np.ndarray]:
        """(A [rank, in, ...], B [out, rank, ...]) of one module."""
        name = f"{self.component}.{module}"
        return state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]


def layout(state: Mapping[str, np.ndarray], subject: str = "adapter") -> LoRALayout:
    """Layout of a whole adapter state.

    Raises:
        ModelError: naming ``subject``: no single alpha, half a pair of matrices, more than one rank or component.
    """
    alphas = [name for name in state if name.endswith(ALPHA_SUFFIX)]
    if len(alphas) != 1:
        raise ModelError(subject, "the adapter state has no single …lora_alpha entry", "pass policy.adapter_state()")
    component, alpha = alphas[0].removesuffix(ALPHA_SUFFIX), float(np.asarray(state[alphas[0]]).reshape(-1)[0])
    modules = sorted(
        name.removeprefix(f"{component}.").removesuffix(".lora_A.weight")
        for name in state
        if name.startswith(f"{component}.") and name.endswith(".lora_A.weight")
    )
    ranks = {array.shape[0] for name, array in state.items() if name.endswith(".lora_A.weight")}
    if not modules or len(ranks) != 1:
        raise ModelError(subject, "the adapter state holds no LoRA matrices of one rank", "pass a whole adapter")
    matrices = {f"{component}.{module}.lora_{side}.weight" for module in modules for side in "AB"}
    for name in sorted((matrices | {alphas[0]}) ^ set(state)):
        problem = "is missing" if name in matrices else f"is no LoRA matrix of the {component}"
        raise ModelError(subject, f"{name} {problem}", "use a plain LoRA of the denoiser")
    return LoRALayout(component, ranks.pop(), alpha, tuple(modules))


def checksum(state: Mapping[str, np.ndarray]) -> str:
    """sha256 (hex) over names, dtypes, shapes and bytes; independent of insertion order."""
    digest = hashlib.sha256()
    for name in sorted(state):
        array = np.ascontiguousarray(state[name])
        digest.update(f"{name}|{array.dtype.str}|{state[name].shape}|".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


# ---- files ----------------------------------------------------------------------------------------------------------


def save_adapter(
    state: Mapping[str, np.ndarray], folder: str | Path, metadata: Mapping[str, str] | None = None
) -> Path:
    """Write ``folder/pytorch_lora_weights.safetensors`` so that ``pipe.load_lora_weights(folder)`` restores it exactly.

    Args:
        state: a whole adapter state (see the module's docstring).
        folder: created if needed; an existing file is replaced atomically.
        metadata: extra text for the file's header (run, step, checksum ...).

    Returns:
        Path of the file.
    """
    what = layout(state, str(folder))
    weights = {name: array for name, array in state.items() if not name.endswith(ALPHA_SUFFIX)}
    lora = {
        "r": what.rank,
        "lora_alpha": what.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(what.modules),
    }
    # Without the header diffusers would assume alpha = rank and scale the adapter wrongly.
    header = {_METADATA_KEY: json.dumps({f"{what.component}.{k}": v for k, v in lora.items()}, sort_keys=True)}
    return _write(Path(folder) / WEIGHTS_NAME, weights, dict(metadata or {}) | header)


def save_kohya(state: Mapping[str, np.ndarray], file: str | Path, metadata: Mapping[str, str] | None = None) -> Path:
    """Write one file with the keys of kohya's sd-scripts, which ``pipe.load_lora_weights(file)`` also restores exactly.

    Args:
        state: a whole adapter state of a UNet.
        file: ends in .safetensors; folders are created if needed, an existing file is replaced atomically.
        metadata: extra text for the file's header.

    Raises:
        ExportError: diffusers has no converter for this component, or no way back for one of the modules.
    """
    from diffusers.utils import convert_state_dict_to_kohya

    what = layout(state, str(file))
    if what.component != _KOHYA_COMPONENT:
        raise ExportError(
            str(file),
            f"there is no kohya form of a {what.component} adapter (diffusers converts only {_KOHYA_COMPONENT} keys)",
            "export with --to diffusers or --to merged",
        )
    weights = {name: array for name, array in state.items() if not name.endswith(ALPHA_SUFFIX)}
    converted: dict[str, Any] = convert_state_dict_to_kohya(weights)
    # The converter writes alpha = rank whatever the adapter's own.
    alpha = np.array(what.alpha, np.float32)
    converted = {key: alpha if key.endswith(".alpha") else array for key, array in converted.items()}
    # A dot becomes an underscore, and not every module name finds its way back.
    returned = {name for name in _from_kohya(converted, str(file)) if not name.endswith(ALPHA_SUFFIX)}
    lost = sorted(set(weights) - returned)
    if lost:
        raise ExportError(
            str(file), f"{lost[0]} has no kohya name that diffusers reads back", "export with --to diffusers"
        )
    header = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(what.rank),
        "ss_network_alpha": f"{what.alpha:g}",
    }
    return _write(Path(file), converted, dict(metadata or {}) | header)


def load_adapter_file(path: str | Path) -> AdapterState:
    """Read an adapter file, or the folder it lies in, back into an adapter state (the inverse of ``save_adapter`` and
    ``save_kohya``).

    Files saved by diffusers itself or by kohya's sd-scripts are accepted too, in any float dtype. Where neither header
    nor file says an alpha it equals the rank, as diffusers and kohya have it.

    Raises:
        ModelError: there is no such file, or it holds no LoRA adapter, or more than a plain one of a denoiser.
    """
    from safetensors import SafetensorError, safe_open

    file = _file_in(Path(path))
    if not file.is_file():
        raise ModelError(str(file), "no such adapter file", f"give a folder with {WEIGHTS_NAME} or the file itself")
    try:
        with safe_open(file, framework="pt") as opened:  # numpy knows no bfloat16
            header: dict[str, str] = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name).float().numpy() for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, TypeError, ValueError, OSError) as error:
        raise ModelError(str(file), f"not a readable safetensors file ({error})", "export the adapter again") from error
    if any(name.startswith(_KOHYA_PREFIXES) for name in tensors):
        state = _from_kohya(tensors, str(file))
    else:
        state = _from_diffusers(tensors, header, str(file))
    layout(state, str(file))
    return state


def adapter_metadata(path: str | Path) -> dict[str, str]:
    """The header texts given to ``save_adapter`` or ``save_kohya`` (empty when there are none)."""
    from safetensors import safe_open

    with safe_open(_file_in(Path(path)), framework="numpy") as opened:
        header: dict[str, str] = opened.metadata() or {}
    known = (_METADATA_KEY, "format")
    return {key: value for key, value in header.items() if key not in known and not key.startswith("ss_")}


def _file_in(path: Path) -> Path:
    """The adapter file in a folder: the one of diffusers, else the only safetensors file that is there."""
    if not path.is_dir() or (path / WEIGHTS_NAME).is_file():
        return path / WEIGHTS_NAME if path.is_dir() else path
    others = list(path.glob("*.safetensors"))
    return others[0] if len(others) == 1 else path / WEIGHTS_NAME


def _write(target: Path, tensors: Mapping[str, np.ndarray], header: Mapping[str, str]) -> Path:
    from safetensors.numpy import save

    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    whole = {name: array if array.flags.c_contiguous else array.copy() for name, array in tensors.items()}
    beside.write_bytes(save(whole, metadata=dict(header) | {"format": "pt"}))
    os.replace(beside, target)
    return target


def _from_diffusers(tensors: Mapping[str, np.ndarray], header: Mapping[str, str], subject: str) -> AdapterState:
    state: AdapterState = {_peft_name(name): array for name, array in tensors.items()}
    downs = sorted(name for name in state if name.endswith(".lora_A.weight"))
    if not downs:
        raise ModelError(subject, "holds no LoRA matrices (…lora_A.weight)", "export it with raysteer export")
    first = next((name for name in downs if not name.startswith("text_encoder")), downs[0])
    component = first.split(".", 1)[0]
    lora: dict[str, Any] = json.loads(header.get(_METADATA_KEY, "{}"))
    for feature in _BEYOND_US:
        if lora.get(f"{component}.{feature}"):
            raise ModelError(subject, f"uses {feature}, which raysteer does not", "use a plain LoRA of the denoiser")
    alpha = lora.get(f"{component}.lora_alpha") or state[first].shape[0]
    return state | {component + ALPHA_SUFFIX: np.array([alpha], np.float32)}


def _from_kohya(tensors: Mapping[str, np.ndarray], subject: str) -> AdapterState:
    from diffusers.loaders import StableDiffusionLoraLoaderMixin
    from diffusers.utils import convert_unet_state_dict_to_peft

    for name in sorted(tensors):
        if name.startswith("lora_te"):
            raise ModelError(subject, f"also adapts a text encoder ({name})", "use a LoRA of the denoiser alone")
        if any(block in name for block in _SGM_BLOCKS):
            raise ModelError(
                subject,
                f"names blocks as the original SDXL code does ({name}), which only the model's config can map",
                "load it with pipe.load_lora_weights and save it with pipe.save_lora_weights",
            )
    try:
        renamed, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(dict(tensors))
    except (KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(subject, f"diffusers cannot convert its keys ({reason})", "use a plain LoRA") from error
    state: AdapterState = convert_unet_state_dict_to_peft(renamed)
    first = next((name for name in sorted(state) if name.endswith(".lora_A.weight")), None)
    if first is None:
        raise ModelError(subject, "holds no LoRA matrices (…lora_down.weight)", "export it with raysteer export")
    rank = state[first].shape[0]
    pairs = sum(name.endswith(".lora_A.weight") for name in state)
    values = set((alphas or {}).values()) | ({float(rank)} if len(alphas or {}) < pairs else set())
    if len(values) != 1:
        found = ", ".join(f"{value:g}" for value in sorted(values))
        raise ModelError(subject, f"its modules have different alphas ({found})", "use a LoRA of one alpha")
    return state | {_KOHYA_COMPONENT + ALPHA_SUFFIX: np.array([values.pop()], np.float32)}


def _peft_name(name: str) -> str:
    """The name diffusers' own training scripts give a matrix, as peft names it."""
    return name.replace(".lora.down.weight", ".lora_A.weight").replace(".lora.up.weight", ".lora_B.weight")


# ---- models ---------------------------------------------------------------------------------------------------------


def check_fits(state: Mapping[str, np.ndarray], denoiser: nn.Module, subject: str = "adapter") -> LoRALayout:
    """Refuse an adapter of another model; a denoiser on the meta device will do.

    Raises:
        ModelError: naming the first module of the adapter that the denoiser lacks or has in another size.
    """
    what, model = layout(state, subject), type(denoiser).__name__
    for module in what.modules:
        down, up = what.pair(state, module)
        try:
            weight = denoiser.get_parameter(f"{module}.weight")
        except AttributeError:
            raise ModelError(
                subject, f"adapts {module}, which this {model} does not have", "use the model it was made for"
            ) from None
        if down.shape[1:] != weight.shape[1:] or up.shape[0] != weight.shape[0]:
            made_for = (up.shape[0], *down.shape[1:])
            raise ModelError(
                subject,
                f"adapts {module} of size {_size(made_for)}, but this {model} has {_size(tuple(weight.shape))}",
                "use the model it was made for",
            )
    return what


@torch.no_grad()
def fuse(state: Mapping[str, np.ndarray], denoiser: nn.Module) -> None:
    """Add the adapter to the weights of a denoiser in place: W + alpha / rank * B A (Hu et al. 2021), worked out in
    float64 and rounded once to the weight's own dtype.

    Raises:
        ModelError: the adapter is of another model (nothing is changed then).
    """
    what = check_fits(state, denoiser)
    for module in what.modules:
        down, up = (torch.from_numpy(np.array(matrix, np.float64)).flatten(1) for matrix in what.pair(state, module))
        weight = denoiser.get_parameter(f"{module}.weight")
        delta = what.scaling * (up @ down).reshape(weight.shape)
        weight.copy_(weight.double() + delta.to(weight.device))


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(str(length) for length in shape)
