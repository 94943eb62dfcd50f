"""GRPO over denoising steps: PPO's clipped ratio per step, group-relative advantages (DDPO, SafeDiffusion-R1).

L = mean_{images, steps} max(-A rho, -A clip(rho, 1 - c, 1 + c)) + kl_coef KL,   rho = exp(log_prob - old_log_prob)

Log-probs are means over latent dimensions, so the clip range is in those units: 1e-4 is 1.6 nats of the whole step at
4 x 64 x 64 latents, but 0.03 nats at 4 x 8 x 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field

from learner.advantages import group_advantages

if TYPE_CHECKING:
    from diffusion.policy import DiffusionPolicy
    from diffusion.sampling import Trajectory
    from diffusion.steps import Stepper


class GRPOConfig(BaseModel, frozen=True, extra="forbid"):
    """Parameters of the GRPO objective.

    ``kl_coef`` weighs the KL to the base model (adapter off), mean over latent dimensions; 0 costs nothing.
    ``train_guidance: conditional`` sends no gradient through the unconditional half of guidance: cheaper, and the
    published method's ``both`` is the default. ``updates_per_batch`` splits the trained steps over several updates.
    """

    name: Literal["grpo"] = "grpo"
    clip_range: float = Field(default=1e-4, gt=0.0, lt=1.0)
    adv_clip: float = Field(default=5.0, gt=0.0, allow_inf_nan=False)
    std: Literal["group", "batch", "mixed"] = "group"
    std_floor: float = Field(default=1e-4, gt=0.0, allow_inf_nan=False)
    kl_coef: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    train_guidance: Literal["both", "conditional"] = "both"
    updates_per_batch: int = Field(default=1, ge=1)


class GRPO:
    """The objective registered as "grpo"."""

    def __init__(self, cfg: GRPOConfig) -> None:
        self.cfg = cfg

    def advantages(self, rewards: np.ndarray) -> np.ndarray:
        """float32 [n_groups, G] of the whole batch's rewards [n_groups, G]."""
        return group_advantages(rewards, self.cfg.std, self.cfg.std_floor, self.cfg.adv_clip)

    def loss(
        self,
        policy: DiffusionPolicy,
        stepper: Stepper,
        trajectory: Trajectory,
        advantages: np.ndarray | torch.Tensor,
        positions: Sequence[int],
        guidance_scale: float,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Mean loss of one group over its images and the given positions (indices into the trained steps).

        Args:
            policy: the current policy; gradients reach its adapter only.
            advantages: float32 [G].
            positions: one forward each, of exactly the sampler's batch shape.

        Returns:
            The scalar loss and ratio_mean, ratio_max_dev, clip_fraction, approx_kl, kl_ref (means over the positions,
            the second a maximum).
        """
        if not positions:
            raise ValueError("positions is empty: name at least one trained step")
        adv = torch.as_tensor(np.array(advantages, np.float32), device=policy.device)
        if adv.shape != (trajectory.group_size,):
            raise ValueError(f"{tuple(adv.shape)} advantages for a group of {trajectory.group_size}")
        losses, rows = [], []
        for position in positions:
            log_prob, mean = self._score(policy, stepper, trajectory, position, guidance_scale)
            loss, row = clipped_loss(
                log_prob, trajectory.old_log_prob(position, policy.device), adv, self.cfg.clip_range
            )
            row["kl_ref"] = 0.0
            if self.cfg.kl_coef > 0.0:
                kl = self._kl_to_reference(policy, stepper, trajectory, position, guidance_scale, mean)
                loss = loss + self.cfg.kl_coef * kl
                row["kl_ref"] = kl.item()
            losses.append(loss)
            rows.append(row)
        stats = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
        stats["ratio_max_dev"] = max(row["ratio_max_dev"] for row in rows)
        return torch.stack(losses).mean(), stats

    @torch.no_grad()
    def parity(self, policy: DiffusionPolicy, stepper: Stepper, trajectory: Trajectory, guidance_scale: float) -> float:
        """max |rho - 1| over every image and trained step; exactly 0 on a CPU for a group this policy just drew."""
        worst = 0.0
        for position in range(trajectory.num_positions):
            log_prob, _ = self._score(policy, stepper, trajectory, position, guidance_scale)
            ratio = torch.exp(log_prob - trajectory.old_log_prob(position, policy.device))
            worst = max(worst, (ratio - 1.0).abs().max().item())
        return worst

    def _score(
        self, policy: DiffusionPolicy, stepper: Stepper, trajectory: Trajectory, position: int, guidance_scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        i = int(trajectory.step_index[position])
        x_t, x_prev = trajectory.transition(position, policy.device)
        embeds = policy.encode([trajectory.prompt]).expand(len(x_t), -1, -1)
        output = policy.predict(
            x_t,
            int(stepper.timesteps[i]),
            embeds,
            guidance_scale,
            detach_uncond=self.cfg.train_guidance == "conditional",
        )
        return stepper.log_prob(output, x_t, x_prev, i)

    def _kl_to_reference(
        self,
        policy: DiffusionPolicy,
        stepper: Stepper,
        trajectory: Trajectory,
        position: int,
        guidance_scale: float,
        mean: torch.Tensor,
    ) -> torch.Tensor:
        with torch.no_grad(), policy.adapter_disabled():
            _, reference = self._score(policy, stepper, trajectory, position, guidance_scale)
        sigma = float(stepper.sigmas[int(trajectory.step_index[position])])
        return ((mean - reference) ** 2).mean() / (2.0 * sigma * sigma)


def clipped_loss(
    log_prob: torch.Tensor, old_log_prob: torch.Tensor, advantages: torch.Tensor, clip_range: float
) -> tuple[torch.Tensor, dict[str, float]]:
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7) of float32 [G] log-probs, and its figures."""
    ratio = torch.exp(log_prob - old_log_prob)
    clipped = ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped).mean()
    with torch.no_grad():
        deviation = (ratio - 1.0).abs()
        stats = {
            "ratio_mean": ratio.mean().item(),
            "ratio_max_dev": deviation.max().item(),
            "clip_fraction": (deviation > clip_range).float().mean().item(),
            "approx_kl": 0.5 * ((log_prob - old_log_prob) ** 2).mean().item(),
        }
    return loss, stats
