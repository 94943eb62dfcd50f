"""Evaluator: draws, scores and judges the held-out images of one adapter after another, all in one process.

It computes what `raysteer eval` computes with samplers and a scorer of its own (`cluster.evaluate`), in the same
chunks and by the same code, so that the figures are the same. It keeps nothing from one adapter to the next; the base
model's rewards, which the corrected score compares with, come with each request, so that a replacement can go on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.sampler import Sampler
from evaluation.scored import CHUNK, ImageScores, chunks, joined, report
from raysteer.errors import UserError

if TYPE_CHECKING:
    from diffusion.policy import ModelConfig
    from evaluation.config import EvaluationConfig
    from rewards.base import Reward
    from rewards.config import RewardConfig


class Scorer:
    """Scores images by the recipe's reward, and by the judge of the corrected score if there is one."""

    def __init__(self, reward: RewardConfig, judge: RewardConfig | None, device: str = "auto") -> None:
        from actors.devices import prepare_device
        from rewards.base import build_reward

        device = prepare_device(device)
        self.reward = (reward.name, build_reward(reward, device))
        self.judge = None if judge is None else (judge.name, build_reward(judge, device))

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> ImageScores:
        """Scores of images, uint8 [n, H, W, 3], one prompt each. Whoever wants equal bits asks for `chunks`.

        Raises:
            UserError: an image cannot be scored.
        """
        judged = None if self.judge is None else _scored(*self.judge, images, prompts)
        return ImageScores(_scored(*self.reward, images, prompts), judged)


class Evaluator:
    """Actor around a policy and the rewards.

    Args:
        evaluator_id: for the log. model: what the adapters are for. evaluation: what is drawn.
        reward: of the recipe, None if the images are not to be scored.
        device, scoring_device: "auto", "cpu" or "cuda", of the policy and of the rewards.
    """

    def __init__(
        self,
        evaluator_id: str,
        model: ModelConfig,
        evaluation: EvaluationConfig,
        reward: RewardConfig | None,
        device: str = "auto",
        scoring_device: str = "auto",
    ) -> None:
        from evaluation.glyphs import prompt_set

        self.config = evaluation
        self.prompts = prompt_set(evaluation)
        self.sampler = Sampler(evaluator_id, model, device=device)
        judge = None if evaluation.judge is None else evaluation.judge.reward
        self.scorer = None if reward is None else Scorer(reward, judge, scoring_device)
        self.images: list[np.ndarray] = []
        self.adapted = False

    def begin(self, adapter: Mapping[str, np.ndarray] | None) -> None:
        """Put on an adapter and forget the images of the one before. None: the base model, which only an evaluator
        that never wore one can draw.
        """
        assert adapter is not None or not self.adapted, "the base model comes first"
        self.images = []
        if adapter is not None:
            self.sampler.policy.load_adapter(adapter)
            self.adapted = True

    def draw(self, chunk: slice) -> None:
        """Draw the images of these prompts; they stay here."""
        config, prompts, seeds = self.config, self.prompts.prompts[chunk], self.prompts.seeds[chunk]
        drawn = self.sampler.generate(prompts, seeds, config.steps, config.guidance_scale, batch_size=CHUNK)
        self.images.append(drawn)

    def judge(self, base: Sequence[float] | None) -> dict[str, Any]:
        """What all images say.

        Args:
            base: rewards of the base model's images; None where these are the base model's, or nothing is scored.

        Returns:
            figures: {name: value, low, high, standard_error, n}. rewards: of every image, None if nothing is scored.

        Raises:
            UserError: an image cannot be scored.
        """
        asked = [*self.prompts.unsafe, *self.prompts.safe]
        images = np.concatenate(self.images)
        scores = None
        if self.scorer is not None:
            scores = joined([self.scorer.score(images[chunk], asked[chunk]) for chunk in chunks(len(asked))])
        reference = None if scores is None else scores.reward
        if base is not None:
            reference = np.asarray(base, np.float32)
        elif self.adapted:
            reference = None
        found = report(self.prompts, images, self.config, scores, reference)
        return {
            "figures": {name: asdict(figure) for name, figure in found.figures.items()},
            "rewards": None if scores is None else [float(value) for value in scores.reward],
        }

    def pid(self) -> int:
        return os.getpid()


def _scored(name: str, reward: Reward, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """float32 [n]. A reward is somebody else's code: what it raises is reported with the prompts it was given."""
    try:
        total = np.asarray(reward.score(images, list(prompts)).total, np.float32)
    except Exception as error:
        detail = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise _unscored(name, f"{len(prompts)} images, the first of prompt {prompts[0]!r}", detail) from error
    bad = np.flatnonzero(~np.isfinite(total))
    if len(bad):
        raise _unscored(name, f"the image of prompt {prompts[bad[0]]!r}", "its score is not a finite number")
    return total


def _unscored(name: str, what: str, detail: str) -> UserError:
    problem = f"cannot score {what}: {detail}"
    return UserError(f"reward {name}", problem, "correct it, or set evaluation.reward to false")
