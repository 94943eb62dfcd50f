"""Training on scored groups instead of a live stream: a recipe with a section ``offline``.

    offline.data given     that dataset ─▶ learner
    offline.data left out  rounds 1 .. n:  generate with the adapter so far ─▶ dataset of the round ─▶ learner

A round is the same run, continued by another `run.steps / rounds` steps: same folder, same checkpoints, same reference
(the base model, the adapter off). Its dataset lies in the run's folder, below ``rounds/``. What is done already is read
from the disk, so the same command goes on wherever a run was ended, in a generation too.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cluster.config import Recipe
from cluster.fit import check_dataset
from cluster.generate import generate
from cluster.purpose import Consumer, Training
from cluster.services import LearnerThread, start_desk
from cluster.status import Stage, StatusWriter
from cluster.stopping import withdraw_stop
from cluster.storage import RunFolder, write_atomic
from cluster.tickets import derive_seed
from cluster.train import Observer, RunResult, carry_out
from learner.dataset import GroupDataset, find_dataset
from learner.loop import Services
from learner.sources import OfflineSettings

if TYPE_CHECKING:
    from cluster.runlock import RunLock
    from cluster.supervisor import Role


class OfflineTraining(Training):
    """A run, or a round of one, that learns from a dataset (a `cluster.train.Purpose`): nobody draws, nobody scores.

    Args:
        recipe: as given.
        dataset: folder of the groups.
        begins_at, ends_at: the learner steps it is for.
        stage: the round it is of.
    """

    def __init__(self, recipe: Recipe, dataset: Path, begins_at: int, ends_at: int, stage: Stage | None = None) -> None:
        super().__init__(learning(recipe, ends_at), recipe.run.steps)
        self.written, self.stage, self.title = recipe, stage, "" if stage is None else str(stage)
        self.dataset, self.begins_at = dataset, begins_at

    def begin(self) -> None:
        write_atomic(self.folder.recipe, self.written.to_yaml().encode())

    def services(self, ledger: Mapping[str, Any] | None) -> Services:
        return start_desk(self.recipe, self.folder, GroupDataset.open(self.dataset))

    def roles(self, services: Services) -> list[Role]:
        return []

    def consumer(self, services: Services) -> Consumer:
        run, offline = self.recipe.run, self.recipe.offline
        assert offline is not None, "only a recipe with a section offline comes here"
        settings = OfflineSettings(
            folder=str(self.dataset.absolute()),
            window=offline.window,
            groups_per_step=run.groups_per_step,
            begins_at=self.begins_at,
            ends_at=run.steps,
            seed=derive_seed(run.seed, "order", self.begins_at),
        )
        return LearnerThread(self.recipe, self.folder, services, settings)


def learning(recipe: Recipe, steps: int) -> Recipe:
    """The recipe as learner ranks alone go by it, until `steps`: as many rounds as that are, of the same length."""
    offline, nobody = recipe.offline, {"count": 0, "min": None, "max": None}
    assert offline is not None, "only a recipe with a section offline learns alone"
    rounds = offline.rounds * steps // recipe.run.steps
    sections = {
        "run": {"steps": steps},
        "offline": {"rounds": rounds},
        "samplers": nobody,
        "reward_workers": nobody,
    }
    changed = {name: getattr(recipe, name).model_copy(update=keys) for name, keys in sections.items()}
    return recipe.model_copy(update=changed)


def train_offline(recipe: Recipe, lock: RunLock | None, observe: Observer | None = None) -> RunResult:
    """Run or continue the offline training a recipe describes; see `cluster.train.train`. The recipe has been checked.

    Args:
        recipe: with a section `offline`.
        lock: of its run folder, released at the end.
        observe: of whatever is under way: generating, or learning.
    """
    offline = recipe.offline
    assert offline is not None, "only a recipe with a section offline comes here"
    try:
        if offline.data is not None:
            dataset = find_dataset(offline.data)
            return carry_out(OfflineTraining(recipe, dataset, 0, recipe.run.steps), None, observe)
        folder = RunFolder(recipe.run_dir).create()
        withdraw_stop(folder)
        whole = Training(recipe)
        if whole.ended_early() is not None:
            return carry_out(whole, None, observe)  # which says so
        write_atomic(folder.recipe, recipe.to_yaml().encode())  # status and stop know a run by it, in a generation too
        done, _ = whole.progress()
        length, started, began = recipe.run.steps // offline.rounds, time.monotonic(), time.time()
        for number in range(min(done // length + 1, offline.rounds), offline.rounds + 1):
            result = play_round(Round(recipe, number, began), observe)
            if result.status != "finished" or result.reason is not None:
                break
        return replace(result, seconds=time.monotonic() - started if result.seconds else 0.0)
    finally:
        withdraw_stop(RunFolder(recipe.run_dir))
        if lock is not None:
            lock.release()


@dataclass(frozen=True)
class Round:
    """One round of a run: the learner steps it covers, and where its things lie. `began`: when the run did."""

    recipe: Recipe
    number: int
    began: float

    @property
    def length(self) -> int:
        offline = self.recipe.offline
        assert offline is not None, "only a recipe with a section offline has rounds"
        return self.recipe.run.steps // offline.rounds

    @property
    def begins_at(self) -> int:
        return (self.number - 1) * self.length

    @property
    def ends_at(self) -> int:
        return self.number * self.length

    def stage(self, doing: Literal["generating", "learning"]) -> Stage:
        recipe, offline = self.recipe, self.recipe.offline
        assert offline is not None, "only a recipe with a section offline has rounds"
        return Stage(self.number, offline.rounds, doing, recipe.run.steps, recipe.generate.groups, self.began)

    @property
    def adapter(self) -> Path:
        """What it draws with, as the rounds before have left it."""
        return RunFolder(self.recipe.run_dir).rounds / f"round-{self.number}-adapter"

    @property
    def generating(self) -> Recipe:
        """The recipe of its dataset: prompts and noise are its own."""
        run = {
            "name": f"{self.recipe.run.name}-round-{self.number}",
            "storage": str(RunFolder(self.recipe.run_dir).rounds),
            "seed": derive_seed(self.recipe.run.seed, "round", self.number) % 2**31,
        }
        return self.recipe.model_copy(update={"run": self.recipe.run.model_copy(update=run), "offline": None})


def pass_on_stop(run: RunFolder, generation: RunFolder, observers: Sequence[Observer]) -> Observer:
    """An observer of a generation that hands on what `raysteer stop` asks of the run it is for."""

    def watch(snapshot: dict[str, Any]) -> None:
        if run.stop_request.exists():
            generation.stop_request.touch()
        for observe in observers:
            observe(snapshot)

    return watch


def play_round(this: Round, observe: Observer | None) -> RunResult:
    """Generate the dataset of a round and learn from it, as far as that has not been done."""
    recipe, folder = this.recipe, RunFolder(this.generating.run_dir)
    training = Training(recipe)
    done, _ = training.progress()
    if done < this.ends_at:
        if done == this.begins_at and this.number > 1 and not this.adapter.exists():
            training.export(this.adapter)
        stage = this.stage("generating")
        with StatusWriter(training.folder, recipe, done, stage) as status:
            watching = pass_on_stop(training.folder, folder, [status, *([observe] if observe is not None else [])])
            drawn = generate(this.generating, str(this.adapter) if this.number > 1 else None, watching, str(stage))
            if drawn.status != "finished":
                status.ended(drawn.status, done, ledger=drawn.ledger)
                return replace(drawn, run_dir=recipe.run_dir, steps=done)
            check_dataset(recipe, folder.journal)
    lesson = OfflineTraining(recipe, folder.journal, this.begins_at, this.ends_at, this.stage("learning"))
    return carry_out(lesson, None, observe)
