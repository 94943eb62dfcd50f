"""What an objective is, and the table of those we have.

To add an objective: one file with a class that satisfies ``Objective`` and is constructed as ``Class(config)``, and one
line in ``OBJECTIVES`` (or no line at all: a recipe may name ``module:Class``). It gets the ``objective`` section of the
recipe and reads what it needs of it; ``updates_per_batch``, ``std``, ``std_floor`` and ``clip_range`` (a tenth of which
is the tolerance of the parity gate) are also read by the loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from raysteer.errors import ConfigError
from raysteer.import_path import is_import_path, load_object

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

    def prepare(
        self, policy: DiffusionPolicy, stepper: Stepper, trajectory: Trajectory, guidance_scale: float
    ) -> Any | None:
        """What ``loss`` has to know of the policy as it was before the first update of a batch; None for nothing.

        Called once for each group of a rank, without gradient; the loop hands it back with every ``loss`` of the group.
        """
        ...

    def loss(
        self,
        policy: DiffusionPolicy,
        stepper: Stepper,
        trajectory: Trajectory,
        advantages: np.ndarray | torch.Tensor,
        positions: Sequence[int],
        guidance_scale: float,
        prepared: Any | None = None,
        proximal_at: float = 0.0,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Scalar loss of one group at some of its trained steps, and figures to log.

        The loss is a mean over images and positions, so calling it position by position and averaging is the same;
        one position is one forward, which bounds the memory. The figures have the same names on every call; those with
        "max" in their name are maxima, the others means.

        ``proximal_at`` says where the policy at the start of the batch lies between the one that drew the group (0) and
        the present one (1), counted in versions, of which every update is its share: lag / (lag + updates made / all).
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
    return objective_class(cfg.name)(cfg)


def objective_class(name: str) -> Any:
    """The class of a registered objective or of a ``module:Class`` (ConfigError when there is none)."""
    if name not in OBJECTIVES and not is_import_path(name):
        raise ConfigError("objective.name", name, f"use one of: {', '.join(OBJECTIVES)}; or 'module:Class'")
    return load_object(OBJECTIVES.get(name, name), "objective.name")
