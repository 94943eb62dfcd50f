"""NudeNet 3 (notAI-tech) as a detector of body parts; an optional extra, for its licences contradict each other (see
``rewards/nudenet.py``). It runs on the CPU, with the model of its own wheel.

NudeNet 2, which the published script of I2P uses, is another model with other scores: never compare figures of the two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from raysteer.errors import ConfigError
from rewards.nudenet import INSTALL

MODEL = "320n.onnx"
#: fixed inside the package: candidates it keeps, and its non-maximum suppression (score, overlap)
SCORE_FLOOR, NMS_SCORE, NMS_OVERLAP = 0.2, 0.25, 0.45

_KEY = "evaluation.detectors.nudenet"


class NudeNetDetectorConfig(BaseModel, frozen=True, extra="forbid"):
    """It has no settings: classes and thresholds are those of the suites."""


class NudeNetDetector:
    """Each verdict is a list of {"class": one of ``rewards.nudenet.LABELS``, "score": in (0.25, 1], "box": [left, top,
    width, height] in pixels}, the highest score first; empty where it sees nothing.
    """

    name = "nudenet"

    def __init__(self, config: NudeNetDetectorConfig, device: str = "cpu") -> None:
        """Load the model; ``device`` has no meaning.

        Raises:
            ConfigError: as `check`.
        """
        check(config)
        import nudenet

        self._file = Path(nudenet.__file__).with_name(MODEL)
        self._detector = nudenet.NudeDetector(model_path=str(self._file), inference_resolution=320)

    def identity(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "version": version("nudenet"),
            "model": MODEL,
            "weights_sha256": hashlib.sha256(self._file.read_bytes()).hexdigest(),
            "input": self._detector.input_width,
            "score_floor": SCORE_FLOOR,
            "nms_score": NMS_SCORE,
            "nms_overlap": NMS_OVERLAP,
        }

    def detect(self, images: np.ndarray, prompts: Sequence[str], base: np.ndarray | None) -> list[Any]:
        # One by one, so that no verdict depends on its neighbours; BGR, as the package reads files itself.
        return [_plain(self._detector.detect(np.ascontiguousarray(image[:, :, ::-1]))) for image in images]


def check(config: NudeNetDetectorConfig) -> None:
    """Refuse when NudeNet 3 is not installed.

    Raises:
        ConfigError: with the command that installs it.
    """
    if find_spec("nudenet") is None:
        raise ConfigError(_KEY, "nudenet", f"the package nudenet is not installed: {INSTALL}")
    try:
        installed = version("nudenet")
    except PackageNotFoundError:
        installed = "unknown"
    if installed.split(".")[0] != "3":
        raise ConfigError(_KEY, f"nudenet {installed}", f"its labels and scores are of NudeNet 3: {INSTALL}")


def _plain(detections: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found = [
        {"class": str(one["class"]), "score": float(one["score"]), "box": [int(side) for side in one["box"]]}
        for one in detections
    ]
    return sorted(found, key=lambda one: -float(one["score"]))
