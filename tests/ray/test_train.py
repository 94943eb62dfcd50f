"""Whole runs on a local cluster: nothing that dies, stops or is added changes what a strict run learns."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ray.conftest import World

pytestmark = pytest.mark.timeout(500)  # a run takes half a minute on two idle cores, ten times that on busy ones


def adapter(folder: str | Path | None) -> dict[str, np.ndarray]:
    from diffusion.adapters import load_adapter_file

    assert folder is not None, "the run has not finished"
    return load_adapter_file(folder)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    from learner.records import read_rows

    return read_rows(run_dir / "metrics.jsonl")


def assert_same_adapter(found: Path | None, expected: Path | None) -> None:
    ours, theirs = adapter(found), adapter(expected)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_a_run_leaves_everything_it_promises(undisturbed: Any, world: World) -> None:
    run_dir = undisturbed.run_dir
    assert (undisturbed.status, undisturbed.steps) == ("finished", 4)
    assert undisturbed.ledger["issued"] == undisturbed.ledger["committed"] == 16
    assert any(np.abs(value).max() > 0 for name, value in adapter(undisturbed.adapter_dir).items() if "lora_B" in name)
    rows = metrics(run_dir)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    wanted = """reward/mean reward/spread_in_group reward/safe_prompts alignment/safe_prompts
        inappropriate/unsafe_prompts staleness/max objective/clip_fraction objective/approx_kl objective/kl_ref
        objective/ratio_max_dev optimizer/grad_norm overlap/reward_hidden idle/samplers idle/learner
        idle/reward_workers stage/sample_s stage/score_s stage/wait_s stage/learn_s stage/publish_s
        stage/adapter_latency_s throughput/images_per_s prompts/truncated"""
    assert all(set(wanted.split()) <= row.keys() for row in rows)
    assert rows[0]["objective/ratio_max_dev"] == 0.0, "fresh samples replay exactly"
    assert all(row["staleness/max"] == 0.0 for row in rows)
    record = json.loads((run_dir / "ledger.json").read_text())
    assert record["status"] == "finished"


def test_the_journal_holds_every_consumed_group_with_its_latents(undisturbed: Any) -> None:
    from cluster.journal import latents_of, read_journal

    table = read_journal(undisturbed.run_dir / "journal")
    assert table["ticket"].to_pylist() == list(range(16))
    assert table["version"].to_pylist() == [ticket // 4 for ticket in range(16)]
    assert latents_of(table).shape == (16, 2, 4, 8, 8)
    assert np.isfinite(latents_of(table)).all()
    mean = np.mean(table["reward"].to_pylist()[:4])
    assert metrics(undisturbed.run_dir)[0]["reward/mean"] == pytest.approx(mean, abs=1e-6)


def test_mlflow_has_the_metrics_and_the_previews(undisturbed: Any, world: World) -> None:
    from cluster.tracking import open_client

    client = open_client(f"sqlite:///{world.folder}/runs/mlflow.db")
    run = client.get_run(undisturbed.mlflow_run_id)
    assert run.info.status == "FINISHED"
    assert len(client.get_metric_history(undisturbed.mlflow_run_id, "reward/mean")) == 4
    images = client.list_artifacts(undisturbed.mlflow_run_id, "images")
    for version in (0, 2, 4):
        assert any(f"+step+{version}+" in file.path for file in images), f"no preview of version {version}"


def test_a_finished_run_is_not_run_again(undisturbed: Any, world: World) -> None:
    from cluster.train import train

    again = train(world.recipe("undisturbed"))
    assert (again.status, again.steps, again.mlflow_run_id) == ("finished", 4, undisturbed.mlflow_run_id)
    assert_same_adapter(again.adapter_dir, undisturbed.adapter_dir)


def test_three_samplers_a_killed_sampler_and_a_killed_reward_worker_change_nothing(
    undisturbed: Any, world: World
) -> None:
    from cluster.train import train

    world.plan_faults(hold_after=6)
    killed: list[str] = []

    def kill(snapshot: dict[str, Any]) -> None:
        """While a score of the second batch is held back: end its worker and a sampler whose group waits."""
        holder = world.holding()
        waiting = [sampler for state, sampler in snapshot["open"].values() if state in ("scoring", "ready")]
        if killed or holder is None or len(waiting) < 4:
            return
        os.kill(snapshot["samplers"][waiting[0]]["pid"], signal.SIGKILL)
        os.kill(holder, signal.SIGKILL)
        world.release()
        killed.append(waiting[0])

    result = train(world.recipe("killed", samplers__count=3), observe=kill)
    assert killed
    assert result.restarts == {"sampler": 1, "reward_worker": 1}
    assert result.ledger["events"]["sampler_lost"] >= 1
    assert result.ledger["committed"] == 16 and not result.ledger["dropped"]
    assert_same_adapter(result.adapter_dir, undisturbed.adapter_dir)


def test_a_killed_learner_goes_on_from_its_checkpoint_without_drawing_again(undisturbed: Any, world: World) -> None:
    from cluster.train import train

    world.plan_faults(hold_after=13)  # the last batch is being scored, the checkpoint is two steps old or one
    killed: list[int] = []

    def kill(snapshot: dict[str, Any]) -> None:
        if not killed and world.holding() is not None and snapshot["version"] == 3:
            killed.append(snapshot["learners"][0])
            os.kill(killed[0], signal.SIGKILL)
            world.release()

    result = train(world.recipe("relearned"), observe=kill)
    assert killed
    assert result.ledger["events"]["rewinds"] == 1
    assert result.ledger["events"]["delivered_again"] >= 4, "step 2 was learned after the checkpoint and came again"
    assert result.ledger["issued"] == 16 and "leased_again" not in result.ledger["events"]
    assert [row["step"] for row in metrics(result.run_dir)] == [1, 2, 3, 4]
    assert_same_adapter(result.adapter_dir, undisturbed.adapter_dir)


def test_ctrl_c_stops_in_order_and_the_same_command_goes_on_bit_for_bit(undisturbed: Any, world: World) -> None:
    from cluster.train import train

    world.plan_faults(hold_after=5)  # inside the second batch
    recipe = world.recipe_file("interrupted")
    environment = os.environ | {"RAY_TMPDIR": os.environ["RAY_TMPDIR"] + "s"}
    command = [sys.executable, "-m", "cluster", "train", str(recipe)]
    process = subprocess.Popen(
        command, env=environment, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        deadline = time.monotonic() + 240
        while world.holding() is None and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert world.holding() is not None
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=180)
    finally:
        process.kill()
    run_dir = world.folder / "runs" / "interrupted"
    record = json.loads((run_dir / "ledger.json").read_text())
    assert (record["status"], record["steps"]) == ("stopped", 1), output.decode()
    assert process.returncode == 130
    assert not (run_dir / "run.lock").exists()

    world.plan_faults()
    result = train(world.recipe("interrupted"))
    assert (result.status, result.steps) == ("finished", 4)
    assert [row["step"] for row in metrics(run_dir)] == [1, 2, 3, 4]
    assert_same_adapter(result.adapter_dir, undisturbed.adapter_dir)


def test_two_learner_workers_make_the_same_update_as_one(undisturbed: Any, world: World) -> None:
    from cluster.train import train
    from learner.checkpoint import read_checkpoint

    world.plan_faults()
    result = train(world.recipe("two_ranks", run__steps=1, learner__workers=2))
    expected = read_checkpoint(undisturbed.run_dir / "checkpoints" / "step-000001").adapter
    found = adapter(result.adapter_dir)
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-5, err_msg=name)


def test_an_asynchronous_run_keeps_its_lag_bound_and_names_what_it_drops(ray_cluster: Any, world: World) -> None:
    from cluster.train import train

    world.plan_faults(nan_at=[3], raise_at=[6])
    decoupled = {"objective__anchor": "interpolated", "objective__updates_per_batch": 2}
    result = train(world.recipe("overlapped", run__steps=5, buffer__max_staleness=1, samplers__count=2, **decoupled))
    assert result.status == "finished"
    assert result.ledger["dropped"] == {"reward_not_finite:inappropriate": 1}
    assert result.ledger["events"]["score_retried"] == 1
    assert result.ledger["committed"] == 20
    rows = metrics(result.run_dir)
    lags = [row["staleness/max"] for row in rows]
    assert max(lags) == 1.0, "samplers run ahead by one version and no further"
    weighted = [row["objective/weight_mean"] != 1.0 for row in rows]
    assert weighted == [lag > 0.0 for lag in lags], "stale groups, and no others, begin away from their own policy"
    assert max(row["overlap/sampling_while_learning"] for row in rows) > 0.0
