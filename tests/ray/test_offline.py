"""Offline training for real: from the journal of an online run, and in rounds that generate their own groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusion.adapters import load_adapter_file
from learner.dataset import GroupDataset
from learner.records import read_rows
from tests.ray.conftest import World

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
    recipe = world.recipe("rounds", **changes)
    result = train(recipe)
    assert (result.status, result.steps) == ("finished", 2)
    first, second = (GroupDataset.open(result.run_dir / "rounds" / f"rounds-round-{n}") for n in (1, 2))
    assert len(first.rows) == len(second.rows) == 4
    after_one = load_adapter_file(result.run_dir / "rounds" / "round-2-adapter")
    assert {group.checksum for group in second.read(second.rows)} == {checksum(after_one)}
    assert {group.checksum for group in first.read(first.rows)} == {checksum({})}, "the base model"
    assert any(values.any() for name, values in after_one.items() if "lora_B" in name)
    again = train(recipe)
    assert (again.status, again.steps) == ("finished", 2), "all is done: nothing is drawn or learned again"
