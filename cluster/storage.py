"""The run folder: what lies where, and writing it so that a crash never leaves half a file."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run below <storage>/<name>/."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def journal(self) -> Path:
        return self.path / "journal"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def best(self) -> Path:
        """The adapter of the best evaluation so far, of a run that is ended by its evaluations."""
        return self.path / "best"

    @property
    def evaluations(self) -> Path:
        """What evaluating beside training has found (see `cluster.beside`)."""
        return self.path / "evaluations.jsonl"

    @property
    def generation(self) -> Path:
        """Where a generated dataset stands; its presence means that this is one."""
        return self.path / "generation.json"

    @property
    def rounds(self) -> Path:
        """What the rounds of an offline run have generated."""
        return self.path / "rounds"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.json"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def stop_request(self) -> Path:
        """Its presence asks the run to end (see `cluster.stopping`)."""
        return self.path / "stop.json"

    @property
    def train_logs(self) -> Path:
        """Where Ray Train keeps its own records."""
        return self.path / "ray_train"

    def create(self) -> RunFolder:
        self.path.mkdir(parents=True, exist_ok=True)
        return self


def is_run_name(name: str) -> bool:
    """Whether a run may be called so: its name becomes a folder, and a label in other systems."""
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name) is not None


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write beside, sync, rename: readers see the old file or the new one."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with open(beside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def write_json(path: str | Path, value: Any) -> None:
    """`value` as indented JSON, atomically."""
    write_atomic(path, (json.dumps(value, indent=1, default=float) + "\n").encode())
