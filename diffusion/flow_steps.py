"""Rectified-flow steps with a density: x_t = (1 - t) x0 + t x1, velocity v = x1 - x0, t from 1 (noise) to 0 (image).

Invariants
1. Every kind at level 0 is the Euler step x + (t_prev - t) v, hence ``FlowMatchEulerDiscreteScheduler.step``.
2. A step is linear in (x_t, v), so its coefficients are worked out once, in float64, like those of DDIM.
3. The first step starts at t = 1, where the SDE's noise level is infinite; it uses the second time instead and stays
   finite (Flow-GRPO, Liu et al. 2025).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field, model_validator

from diffusion.steps import LinearGaussian, at_least_float32
from raysteer.errors import ConfigError, ModelError


class FlowNoiseConfig(BaseModel, frozen=True, extra="forbid"):
    """How much noise a stochastic step of a rectified-flow model injects.

    ``sde``: sigma_t = level sqrt(t / (1 - t)) (Flow-GRPO; published levels 0.7 to 0.9). ``constant``: sigma_t = level
    (DanceGRPO; 0.3). ``cps``: a share sin(level pi / 2) of the noise left is drawn anew (Flow-CPS; 0.8); its log-prob
    is minus the mean squared distance, so clip ranges do not carry over from the other two.
    """

    kind: Literal["sde", "constant", "cps"] = "sde"
    level: float = Field(default=0.7, gt=0.0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _enough_noise_left(self) -> FlowNoiseConfig:
        if self.kind == "cps" and self.level > 1.0:
            raise ValueError(f"level {self.level:g} with kind 'cps' redraws more noise than there is: use at most 1")
        return self


class FlowODE(LinearGaussian):
    """The Euler step of the probability flow: no noise, hence no density."""

    def __init__(self, times: np.ndarray, train_timesteps: int = 1000) -> None:
        t, t_prev = _pairs(times)
        zeros = np.zeros(len(t))
        super().__init__(_timesteps(t, train_timesteps), zeros, np.ones(len(t)), t_prev - t)


class FlowSDE(LinearGaussian):
    """Euler-Maruyama step of the SDE with the flow's marginals (Flow-GRPO, Liu et al. 2025, eq. 9).

    sigma_t = level sqrt(t / (1 - t')), t' = t but the second time at t = 1;
    x_p ~ N(x (1 - D sigma_t^2 / 2t) - v D (1 + sigma_t^2 (1 - t) / 2t), D sigma_t^2 I), D = t - t_p.
    """

    def __init__(self, times: np.ndarray, level: float, train_timesteps: int = 1000) -> None:
        t, t_prev = _pairs(times)
        below_one = np.where(t < 1.0, t, t_prev)
        noise = _checked(level) * np.sqrt(t / (1.0 - below_one))
        super().__init__(_timesteps(t, train_timesteps), *_sde_coefficients(t, t_prev, noise))


class ConstantEta(LinearGaussian):
    """The same SDE with sigma_t = level at every time (DanceGRPO, Xue et al. 2025)."""

    def __init__(self, times: np.ndarray, level: float, train_timesteps: int = 1000) -> None:
        t, t_prev = _pairs(times)
        noise = np.full(len(t), _checked(level))
        super().__init__(_timesteps(t, train_timesteps), *_sde_coefficients(t, t_prev, noise))


class FlowCPS(LinearGaussian):
    """Coefficients-preserving step (Flow-CPS, arXiv 2509.05952): fresh noise takes the place of predicted noise.

    std = t_p sin(level pi / 2); x_p ~ N((1 - t_p) x0 + sqrt(t_p^2 - std^2) x1, std^2 I), so the noise of x_p has
    standard deviation t_p exactly. The last step (t_p = 0) has no noise.

    ``density`` is minus the mean squared distance, without 1 / (2 std^2) and constants: a tempered log-prob.
    """

    def __init__(self, times: np.ndarray, level: float, train_timesteps: int = 1000) -> None:
        if level > 1.0:
            raise ConfigError("sampling.flow.level", level, "with sampling.flow.kind cps use at most 1 (all noise new)")
        t, t_prev = _pairs(times)
        std = t_prev * np.sin(_checked(level) * np.pi / 2)
        to_x0, to_x1 = 1.0 - t_prev, np.sqrt(np.clip(t_prev**2 - std**2, 0.0, None))
        super().__init__(_timesteps(t, train_timesteps), std, to_x0 + to_x1, to_x1 * (1.0 - t) - to_x0 * t)

    def density(self, x: torch.Tensor, mean: torch.Tensor, i: int) -> torch.Tensor:
        return -((at_least_float32(x) - mean) ** 2).flatten(1).mean(1)


def flow_stepper(
    flow: FlowNoiseConfig, times: np.ndarray, deterministic: bool = False, train_timesteps: int = 1000
) -> LinearGaussian:
    """The stepper of a noise configuration.

    Args:
        flow: kind and level of the noise.
        times: [N + 1], strictly falling from 1 to 0 (``flow_sigmas``).
        deterministic: Euler steps whatever ``flow`` says.
        train_timesteps: the denoiser is told ``times * train_timesteps``.
    """
    if deterministic:
        return FlowODE(times, train_timesteps)
    kinds = {"sde": FlowSDE, "constant": ConstantEta, "cps": FlowCPS}
    return kinds[flow.kind](times, flow.level, train_timesteps)


_REFUSED = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas", "stochastic_sampling")


def flow_sigmas(
    scheduler_config: Mapping[str, Any],
    steps: int,
    image_seq_len: int,
    shift: float | None = None,
    spacing: Literal["scheduler", "uniform"] = "scheduler",
) -> np.ndarray:
    """Times of a schedule, float32 [steps + 1] from 1 to 0, exactly as a diffusers pipeline would set them.

    Args:
        scheduler_config: config of a ``FlowMatchEulerDiscreteScheduler`` (static, dynamic and terminal shift).
        steps: number of steps N.
        image_seq_len: tokens the denoiser makes of one latent; dynamic shifting grows with it.
        shift: a static shift that takes the place of the scheduler's own shift, static or dynamic.
        spacing: where the pipeline's times lie before the shift. ``scheduler``: its own, as
            ``StableDiffusion3Pipeline`` has it; ``uniform``: 1, 1 - 1/N ... 1/N, as ``FluxPipeline`` has it.

    Raises:
        ConfigError: ``steps`` or ``shift`` leave no falling sequence of times.
        ModelError: another scheduler, or one with an option that is not supported.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler as Scheduler

    name = scheduler_config.get("_class_name", Scheduler.__name__)
    if name != Scheduler.__name__:
        raise ModelError("scheduler", f"{name} is not a rectified-flow scheduler we know", f"use {Scheduler.__name__}")
    for key in _REFUSED:
        if scheduler_config.get(key):
            raise ModelError("scheduler", f"{key} is not supported", f"set {key} to false in scheduler_config.json")
    if steps < 1:
        raise ConfigError("sampling.steps", steps, "use at least 1")
    # without diffusers' own bookkeeping: it lists values as defaults, and would put those in place of ours
    given = {key: value for key, value in scheduler_config.items() if not key.startswith("_")}
    if shift is not None:
        if not 0.0 < shift < np.inf:
            raise ConfigError("sampling.shift", shift, "use a positive number; 1 shifts nothing")
        given |= {"use_dynamic_shifting": False, "shift": shift}
    scheduler = Scheduler.from_config(given)
    options: dict[str, Any] = {}
    if scheduler.config.use_dynamic_shifting:
        options["mu"] = _resolution_shift(image_seq_len, scheduler.config)
    if spacing == "uniform":
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps), **options)
    else:
        scheduler.set_timesteps(steps, **options)
    times = scheduler.sigmas.numpy().astype(np.float32)
    if not (np.isfinite(times).all() and (np.diff(times) < 0.0).all()):
        raise ConfigError("sampling.steps", steps, "this schedule's times do not fall at every step: use other steps")
    return times


