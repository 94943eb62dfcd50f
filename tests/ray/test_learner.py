"""One learner rank among recording actors: what it refuses to train on, and what it sees through before it ends."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cluster.services import start_actor
from diffusion.policy import DiffusionPolicy
from diffusion.sampling import Trajectory, sample_rollout
from learner.batches import Batch, Group
from learner.loop import Learner, LoopSettings, Services
from tests.ray.conftest import World

pytestmark = pytest.mark.timeout(200)


class Recorder:
    """Answers as buffer, weight store and tracker do, slowly, and remembers what it was told."""

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.steps: list[int] = []

    def fail(self, error: Exception) -> None:
        self.failure = error

    def report(self, step: int, row: dict[str, float]) -> None:
        time.sleep(0.3)
        self.steps.append(step)

    def seen(self) -> tuple[Exception | None, list[int]]:
        return self.failure, self.steps


class Rank:
    """A learner in a process of its own, which can be ended as Ray Train ends one."""

    def report(self, settings: LoopSettings, recorder: list[Any], steps: int) -> None:
        learner = Learner(settings, Services(recorder[0], recorder[0], recorder[0]))
        for step in range(1, steps + 1):
            learner.report(step, {"batch/groups": 1.0})
        learner.finish()


def settings_of(world: World, name: str) -> LoopSettings:
    recipe, folder = world.recipe(name), world.folder / name
    folder.mkdir()
    return LoopSettings(
        model=recipe.model,
        sampling=recipe.sampling,
        objective=recipe.objective,
        optimizer=recipe.optimizer,
        learner=recipe.learner.model_copy(update={"device": "cpu"}),
        seed=0,
        steps=1,
        checkpoint_every=1,
        keep_checkpoints=1,
        checkpoints=str(folder / "checkpoints"),
        metrics_file=str(folder / "metrics.jsonl"),
        fingerprint="f",
    )


def fresh_batch(settings: LoopSettings) -> tuple[Batch, Trajectory]:
    """One group, drawn in this process by the adapter the learner begins with."""
    sampler = DiffusionPolicy.load(settings.model, adapter_seed=settings.seed)
    rollout = sample_rollout(sampler, "a toxic sign", [1, 2], settings.sampling, step_seed=0)
    group = Group(0, "a toxic sign", "unsafe", 0, "c", "s", np.zeros(2, np.float32), {}, [], {})
    return Batch(0, (group,), {}), rollout.trajectory


def test_the_gate_stops_at_log_probs_that_fresh_groups_cannot_have_and_lets_others_pass(
    ray_cluster: Any, world: World
) -> None:
    recorder, settings = start_actor(Recorder), settings_of(world, "gate")
    learner = Learner(settings, Services(recorder, recorder, recorder))
    batch, trajectory = fresh_batch(settings)
    off = replace(trajectory, log_prob=trajectory.log_prob + settings.objective.clip_range)
    assert not learner.in_parity(batch, {0: off})
    failure, _ = ray_cluster.get(recorder.seen.remote())
    assert type(failure).__name__ == "ParityError"
    assert "sampler and learner compute different steps" in str(failure)
    assert learner.in_parity(batch, {0: trajectory})
    assert learner.in_parity(batch, {0: off}), "the gate is passed once: later batches need not be fresh"


def test_the_last_figures_arrive_although_the_process_ends(ray_cluster: Any, world: World) -> None:
    recorder, rank = start_actor(Recorder), start_actor(Rank)
    ray_cluster.get(rank.report.remote(settings_of(world, "last-figures"), [recorder], 4), timeout=150)
    ray_cluster.kill(rank)
    assert ray_cluster.get(recorder.seen.remote(), timeout=60)[1] == [1, 2, 3, 4]
