"""Checkpoints of a run: atomic, self-describing, never pickle.

    <folder>/step-000010/
        adapter.safetensors    the adapter state of version 10 (float32)
        ema.safetensors        its moving average, if there is one
        optimizer.safetensors  moments, update counter, generator states
        state.json             format, step, recipe fingerprint, ledger, metrics of the last step
        manifest.json          sha256 of each of the above

A checkpoint is written beside its place, synced and renamed, so it is there completely or not at all; one that does
not match its manifest (a torn disk, a half-copied folder) is passed over with a warning and the one before it is used.
One that is whole but of an unknown format, or made by another recipe, is refused: going on from an older one, or from
nothing, would throw training away unasked.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from raysteer.errors import CheckpointError

FORMAT = 1
_NAME = re.compile(r"step-(\d{6,})$")
_OPTIMIZER = "optimizer.safetensors"
_FILES = ("adapter.safetensors", _OPTIMIZER, "state.json")
_EMA = "ema.safetensors"


class DamagedCheckpoint(CheckpointError):
    """A checkpoint that is not what was written: torn, half copied, changed."""


@dataclass(frozen=True)
class Checkpoint:
    """All that the learner and the ledger need to go on after `step` learner steps (adapter version = step).

    `ema` is the moving average of the adapter, itself an adapter state, when the recipe asks for one.
    """

    step: int
    fingerprint: str
    adapter: Mapping[str, np.ndarray]
    optimizer: Mapping[str, np.ndarray]
    ledger: Mapping[str, Any]
    metrics: Mapping[str, float] = field(default_factory=dict)
    ema: Mapping[str, np.ndarray] | None = None

    @property
    def exported(self) -> Mapping[str, np.ndarray]:
        """The adapter for everything but training: the moving average if there is one."""
        return self.adapter if self.ema is None else self.ema


def checkpoint_path(folder: str | Path, step: int) -> Path:
    return Path(folder) / f"step-{step:06d}"


def save_checkpoint(folder: str | Path, checkpoint: Checkpoint, keep: int | None = None) -> Path:
    """Write a checkpoint durably; older ones beyond the newest `keep` are removed, and what writers that died left.

    Raises OSError when the disk refuses; nothing of this checkpoint is left then.
    """
    from safetensors.numpy import save

    state = {
        "format": FORMAT,
        "step": checkpoint.step,
        "fingerprint": checkpoint.fingerprint,
        "ledger": dict(checkpoint.ledger),
        "metrics": dict(checkpoint.metrics),
    }
    contents = {
        "adapter.safetensors": save(_contiguous(checkpoint.adapter)),
        "optimizer.safetensors": save(_contiguous(checkpoint.optimizer)),
        "state.json": json.dumps(state, indent=1).encode(),
    }
    if checkpoint.ema is not None:
        contents[_EMA] = save(_contiguous(checkpoint.ema))
    manifest = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    contents["manifest.json"] = json.dumps(manifest, indent=1).encode()

    target = checkpoint_path(folder, checkpoint.step)
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    for unfinished in target.parent.glob(".step-*"):
        shutil.rmtree(unfinished, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        for name, data in contents.items():
            _write_synced(beside / name, data)
        _sync_folder(beside)
    except OSError:
        shutil.rmtree(beside, ignore_errors=True)  # on a full disk its room is needed
        raise
    if target.exists():  # the same step again after going back: a rename cannot replace a folder that is not empty
        shutil.rmtree(target)
    os.rename(beside, target)
    _sync_folder(target.parent)
    if keep is not None:
        for old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    return target


def list_checkpoints(folder: str | Path) -> list[Path]:
    """Checkpoint folders by ascending step, whether valid or not."""
    found = [(int(match[1]), path) for path in Path(folder).glob("step-*") if (match := _NAME.match(path.name))]
    return [path for _, path in sorted(found)]


def step_of(path: Path) -> int:
    """The step that a folder of `list_checkpoints` is of."""
    return int(path.name.removeprefix("step-"))


def read_checkpoint(path: str | Path, optimizer: bool = True) -> Checkpoint:
    """Read one checkpoint; without `optimizer` its moments, three quarters of it, are left where they are.

    Raises DamagedCheckpoint, or CheckpointError when it is of another format.
    """
    from safetensors.numpy import load

    path = Path(path)
    try:
        manifest = dict(json.loads((path / "manifest.json").read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise DamagedCheckpoint(str(path), "manifest.json is missing or torn", "delete this folder") from error
    state = json.loads(_verified(path, "state.json", manifest))
    if state.get("format") != FORMAT:  # asked before the other files: another format may have others
        raise CheckpointError(
            str(path),
            f"has format {state.get('format')}, this version reads {FORMAT}",
            "use the version that wrote it, or begin anew with another run.name",
        )
    wanted = {*_FILES, *manifest} - (set() if optimizer else {_OPTIMIZER})
    contents = {name: _verified(path, name, manifest) for name in sorted(wanted)}
    return Checkpoint(
        step=state["step"],
        fingerprint=state["fingerprint"],
        adapter=load(contents["adapter.safetensors"]),
        optimizer=load(contents[_OPTIMIZER]) if optimizer else {},
        ledger=state["ledger"],
        metrics=state["metrics"],
        ema=load(contents[_EMA]) if _EMA in contents else None,
    )


def latest_checkpoint(folder: str | Path, fingerprint: str | None = None) -> Checkpoint | None:
    """The newest whole checkpoint, or None. Raises CheckpointError when it has an unknown format or was made by another
    recipe.
    """
    for path in reversed(list_checkpoints(folder)):
        try:
            checkpoint = read_checkpoint(path)
        except DamagedCheckpoint as error:
            warnings.warn(f"checkpoint passed over: {error}", stacklevel=2)
            continue
        if fingerprint is not None and checkpoint.fingerprint != fingerprint:
            raise CheckpointError(
                str(path),
                "was made by another recipe (something that decides training has changed)",
                "choose another run.name, or restore the recipe the run began with",
            )
        return checkpoint
    return None


def _verified(path: Path, name: str, manifest: Mapping[str, str]) -> bytes:
    try:
        data = (path / name).read_bytes()
    except OSError as error:
        raise DamagedCheckpoint(str(path), f"{name} cannot be read ({error.strerror})", "delete this folder") from error
    if hashlib.sha256(data).hexdigest() != manifest.get(name):
        raise DamagedCheckpoint(str(path), f"{name} does not match its checksum", "delete this folder")
    return data


def _write_synced(file: Path, data: bytes) -> None:
    with open(file, "wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())


def _contiguous(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    # safetensors writes the memory of an array as it lies
    return {name: np.ascontiguousarray(array).reshape(np.shape(array)) for name, array in arrays.items()}


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
