"""Stochastic denoising steps with a density: what a sampler draws and a learner scores.

Invariants
1. Round, then score: ``step`` rounds the new latent to the storage dtype and scores the rounded latent, so scoring
   what was stored gives the very same number.
2. A log-prob is the mean over latent dimensions, in float32, whatever the half precision of the model. (float64 stays
   float64 throughout, so that gradients can be checked against finite differences.)
3. A step without noise (sigma = 0) has no density: it can be taken, never scored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from raysteer.errors import ConfigError, ModelError

_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


@dataclass(frozen=True)
class StepOutput:
    """One denoising step of a batch.

    Attributes:
        x_prev: [n, C, h, w], already rounded to the storage dtype.
        log_prob: float32 [n] of exactly that ``x_prev``; ``None`` when the step has no noise.
        mean: float32 [n, C, h, w].
    """

    x_prev: torch.Tensor
    log_prob: torch.Tensor | None
    mean: torch.Tensor


class Stepper(Protocol):
    """What samplers and objectives need of a noise schedule; everything is indexed by the step i = 0 .. num_steps-1."""

    timesteps: np.ndarray
    sigmas: np.ndarray

    @property
    def num_steps(self) -> int: ...

    def mean(self, model_output: torch.Tensor, x_t: torch.Tensor, i: int) -> torch.Tensor: ...

    def step(
        self,
        model_output: torch.Tensor,
        x_t: torch.Tensor,
        i: int,
        noise: torch.Tensor | None,
        storage_dtype: torch.dtype,
    ) -> StepOutput: ...

    def log_prob(
        self, model_output: torch.Tensor, x_t: torch.Tensor, x_prev: torch.Tensor, i: int
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


class LinearGaussian:
    """A step whose mean is linear in latents and model output: x_p ~ N(coef_x x_t + coef_out out, sigma^2 I).

    That covers DDIM for every prediction type and the rectified-flow SDEs. A step keeps its two coefficients, worked
    out in float64, so that a division by a small number costs no float32 digits.

    Attributes:
        timesteps: [N], descending, as the denoiser is told them (int64 for DDIM, float32 for flows).
        sigmas: float32 [N], standard deviation of the noise that step i injects; 0 for a deterministic step.
    """

    def __init__(self, timesteps: np.ndarray, sigmas: np.ndarray, coef_x: np.ndarray, coef_out: np.ndarray) -> None:
        self.timesteps = np.asarray(timesteps)
        self.sigmas = np.asarray(sigmas).astype(np.float32)
        self._coef_x, self._coef_out = np.asarray(coef_x, np.float64), np.asarray(coef_out, np.float64)

    @property
    def num_steps(self) -> int:
        """Number of steps N."""
        return len(self.timesteps)

    def mean(self, model_output: torch.Tensor, x_t: torch.Tensor, i: int) -> torch.Tensor:
        """Mean of x_prev at step ``i``; float32 (float64 of float64), the shape of ``x_t``."""
        x_t, model_output = at_least_float32(x_t), at_least_float32(model_output)
        return float(self._coef_x[i]) * x_t + float(self._coef_out[i]) * model_output

    def density(self, x: torch.Tensor, mean: torch.Tensor, i: int) -> torch.Tensor:
        """Log-prob [n] of ``x`` at step ``i``, whose sigma is not 0."""
        return gaussian_log_prob(x, mean, float(self.sigmas[i]))

    def step(
        self,
        model_output: torch.Tensor,
        x_t: torch.Tensor,
        i: int,
        noise: torch.Tensor | None,
        storage_dtype: torch.dtype,
    ) -> StepOutput:
        """Take step ``i`` for the whole batch with the given standard normal ``noise`` (ignored when sigma is 0)."""
        mean = self.mean(model_output, x_t, i)
        sigma = float(self.sigmas[i])
        if sigma == 0.0:
            return StepOutput(mean.to(storage_dtype), None, mean)
        if noise is None:
            raise ValueError(f"step {i} has sigma {sigma:.4f}: it needs noise")
        x_prev = (mean + sigma * at_least_float32(noise)).to(storage_dtype)
        return StepOutput(x_prev, self.density(x_prev, mean, i), mean)

    def log_prob(
        self, model_output: torch.Tensor, x_t: torch.Tensor, x_prev: torch.Tensor, i: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Score a stored transition: (log_prob float32 [n], mean float32 [n, C, h, w]).

        Raises:
            ValueError: step ``i`` has no noise, hence no density.
        """
        if self.sigmas[i] == 0.0:
            raise ValueError(f"step {i} is deterministic (sigma 0) and has no log-prob; do not train it")
        mean = self.mean(model_output, x_t, i)
        return self.density(x_prev, mean, i), mean


