"""GDRO: group-level direct reward optimisation (arXiv 2601.02036): rank a group's images by how well each is denoised.

s_i = -beta ( err_theta(x_i) - err_ref(x_i) ),   err = mean over latent dimensions of (target - prediction)^2
L   = ranking_loss(s, r / tau) + gamma sum_i M_i err_theta(x_i),   M one-hot on the best image

A clean latent is noised to some time and denoised by the policy and by the reference (the adapter off); s is the
*implicit reward* of Diffusion-DPO's bound (Wallace et al. 2023). Who drew the image, how, and with which weights plays
no part: no ratio, no stored step, no parity gate. So the same class trains from rollouts and from a dataset.

err is a *mean*: the KL coefficient that beta stands for is beta / d in nats, as everything in raysteer that is a mean
over the d latent dimensions. See docs/gdro.md for what that means between resolutions and between papers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field, model_validator

from diffusion.noising import Noised, TimesConfig
from diffusion.steps import at_least_float32
from learner.advantages import group_advantages
from learner.ranking import Ranking, best_share, ordered_share, ranking_loss, target_kl
from raysteer.errors import ConfigError

if TYPE_CHECKING:
    from diffusion.conditioning import Conditioning
    from diffusion.policy import DiffusionPolicy
    from diffusion.sampling import Trajectory
    from diffusion.steps import Stepper

Figures = dict[str, float]
FIGURES = ("ranking", "sft", "target_kl", "margin", "accuracy", "err_theta", "err_ref", "flat_groups")


class GDROConfig(BaseModel, frozen=True, extra="forbid"):
    """Parameters of the GDRO objective; Diffusion-DPO is subset 2, tau 0, gamma 0.

    ``beta`` holds the policy to the reference; more holds it closer. ``tau`` is the temperature of the rewards, in
    their own units (``std: none``) or in those of their deviation: differences well above it are an order, those well
    below it are none; 0 ranks by order alone. ``gamma`` weighs plain training on the best image, which keeps the
    ranking from being won by denoising the others badly. ``ranking: top1`` asks for the best image only.

    A group is visited ``draws`` times a step. Every draw takes ``subset`` of its images (None: all), at random or with
    ``subset_choice: extremes`` the best and the worst, and noises them: at one time for all of them (``shared_time``)
    and with one noise (``shared_noise``), or each on its own. ``updates_per_batch`` splits the draws over several
    updates.

    ``std`` divides rewards by a deviation first, as GRPO's advantages are (and as ``reward.mix: group`` needs),
    ``std_floor`` being the least one.
    """

    name: Literal["gdro"] = "gdro"
    beta: float = Field(default=12.0, gt=0.0, allow_inf_nan=False)
    tau: float = Field(default=0.05, ge=0.0, allow_inf_nan=False)
    gamma: float = Field(default=0.5, ge=0.0, allow_inf_nan=False)
    ranking: Ranking = "full"
    subset: int | None = Field(default=None, ge=2)
    subset_choice: Literal["random", "extremes"] = "random"
    draws: int = Field(default=1, ge=1)
    timesteps: TimesConfig = TimesConfig()
    shared_time: bool = True
    shared_noise: bool = True
    std: Literal["none", "group", "batch", "mixed"] = "none"
    std_floor: float = Field(default=1e-4, gt=0.0, allow_inf_nan=False)
    updates_per_batch: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _possible(self) -> GDROConfig:
        if self.draws % self.updates_per_batch:
            divisors = [n for n in range(1, self.draws + 1) if self.draws % n == 0]
            raise ValueError(f"updates_per_batch must divide the {self.draws} draws: use one of {divisors}")
        if self.subset_choice == "extremes" and self.subset != 2:
            raise ValueError("subset_choice 'extremes' takes the best image and the worst: set subset to 2")
        return self

    def images(self, group_size: int) -> int:
        """How many images of a group one draw takes.

        Raises:
            ConfigError: the group has fewer.
        """
        if self.subset is not None and self.subset > group_size:
            raise ConfigError("objective.subset", self.subset, f"a group has {group_size} images: use that or less")
        return group_size if self.subset is None else self.subset


@dataclass(frozen=True)
class Lots:
    """What is drawn at random for one group at one step: a function of settings, group size and seed alone.

    Attributes:
        order: int64 [draws, G], the images shuffled; a random subset is the first of them.
        time: float64 [draws, G], from 0 (image) to 1 (noise).
        noise_seed: int64 [draws, G].
    """

    order: np.ndarray
    time: np.ndarray
    noise_seed: np.ndarray

    @classmethod
    def draw(cls, cfg: GDROConfig, group_size: int, seed: int) -> Lots:
        """The lots of a group of ``group_size`` images."""
        rng, shape = np.random.Generator(np.random.Philox(seed)), (cfg.draws, group_size)
        order = rng.permuted(np.tile(np.arange(group_size), (cfg.draws, 1)), axis=1)
        time, noise_seed = cfg.timesteps.draw(rng, shape), rng.integers(2**63, size=shape)
        if cfg.shared_time:
            time = np.repeat(time[:, :1], group_size, axis=1)
        if cfg.shared_noise:
            noise_seed = np.repeat(noise_seed[:, :1], group_size, axis=1)
        return cls(order, time, noise_seed)

    def noise(self, draw: int, images: np.ndarray, shape: Sequence[int]) -> torch.Tensor:
        """Standard normal float32 [len(images), *shape], drawn on the CPU."""
        seeds = [int(seed) for seed in self.noise_seed[draw, images]]
        return torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


class GDRO:
    """The objective registered as "gdro"."""

    parity_tolerance = None

    def __init__(self, cfg: GDROConfig) -> None:
        self.cfg = cfg

    def advantages(self, rewards: np.ndarray) -> np.ndarray:
        """The rewards themselves, float32 [n_groups, G], or with ``std`` their group-relative advantages."""
        if self.cfg.std == "none":
            return np.asarray(rewards, np.float32)
        return group_advantages(rewards, self.cfg.std, self.cfg.std_floor)

    def positions(self, trajectory: Trajectory) -> int:
        """The draws."""
        return self.cfg.draws

    def prepare(
        self, policy: DiffusionPolicy, stepper: Stepper, trajectory: Trajectory, guidance_scale: float, seed: int
    ) -> Lots:
        """The lots of a group. The reference needs no visit before the first update: it never changes.

        Raises:
            ConfigError: the group has fewer images than ``objective.subset``.
        """
        self.cfg.images(trajectory.group_size)
        return Lots.draw(self.cfg, trajectory.group_size, seed)

    def loss(
        self,
        policy: DiffusionPolicy,
        stepper: Stepper,
        trajectory: Trajectory,
        advantages: np.ndarray | torch.Tensor,
        positions: Sequence[int],
        guidance_scale: float,
        prepared: Lots | None = None,
        proximal_at: float = 0.0,
    ) -> tuple[torch.Tensor, Figures]:
        """Mean loss of one group over the given draws.

        A draw whose images have equal rewards has nothing to rank and no best image: its loss is 0, without a forward,
        and it counts in ``flat_groups`` (and as 0 in the other figures).

        Args:
            policy: the current policy; gradients reach its adapter only.
            advantages: rewards [G], finite.
            positions: draws; one forward of the policy and one of the reference each.
            guidance_scale: for denoisers that take it as an input; others predict without guidance.
            prepared: what ``prepare`` returned for this group.

        Returns:
            The scalar loss and, as means over the draws: ranking and sft (the two parts, sft without gamma), target_kl
            (what is left to gain of ranking), margin (s of the best image less that of the worst), accuracy (share of
            pairs ordered as the rewards are), err_theta, err_ref, flat_groups.

        Raises:
            ValueError: no draw, no lots, or rewards that are not [G] finite numbers.
        """
        if not positions:
            raise ValueError("positions is empty: name at least one draw")
        if prepared is None:
            raise ValueError("nothing was drawn for this group: call prepare before the first loss of a batch")
        rewards = np.array(advantages, np.float32)
        if rewards.shape != (trajectory.group_size,):
            raise ValueError(f"{rewards.shape} rewards for a group of {trajectory.group_size}")
        if not np.isfinite(rewards).all():
            raise ValueError("rewards must be finite: drop poisoned groups before ranking")
        losses, rows = [], []
        for draw in positions:
            images = self._images(rewards, prepared.order[draw])
            loss, row = self._draw_loss(policy, trajectory, rewards[images], images, draw, guidance_scale, prepared)
            losses.append(loss)
            rows.append(row)
        return torch.stack(losses).mean(), {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}

    def parity(self, policy: DiffusionPolicy, stepper: Stepper, trajectory: Trajectory, guidance_scale: float) -> float:
        """0: there is no ratio."""
        return 0.0

    def _images(self, rewards: np.ndarray, order: np.ndarray) -> np.ndarray:
        """Indices [k] of the images of one draw; the shuffled order decides between equal extremes."""
        if self.cfg.subset_choice == "extremes":
            return order[[rewards[order].argmax(), rewards[order].argmin()]]
        return np.sort(order[: self.cfg.images(len(rewards))])

    def _draw_loss(
        self,
        policy: DiffusionPolicy,
        trajectory: Trajectory,
        rewards: np.ndarray,
        images: np.ndarray,
        draw: int,
        guidance_scale: float,
        lots: Lots,
    ) -> tuple[torch.Tensor, Figures]:
        cfg = self.cfg
        if rewards.max() == rewards.min():
            nothing = torch.zeros((), device=policy.device, requires_grad=True)
            return nothing, dict.fromkeys(FIGURES, 0.0) | {"flat_groups": 1.0}
        x0 = trajectory.latents(policy.device)[torch.from_numpy(images)]
        noise = lots.noise(draw, images, x0.shape[1:]).to(policy.device)
        noised = policy.noising(x0, noise, lots.time[draw, images])
        cond = policy.encode([trajectory.prompt]).expand(len(images))
        with torch.no_grad(), policy.adapter_disabled():
            reference = denoising_error(policy, noised, cond, guidance_scale)
        error = denoising_error(policy, noised, cond, guidance_scale)
        scores = -cfg.beta * (error - reference)
        r = torch.from_numpy(rewards).to(scores)
        ranking = ranking_loss(scores, r, cfg.tau, cfg.ranking)
        sft = (best_share(r) * error).sum()
        with torch.no_grad():
            best, worst = best_share(r), best_share(-r)
            figures = {
                "ranking": ranking.item(),
                "sft": sft.item(),
                "target_kl": target_kl(scores, r, cfg.tau, cfg.ranking).item(),
                "margin": ((best - worst) * scores).sum().item(),
                "accuracy": ordered_share(scores, r).item(),
                "err_theta": error.mean().item(),
                "err_ref": reference.mean().item(),
                "flat_groups": 0.0,
            }
        return ranking + cfg.gamma * sft, figures


def denoising_error(policy: DiffusionPolicy, noised: Noised, cond: Conditioning, guidance_scale: float) -> torch.Tensor:
    """err [n], float32 (float64 of float64): squared error of the prediction, mean over latent dimensions.

    The prediction is that of the conditional model, as it was trained: without classifier-free guidance, and with
    ``guidance_scale`` where the denoiser takes it as an input.
    """
    scale = guidance_scale if policy.family.embedded_guidance else 1.0
    output = at_least_float32(policy.predict(noised.x_t, noised.timestep, cond, scale))
    return ((output - noised.target) ** 2).flatten(1).mean(1)
