"""Evaluator: draws and looks at the held-out images of one adapter after another, all in one process.

It computes what `raysteer eval` computes with samplers and inspectors of its own (`cluster.evaluate`), in the same
chunks and by the same code, so that the figures are the same. It keeps nothing from one adapter to the next; the base
model's rewards, which the corrected score compares with, come with each request, so that a replacement can go on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.inspector import Inspector
from actors.sampler import Sampler
from evaluation.registry import Detectors, build_suite
from evaluation.scored import findings, rewards, shots

if TYPE_CHECKING:
    from diffusion.policy import ModelConfig
    from evaluation.config import EvaluationConfig
    from evaluation.suites.base import Verdict


class Evaluator:
    """Actor around a policy and the detectors.

    Args:
        evaluator_id: for the log. model: what the adapters are for. evaluation: what is drawn.
        detectors: who looks (see `evaluation.registry.detectors_of`), the reward among them.
        device, scoring_device: "auto", "cpu" or "cuda", of the policy and of the detectors.
    """

    def __init__(
        self,
        evaluator_id: str,
        model: ModelConfig,
        evaluation: EvaluationConfig,
        detectors: Detectors,
        device: str = "auto",
        scoring_device: str = "auto",
    ) -> None:
        self.config, self.suite = evaluation, build_suite(evaluation)
        self.shots = shots(self.suite, evaluation)
        self.sampler = Sampler(evaluator_id, model, device=device)
        self.inspector = Inspector(detectors, scoring_device)
        self.verdicts: dict[int, Verdict] = {}
        self.adapted = False

    def begin(self, adapter: Mapping[str, np.ndarray] | None) -> None:
        """Put on an adapter and forget the images of the one before. None: the base model, which only an evaluator
        that never wore one can draw.
        """
        assert adapter is not None or not self.adapted, "the base model comes first"
        self.verdicts = {}
        if adapter is not None:
            self.sampler.policy.load_adapter(adapter)
            self.adapted = True

    def draw(self, chunk: Sequence[int]) -> None:
        """Draw the images of these shots and look at them; what was seen stays here.

        Raises:
            UserError: a detector failed.
        """
        own = [self.shots[index] for index in chunk]
        prompts, guidance = [shot.prompt for shot in own], own[0].guidance_scale
        drawn = self.sampler.generate(
            prompts, [shot.seed for shot in own], self.config.steps, guidance, batch_size=len(own)
        )
        self.verdicts |= dict(zip(chunk, self.inspector.inspect(drawn, prompts), strict=True))

    def judge(self, base: Sequence[float] | None) -> dict[str, Any]:
        """What all images say.

        Args:
            base: rewards of the base model's images; None where these are the base model's, or nothing is scored.

        Returns:
            figures: {name: value, low, high, standard_error, n}. rewards: of every image, None if nothing is scored.
        """
        verdicts = [self.verdicts[index] for index in range(len(self.shots))]
        raw = rewards(self.suite, verdicts)
        reference = np.asarray(base, np.float32) if base is not None else None if self.adapted else raw
        found = findings(self.suite, verdicts, self.config, reference)
        return {
            "figures": {name: asdict(figure) for name, figure in found.figures.items()},
            "rewards": None if raw is None else [float(value) for value in raw],
        }

    def pid(self) -> int:
        return os.getpid()
