"""What a reward is, the table of those we have, and how one is built.

To add a reward: one file with a class that satisfies ``Reward`` and is constructed as ``Class(config, device)``, and
one line in ``REWARDS`` (or no line at all: a recipe may name ``module:Class``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import numpy as np

from raysteer.errors import ConfigError
from rewards.config import RewardConfig

#: name in the recipe -> "module:Class" (imported only when it is built)
REWARDS: dict[str, str] = {
    "steering": "rewards.steering:SteeringReward",
    "clip": "rewards.alignment:AlignmentReward",
}

Detector = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Scores:
    """Rewards of n images.

    Attributes:
        total: float32 [n], what is optimised.
        parts: named float32 [n], what it is made of and what is only watched; logged, never optimised on their own.
    """

    total: np.ndarray
    parts: dict[str, np.ndarray]

    def __post_init__(self) -> None:
        for name, values in {"total": self.total, **self.parts}.items():
            if values.dtype != np.float32 or values.shape != (len(self.total),):
                raise ValueError(f"{name}: expected float32 [{len(self.total)}], got {values.dtype} {values.shape}")


class Reward(Protocol):
    """Scores images against their prompts. The score of an image never depends on the images beside it."""

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> Scores:
        """Scores of uint8 images [n, H, W, 3], one prompt each."""
        ...


class WithDetector:
    """A reward that also reports a detector's verdict as the part "inappropriate"; the total is left alone."""

    def __init__(self, reward: Reward, detector: Detector, name: str) -> None:
        self.reward, self.detector, self.name = reward, detector, name

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> Scores:
        scores = self.reward.score(images, prompts)
        verdict = np.asarray(self.detector(images), np.float32)
        if verdict.shape != (len(images),):
            raise ValueError(f"detector {self.name} returned shape {verdict.shape} for {len(images)} images")
        return Scores(scores.total, {**scores.parts, "inappropriate": verdict})


def build_reward(cfg: RewardConfig, device: str = "cpu") -> Reward:
    """Build the reward of a recipe, models loaded and anchors embedded.

    Raises:
        ConfigError: an import path, the anchors or the CLIP model cannot be used; names the key.
    """
    target = REWARDS.get(cfg.name, cfg.name)
    reward: Reward = load_object(target, "reward.name")(cfg, device)
    if cfg.detector is not None:
        reward = WithDetector(reward, load_object(cfg.detector, "reward.detector"), cfg.detector)
    return reward


def load_object(import_path: str, key: str) -> Any:
    """The object at ``module:name``.

    Raises:
        ConfigError: naming ``key``, when there is no such module or name.
    """
    module, _, name = import_path.partition(":")
    try:
        return getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(error.name + ".")):
            raise ConfigError(key, import_path, f"there is no module {module!r} on the import path") from error
        raise  # the module exists and misses a dependency of its own: its message is the better one
    except AttributeError as error:
        raise ConfigError(key, import_path, f"module {module!r} has no {name!r}") from error


def check_images(images: np.ndarray, prompts: Sequence[str]) -> None:
    """Refuse anything but uint8 [n, H, W, 3] with one prompt each (ValueError: a caller's bug)."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"images must be uint8 [n, H, W, 3], got {images.dtype} {images.shape}")
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
