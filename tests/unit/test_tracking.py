"""MLflow: one explicit store, one run per run folder, and a dead server never stops a training."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from cluster.cli import app
from cluster.compare import fetch_runs, table
from cluster.tracking import RUN_ID_FILE, Tracker, TrackingConfig, environment, open_client, probe, resolve_uri
from raysteer.errors import TrackingError

CONFIG = TrackingConfig(experiment="tests")


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for the module: making the database costs seconds."""
    return tmp_path_factory.mktemp("runs")


def start(storage: Path, name: str, **params: Any) -> Tracker:
    return Tracker(CONFIG, name, storage / name, {"run.name": name, **params})


def test_metrics_params_and_environment_are_recorded(storage: Path) -> None:
    tracker = start(storage, "first", **{"sampling.eta": 1.0, "long": "x" * 9000})
    tracker.log_metrics(1, {"reward/mean": 0.25, "count": 3, "odd{key}": 1.0, "flag": True, "text": "no"})
    tracker.log_metrics(2, {"reward/mean": 0.5, "count": np.float32(4)})
    assert tracker.finish() == 0
    run = tracker.client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["sampling.eta"] == "1.0"
    assert run.data.metrics == {"reward/mean": 0.5, "count": 4.0, "odd_key_": 1.0}
    assert [m.value for m in tracker.client.get_metric_history(tracker.run_id, "reward/mean")] == [0.25, 0.5]
    assert run.data.tags["raysteer.torch"] == environment()["torch"]


def test_nothing_is_written_into_the_working_directory(
    storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tracker = start(storage, "elsewhere")
    tracker.log_images(1, np.zeros((2, 8, 8, 3), np.uint8), ["a cat", "a/b: dog"])
    tracker.log_table({"prompt": ["a"], "score": [1.0]}, "table.json")
    (tmp_path / "note.txt").write_text("x", encoding="utf-8")
    tracker.log_artifact(tmp_path / "note.txt", "notes")
    assert tracker.finish() == 0
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]
    names = {item.path for item in tracker.client.list_artifacts(tracker.run_id)}
    assert {"images", "notes", "table.json", "recipe.json", "environment.json"} <= names


def test_a_resumed_run_continues_the_same_mlflow_run(storage: Path) -> None:
    first = start(storage, "resumed")
    first.log_metrics(1, {"loss": 1.0})
    second = start(storage, "resumed")
    second.log_metrics(2, {"loss": 2.0})
    second.finish()
    assert second.run_id == first.run_id
    assert (storage / "resumed" / RUN_ID_FILE).read_text().strip() == first.run_id
    assert len(second.client.get_metric_history(second.run_id, "loss")) == 2


def test_a_run_deleted_in_mlflow_starts_anew(storage: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = start(storage, "deleted")
    first.client.delete_run(first.run_id)
    with caplog.at_level(logging.WARNING):
        second = start(storage, "deleted")
    assert second.run_id != first.run_id
    assert "was deleted" in caplog.text
    second.finish()


def test_metrics_wait_while_the_server_is_away(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracker = start(storage, "away")
    client = tracker.client
    tracker.client = open_client("http://127.0.0.1:1")
    tracker.log_metrics(1, {"loss": 1.0})
    assert tracker.failures == 1
    tracker.client = client
    tracker.log_metrics(2, {"loss": 2.0})
    assert [m.step for m in client.get_metric_history(tracker.run_id, "loss")] == [1, 2]
    assert tracker.finish() == 1


def test_metrics_that_never_arrive_are_kept_in_the_run_folder(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracker = start(storage, "lost")
    tracker.client = open_client("http://127.0.0.1:1")
    tracker.log_metrics(1, {"loss": 1.0})
    assert tracker.finish() >= 2
    kept = (storage / "lost" / "unsent_metrics.jsonl").read_text(encoding="utf-8")
    assert json.loads(kept) == {"step": 1, "key": "loss", "value": 1.0}


def test_images_of_another_kind_are_our_bug(storage: Path) -> None:
    tracker = start(storage, "first")
    with pytest.raises(ValueError, match="uint8"):
        tracker.log_images(0, np.zeros((1, 8, 8, 3), np.float32), ["x"])
    tracker.finish()


def test_the_default_store_lies_in_the_run_storage(tmp_path: Path) -> None:
    assert resolve_uri(TrackingConfig(), tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    assert resolve_uri(TrackingConfig(uri="http://h:1"), tmp_path) == "http://h:1"


@pytest.mark.parametrize("uri", ["./mlruns", "file:///tmp/mlruns", "gopher://x"])
def test_stores_mlflow_cannot_use_are_refused(uri: str) -> None:
    with pytest.raises(TrackingError, match="sqlite"):
        probe(uri)


def test_runs_are_compared_by_what_they_differ_in(storage: Path, tmp_path: Path) -> None:
    for name, alpha, reward in (("alpha0", 0.0, 0.1), ("alpha1", 1.0, 0.3)):
        tracker = start(storage, name, **{"reward.alpha": alpha, "run.seed": 0})
        tracker.log_metrics(5, {"reward/mean": reward})
        tracker.log_summary({"after/inappropriate_rate": reward / 2}, "evaluation/")
        tracker.finish()
    uri = resolve_uri(CONFIG, storage)
    rows = fetch_runs(uri, "tests", ["alpha0", str(storage / "alpha1")])
    lines = dict(table(rows))
    assert lines["reward.alpha"] == ["0.0", "1.0"]
    assert "run.seed" not in lines
    assert lines["reward/mean"] == ["0.1", "0.3"]
    assert lines["last step"] == ["5", "5"]
    labels = [label for label, _ in table(rows)]
    assert labels.index("evaluation/after/inappropriate_rate") < labels.index("reward/mean")

    out = tmp_path / "compare.json"
    command = ["compare", "alpha0", "alpha1", "--storage", str(storage), "--experiment", "tests", "--json", str(out)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "alpha0" in result.stdout
    assert json.loads(out.read_text())[1]["metrics"]["reward/mean"] == 0.3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["nobody"], "no such run"), (["--experiment", "none"], "no such experiment")],
)
def test_compare_says_what_there_is(storage: Path, arguments: list[str], words: str) -> None:
    start(storage, "first").finish()
    experiment = [] if "--experiment" in arguments else ["--experiment", "tests"]
    result = CliRunner().invoke(app, ["compare", *arguments, *experiment, "--storage", str(storage)])
    assert result.exit_code == 2
    assert words in result.stderr
    assert "it has:" in result.stderr


def test_compare_without_a_database_makes_none(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["compare", "--storage", str(tmp_path)])
    assert result.exit_code == 2
    assert list(tmp_path.iterdir()) == []
