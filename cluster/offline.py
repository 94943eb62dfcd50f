"""Training on scored groups instead of a live stream: a recipe with a section ``offline``.

    offline.data given     that dataset ─▶ learner
    offline.data left out  rounds 1 .. n:  generate with the adapter so far ─▶ dataset of the round ─▶ learner

A round is the same run, continued by another `run.steps / rounds` steps: same folder, same checkpoints, same reference
(the base model, the adapter off). Its dataset lies in the run's folder, below ``rounds/``. What is done already is read
from the disk, so the same command goes on wherever a run was ended, in a generation too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config import Recipe
from cluster.desk import Desk
from cluster.generate import dataset_of, generate
from cluster.identity import model_identity
from cluster.services import LearnerThread, start_desk
from cluster.storage import RunFolder, write_atomic
from cluster.tickets import derive_seed
from cluster.train import Consumer, Observer, RunResult, Training, carry_out
from learner.dataset import GroupDataset, check_identity
from learner.loop import Services
from learner.sources import OfflineSettings
from raysteer.errors import ConfigError

if TYPE_CHECKING:
    from cluster.runlock import RunLock
    from cluster.supervisor import Role


class OfflineTraining(Training):
    """A run, or a round of one, that learns from a dataset (a `cluster.train.Purpose`): nobody draws, nobody scores.

    Args:
        recipe: as given.
        dataset: folder of the groups.
        begins_at, ends_at: the learner steps it is for.
    """

    def __init__(self, recipe: Recipe, dataset: Path, begins_at: int, ends_at: int) -> None:
        super().__init__(learning(recipe, ends_at))
        self.written = recipe
        self.dataset, self.begins_at = dataset, begins_at

    def begin(self) -> None:
        write_atomic(self.folder.recipe, self.written.to_yaml().encode())

    def services(self, ledger: Mapping[str, Any] | None) -> Services:
        run, skipped = self.recipe.run, GroupDataset.open(self.dataset).skipped
        return start_desk(self.recipe, self.folder, Desk, run.steps, run.groups_per_step, skipped)

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
    """The recipe as learner ranks alone go by it, until `steps`."""
    nobody = {"count": 0, "min": None, "max": None}
    sections = {"run": {"steps": steps}, "samplers": nobody, "reward_workers": nobody}
    changed = {name: getattr(recipe, name).model_copy(update=keys) for name, keys in sections.items()}
    return recipe.model_copy(update=changed)


def check_dataset(recipe: Recipe, folder: Path) -> GroupDataset:
    """A dataset that this recipe can learn from.

    Raises:
        DatasetError: there is none, or it cannot be read.
        ConfigError: it was made with another model, its groups are smaller than `objective.subset`, or there are fewer
            than a step takes.
    """
    dataset = GroupDataset.open(folder)
    check_identity(dataset, model_identity(recipe))
    dataset.check_subset(getattr(recipe.objective, "subset", None))
    if len(dataset.rows) < recipe.run.groups_per_step:
        left_out = ", ".join(f"{reason} {count}" for reason, count in dataset.skipped.items() if count)
        raise ConfigError(
            "run.groups_per_step",
            recipe.run.groups_per_step,
            f"{folder} has only {len(dataset.rows)} usable groups{f' (left out: {left_out})' if left_out else ''}",
        )
    return dataset


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
            return carry_out(OfflineTraining(recipe, Path(offline.data), 0, recipe.run.steps), None, observe)
        result, length = None, recipe.run.steps // offline.rounds
        for number in range(1, offline.rounds + 1):
            begins_at, ends_at = (number - 1) * length, number * length
            done, _ = Training(recipe).progress()
            if done >= ends_at and number < offline.rounds:
                continue
            drawn = generate_round(recipe, number, observe)
            if drawn.status != "finished":
                return drawn
            result = carry_out(OfflineTraining(recipe, dataset_of(drawn), begins_at, ends_at), None, observe)
            if result.status != "finished":
                break
        assert result is not None, "there is at least one round"
        return result
    finally:
        if lock is not None:
            lock.release()


def generate_round(recipe: Recipe, number: int, observe: Observer | None) -> RunResult:
    """The dataset of one round, drawn with what the rounds before have learned: its prompts and noise are its own."""
    folder = RunFolder(recipe.run_dir)
    run = {
        "name": f"round-{number}",
        "storage": str(folder.rounds),
        "seed": derive_seed(recipe.run.seed, "round", number) % 2**31,
    }
    round_recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update=run), "offline": None})
    adapter = None if number == 1 else str(folder.adapter)
    return generate(round_recipe, adapter, observe)
