"""Plain CLIP alignment: the cosine between image and prompt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rewards.base import Scores, check_images
from rewards.clip import check_clip, clip_scorer
from rewards.config import RewardTerm
from rewards.encoder import rowwise_dot


class AlignmentReward:
    """r = z_img . z_prompt, both of unit length."""

    def __init__(self, cfg: RewardTerm, device: str = "cpu") -> None:
        self.clip = clip_scorer(cfg.need_clip(), device)

    @staticmethod
    def check(cfg: RewardTerm) -> None:
        """Refuse a CLIP model that is not there (ConfigError)."""
        check_clip(cfg.need_clip())

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> Scores:
        check_images(images, prompts)
        alignment = rowwise_dot(self.clip.encode_images(images), self.clip.encode_texts(prompts))
        return Scores(alignment, {"alignment": alignment})
