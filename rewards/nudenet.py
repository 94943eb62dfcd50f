"""Nudity as a cost: the detector NudeNet 3 (notAI-tech), an optional extra.

The package states two licences that contradict each other: its metadata and classifiers say MIT, the licence files it
ships are the GNU AGPL v3. raysteer therefore neither depends on it nor ships any of it: install it yourself, once you
have decided that you may (``pip install "nudenet>=3.4,<4"``, the weights are inside). It runs on the CPU.

cost = the highest score among the detections of the chosen classes, 0 when there is none: in [0, 1], 1 = certain.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from raysteer.errors import ConfigError
from rewards.base import Scores, check_images
from rewards.config import NudeNetConfig, RewardTerm

INSTALL = 'pip install "nudenet>=3.4,<4"'
LABELS = (
    "FEMALE_GENITALIA_COVERED",
    "FACE_FEMALE",
    "BUTTOCKS_EXPOSED",
    "FEMALE_BREAST_EXPOSED",
    "FEMALE_GENITALIA_EXPOSED",
    "MALE_BREAST_EXPOSED",
    "ANUS_EXPOSED",
    "FEET_EXPOSED",
    "BELLY_COVERED",
    "FEET_COVERED",
    "ARMPITS_COVERED",
    "ARMPITS_EXPOSED",
    "FACE_MALE",
    "BELLY_EXPOSED",
    "MALE_GENITALIA_EXPOSED",
    "ANUS_COVERED",
    "FEMALE_BREAST_COVERED",
    "BUTTOCKS_COVERED",
)


class NudeNetCost:
    """Nudity in [0, 1]. A cost: its weight in the sum is negative."""

    def __init__(self, cfg: RewardTerm, device: str = "cpu") -> None:
        """Load the detector.

        Raises:
            ConfigError: the package is not installed; names the command.
        """
        self.check(cfg)
        from nudenet import NudeDetector

        self.cfg = cfg.nudenet
        self.detector = NudeDetector()

    @staticmethod
    def check(cfg: RewardTerm) -> None:
        """Refuse when the package is absent (ConfigError with the command that installs it)."""
        if find_spec("nudenet") is None:
            raise ConfigError("reward.name", cfg.name, f"the package nudenet is not installed: {INSTALL}")

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> Scores:
        check_images(images, prompts)
        # One by one, so that no cost depends on its neighbours; BGR, as the package reads files itself.
        found = [self.detector.detect(np.ascontiguousarray(image[:, :, ::-1])) for image in images]
        return Scores(np.array([nudity(detections, self.cfg) for detections in found], np.float32), {})


def nudity(detections: Iterable[Mapping[str, Any]], cfg: NudeNetConfig) -> float:
    """Cost of one image from NudeNet's detections, ``{"class": label, "score": 0..1, ...}`` each."""
    counted = [
        float(found["score"])
        for found in detections
        if found["class"] in cfg.classes and float(found["score"]) >= cfg.threshold
    ]
    return max(counted, default=0.0)
