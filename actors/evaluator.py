"""Evaluator: draws and looks at the held-out images of one adapter after another, all in one process.

It computes what `raysteer eval` computes with samplers and inspectors of its own (`cluster.evaluate`), in the same
chunks and by the same code, so that the figures are the same. It keeps nothing from one adapter to the next; the base
model's rewards and samples, which others are compared with, come with each request, so that a replacement can go on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.inspector import Inspector
from actors.sampler import Sampler
from evaluation.bootstrap import mean
from evaluation.guards import KL, changes
from evaluation.registry import Detectors, build_suite
from evaluation.scored import findings, rewards, shots
from evaluation.suites.table import image_seeds

if TYPE_CHECKING:
    from diffusion.policy import ModelConfig
    from diffusion.sampling import SamplingConfig
    from evaluation.config import EvaluationConfig
    from evaluation.suites.base import Sample, Verdict


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
        self.kl: list[float] = []
        self.adapted = False

    def begin(self, adapter: Mapping[str, np.ndarray] | None) -> None:
        """Put on an adapter and forget the images of the one before. None: the base model, which only an evaluator
        that never wore one can draw.
        """
        assert adapter is not None or not self.adapted, "the base model comes first"
        self.verdicts, self.kl = {}, []
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

    def diverge(self, index: int, sampling: SamplingConfig) -> None:
        """Measure the KL to the base model on the prompt of this shot (see `learner.divergence`)."""
        from learner.divergence import kl_to_base

        shot = self.shots[index]
        drawn = (self.sampler.policy, shot.prompt, image_seeds(shot.seed, 2), sampling)
        self.kl.append(kl_to_base(*drawn) if self.adapted else 0.0)

    def judge(self, base: Sequence[float] | None, base_samples: Mapping[str, Sample] | None) -> dict[str, Any]:
        """What all images say.

        Args:
            base: rewards of the base model's images; None where these are the base model's, or nothing is scored.
            base_samples: of the base model's figures; None where these are the base model's, or nobody has them.

        Returns:
            figures: {name: value, low, high, standard_error, n}. rewards: of every image, None if nothing is scored.
            samples: {name: values, strata}. changes: {name: value, low, high}, of the differences to the base model.
        """
        verdicts = [self.verdicts[index] for index in range(len(self.shots))]
        raw = rewards(self.suite, verdicts)
        reference = np.asarray(base, np.float32) if base is not None else None if self.adapted else raw
        found, resamples = findings(self.suite, verdicts, self.config, reference), self.config.bootstrap_samples
        figures = found.figures | ({KL: mean(np.array(self.kl), resamples)} if self.kl else {})
        return {
            "figures": {name: asdict(figure) for name, figure in figures.items()},
            "rewards": None if raw is None else [float(value) for value in raw],
            "samples": {
                name: {"values": list(sample.values), "strata": None if sample.strata is None else list(sample.strata)}
                for name, sample in found.samples.items()
            },
            "changes": {} if base_samples is None else changes(base_samples, found.samples, resamples),
        }

    def pid(self) -> int:
        return os.getpid()
