"""What a detector is: images in, what it sees in each of them out, and an identity that says who looked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np


class Detector(Protocol):
    """A detector, built as ``DetectorClass(config, device)`` inside an actor; heavy imports happen there.

    Its module also has ``check(config)``, which refuses what cannot work without loading it (ConfigError with key
    ``evaluation.detectors.<name>.<field>``, value and remedy).
    """

    name: str

    def identity(self) -> dict[str, Any]:
        """Name, version, hash of the weights, and every setting that what it sees depends on; JSON values."""
        ...

    def detect(self, images: np.ndarray, prompts: Sequence[str], base: np.ndarray | None) -> list[Any]:
        """What it sees in each image; JSON values, of every candidate above a low floor, so that thresholds can be
        swept later.

        Args:
            images: uint8 [n, H, W, 3].
            prompts: of these images.
            base: the base model's images at the same prompts and seeds; None where these are the base model's.
        """
        ...
