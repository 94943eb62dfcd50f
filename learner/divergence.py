"""How far an adapter has moved the policy from the base model: the KL that training with `objective.kl_coef` bounds.

It is measured on held-out prompts, of the adapter alone, so any objective can be guarded by it, those without a KL term
and those that learn offline among them; `objective/kl_ref` is only there, and then only of training prompts, where the
objective pays for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from diffusion.sampling import sample_rollout
from learner.replay import replay
from learner.surrogates import step_kl

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diffusion.policy import DiffusionPolicy
    from diffusion.sampling import SamplingConfig


@torch.no_grad()
def kl_to_base(policy: DiffusionPolicy, prompt: str, seeds: Sequence[int], sampling: SamplingConfig) -> float:
    """KL(policy || base model) of one prompt: mean over images drawn by the policy and over noisy steps of the exact KL
    of a step, in nats per latent dimension; 0 for the base model. It is what the learner logs as `objective/kl_ref`.

    Args:
        seeds: of two images or more.
        sampling: of the recipe: noise, steps and guidance are its own, and every step counts that it could train.

    Raises:
        ConfigError: no step has noise enough.
    """
    trained = sampling.trained.model_copy(update={"mode": "all", "count": None, "fraction": None})
    sampling = sampling.model_copy(update={"group_size": len(seeds), "mixed": False, "trained": trained})
    trajectory = sample_rollout(policy, prompt, seeds, sampling, step_seed=0).trajectory
    stepper = policy.stepper(sampling)
    found = []
    for position, i in enumerate(trajectory.step_index.tolist()):
        _, mean = replay(policy, stepper, trajectory, position, sampling.guidance_scale)
        with policy.adapter_disabled():
            _, reference = replay(policy, stepper, trajectory, position, sampling.guidance_scale)
        found.append(step_kl(mean, reference, float(stepper.sigmas[i])).mean().item())
    return float(np.mean(found))
