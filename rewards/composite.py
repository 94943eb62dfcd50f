"""Several rewards as one: every component by its own name, and their weighted sum.

Invariants: ``total`` is the sum of weight x part over the components, in the recipe's order, added in float64 and
rounded once, so that it can be recomputed to the bit from the journalled parts; a component's part is its raw score,
whatever its weight and however the learner mixes; a component that raises is named.

What a component reports beside its score keeps its name for the main reward, and is written ``component.name`` for the
others: two rewards may both know an "alignment".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import numpy as np

from rewards.base import Reward, Scores
from rewards.encoder import Encoder


class RewardFailed(RuntimeError):
    """A reward raised while it scored; the message says which."""


class CompositeReward:
    """The weighted sum of rewards.

    Args:
        rewards: component name -> (weight, reward), the main one first.
    """

    def __init__(self, rewards: Mapping[str, tuple[float, Reward]]) -> None:
        self.rewards = dict(rewards)

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> Scores:
        parts: dict[str, np.ndarray] = {}
        with ExitStack() as stack:
            for encoder in self._encoders():
                stack.enter_context(encoder.remember())
            for index, (name, (_, reward)) in enumerate(self.rewards.items()):
                scores = _score(name, reward, images, prompts)
                own = {f"{name}.{part}" if index else part: values for part, values in scores.parts.items()}
                for part, values in {name: scores.total, **own}.items():
                    if part in parts:
                        raise ValueError(f"two rewards report the part {part!r}: rename one")
                    parts[part] = values
        weights = {name: weight for name, (weight, _) in self.rewards.items()}
        return Scores(weighted_sum(parts, weights), parts)

    def _encoders(self) -> list[Encoder]:
        """The models that more than one component looks through: each image is encoded by them once."""
        held = [encoder for _, reward in self.rewards.values() if isinstance(encoder := _encoder(reward), Encoder)]
        return [encoder for index, encoder in enumerate(held) if any(encoder is other for other in held[:index])]


def weighted_sum(parts: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """float32 [n]: the sum of weight x parts[name], in the order of ``weights``, rounded once."""
    terms = [weight * parts[name].astype(np.float64) for name, weight in weights.items()]
    return sum(terms[1:], start=terms[0]).astype(np.float32)


def _score(name: str, reward: Reward, images: np.ndarray, prompts: Sequence[str]) -> Scores:
    try:
        scores = reward.score(images, prompts)
    except Exception as error:  # a reward is somebody else's code, and all that it raises concerns this component
        raise RewardFailed(f"{name}: {type(error).__name__}: {error}") from error
    if len(scores.total) != len(images):
        raise RewardFailed(f"{name}: it returned {len(scores.total)} scores for {len(images)} images")
    return scores


def _encoder(reward: Reward) -> object:
    return getattr(reward, "clip", None)
