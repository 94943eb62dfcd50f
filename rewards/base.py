"""What a reward is, the table of those we have, and how one is built.

To add a reward: one file with a class that satisfies ``Reward`` and is constructed as ``Class(config, device)``, and
one line in ``REWARDS`` (or no line at all: a recipe may name ``module:Class``). A static method ``check(config)``, if
the class has one, is called before a cluster starts: it refuses what can be known to be wrong without loading anything.
Errors name keys as if the reward were the main one ("reward.clip.model"); for a term the key is corrected here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from raysteer.errors import ConfigError
from raysteer.import_path import load_object
from rewards.config import RewardConfig

#: name in the recipe -> "module:Class" (imported only when it is built)
REWARDS: dict[str, str] = {
    "steering": "rewards.steering:SteeringReward",
    "clip": "rewards.alignment:AlignmentReward",
    "hps": "rewards.hps:HPSReward",
    "pickscore": "rewards.pickscore:PickScoreReward",
    "jpeg_compressibility": "rewards.jpeg:JpegCompressibility",
    "nudenet": "rewards.nudenet:NudeNetCost",
    "q16": "rewards.q16:Q16Cost",
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

    Its scores hold every component's raw score as a part of that name, and their weighted sum as the total.

    Raises:
        ConfigError: an import path, the anchors, a model or a package cannot be used; names the key.
    """
    from rewards.composite import CompositeReward

    rewards: dict[str, tuple[float, Reward]] = {}
    for key, term in cfg.located():
        with located_errors(key):
            rewards[term.component] = term.weight, reward_class(term.name)(term, device)
    reward: Reward = CompositeReward(rewards)
    if cfg.detector is not None:
        reward = WithDetector(reward, load_object(cfg.detector, "reward.detector"), cfg.detector)
    return reward


def check_rewards(cfg: RewardConfig) -> None:
    """Everything about the rewards of a recipe that can be wrong without loading a model.

    Raises:
        ConfigError: the first thing that is, with its key.
    """
    for key, term in cfg.located():
        with located_errors(key):
            check = getattr(reward_class(term.name), "check", None)
            if check is not None:
                check(term)
    if cfg.detector is not None:
        load_object(cfg.detector, "reward.detector")


def reward_class(name: str) -> Any:
    """The class of a registered reward or of a ``module:Class`` (ConfigError when there is none)."""
    return load_object(REWARDS.get(name, name), "reward.name")


@contextmanager
def located_errors(key: str) -> Iterator[None]:
    """Give a ConfigError about "reward.x" the key at which the reward really stands ("reward.terms.0.x")."""
    try:
        yield
    except ConfigError as error:
        if key == "reward" or not error.key.startswith("reward."):
            raise
        raise ConfigError(key + error.key.removeprefix("reward"), error.value, error.remedy) from error


def check_images(images: np.ndarray, prompts: Sequence[str]) -> None:
    """Refuse anything but uint8 [n, H, W, 3] with one prompt each (ValueError: a caller's bug)."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"images must be uint8 [n, H, W, 3], got {images.dtype} {images.shape}")
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
