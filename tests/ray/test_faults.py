"""Every fault of the catalogue, for real: the run finishes, or stops with one message that names the culprit and goes
on with the same command; the books balance; a strict run ends with the bits of the undisturbed one.
"""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from learner.checkpoint import latest_checkpoint, read_checkpoint
from raysteer.errors import DeadlineExceeded, UserError
from tests.ray.books import assert_balanced, assert_same_adapter, trained_tickets
from tests.ray.catalogue import FINISHES, NO_ROOM_TO_SPILL, STOPS, Command, Scene
from tests.ray.conftest import World

pytestmark = pytest.mark.timeout(900)  # a run takes half a minute on two idle cores, ten times that on busy ones

FAULTS = {fault.name: fault for fault in FINISHES}


def play(world: World, name: str, *faults: str, bad_images: tuple[str, ...] = (), **changes: Any) -> Any:
    """The result of a run that these faults of the catalogue are done to."""
    from cluster.train import train

    chosen = [FAULTS[fault] for fault in faults]
    recipe = world.recipe(name, **{k: v for fault in chosen for k, v in fault.changes.items()} | changes)
    scene = Scene(world, recipe.run_dir, *chosen)
    for mark in bad_images:
        (world.faults / mark).touch()
    result = train(recipe, observe=scene)
    assert scene.over, "the run ended before the fault could happen"
    assert result.status == "finished"
    assert_balanced(result.run_dir, result.steps, recipe.run.groups_per_step)
    return result


def test_a_sampler_killed_while_it_draws_and_a_reward_worker_killed_while_it_scores_change_nothing(
    undisturbed: Any, world: World
) -> None:
    result = play(world, "members-killed", "sampler-killed", "reward-worker-killed", samplers__count=3)
    assert result.restarts == {"sampler": 1, "reward_worker": 1}
    assert result.ledger["events"]["sampler_lost"] >= 1
    assert result.ledger["committed"] == 16 and not result.ledger["dropped"]
    assert_same_adapter(result.adapter_dir, undisturbed.adapter_dir)


def test_a_killed_learner_goes_on_from_its_checkpoint_without_drawing_again(undisturbed: Any, world: World) -> None:
    result = play(world, "learner-killed", "learner-killed")
    assert result.ledger["events"]["rewinds"] == 1
    assert result.ledger["events"]["delivered_again"] >= 4, "step 3 was learned after the checkpoint and came again"
    assert result.ledger["issued"] == 16 and "leased_again" not in result.ledger["events"]
    assert_same_adapter(result.adapter_dir, undisturbed.adapter_dir)


def test_two_ranks_learn_what_one_learns_and_one_killed_in_a_step_changes_nothing(
    undisturbed: Any, world: World
) -> None:
    from cluster.train import train

    world.plan_faults()
    whole = train(world.recipe("two-ranks", learner__workers=2, run__checkpoint_every=1, run__keep_checkpoints=9))
    # Later steps draw with adapters that differ in the last bits, and no longer see the same images.
    first = read_checkpoint(undisturbed.run_dir / "checkpoints" / "step-000001").adapter
    found = read_checkpoint(whole.run_dir / "checkpoints" / "step-000001").adapter
    assert found.keys() == first.keys()
    for name in first:
        np.testing.assert_allclose(found[name], first[name], rtol=0, atol=1e-5, err_msg=name)

    result = play(world, "rank-killed", "rank-killed")
    assert result.ledger["events"]["rewinds"] == 1
    assert_same_adapter(result.adapter_dir, whole.adapter_dir)


