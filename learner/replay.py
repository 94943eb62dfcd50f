"""Replaying a stored step under the present policy: what every objective with a ratio begins with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusion.policy import DiffusionPolicy
    from diffusion.sampling import Trajectory
    from diffusion.steps import Stepper


def replay(
    policy: DiffusionPolicy,
    stepper: Stepper,
    trajectory: Trajectory,
    position: int,
    guidance_scale: float,
    detach_uncond: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob float32 [G] and mean float32 [G, C, h, w] of one trained step of a group, under ``policy``.

    One forward of exactly the sampler's batch shape, so that the policy that drew the group gets the very log-probs
    that are stored with it.

    Args:
        position: index into the trained steps of the trajectory, 0 .. K - 1.
        detach_uncond: no gradient through the unconditional half of guidance (see ``DiffusionPolicy.predict``).
    """
    i = int(trajectory.step_index[position])
    x_t, x_prev = trajectory.transition(position, policy.device)
    cond = policy.encode([trajectory.prompt]).expand(len(x_t))
    output = policy.predict(x_t, float(stepper.timesteps[i]), cond, guidance_scale, detach_uncond=detach_uncond)
    return stepper.log_prob(output, x_t, x_prev, i)
