"""Whole runs on a local cluster that nothing is done to: what they leave behind, and what they measure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusion.adapters import load_adapter_file
from tests.ray.books import assert_same_adapter
from tests.ray.conftest import World

pytestmark = pytest.mark.timeout(500)  # a run takes half a minute on two idle cores, ten times that on busy ones


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    from learner.records import read_rows

    return read_rows(run_dir / "metrics.jsonl")


def test_a_run_leaves_everything_it_promises(undisturbed: Any, world: World) -> None:
    run_dir = undisturbed.run_dir
    assert (undisturbed.status, undisturbed.steps) == ("finished", 4)
    assert undisturbed.ledger["issued"] == undisturbed.ledger["committed"] == 16
    adapter = load_adapter_file(undisturbed.adapter_dir)
    assert any(np.abs(value).max() > 0 for name, value in adapter.items() if "lora_B" in name)
    rows = metrics(run_dir)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    wanted = """reward/mean reward/spread_in_group reward/safe_prompts alignment/safe_prompts
        inappropriate/unsafe_prompts staleness/max objective/clip_fraction objective/approx_kl objective/kl_ref
        objective/ratio_max_dev optimizer/grad_norm overlap/reward_hidden idle/samplers idle/learner
        idle/reward_workers stage/sample_s stage/score_s stage/wait_s stage/learn_s stage/publish_s
        stage/adapter_latency_s throughput/images_per_s prompts/truncated"""
    assert all(set(wanted.split()) <= row.keys() for row in rows)
    assert rows[0]["objective/ratio_max_dev"] == 0.0, "fresh samples replay exactly"
    assert all(row["staleness/max"] == 0.0 and row["throughput/sampled_images_per_s"] > 0.0 for row in rows)
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
