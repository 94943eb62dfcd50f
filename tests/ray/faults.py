"""A detector that fails on demand, in the process of a reward worker: the tests' way to stop time at a known group.

The plan is a JSON file in the folder RAYSTEER_TEST_FAULTS. Calls are counted from 1 over all processes, each leaves a
file "call-<number>":
    hold_after: n     calls after the n-th wait until the file "release" is there; "holding-<pid>" says that one waits
    hold_at: [..]     these calls wait until "release-<number>" (or "release") is there
    nan_at: [..]      these calls give a value that is not a number
    raise_at: [..]    these calls raise
    hang_at: [..]     these calls never come back
    bad_image_at: n   the images of this call make the detector raise, now and ever after; "bad-<digest>" remembers them
    fill_store_at: n  this call fills the object store of its node to the last page, and keeps it full
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

HOLD_TIMEOUT_S = 200.0
_kept: list[Any] = []


def detector(images: np.ndarray) -> np.ndarray:
    """float32 [n]: 1 where the image is brighter than the middle; faults as planned."""
    folder = Path(os.environ["RAYSTEER_TEST_FAULTS"])
    plan = json.loads((folder / "plan.json").read_text())
    call = _count(folder)
    if call > plan.get("hold_after", 10**9):
        _hold(folder, "release")
    if call in plan.get("hold_at", ()):
        _hold(folder, f"release-{call}")
    if call in plan.get("hang_at", ()):
        threading.Event().wait()
    if call == plan.get("fill_store_at"):
        _fill_store()
    bad = folder / f"bad-{hashlib.sha256(images.tobytes()).hexdigest()}"
    if call == plan.get("bad_image_at"):
        bad.touch()
    if bad.exists():
        raise ValueError("planned failure of this image")
    if call in plan.get("raise_at", ()):
        raise ValueError(f"planned failure of call {call}")
    verdict = (images.mean(axis=(1, 2, 3)) > 127).astype(np.float32)
    if call in plan.get("nan_at", ()):
        verdict[0] = np.nan
    return verdict


def _count(folder: Path) -> int:
    """The number of this call among those of all processes."""
    number = 1 + sum(1 for _ in folder.glob("call-*"))
    while True:
        try:
            (folder / f"call-{number}").touch(exist_ok=False)
            return number
        except FileExistsError:
            number += 1


def _hold(folder: Path, release: str) -> None:
    deadline = time.monotonic() + HOLD_TIMEOUT_S
    mark = folder / f"holding-{os.getpid()}"
    while not ((folder / release).exists() or (folder / "release").exists()) and time.monotonic() < deadline:
        mark.touch()
        time.sleep(0.02)
    mark.unlink(missing_ok=True)


def _fill_store() -> None:
    import ray

    size = 2**24
    while size >= 2**12:
        try:
            _kept.append(ray.put(np.ones(size, np.uint8)))
        except (ray.exceptions.ObjectStoreFullError, ray.exceptions.OutOfDiskError):
            size //= 4
