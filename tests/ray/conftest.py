"""Fixtures of the tests that need a cluster: one world of tiny models, one cluster, runs that several tests look at."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Read by tests.ray.faults in the workers, which inherit the environment that the cluster is started with.
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 leaves the workers nothing on a busy machine
os.environ.setdefault("RAYSTEER_TEST_FAULTS", tempfile.mkdtemp(prefix="faults"))

Runner = Callable[..., Any]


def pytest_configure(config: pytest.Config) -> None:
    """Of two test processes each has faults of its own; what they start inherits them."""
    if hasattr(config, "workerinput"):
        os.environ["RAYSTEER_TEST_FAULTS"] = tempfile.mkdtemp(prefix="faults")


class World:
    """Recipes over tiny models in one storage folder, and the faults that are to happen in the next run."""

    def __init__(self, folder: Path, factory: Any) -> None:
        self.folder, self.factory = folder, factory
        self.faults = Path(os.environ["RAYSTEER_TEST_FAULTS"])

    def recipe_file(self, name: str, **changes: Any) -> Path:
        """Path of a recipe: 4 steps of 4 groups, strict unless `changes` (dotted keys with "__" for ".") say else."""
        defaults = {
            "run.name": name,
            "run.steps": 4,
            "run.groups_per_step": 4,
            "run.checkpoint_every": 2,
            "buffer.max_staleness": 0,
            "learner.batch_timeout_s": 240.0,
            "reward.detector": "tests.ray.faults:detector",
        }
        given = {key.replace("__", "."): value for key, value in changes.items()}
        return self.factory(defaults | given, name=f"{name}.yaml")

    def recipe(self, name: str, **changes: Any) -> Any:
        from cluster.config import load_recipe

        return load_recipe(self.recipe_file(name, **changes))

    def plan_faults(self, **faults: Any) -> None:
        """What the reward workers of the next run do wrong (see tests.ray.faults); earlier marks are cleared."""
        for mark in self.faults.iterdir():
            mark.unlink()
        (self.faults / "plan.json").write_text(json.dumps(faults))

    def holding(self) -> int | None:
        """Process id of the reward worker that holds a score back, if one does."""
        marks = list(self.faults.glob("holding-*"))
        return int(marks[0].name.split("-")[1]) if marks else None

    def release(self) -> None:
        (self.faults / "release").touch()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_pipeline: Path, tiny_clip: Path) -> World:
    from tests.conftest import make_recipe_factory

    folder = tmp_path_factory.mktemp("world")
    return World(folder, make_recipe_factory(folder, tiny_pipeline, tiny_clip))


@pytest.fixture(scope="session")
def undisturbed(world: World, ray_cluster: Any) -> Any:
    """The result of a strict run with one sampler that nothing happened to: the reference of all others."""
    from cluster.train import train

    world.plan_faults()
    changes = {"run__checkpoint_every": 1, "run__keep_checkpoints": 9, "tracking__preview_every": 2}
    return train(world.recipe("undisturbed", **changes))
