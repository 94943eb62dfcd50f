"""The forward process: clean latents with noise added, and what the denoiser was trained to answer there.

What the error of a denoiser is measured by, at any time and without a trajectory: the bound of Diffusion-DPO (Wallace
et al. 2023), in which the error stands for the log-likelihood of an image. Pure functions; noise is an argument.

Time runs from 0 (image) to 1 (noise). A rectified flow takes it as it is; a model with a beta schedule takes the
timestep floor(time T) of its T.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from pydantic import BaseModel, Field, model_validator

from diffusion.steps import at_least_float32
from raysteer.errors import ModelError

_MEAN, _STD = 0.0, 1.0  # Esser et al. 2024


class TimesConfig(BaseModel, frozen=True, extra="forbid"):
    """At which times images are noised, between ``low`` and ``high``.

    ``uniform``: any alike. ``logit_normal``: low + (high - low) sigmoid(mean + std z) with z standard normal, which
    prefers the middle (Esser et al. 2024); ``mean`` above 0 moves it towards noise.
    """

    kind: Literal["uniform", "logit_normal"] = "uniform"
    mean: float = Field(default=_MEAN, allow_inf_nan=False)
    std: float = Field(default=_STD, gt=0.0, allow_inf_nan=False)
    low: float = Field(default=0.0, ge=0.0, lt=1.0)
    high: float = Field(default=1.0, gt=0.0, le=1.0)

    @model_validator(mode="after")
    def _possible(self) -> TimesConfig:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low:g}) must be below high ({self.high:g}): times lie between them")
        for name, value, usual in (("mean", self.mean, _MEAN), ("std", self.std, _STD)):
            if self.kind == "uniform" and value != usual:
                raise ValueError(f"{name} ({value:g}) is of kind 'logit_normal': leave it out, or set kind to that")
        return self

    def draw(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Times float64 of that shape, low <= time <= high."""
        if self.kind == "uniform":
            share = rng.random(shape)
        else:
            share = 1.0 / (1.0 + np.exp(-(self.mean + self.std * rng.standard_normal(shape))))
        return self.low + (self.high - self.low) * share


@dataclass(frozen=True)
class Noised:
    """Noised latents and what is asked of the denoiser there.

    Attributes:
        x_t: float32 (float64 of float64) [n, C, h, w].
        target: what a perfect denoiser would predict, as ``x_t``.
        timestep: [n], as the denoiser is told it: float32 for flows, int64 for beta schedules.
    """

    x_t: torch.Tensor
    target: torch.Tensor
    timestep: torch.Tensor


class Noising(Protocol):
    """The forward process of one model."""

    def __call__(self, x0: torch.Tensor, noise: torch.Tensor, time: np.ndarray) -> Noised:
        """Noise clean latents.

        Args:
            x0: latents [n, C, h, w], scaled as the denoiser sees them.
            noise: standard normal, the shape of ``x0``.
            time: float64 [n], from 0 to 1, one for each image.
        """
        ...


class FlowNoising:
    """Rectified flow (Liu et al. 2022): x_t = (1 - t) x0 + t eps, target v = eps - x0, timestep t T."""

    def __init__(self, train_timesteps: int = 1000) -> None:
        self.train_timesteps = train_timesteps

    @classmethod
    def from_scheduler(cls, scheduler_config: Mapping[str, Any]) -> FlowNoising:
        """The process of a diffusers flow scheduler. Its shift is about sampling and plays no part."""
        return cls(int(scheduler_config.get("num_train_timesteps", 1000)))

    def __call__(self, x0: torch.Tensor, noise: torch.Tensor, time: np.ndarray) -> Noised:
        x0 = at_least_float32(x0)
        noise = noise.to(x0)
        x_t = _each(1.0 - time, x0) * x0 + _each(time, x0) * noise
        timestep = torch.from_numpy((time * self.train_timesteps).astype(np.float32)).to(x0.device)
        return Noised(x_t, noise - x0, timestep)


class BetaNoising:
    """A beta schedule (Ho et al. 2020): x_t = sqrt(a_t) x0 + sqrt(1 - a_t) eps, a = cumulative alpha.

    The target is what the model predicts: eps, v = sqrt(a_t) eps - sqrt(1 - a_t) x0 (Salimans & Ho 2022), or x0. Errors
    of different prediction types differ by a factor that depends on t, so they weigh times differently.

    Args:
        alphas_cumprod: [T], a_t of every training timestep.
        prediction_type: "epsilon", "v_prediction" or "sample".

    Raises:
        ModelError: another prediction type.
    """

    def __init__(self, alphas_cumprod: np.ndarray, prediction_type: str = "epsilon") -> None:
        if prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise ModelError(
                "scheduler", f"prediction_type {prediction_type!r} is unknown", "use epsilon, v_prediction or sample"
            )
        self.alphas_cumprod = np.asarray(alphas_cumprod, np.float64)
        self.prediction_type = prediction_type

    @classmethod
    def from_scheduler(cls, scheduler_config: Mapping[str, Any]) -> BetaNoising:
        """The process of any diffusers scheduler with betas."""
        from diffusers import DDIMScheduler

        scheduler = DDIMScheduler.from_config(dict(scheduler_config))
        return cls(scheduler.alphas_cumprod.double().numpy(), scheduler.config.prediction_type)

    def __call__(self, x0: torch.Tensor, noise: torch.Tensor, time: np.ndarray) -> Noised:
        x0 = at_least_float32(x0)
        noise = noise.to(x0)
        count = len(self.alphas_cumprod)
        timestep = np.clip(np.floor(time * count).astype(np.int64), 0, count - 1)
        alpha = self.alphas_cumprod[timestep]
        to_image, to_noise = _each(np.sqrt(alpha), x0), _each(np.sqrt(1.0 - alpha), x0)
        target = noise
        if self.prediction_type == "v_prediction":
            target = to_image * noise - to_noise * x0
        elif self.prediction_type == "sample":
            target = x0
        return Noised(to_image * x0 + to_noise * noise, target, torch.from_numpy(timestep).to(x0.device))


def _each(factor: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    """One factor for each image [n, 1, 1, 1], worked out in float64, in the dtype and on the device of ``like``."""
    return torch.from_numpy(np.asarray(factor, np.float64)).to(like).view(-1, 1, 1, 1)
