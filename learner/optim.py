"""AdamW over the adapter, with gradients averaged over the ranks and a state that is plain numpy.

The gradient of an update is one flat float32 vector in the order of the parameters: one all_reduce per update, and the
clipping norm is that of the whole adapter (Pascanu et al. 2013) whatever the number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from pydantic import BaseModel, Field
from torch import nn


class OptimizerConfig(BaseModel, frozen=True, extra="forbid"):
    """AdamW (Loshchilov & Hutter 2019). `warmup_steps` counts updates; after them the rate is constant.

    With `ema_decay` the exported and evaluated adapter is the exponential moving average over about 1 / (1 - ema_decay)
    updates; samplers always draw with the raw one.
    """

    lr: float = Field(default=3e-4, gt=0.0, allow_inf_nan=False)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(default=1e-4, ge=0.0, allow_inf_nan=False)
    eps: float = Field(default=1e-8, gt=0.0, allow_inf_nan=False)
    max_grad_norm: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    warmup_steps: int = Field(default=0, ge=0)
    ema_decay: float | None = Field(default=None, ge=0.0, lt=1.0)


class AdapterOptimizer:
    """Optimiser of named parameters.

    Args: parameters (name, float32 parameter) in an order that is the same on every rank; cfg.
    """

    def __init__(self, parameters: Sequence[tuple[str, nn.Parameter]], cfg: OptimizerConfig) -> None:
        self.cfg = cfg
        self.names = [name for name, _ in parameters]
        self.parameters = [parameter for _, parameter in parameters]
        self.updates = 0
        self.adamw = torch.optim.AdamW(
            self.parameters, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, weight_decay=cfg.weight_decay, foreach=False
        )

    @property
    def lr(self) -> float:
        """Learning rate of the next update."""
        return self.cfg.lr * min(1.0, (self.updates + 1) / max(1, self.cfg.warmup_steps))

    def update(self) -> float:
        """Sum gradients over the ranks, clip, step, clear. Returns the gradient norm before clipping.

        Each rank's gradients must already carry the weight of its share of the batch. Raises FloatingPointError on a
        gradient that is not finite, before anything is changed; every rank raises alike.
        """
        flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).reshape(-1) for p in self.parameters])
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(flat)
        norm = float(flat.norm())
        if not np.isfinite(norm):
            raise FloatingPointError(f"gradient norm is {norm} at update {self.updates}")
        if norm > self.cfg.max_grad_norm:
            flat *= self.cfg.max_grad_norm / norm
        for parameter, gradient in zip(self.parameters, flat.split([p.numel() for p in self.parameters]), strict=True):
            parameter.grad = gradient.view_as(parameter).clone()
        for group in self.adamw.param_groups:
            group["lr"] = self.lr
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        self.updates += 1
        return norm

    def state(self) -> dict[str, np.ndarray]:
        """Moments by parameter name and the number of updates: all that a bit-exact continuation needs."""
        arrays: dict[str, np.ndarray] = {"updates": np.array([self.updates], np.int64)}
        for name, parameter in zip(self.names, self.parameters, strict=True):
            for key, value in self.adamw.state.get(parameter, {}).items():
                arrays[f"{key}/{name}"] = value.detach().cpu().numpy().copy()
        return arrays

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Restore what `state` returned. Raises KeyError when it belongs to other parameters."""
        self.updates = int(arrays["updates"][0])
        self.adamw.state.clear()
        if not self.updates:
            return
        for name, parameter in zip(self.names, self.parameters, strict=True):
            moments = {key: torch.tensor(arrays[f"{key}/{name}"]) for key in ("step", "exp_avg", "exp_avg_sq")}
            device = parameter.device
            self.adamw.state[parameter] = {k: v if k == "step" else v.to(device) for k, v in moments.items()}
