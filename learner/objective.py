"""What an objective is, and the table of those we have.

To add an objective: one file with a class that satisfies ``Objective`` and is constructed as ``Class(config)``, and one
line in ``OBJECTIVES``.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from raysteer.errors import ConfigError

if TYPE_CHECKING:
    from diffusion.policy import DiffusionPolicy
    from diffusion.sampling import Trajectory
    from diffusion.steps import Stepper

#: name in the recipe -> "module:Class" (imported only when it is built)
OBJECTIVES: dict[str, str] = {
    "grpo": "learner.grpo:GRPO",
}


class Objective(Protocol):
    """Turns sampled groups and their rewards into a loss. Stateless: optimiser, batching and ranks are the loop's."""

    def advantages(self, rewards: np.ndarray) -> np.ndarray:
        """float32 [n_groups, G] of the whole batch's rewards [n_groups, G]."""
        ...

    def loss(
        self,
        policy: DiffusionPolicy,
        stepper: Stepper,
        trajectory: Trajectory,
        advantages: np.ndarray | torch.Tensor,
        positions: Sequence[int],
        guidance_scale: float,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Scalar loss of one group at some of its trained steps, and figures to log.

        The loss is a mean over images and positions, so calling it position by position and averaging is the same;
        one position is one forward, which bounds the memory.
        """
        ...

    def parity(self, policy: DiffusionPolicy, stepper: Stepper, trajectory: Trajectory, guidance_scale: float) -> float:
        """max |ratio - 1| over the group's trained steps: how far this policy is from the one that drew it."""
        ...


def build_objective(cfg: Any) -> Objective:
    """The objective of a recipe; ``cfg.name`` selects it.

    Raises:
        ConfigError: there is no objective of that name.
    """
    target = OBJECTIVES.get(cfg.name)
    if target is None:
        raise ConfigError("objective.name", cfg.name, f"use one of: {', '.join(OBJECTIVES)}")
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)(cfg)
