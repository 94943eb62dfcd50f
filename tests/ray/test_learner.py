"""One learner rank among recording actors: what it refuses to train on, and what it sees through before it ends."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cluster.services import start_actor
from diffusion.adapters import checksum
from diffusion.policy import DiffusionPolicy
from diffusion.sampling import Trajectory, sample_rollout
from learner.batches import Batch, Group
from learner.checkpoint import checkpoint_path, read_checkpoint
from learner.loop import Learner, LoopSettings, Services
from tests.ray.conftest import World

pytestmark = pytest.mark.timeout(200)


class Recorder:
    """Answers as buffer, weight store and tracker do, slowly, and remembers what it was told."""

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.steps: list[int] = []
        self.published: dict[int, str] = {}

    def fail(self, error: Exception) -> None:
        self.failure = error

    def report(self, step: int, row: dict[str, float]) -> None:
        time.sleep(0.3)
        self.steps.append(step)

    def publish(self, version: int, state: Any, checksum: str) -> None:
        self.published[version] = checksum

    def rewind(self, step: int, pids: dict[int, int]) -> None:
        pass

    def ledger_state(self, step: int) -> dict[str, int]:
        return {"step": step}

    def commit(self, step: int) -> None:
        pass

    def flush(self) -> None:
        pass

    def lent(self) -> dict[int, str]:
        return self.published

    def seen(self) -> tuple[Exception | None, list[int]]:
        return self.failure, self.steps


class Rank:
    """A learner in a process of its own, which can be ended as Ray Train ends one."""

    def report(self, settings: LoopSettings, recorder: list[Any], steps: int) -> None:
        learner = Learner(settings, Services(recorder[0], recorder[0], recorder[0]))
        for step in range(1, steps + 1):
            learner.report(step, {"batch/groups": 1.0})
        learner.finish()


def settings_of(world: World, name: str, **changes: Any) -> LoopSettings:
    recipe, folder = world.recipe(name, **changes), world.folder / name
    folder.mkdir()
    return LoopSettings(
        run="learner",
        model=recipe.model,
        sampling=recipe.sampling,
        objective=recipe.objective,
        optimizer=recipe.optimizer,
        learner=recipe.learner.model_copy(update={"device": "cpu"}),
        seed=0,
        steps=1,
        checkpoint_every=1,
        keep_checkpoints=9,
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


def test_a_resumed_learner_goes_on_with_the_same_average_and_samplers_get_the_raw_adapter(
    ray_cluster: Any, world: World
) -> None:
    recorder = start_actor(Recorder)
    services = Services(recorder, recorder, recorder)
    changes = {"optimizer__ema_decay": 0.8, "objective__updates_per_batch": 2, "objective__anchor": "proximal"}
    changes |= {"objective__trust": "kl_mask", "objective__kl_threshold": 1e-12, "optimizer__lr": 1e-2}
    settings = replace(settings_of(world, "average", **changes), mixture={"kind": 1.0, "neat": 0.5})
    batch, trajectory = fresh_batch(settings)
    parts = {"kind": np.array([0.1, 0.3], np.float32), "neat": np.array([70.0, 10.0], np.float32)}
    batch = replace(batch, groups=(replace(batch.groups[0], parts=parts),))

    def take_step(learner: Learner, step: int) -> dict[str, float]:
        figures = learner.learn(replace(batch, step=step - 1), {0: trajectory})
        assert figures is not None
        learner.publish(step)
        learner.save(step)
        return figures

    learner = Learner(settings, services)
    assert learner.restore() == 0
    figures = [take_step(learner, step) for step in (1, 2)]
    assert figures[0]["objective/kl_anchor"] > 0.0, "the second update of a batch is measured from before the first"
    assert figures[0]["objective/mask_fraction"] > 0.0
    assert figures[0]["objective/weight_mean"] == 1.0 != figures[1]["objective/weight_mean"]
    expected = read_checkpoint(checkpoint_path(settings.checkpoints, 2))
    shutil.rmtree(checkpoint_path(settings.checkpoints, 2))
    resumed = Learner(settings, services)
    assert resumed.restore() == 1
    assert take_step(resumed, 2) == figures[1]
    found = read_checkpoint(checkpoint_path(settings.checkpoints, 2))
    assert expected.ema is not None and found.ema is not None
    pairs = ((expected.adapter, found.adapter), (expected.ema, found.ema), (expected.optimizer, found.optimizer))
    for wanted, got in pairs:
        assert wanted.keys() == got.keys()
        assert all(np.array_equal(wanted[name], got[name]) for name in wanted)
    assert checksum(found.ema) != checksum(found.adapter)
    assert ray_cluster.get(recorder.lent.remote())[2] == checksum(found.adapter)


def test_the_last_figures_arrive_although_the_process_ends(ray_cluster: Any, world: World) -> None:
    recorder, rank = start_actor(Recorder), start_actor(Rank)
    ray_cluster.get(rank.report.remote(settings_of(world, "last-figures"), [recorder], 4), timeout=150)
    ray_cluster.kill(rank)
    assert ray_cluster.get(recorder.seen.remote(), timeout=60)[1] == [1, 2, 3, 4]
