"""What a run is for: to train, here, or to leave a dataset (`cluster.generate`); `cluster.train` carries it out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cluster.evaluations import Evaluations
from cluster.final import export_adapter, leave_adapter
from cluster.identity import journal_identity
from cluster.services import LearnerRoom, LearnerThread, roles, start_services
from cluster.storage import RunFolder, write_atomic
from learner.checkpoint import Checkpoint, latest_checkpoint

if TYPE_CHECKING:
    from cluster.beside import Beside
    from cluster.config import Recipe
    from cluster.status import Stage
    from cluster.supervisor import Ranks, Role
    from learner.loop import Services


class Consumer(Protocol):
    """A thread that takes the batches of a run. `error` is what it raised."""

    error: Exception | None

    def start(self) -> None: ...
    def is_alive(self) -> bool: ...
    def join(self, timeout: float | None = None) -> None: ...


class Purpose(Protocol):
    """What a run draws its groups for.

    Attributes:
        recipe, folder: of the run.
        stage: of a run in rounds, if its status is that of one.
        title: which part of a run this is, for who watches; "" for a whole one.
    """

    recipe: Recipe
    folder: RunFolder
    stage: Stage | None
    title: str

    def progress(self) -> tuple[int, Mapping[str, Any] | None]:
        """Steps that are done for good, and the ledger as it was after them."""
        ...

    def begin(self) -> None:
        """Write what a run leaves before its first step."""
        ...

    def services(self, ledger: Mapping[str, Any] | None) -> Services:
        """The service actors, going on from this state of the ledger."""
        ...

    def roles(self, services: Services) -> list[Role]: ...
    def ranks(self) -> Ranks | None: ...
    def consumer(self, services: Services) -> Consumer: ...

    def beside(self, services: Services) -> Beside | None:
        """Who evaluates beside it, if anybody does."""
        ...

    def ended_early(self) -> str | None:
        """Why there is nothing left to do although steps are left, or None."""
        ...

    def complete(self) -> Path | None:
        """All is done: write the final adapter, if this is what the run is for, and say where."""
        ...


class Training:
    """A run that trains: its batches go to the learner ranks, its checkpoints say how far it is.

    `steps`: of the whole run, where `recipe` is that of a part of it; None: it is that of the whole.
    """

    stage: Stage | None = None
    title = ""

    def __init__(self, recipe: Recipe, steps: int | None = None) -> None:
        self.recipe, self.folder = recipe, RunFolder(recipe.run_dir)
        self.fingerprint = recipe.fingerprint()  # of now: files that change meanwhile are for the next start to refuse
        self.steps = recipe.run.steps if steps is None else steps

    def progress(self) -> tuple[int, Mapping[str, Any] | None]:
        checkpoint = self._checkpoint()
        return (0, None) if checkpoint is None else (checkpoint.step, checkpoint.ledger)

    def begin(self) -> None:
        write_atomic(self.folder.recipe, self.recipe.to_yaml().encode())

    def services(self, ledger: Mapping[str, Any] | None) -> Services:
        return start_services(self.recipe, self.folder, journal_identity(self.recipe, "train"), ledger)

    def roles(self, services: Services) -> list[Role]:
        return roles(self.recipe, services)

    def ranks(self) -> Ranks:
        return LearnerRoom(self.recipe)

    def consumer(self, services: Services) -> Consumer:
        return LearnerThread(self.recipe, self.folder, services)

    def beside(self, services: Services) -> Beside | None:
        if self.recipe.evaluation.every is None:
            return None
        from cluster.beside import Beside

        done, _ = self.progress()
        return Beside(self.recipe, self.steps, done, Evaluations(self.recipe, self.folder), services.tracker)

    def ended_early(self) -> str | None:
        done, _ = self.progress()
        if not self.recipe.evaluation.may_end or done >= self.steps:
            return None
        evaluations = Evaluations(self.recipe, self.folder, until=done)
        verdict = evaluations.verdict
        return f"stopped early: {verdict.words(evaluations.rule.figure)}" if verdict.stops else None

    def complete(self) -> Path:
        return leave_adapter(self.recipe, self.folder, self._newest())

    def export(self, folder: Path) -> None:
        """Write the adapter of the newest checkpoint into `folder`."""
        export_adapter(self.recipe, folder, self._newest())

    def _newest(self) -> Checkpoint:
        checkpoint = self._checkpoint()
        assert checkpoint is not None, "whoever exports has seen that there is a checkpoint"
        return checkpoint

    def _checkpoint(self) -> Checkpoint | None:
        return latest_checkpoint(self.folder.checkpoints, self.fingerprint)
