"""Policies on real tiny pipelines for tests: moved off their base model, drawn from, scored and differentiated.

All helpers take any saved pipeline folder and any sampling configuration, so that what is tested of one family is
tested of every family.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from diffusion.policy import DiffusionPolicy, LoRAConfig, ModelConfig
from diffusion.sampling import Rollout, SamplingConfig, Trajectory, sample_rollout
from diffusion.steps import Stepper
from learner.replay import replay

GUIDANCE = 5.0
PROMPT = "a toxic sign"


class Drawn(NamedTuple):
    """A policy, its schedule, and a group it has just drawn."""

    policy: DiffusionPolicy
    stepper: Stepper
    rollout: Rollout


class Exact(NamedTuple):
    """The same in float64: the stored log-probs are those of this very policy."""

    policy: DiffusionPolicy
    stepper: Stepper
    trajectory: Trajectory


def moved(policy: DiffusionPolicy, scale: float, seed: int = 0) -> DiffusionPolicy:
    """The policy itself, its adapter moved by ``scale`` times standard normal noise."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.trainable_parameters():
        parameter.data += (scale * torch.randn(parameter.shape, generator=generator)).to(parameter)
    return policy


def load(folder: Path, dtype: str = "float32", rank: int = 4, **model: Any) -> DiffusionPolicy:
    """A policy of the pipeline in ``folder``; ``model`` are further values of ModelConfig."""
    config = {"path": str(folder), "dtype": dtype, "lora": LoRAConfig(rank=rank), **model}
    return DiffusionPolicy.load(ModelConfig.model_validate(config))


@functools.cache
def drawn(
    folder: Path, cfg: SamplingConfig, dtype: str = "float32", scale: float = 0.05, resolution: int | None = None
) -> Drawn:
    """A policy ``scale`` away from its base model, and a group of ``PROMPT`` it has drawn. Shared between tests: do
    not change it, or use ``restored``.
    """
    policy = moved(load(folder, dtype, resolution=resolution), scale)
    return Drawn(policy, policy.stepper(cfg), sample_rollout(policy, PROMPT, range(cfg.group_size), cfg, step_seed=0))


@contextmanager
def restored(made: Drawn) -> Iterator[Drawn]:
    """``made``, with an adapter that may be moved inside."""
    state = made.policy.adapter_state()
    try:
        yield made
    finally:
        made.policy.load_adapter(state)


@functools.cache
def exact(folder: Path, cfg: SamplingConfig, scale: float = 0.05) -> Exact:
    """The policy and group of ``drawn`` in float64, denoiser and adapter. Shared between tests: do not change it."""
    sampler, stepper, rollout = drawn(folder, cfg, scale=scale)
    policy = DiffusionPolicy.load(sampler.config)
    policy.load_adapter(sampler.adapter_state())
    policy.denoiser.double()
    policy.dtype = torch.float64
    t = rollout.trajectory
    t = replace(t, x_t=t.x_t.astype(np.float64), x_prev=t.x_prev.astype(np.float64), dtype="float64")
    log_prob = score(policy, stepper, t, range(t.num_positions), cfg.guidance_scale).numpy().T.copy()
    return Exact(policy, stepper, replace(t, log_prob=log_prob))


@torch.no_grad()
def score(
    policy: DiffusionPolicy, stepper: Stepper, t: Trajectory, positions: Iterable[int], guidance: float = GUIDANCE
) -> torch.Tensor:
    """Log-probs [positions, G] under this policy."""
    return torch.stack([replay(policy, stepper, t, k, guidance)[0] for k in positions])


@torch.no_grad()
def means(
    policy: DiffusionPolicy, stepper: Stepper, t: Trajectory, positions: Iterable[int], guidance: float = GUIDANCE
) -> torch.Tensor:
    """Means [positions, G, C, h, w] under this policy."""
    return torch.stack([replay(policy, stepper, t, k, guidance)[1] for k in positions])


def gradient(policy: DiffusionPolicy, loss: torch.Tensor) -> torch.Tensor:
    """Gradient of ``loss`` over the flattened adapter; parameters the loss does not depend on count as zeros."""
    grads = torch.autograd.grad(loss, policy.trainable_parameters(), allow_unused=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in grads])


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Length of ``a - b`` relative to that of ``a``."""
    return ((a - b).norm() / a.norm()).item()
