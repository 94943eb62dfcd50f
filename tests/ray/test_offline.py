"""Offline training for real: from the journal of an online run, and in rounds that generate their own groups."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.status import read_status
from cluster.status_view import render
from cluster.storage import RunFolder
from diffusion.adapters import load_adapter_file
from learner.dataset import GroupDataset
from learner.records import read_rows
from raysteer.errors import DatasetError
from tests.ray.conftest import World
from tests.unit.test_bad_datasets import rotten

OBJECTIVE = {"name": "gdro", "beta": 500.0, "tau": 0.0, "gamma": 0.5, "draws": 2}
pytestmark = pytest.mark.timeout(600)


def assert_same_bits(found: Path, expected: Path) -> None:
    ours, theirs = load_adapter_file(found), load_adapter_file(expected)
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        np.testing.assert_array_equal(values, theirs[name])


def test_an_online_journal_is_learned_from_and_a_run_goes_on_in_the_middle_of_an_epoch(
    undisturbed: Any, world: World
) -> None:
    from cluster.train import train

    journal = undisturbed.run_dir / "journal"
    groups = len(GroupDataset.open(journal).rows)
    changes = {"objective": OBJECTIVE, "offline": {"data": str(journal), "window": 2}, "run__groups_per_step": 6}
    whole = train(world.recipe("offline-whole", **changes, run__steps=4))
    assert (whole.status, whole.steps) == ("finished", 4)
    rows = read_rows(whole.run_dir / "metrics.jsonl")
    learned = [ticket for row in rows for ticket in row["tickets"]]
    assert groups == 16 and sorted(learned[:groups]) == list(range(groups)), "an epoch has every group once"
    assert all(row["objective/ranking"] >= 0.0 and row["objective/flat_groups"] == 0.0 for row in rows)
    assert rows[0]["objective/margin"] == 0.0, "it begins at the reference"
    assert not (whole.run_dir / "journal").exists(), "nothing is drawn"

    begun = train(world.recipe("offline-parts", **changes, run__steps=2))
    assert begun.steps == 2
    resumed = train(world.recipe("offline-parts", **changes, run__steps=4))
    assert [row["tickets"] for row in read_rows(resumed.run_dir / "metrics.jsonl")] == [row["tickets"] for row in rows]
    assert resumed.adapter_dir is not None and whole.adapter_dir is not None
    assert_same_bits(resumed.adapter_dir, whole.adapter_dir)


def test_a_dataset_damaged_under_a_run_ends_it_by_name_and_restored_it_is_gone_on_with(
    undisturbed: Any, world: World
) -> None:
    from cluster.train import train

    journal = shutil.copytree(undisturbed.run_dir / "journal", world.folder / "fragile")
    part = sorted(journal.glob("part-*.parquet"))[-1]
    intact = part.read_bytes()

    def damage(snapshot: dict[str, Any]) -> None:
        if not snapshot["learners"] and part.read_bytes() == intact:  # checked, and not opened by the ranks yet
            part.write_bytes(rotten(part))

    changes = {"objective": OBJECTIVE, "offline": {"data": str(journal), "window": 1}, "run__checkpoint_every": 1}
    recipe = world.recipe("fragile-run", **changes)
    with pytest.raises(DatasetError, match=rf"{part.name}: rows? \d.* cannot be read"):
        train(recipe, observe=damage)
    failed = read_status(RunFolder(recipe.run_dir))
    assert failed["state"] == "failed" and part.name in failed["failure"] and failed["step"] < 4
    part.write_bytes(intact)
    result = train(recipe)
    assert (result.status, result.steps) == ("finished", 4)
    learned = [ticket for row in read_rows(result.run_dir / "metrics.jsonl") for ticket in row["tickets"]]
    assert sorted(learned) == list(range(16)), "nothing is learned twice, and nothing left out"


def test_two_ranks_learn_from_a_dataset_what_one_learns(undisturbed: Any, world: World) -> None:
    from cluster.train import train

    changes = {"objective": OBJECTIVE, "offline": {"data": str(undisturbed.run_dir)}, "run__groups_per_step": 8}
    one, two = (
        train(world.recipe(f"offline-ranks-{count}", **changes, run__steps=2, learner__workers=count))
        for count in (1, 2)
    )
    learned = [[row["tickets"] for row in read_rows(result.run_dir / "metrics.jsonl")] for result in (one, two)]
    assert learned[0] == learned[1]
    assert sorted(ticket for step in learned[0] for ticket in step) == list(range(16)), "an epoch, every group once"
    assert one.adapter_dir is not None and two.adapter_dir is not None
    expected, found = load_adapter_file(one.adapter_dir), load_adapter_file(two.adapter_dir)
    assert (
        any(values.any() for name, values in expected.items() if "lora_B" in name) and found.keys() == expected.keys()
    )
    for name, values in expected.items():  # the ranks' gradients are added in another order
        np.testing.assert_allclose(found[name], values, rtol=0, atol=1e-5, err_msg=name)


def test_rounds_draw_with_what_the_rounds_before_have_learned(world: World, ray_cluster: Any) -> None:
    from cluster.train import train
    from diffusion.adapters import checksum

    world.plan_faults()
    changes = {
        "objective": OBJECTIVE,
        "offline": {"rounds": 2},
        "generate": {"groups": 4},
        "run__steps": 2,
        "run__keep_checkpoints": 1,
        "buffer__max_staleness": 1,
    }
    recipe, seen = world.recipe("rounds", **changes), []

    def look(snapshot: dict[str, Any]) -> None:
        stage = read_status(RunFolder(recipe.run_dir))["stage"]
        if (stage["round"], stage["doing"]) not in seen:
            seen.append((stage["round"], stage["doing"]))

    result = train(recipe, observe=look)
    assert (result.status, result.steps) == ("finished", 2)
    assert seen == [(1, "generating"), (1, "learning"), (2, "generating"), (2, "learning")]
    shown = render(read_status(RunFolder(result.run_dir)), None, time.time())
    assert "rounds finished" in shown and "step 2 of 2" in shown
    first, second = (GroupDataset.open(result.run_dir / "rounds" / f"rounds-round-{n}") for n in (1, 2))
    assert len(first.rows) == len(second.rows) == 4
    after_one = load_adapter_file(result.run_dir / "rounds" / "round-2-adapter")
    assert {group.checksum for group in second.read(second.rows)} == {checksum(after_one)}
    assert {group.checksum for group in first.read(first.rows)} == {checksum({})}, "the base model"
    assert any(values.any() for name, values in after_one.items() if "lora_B" in name)
    again = train(recipe)
    assert (again.status, again.steps) == ("finished", 2), "all is done: nothing is drawn or learned again"
