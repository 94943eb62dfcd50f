"""The run's metrics file: JSON lines, one per learner step, in step of the checkpoints."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Rows in file order; an unfinished last line (a crash while it was written) is left out."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    rows: list[dict[str, Any]] = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def append_row(path: str | Path, row: Mapping[str, Any]) -> None:
    """One more line."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(dict(row)) + "\n")


def keep_rows_until(path: str | Path, step: int) -> None:
    """Forget steps after `step`: they are about to be done again. Atomic."""
    path = Path(path)
    rows = [row for row in read_rows(path) if row["step"] <= step]
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(beside, path)
