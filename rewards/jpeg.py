"""JPEG compressibility (Black et al. 2023, arXiv 2305.13301): the field's sanity check, a reward without weights.

r = -size of the image as a JPEG of quality 95, in kB of 1000 bytes (Pillow's encoder and defaults, as in the authors'
code). A loop that learns anything makes its images smoother under it within a few dozen steps.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from rewards.base import Scores, check_images
from rewards.config import RewardTerm

QUALITY = 95


class JpegCompressibility:
    """Minus the JPEG size in kB; always below 0, larger is smoother. With a negative weight: incompressibility."""

    def __init__(self, cfg: RewardTerm, device: str = "cpu") -> None:
        pass  # nothing to load

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> Scores:
        check_images(images, prompts)
        return Scores(np.array([-jpeg_bytes(image) / 1000 for image in images], np.float32), {})


def jpeg_bytes(image: np.ndarray, quality: int = QUALITY) -> int:
    """Size of one uint8 image [H, W, 3] as a JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=quality)
    return buffer.tell()
