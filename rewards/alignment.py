"""Plain CLIP alignment: the cosine between image and prompt. With HPS v2.1 weights in ``clip`` it is the HPS score."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rewards.base import Scores, check_images
from rewards.clip import ClipScorer
from rewards.config import RewardConfig


class AlignmentReward:
    """r = z_img . z_prompt, both of unit length."""

    def __init__(self, cfg: RewardConfig, device: str = "cpu") -> None:
        self.clip = ClipScorer(cfg.clip, device)

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> Scores:
        check_images(images, prompts)
        alignment = rowwise_dot(self.clip.encode_images(images), self.clip.encode_texts(prompts))
        return Scores(alignment, {"alignment": alignment})


def rowwise_dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float32 [n] of two float32 [n, d]; each row is summed alone, so its bits do not depend on n."""
    return (a * b).sum(-1)
