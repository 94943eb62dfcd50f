"""Human Preference Score v2.1 (Wu et al. 2023, arXiv 2306.09341): an open_clip ViT-H-14 tuned on human choices.

The weights are a plain state dict (``HPS_v2.1_compressed.pt``) that the architecture must fit tensor by tensor; no
package beside open_clip is needed. The score is the bare cosine, as published: about 0.2 to 0.35, and differences of a
hundredth matter, so mix it with other rewards by ``mix: group`` or with a large weight.

The same ``clip`` section under ``steering`` steers in the space of HPS; both together load the model once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from raysteer.errors import ConfigError
from rewards.base import Scores, check_images
from rewards.clip import check_clip, clip_scorer
from rewards.config import RewardTerm
from rewards.encoder import rowwise_dot


class HPSReward:
    """r = z_img . z_prompt in the space of HPS; the raw cosine."""

    def __init__(self, cfg: RewardTerm, device: str = "cpu") -> None:
        """Load the model.

        Raises:
            ConfigError: naming reward.clip.model or reward.clip.pretrained.
        """
        self.check(cfg)
        self.clip = clip_scorer(cfg.need_clip(), device)

    @staticmethod
    def check(cfg: RewardTerm) -> None:
        """Refuse weights that are not there, do not fit, or are those of a plain CLIP.

        Raises:
            ConfigError: naming reward.clip.model or reward.clip.pretrained.
        """
        clip = cfg.need_clip()
        check_clip(clip)
        if clip.pretrained is not None and not Path(clip.pretrained).is_file():
            raise ConfigError(
                "reward.clip.pretrained",
                clip.pretrained,
                "this tag is a plain CLIP (reward clip): give the path of HPS_v2.1_compressed.pt",
            )

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> Scores:
        check_images(images, prompts)
        return Scores(rowwise_dot(self.clip.encode_images(images), self.clip.encode_texts(prompts)), {})
