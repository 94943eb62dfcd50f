"""A generated dataset: every ticket once, as the pipeline itself draws it, whatever dies meanwhile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.journal import Journal, read_journal
from learner.dataset import GroupDataset, OfflineGroup
from raysteer.errors import CheckpointError, StorageError
from tests.ray.catalogue import Command, Fault, Scene, Story
from tests.ray.conftest import World

pytestmark = pytest.mark.timeout(900)  # a run takes half a minute on two idle cores, ten times that on busy ones

GROUPS = 12  # three batches of four


def groups_of(folder: Path) -> list[OfflineGroup]:
    dataset = GroupDataset.open(folder)
    return dataset.read(dataset.rows)


@pytest.fixture(scope="module")
def calm(world: World, ray_cluster: Any) -> Any:
    """The result of a generation that nothing happens to."""
    from cluster.generate import generate

    world.plan_faults()
    return generate(world.recipe("calm", generate__groups=GROUPS, generate__guidance_scale=3.0))


def test_every_ticket_is_there_once_as_the_pipeline_itself_draws_it(calm: Any, world: World) -> None:
    from cluster.generate import collecting
    from cluster.prompts import load_prompts
    from cluster.tickets import TicketSource
    from diffusion.policy import DiffusionPolicy
    from diffusion.sampling import generate as draw
    from diffusion.sampling import sample_deterministic

    assert (calm.status, calm.steps, calm.adapter_dir) == ("finished", 3, None)
    dataset = GroupDataset.open(calm.run_dir)
    assert [ref.ticket for ref in dataset.rows] == list(range(GROUPS)) and not dataset.problems
    assert dataset.identity["source"] == "generate" and dataset.identity["resolution"] == 32
    assert dataset.identity["sampling"] == {"steps": 4, "guidance_scale": 3.0, "deterministic": True}

    recipe = collecting(world.recipe("calm", generate__groups=GROUPS, generate__guidance_scale=3.0), None)
    tickets = TicketSource(recipe.run.seed, load_prompts(recipe.prompts), 0.5, 2, 4)
    policy = DiffusionPolicy.load(recipe.model)
    for group in dataset.read(dataset.rows[:3]):
        ticket = tickets.ticket(group.ticket)
        rollout = sample_deterministic(policy, ticket.prompt, ticket.seeds, 4, 3.0)
        assert (group.prompt, rollout.trajectory.num_positions) == (ticket.prompt, 0)
        np.testing.assert_array_equal(group.final_latents, rollout.trajectory.final_latents)
        np.testing.assert_array_equal(rollout.images, draw(policy, [ticket.prompt] * 2, ticket.seeds, 4, 3.0))


def test_it_is_watched_and_recorded_as_a_training_is(calm: Any) -> None:
    from learner.records import read_rows

    rows = read_rows(calm.run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert sorted(ticket for row in rows for ticket in row["tickets"]) == list(range(GROUPS))
    assert {"reward/mean", "reward/spread_in_group", "idle/samplers", "throughput/images_per_s"} <= rows[0].keys()
    status = json.loads((calm.run_dir / "status.json").read_text())
    assert (status["state"], status["step"], status["ledger"]["committed"]) == ("finished", 3, GROUPS)
    assert not (calm.run_dir / "checkpoints").exists() and not (calm.run_dir / "run.lock").exists()


def test_the_same_command_again_does_nothing_and_the_folder_is_for_no_training(calm: Any, world: World) -> None:
    from cluster.generate import generate
    from cluster.train import train

    settings: dict[str, Any] = {"generate__groups": GROUPS, "generate__guidance_scale": 3.0}
    before = {file.name: file.stat().st_mtime_ns for file in (calm.run_dir / "journal").iterdir()}
    again = generate(world.recipe("calm", **settings, learner__workers=2))
    assert (again.status, again.steps, again.seconds) == ("finished", 3, 0.0)
    assert {file.name: file.stat().st_mtime_ns for file in (calm.run_dir / "journal").iterdir()} == before
    with pytest.raises(StorageError, match="a dataset that raysteer generate made"):
        train(world.recipe("calm"))


def dead_samplers(scene: Scene) -> Story:
    """Kill every sampler while a score is held back: what they drew for unfinished batches is lost with them."""
    yield from scene.holding()
    scene.strike(*(sampler["pid"] for sampler in scene.snapshot["samplers"].values()))
    scene.world.release()


def test_a_killed_driver_and_killed_samplers_change_no_bit(calm: Any, world: World) -> None:
    from cluster.generate import generate

    settings: dict[str, Any] = {
        "generate__groups": GROUPS,
        "generate__guidance_scale": 3.0,
        "buffer__max_staleness": 1,
        "samplers__count": 2,
    }
    file, folder = world.recipe_file("killed", **settings), world.folder / "runs" / "killed"
    world.plan_faults(hold_after=6)
    with Command(file, "generate") as command:
        command.wait_until(world.holding)
        command.wait_until(lambda: json.loads((folder / "generation.json").read_text())["step"] == 1)
        command.process.kill()
        command.ended()
        command.wait_until_gone()
    assert len(list((folder / "journal").glob("part-*.parquet"))) == 1, "one batch was durable"

    fault = Fault("samplers-killed", "", "finishes", "", dead_samplers, {"hold_after": 2})
    scene = Scene(world, folder, fault)
    result = generate(world.recipe("killed", **settings), observe=scene)
    assert scene.over and (result.status, result.steps) == ("finished", 3)
    assert result.restarts["sampler"] >= 1
    assert result.ledger["events"]["sampler_lost"] >= 1

    dataset = GroupDataset.open(folder)
    assert [ref.ticket for ref in dataset.rows] == list(range(GROUPS))
    assert set(dataset.skipped) <= {"duplicate"}, "what was scored and then drawn again"
    for found, expected in zip(groups_of(folder), groups_of(calm.run_dir), strict=True):
        assert (found.ticket, found.prompt, found.checksum) == (expected.ticket, expected.prompt, expected.checksum)
        np.testing.assert_array_equal(found.reward, expected.reward)
        np.testing.assert_array_equal(found.final_latents, expected.final_latents)


class ForgetfulJournal(Journal):
    """Loses the first latents, as if their sampler had died between score and journal."""

    def fetch(self, trajectory: Any) -> np.ndarray | None:
        return super().fetch(trajectory) if self.without_latents else None


def test_an_adapter_draws_the_groups_and_lost_latents_are_drawn_again(
    undisturbed: Any, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cluster.generate import generate, prepare
    from cluster.source import find_adapter
    from diffusion.policy import DiffusionPolicy
    from diffusion.sampling import sample_deterministic

    world.plan_faults()
    monkeypatch.setattr("cluster.services.Journal", ForgetfulJournal)
    recipe = world.recipe("adapted", generate__groups=4, model__lora={"rank": 7})
    result = generate(recipe, str(undisturbed.run_dir))
    assert result.ledger["events"]["data_lost"] == 1 and result.ledger["committed"] == 4
    dataset, adapter = GroupDataset.open(result.run_dir), find_adapter(undisturbed.run_dir)
    assert [ref.ticket for ref in dataset.rows] == [0, 1, 2, 3] and dataset.skipped == {"duplicate": 1}
    policy = DiffusionPolicy.load(prepare(recipe, str(undisturbed.run_dir)).recipe.model)
    policy.load_adapter(adapter.state)
    for group in dataset.read(dataset.rows):
        seeds = read_journal(dataset.folder)["seeds"][group.ticket].as_py()
        rollout = sample_deterministic(policy, group.prompt, seeds, 4, 2.0)
        assert group.checksum == adapter.metadata["checksum"]
        np.testing.assert_array_equal(group.final_latents, rollout.trajectory.final_latents)
    with pytest.raises(CheckpointError, match=r"another recipe \(another adapter\)"):
        prepare(recipe)


def test_a_training_run_is_no_place_for_a_dataset_and_its_journal_is_one(undisturbed: Any, world: World) -> None:
    from cluster.data import examine
    from cluster.generate import prepare

    with pytest.raises(StorageError, match="it holds a training run"):
        prepare(world.recipe("undisturbed"))
    report = examine(undisturbed.run_dir, world.recipe("undisturbed"))
    assert report.good and not report.copies
    assert [group.ticket for group in report.groups] == list(range(16))
    assert list(report.versions()) == [0, 1, 2, 3] and report.lag() == {"mean": 1.5, "max": 3.0}
    identity = report.dataset.identity
    assert (identity["source"], identity["run"]) == ("train", "undisturbed")
    assert identity["sampling"]["deterministic"] is False