def _resolution_shift(image_seq_len: int, config: Mapping[str, Any]) -> float:
    """Linear in the number of image tokens (Esser et al. 2024), as the pipelines work it out."""
    few, many = config["base_image_seq_len"], config["max_image_seq_len"]
    return config["base_shift"] + (config["max_shift"] - config["base_shift"]) * (image_seq_len - few) / (many - few)


def _pairs(times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(t, t_prev) of every step in float64. A shift may leave the first time a rounding error beside 1: it is 1."""
    times = np.asarray(times, np.float64).copy()
    if times.ndim != 1 or len(times) < 2 or not (np.diff(times) < 0.0).all() or times[-1] < 0.0:
        raise ValueError("times must fall strictly and end at 0 or above")
    if abs(times[0] - 1.0) < 1e-5:
        times[0] = 1.0
    if times[0] > 1.0:
        raise ValueError(f"the first time is {times[0]:g}: times lie between 0 and 1")
    return times[:-1], times[1:]


def _timesteps(t: np.ndarray, train_timesteps: int) -> np.ndarray:
    return t.astype(np.float32) * np.float32(train_timesteps)


def _checked(level: float) -> float:
    if not 0.0 <= level < np.inf:
        raise ConfigError("sampling.flow.level", level, "use 0 (deterministic) or more")
    return float(level)


def _sde_coefficients(t: np.ndarray, t_prev: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, ...]:
    """(std, coefficient of x_t, coefficient of v) of x + v dt + sigma^2 / 2t (x + (1 - t) v) dt, dt = t_prev - t."""
    delta, drift = t - t_prev, noise**2 / (2.0 * t)
    return noise * np.sqrt(delta), 1.0 - drift * delta, -delta * (1.0 + drift * (1.0 - t))
