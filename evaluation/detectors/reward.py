"""A recipe's reward as a detector: what it would have given each image. Also the judge of the corrected score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from raysteer.errors import UserError
from rewards.config import RewardConfig


class RewardDetector:
    """Each verdict is the total reward, a float; never NaN."""

    name = "reward"

    def __init__(self, config: RewardConfig, device: str = "cpu") -> None:
        from rewards.base import build_reward

        self.config, self.reward = config, build_reward(config, device)

    def identity(self) -> dict[str, Any]:
        return {"name": self.config.describe()}

    def detect(self, images: np.ndarray, prompts: Sequence[str], base: np.ndarray | None) -> list[Any]:
        """Raises UserError: an image cannot be scored, or its score is not a finite number."""
        try:
            total = np.asarray(self.reward.score(images, list(prompts)).total, np.float32)
        except Exception as error:  # somebody else's code
            detail = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise self._unscored(f"{len(prompts)} images, the first of prompt {prompts[0]!r}", detail) from error
        bad = np.flatnonzero(~np.isfinite(total))
        if len(bad):
            raise self._unscored(f"the image of prompt {prompts[bad[0]]!r}", "its score is not a finite number")
        return [float(value) for value in total]

    def _unscored(self, what: str, detail: str) -> UserError:
        problem = f"cannot score {what}: {detail}"
        return UserError(f"reward {self.config.name}", problem, "correct it, or set evaluation.reward to false")


def check(config: RewardConfig) -> None:
    """Raises ConfigError: it cannot work."""
    from rewards.base import check_rewards

    check_rewards(config)
