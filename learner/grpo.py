"""GRPO over denoising steps: PPO's clipped ratio per step, group-relative advantages (DDPO, SafeDiffusion-R1).

L = mean_{images, steps} max(-A rho, -A clip(rho, 1 - c, 1 + c)) + kl_coef KL,   rho = exp(log_prob - old_log_prob)

Log-probs are means over latent dimensions, so the clip range is in those units: 1e-4 is 1.6 nats of the whole step at
4 x 64 x 64 latents, but 0.03 nats at 4 x 8 x 8.

Moves are measured from an anchor: the behaviour policy that drew the group, or the *proximal* policy, the one at the
start of the batch. Stale groups begin outside a trust region around the first and in the middle of one around the
second (decoupled PPO: Hilton et al. 2022; AReaL, arXiv 2505.24298). The proximal log-prob is replayed or, cheaper,
*interpolated* between that of the behaviour policy and the present one (AReaL's log-linear approximation).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field, field_validator, model_validator

from learner.advantages import group_advantages
from learner.replay import replay
from learner.surrogates import (
    Figures,
    behaviour_weight,
    clipped_loss,
    guarded_log_ratio,
    masked_loss,
    output_gain,
    step_kl,
)
from raysteer.import_path import is_import_path

if TYPE_CHECKING:
    from diffusion.policy import DiffusionPolicy
    from diffusion.sampling import Trajectory
    from diffusion.steps import Stepper

PARITY_SHARE = 0.1  # of the clip range: beyond it, fresh samples would start outside the trust region


class GRPOConfig(BaseModel, frozen=True, extra="forbid"):
    """Parameters of the GRPO objective, or of one of your own (``name``: "module:Class").

    ``kl_coef`` weighs the KL to the base model (adapter off), mean over latent dimensions; 0 costs nothing.
    ``train_guidance: conditional`` sends no gradient through the unconditional half of guidance: cheaper, and the
    published method's ``both`` is the default. ``updates_per_batch`` splits the trained steps over several updates.

    ``anchor: proximal`` is decoupled PPO: ratios are taken to the policy at the start of the batch, and each image's
    loss is weighted by min(pi_proximal / pi_behaviour, ``max_weight``). With several updates per batch that costs one
    more forward without gradient for each trained step; with one it costs nothing. ``interpolated`` never costs one: it
    takes log pi_proximal for a point on the line from log pi_behaviour to the present log pi, at the place that the
    versions say. ``proximal`` is the base of two variants:

    * ``trust: kl_mask`` (Flow-DPPO, arXiv 2606.11025) does not clip; an image whose exact KL to the anchor, mean over
      latent dimensions, has reached ``kl_threshold`` and whose ratio goes on moving away is left out.
    * ``ratio: guarded`` (GRPO-Guard, arXiv 2510.22319) clips a ratio with mean 1, sigma (log rho + KL), and divides
      each step's loss by the step's gain (see ``output_gain``). ``clip_range`` is then in units of that ratio.
    """

    name: str = "grpo"
    clip_range: float = Field(default=1e-4, gt=0.0, lt=1.0)
    adv_clip: float = Field(default=5.0, gt=0.0, allow_inf_nan=False)
    std: Literal["group", "batch", "mixed"] = "group"
    std_floor: float = Field(default=1e-4, gt=0.0, allow_inf_nan=False)
    kl_coef: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    train_guidance: Literal["both", "conditional"] = "both"
    updates_per_batch: int = Field(default=1, ge=1)
    anchor: Literal["behaviour", "proximal", "interpolated"] = "behaviour"
    max_weight: float = Field(default=5.0, ge=1.0, allow_inf_nan=False)
    trust: Literal["clip", "kl_mask"] = "clip"
    kl_threshold: float = Field(default=1e-5, gt=0.0, allow_inf_nan=False)
    ratio: Literal["plain", "guarded"] = "plain"

    @field_validator("name")
    @classmethod
    def _known_objective(cls, name: str) -> str:
        from learner.objective import OBJECTIVES

        if name not in OBJECTIVES and not is_import_path(name):
            raise ValueError(f"unknown objective {name!r}: use one of {', '.join(OBJECTIVES)}, or 'module:Class'")
        return name

    @property
    def replays_first(self) -> bool:
        """Whether a batch begins with a pass without gradient over all its trained steps."""
        return self.anchor == "proximal" and self.updates_per_batch > 1

    @model_validator(mode="after")
    def _possible(self) -> GRPOConfig:
        if self.anchor != "proximal":
            for name, value in (("trust", self.trust), ("ratio", self.ratio)):
                if value in ("kl_mask", "guarded"):
                    raise ValueError(
                        f"{name} '{value}' needs the means of the policy at the start of the batch: set anchor to "
                        "'proximal'"
                    )
        if self.trust == "kl_mask" and self.ratio == "guarded":
            raise ValueError("ratio 'guarded' corrects the clip, and trust 'kl_mask' does not clip: choose one of them")
        if self.trust == "kl_mask" and self.updates_per_batch == 1:
            raise ValueError(
                "trust 'kl_mask' masks nothing at the first update of a batch: set updates_per_batch to 2 or more"
            )
        return self


@dataclass(frozen=True)
class Proximal:
    """What the policy at the start of a batch says of one group, kept on the CPU.

    Attributes:
        log_prob: float32 [G, K].
        mean: float32 [G, K, C, h, w], or None when only ratios are needed.
    """

    log_prob: torch.Tensor
    mean: torch.Tensor | None


class GRPO:
    """The objective registered as "grpo"."""

    def __init__(self, cfg: GRPOConfig) -> None:
        self.cfg = cfg

    @property
    def parity_tolerance(self) -> float:
        """A tenth of the clip range."""
        return PARITY_SHARE * self.cfg.clip_range

    def advantages(self, rewards: np.ndarray) -> np.ndarray:
        """float32 [n_groups, G] of the whole batch's rewards [n_groups, G]."""
        return group_advantages(rewards, self.cfg.std, self.cfg.std_floor, self.cfg.adv_clip)

    def positions(self, trajectory: Trajectory) -> int:
        """The trained steps."""
        return trajectory.num_positions

    @torch.no_grad()
    def prepare(
        self, policy: DiffusionPolicy, stepper: Stepper, trajectory: Trajectory, guidance_scale: float, seed: int
    ) -> Proximal | None:
        """What ``loss`` has to know of the policy before the first update of a batch. Nothing is drawn at random.

        None when it needs nothing: the anchor is the behaviour policy, or there is one update, at which the policy
        still is the proximal one.
        """
        if not self.cfg.replays_first:
            return None
        with_means = self.cfg.trust == "kl_mask" or self.cfg.ratio == "guarded"
        log_probs, means = [], []
        for position in range(trajectory.num_positions):
            log_prob, mean = self._replay(policy, stepper, trajectory, position, guidance_scale)
            log_probs.append(log_prob.cpu())
            if with_means:
                means.append(mean.cpu())
        return Proximal(torch.stack(log_probs, 1), torch.stack(means, 1) if with_means else None)

    def loss(
        self,
        policy: DiffusionPolicy,
        stepper: Stepper,
        trajectory: Trajectory,
        advantages: np.ndarray | torch.Tensor,
        positions: Sequence[int],
        guidance_scale: float,
        prepared: Proximal | None = None,
        proximal_at: float = 0.0,
    ) -> tuple[torch.Tensor, Figures]:
        """Mean loss of one group over its images and the given positions (indices into the trained steps).

        Args:
            policy: the current policy; gradients reach its adapter only.
            advantages: float32 [G].
            positions: one forward each, of exactly the sampler's batch shape.
            prepared: what ``prepare`` returned for this group before the first update of the batch.
            proximal_at: see ``Objective.loss``; read with the interpolated anchor only.

        Returns:
            The scalar loss and ratio_mean, ratio_max_dev, approx_kl, kl_ref (means over the positions, the second a
            maximum), clip_fraction or with the KL mask mask_fraction and kl_anchor, and unless the anchor is the
            behaviour policy weight_mean and weight_capped.
        """
        if not positions:
            raise ValueError("positions is empty: name at least one trained step")
        adv = torch.as_tensor(np.array(advantages, np.float32), device=policy.device)
        if adv.shape != (trajectory.group_size,):
            raise ValueError(f"{tuple(adv.shape)} advantages for a group of {trajectory.group_size}")
        losses, rows = [], []
        for position in positions:
            log_prob, mean = self._replay(policy, stepper, trajectory, position, guidance_scale)
            loss, row = self._surrogate(stepper, trajectory, position, adv, log_prob, mean, prepared, proximal_at)
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
            log_prob, _ = self._replay(policy, stepper, trajectory, position, guidance_scale)
            ratio = torch.exp(log_prob - trajectory.old_log_prob(position, policy.device))
            worst = max(worst, (ratio - 1.0).abs().max().item())
        return worst

    def _replay(
        self, policy: DiffusionPolicy, stepper: Stepper, trajectory: Trajectory, position: int, guidance_scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        conditional = self.cfg.train_guidance == "conditional"
        return replay(policy, stepper, trajectory, position, guidance_scale, detach_uncond=conditional)

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
            _, reference = self._replay(policy, stepper, trajectory, position, guidance_scale)
        return step_kl(mean, reference, float(stepper.sigmas[int(trajectory.step_index[position])])).mean()

    def _surrogate(
        self,
        stepper: Stepper,
        trajectory: Trajectory,
        position: int,
        advantages: torch.Tensor,
        log_prob: torch.Tensor,
        mean: torch.Tensor,
        prepared: Proximal | None,
        proximal_at: float,
    ) -> tuple[torch.Tensor, Figures]:
        cfg, device = self.cfg, log_prob.device
        behaviour = trajectory.old_log_prob(position, device)
        if cfg.anchor == "behaviour":
            return clipped_loss(log_prob - behaviour, advantages, cfg.clip_range)
        if cfg.anchor == "interpolated":
            anchor = torch.lerp(behaviour, log_prob.detach(), proximal_at)
            weight, row = behaviour_weight(anchor, behaviour, cfg.max_weight)
            loss, figures = clipped_loss(log_prob - anchor, advantages, cfg.clip_range, weight)
            return loss, row | figures
        if prepared is None and cfg.replays_first:
            raise ValueError("the proximal policy is unknown: call prepare before the first update of a batch")
        anchor, anchor_mean = log_prob.detach(), mean.detach()
        if prepared is not None:
            anchor = prepared.log_prob[:, position].to(device)
            if prepared.mean is not None:
                anchor_mean = prepared.mean[:, position].to(device)
        weight, row = behaviour_weight(anchor, behaviour, cfg.max_weight)
        i = int(trajectory.step_index[position])
        if cfg.trust == "kl_mask":
            kl = step_kl(mean.detach(), anchor_mean, float(stepper.sigmas[i]))
            loss, figures = masked_loss(log_prob - anchor, advantages, kl, cfg.kl_threshold, weight)
        elif cfg.ratio == "guarded":
            _, x_prev = trajectory.transition(position, device)
            log_ratio = guarded_log_ratio(mean, anchor_mean, x_prev, float(stepper.sigmas[i]))
            loss, figures = clipped_loss(log_ratio, advantages, cfg.clip_range, weight)
            loss = loss / output_gain(stepper, i)
        else:
            loss, figures = clipped_loss(log_prob - anchor, advantages, cfg.clip_range, weight)
        return loss, row | figures