def test_a_group_that_cannot_be_scored_is_dropped_by_name_and_a_hanging_reward_costs_nobody_else_anything(
    ray_cluster: Any, world: World
) -> None:
    expected = play(world, "bad-image", "reward-raises")
    assert expected.ledger["dropped"] == {"reward_failed:ValueError": 1}
    assert trained_tickets(expected.run_dir) == [[0, 1, 2, 3], [4, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]]
    assert latest_checkpoint(expected.run_dir / "checkpoints").ledger["dropped"] == {"5": "reward_failed:ValueError"}  # type: ignore[union-attr]

    bad = tuple(mark.name for mark in world.faults.glob("bad-*"))
    result = play(world, "hang", "reward-hangs", bad_images=bad, samplers__count=2)
    assert result.restarts["reward_worker"] >= 1 and result.restarts["sampler"] == 0
    assert result.ledger["dropped"] == expected.ledger["dropped"]
    assert trained_tickets(result.run_dir) == trained_tickets(expected.run_dir)
    assert_same_adapter(result.adapter_dir, expected.adapter_dir)


def test_whatever_ends_a_run_is_named_and_the_same_command_goes_on_to_the_same_bits(
    undisturbed: Any, world: World
) -> None:
    """One run through a bad night: each fault ends it, and the next start meets the next fault."""
    from cluster.train import train

    recipe = world.recipe("night", run__checkpoint_every=1, learner__max_failures=0)
    steps = 0
    for fault in STOPS:
        early = replace(fault, planned={"hold_after": 1}) if steps else fault  # in the first batch after a restart
        scene = Scene(world, recipe.run_dir, early)
        with pytest.raises((UserError, DeadlineExceeded), match=fault.named) as stopped:
            train(recipe, observe=scene)
        assert scene.over and "\n" not in str(stopped.value), fault.name
        record = json.loads((recipe.run_dir / "ledger.json").read_text())
        checkpoint = latest_checkpoint(recipe.run_dir / "checkpoints", recipe.fingerprint())
        assert record["status"] == "failed" and str(stopped.value) in record["failure"]
        assert checkpoint is not None and checkpoint.step == record["steps"] >= max(1, steps), fault.name
        assert not list((recipe.run_dir / "checkpoints").glob(".*")), "nothing unfinished stays behind"
        assert not (recipe.run_dir / "run.lock").exists()
        steps = checkpoint.step
    world.plan_faults()
    result = train(recipe)
    assert (result.status, result.steps) == ("finished", 4)
    assert_balanced(result.run_dir, 4, 4)
    assert_same_adapter(result.adapter_dir, undisturbed.adapter_dir)


def test_a_command_that_is_interrupted_killed_or_runs_out_of_object_store_goes_on_when_typed_again(
    undisturbed: Any, world: World
) -> None:
    from cluster.train import train

    changes = {"run__checkpoint_every": 1, "cluster__object_store_mb": 80}
    file = world.recipe_file("typed", **changes)
    run_dir = world.folder / "runs" / "typed"

    world.plan_faults(hold_after=5)
    with Command(file) as command:
        command.wait_until(world.holding)
        command.process.send_signal(signal.SIGINT)
        code, said = command.ended()
    record = json.loads((run_dir / "ledger.json").read_text())
    assert (code, record["status"], record["steps"]) == (130, "stopped", 1), said
    assert not (run_dir / "run.lock").exists()

    world.plan_faults(hold_after=5)
    with Command(file) as command:
        command.wait_until(world.holding)
        command.process.kill()
        assert command.ended()[0] == -signal.SIGKILL
        command.wait_until_gone()  # a driver takes the cluster it started along

    world.plan_faults(fill_store_at=2)
    with Command(file, **NO_ROOM_TO_SPILL) as command:
        code, said = command.ended()
    last = said.strip().splitlines()[-1]
    assert code == 2 and "object store of node" in last and "the same command continues the run" in last, said

    world.plan_faults()
    result = train(world.recipe("typed", **changes))
    assert (result.status, result.steps) == ("finished", 4)
    assert_balanced(run_dir, 4, 4)
    assert_same_adapter(result.adapter_dir, undisturbed.adapter_dir)


def test_the_undisturbed_run_balances_too(undisturbed: Any) -> None:
    assert_balanced(undisturbed.run_dir, 4, 4)
    assert trained_tickets(undisturbed.run_dir) == [[*range(first, first + 4)] for first in (0, 4, 8, 12)]
