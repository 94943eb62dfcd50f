"""What an objective is, and the table of those we have.

To add an objective: one file with a class that satisfies ``Objective`` and is constructed as ``Class(config)``, and one
line in ``OBJECTIVES`` (or no line at all: a recipe may name ``module:Class``). It gets the ``objective`` section of the
recipe and reads what it needs of it; ``updates_per_batch``, ``std`` and ``std_floor`` are also read by the loop.
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
    "gdro": "learner.gdro:GDRO",
}


class Objective(Protocol):
    """Turns scored groups and their rewards into a loss. Stateless: optimiser, batching and ranks are the loop's.

    Attributes:
        parity_tolerance: the largest ``parity`` of a fresh group with which a run may begin; None: there is no gate,
            for an objective that does not ask who drew the images.
    """

    @property
    def parity_tolerance(self) -> float | None: ...

    def advantages(self, rewards: np.ndarray) -> np.ndarray:
        """float32 [n_groups, G] of the whole batch's rewards [n_groups, G]: what ``loss`` is told of them."""
        ...

    def positions(self, trajectory: Trajectory) -> int:
        """How many losses a group has: the loop shares positions 0, 1 .. out over the updates of a batch."""
        ...

    def prepare(
        self, policy: DiffusionPolicy, stepper: Stepper, trajectory: Trajectory, guidance_scale: float, seed: int
    ) -> Any | None:
        """What all losses of a group need to know before the first update of a batch; None for nothing.

        Called once for each group of a rank, without gradient; the loop hands it back with every ``loss`` of the group.

        Args:
            seed: of all that is drawn at random for this group at this step (see ``group_seed``).
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
        """Scalar loss of one group at some of its positions, and figures to log.

        The loss is a mean over images and positions, so calling it position by position and averaging is the same;
        one position is one forward, which bounds the memory. The figures have the same names on every call; those with
        "max" in their name are maxima, the others means.

        ``proximal_at`` says where the policy at the start of the batch lies between the one that drew the group (0) and
        the present one (1), counted in versions, of which every update is its share: lag / (lag + updates made / all).
        """
        ...

    def parity(self, policy: DiffusionPolicy, stepper: Stepper, trajectory: Trajectory, guidance_scale: float) -> float:
        """max |ratio - 1| over the group's trained steps: how far this policy is from the one that drew it.

        Not called where ``parity_tolerance`` is None.
        """
        ...


def group_seed(run_seed: int, step: int, ticket_id: int) -> int:
    """The seed of one group at one step: a restarted learner, or any other rank, draws the same for it."""
    return int(np.random.SeedSequence((run_seed, step, ticket_id)).generate_state(1, np.uint64)[0] >> np.uint64(1))


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
