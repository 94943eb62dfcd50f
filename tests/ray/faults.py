"""A detector that fails on demand, in the process of a reward worker: the tests' way to stop time at a known group.

The plan is a JSON file in the folder RAYSTEER_TEST_FAULTS, read at the first call of each process; calls count from 1:
    hold_after: n    calls after the n-th wait until the file "release" is there; "holding-<pid>" says that one waits
    nan_at: [..]     these calls give a value that is not a number
    raise_at: [..]   these calls raise
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

_plan: dict[str, Any] = {}
_calls = 0


def detector(images: np.ndarray) -> np.ndarray:
    """float32 [n]: 1 where the image is brighter than the middle; faults as planned."""
    global _calls
    folder = Path(os.environ["RAYSTEER_TEST_FAULTS"])
    if not _calls:
        _plan.update(json.loads((folder / "plan.json").read_text()))
    _calls += 1
    if _calls > _plan.get("hold_after", 10**9) and not (folder / "release").exists():
        mark = folder / f"holding-{os.getpid()}"
        mark.touch()
        deadline = time.monotonic() + 100
        while not (folder / "release").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        mark.unlink(missing_ok=True)
    if _calls in _plan.get("raise_at", ()):
        raise ValueError(f"planned failure of call {_calls}")
    verdict = (images.mean(axis=(1, 2, 3)) > 127).astype(np.float32)
    if _calls in _plan.get("nan_at", ()):
        verdict[0] = np.nan
    return verdict