class DDIMEta(LinearGaussian):
    """DDIM with noise level eta as a Gaussian policy (Song et al. 2021, eq. 12 and 16; Black et al. 2023, DDPO).

    sigma_t^2 = eta^2 (1-a_p)/(1-a_t) (1-a_t/a_p); x_p ~ N(sqrt(a_p) x0 + sqrt(1-a_p-sigma_t^2) eps, sigma_t^2 I),
    with a = cumulative alpha and p = t - T/N. Past the end of the schedule (p < 0), a_p is the scheduler's final alpha.

    The prediction type (epsilon, v or sample) decides the two coefficients and nothing else.

    Attributes:
        eta: 0 (deterministic) to 1 (DDPM).
    """

    def __init__(
        self,
        timesteps: np.ndarray,
        alpha_t: np.ndarray,
        alpha_prev: np.ndarray,
        eta: float,
        prediction_type: str = "epsilon",
    ) -> None:
        if not 0.0 <= eta <= 1.0:
            raise ConfigError("sampling.eta", eta, "use a value from 0 (deterministic) to 1 (DDPM)")
        a_t, a_p = np.asarray(alpha_t, np.float64), np.asarray(alpha_prev, np.float64)
        variance = (1.0 - a_p) / (1.0 - a_t) * (1.0 - a_t / a_p)
        sigma = eta * np.sqrt(np.clip(variance, 0.0, None))
        to_x0, to_eps = np.sqrt(a_p), np.sqrt(np.clip(1.0 - a_p - sigma**2, 0.0, None))
        s_t, n_t = np.sqrt(a_t), np.sqrt(1.0 - a_t)  # x_t = s_t x0 + n_t eps
        if prediction_type == "epsilon":
            with np.errstate(divide="ignore", invalid="ignore"):
                coef_x, coef_out = to_x0 / s_t, to_eps - to_x0 * n_t / s_t
        elif prediction_type == "v_prediction":
            coef_x, coef_out = to_x0 * s_t + to_eps * n_t, to_eps * s_t - to_x0 * n_t
        elif prediction_type == "sample":
            coef_x, coef_out = to_eps / n_t, to_x0 - to_eps * s_t / n_t
        else:
            raise ModelError(
                "scheduler", f"prediction_type {prediction_type!r} is unknown", "use epsilon, v_prediction or sample"
            )
        if not (np.isfinite(coef_x).all() and np.isfinite(coef_out).all()):
            raise ModelError(
                "scheduler",
                f"alpha is 0 at the first timestep, where {prediction_type} prediction is undefined",
                "use a v_prediction model or a schedule without rescale_betas_zero_snr",
            )
        super().__init__(np.asarray(timesteps, np.int64), sigma, coef_x, coef_out)
        self.eta = float(eta)

    @classmethod
    def from_scheduler(cls, scheduler_config: Mapping[str, Any], steps: int, eta: float) -> DDIMEta:
        """Build the schedule from a diffusers scheduler's config (any scheduler with betas; DDIM rules are applied).

        Raises:
            ConfigError: ``steps`` is not between 1 and the number of training timesteps.
            ModelError: the scheduler clips or thresholds predictions, which leaves no Gaussian density, or its noise
                levels are not those of a beta schedule.
        """
        from diffusers import DDIMScheduler

        name = str(scheduler_config.get("_class_name", ""))
        if name.startswith(("EDM", "FlowMatch")):
            raise ModelError("scheduler", f"{name} has no beta schedule", "use a model trained with one (DDPM, DDIM)")
        for key in ("clip_sample", "thresholding"):
            if scheduler_config.get(key):
                raise ModelError(
                    "scheduler", f"{key} is on, so a step has no Gaussian density", f"set {key} to false in its config"
                )
        scheduler = DDIMScheduler.from_config(dict(scheduler_config), clip_sample=False)
        train_steps = int(scheduler.config.num_train_timesteps)
        if not 1 <= steps <= train_steps:
            raise ConfigError(
                "sampling.steps", steps, f"use 1 to {train_steps}, the timesteps the model was trained on"
            )
        scheduler.set_timesteps(steps)
        timesteps = scheduler.timesteps.numpy().astype(np.int64)
        if timesteps.max() >= train_steps:  # steps_offset moves the first one past the end
            raise ConfigError("sampling.steps", steps, f"use 1 to {train_steps - 1}: this schedule starts one later")
        previous = timesteps - train_steps // steps
        alphas = scheduler.alphas_cumprod.double().numpy()
        alpha_prev = np.where(previous >= 0, alphas[np.maximum(previous, 0)], float(scheduler.final_alpha_cumprod))
        return cls(timesteps, alphas[timesteps], alpha_prev, eta, scheduler.config.prediction_type)


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Half precision as float32; anything else as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def gaussian_log_prob(x: torch.Tensor, mean: torch.Tensor, sigma: float) -> torch.Tensor:
    """log N(x; mean, sigma^2 I), MEAN over all but the first dimension; [n], dtype of ``mean`` (Black et al. 2023)."""
    squared = ((at_least_float32(x) - mean) ** 2).flatten(1).mean(1)
    return -squared / (2.0 * sigma * sigma) - math.log(sigma) - _HALF_LOG_2PI
