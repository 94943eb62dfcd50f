"""A checkpoint is there completely or not at all, and only its own recipe goes on from it."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from learner.checkpoint import Checkpoint, latest_checkpoint, list_checkpoints, read_checkpoint, save_checkpoint
from learner.records import append_row, keep_rows_until, read_rows
from raysteer.errors import CheckpointError


def make(step: int, fingerprint: str = "recipe-a") -> Checkpoint:
    generator = np.random.default_rng(step)
    return Checkpoint(
        step=step,
        fingerprint=fingerprint,
        adapter={"unet.a": generator.normal(size=(2, 3)).astype(np.float32), "unet.alpha": np.array([4.0], np.float32)},
        optimizer={"step/unet.a": np.array(float(step), np.float32), "updates": np.array([step], np.int64)},
        ledger={"step": step, "closed_below": 4 * step, "committed_sparse": [], "dropped": {"3": "reward_timeout"}},
        metrics={"reward": 0.5},
        ema={"unet.a": generator.normal(size=(2, 3)).astype(np.float32), "unet.alpha": np.array([4.0], np.float32)},
    )


def test_what_is_read_is_bit_for_bit_what_was_written(tmp_path: Path) -> None:
    written = make(10)
    found = read_checkpoint(save_checkpoint(tmp_path, written))
    assert written.ema is not None and found.ema is not None
    for before, after in (
        (written.adapter, found.adapter),
        (written.optimizer, found.optimizer),
        (written.ema, found.ema),
    ):
        assert before.keys() == after.keys()
        for name in before:
            assert before[name].dtype == after[name].dtype and before[name].shape == after[name].shape
            np.testing.assert_array_equal(before[name], after[name])
    assert (found.step, found.fingerprint, found.ledger, found.metrics) == (
        10,
        "recipe-a",
        written.ledger,
        {"reward": 0.5},
    )


def test_the_newest_checkpoint_is_taken_and_old_ones_are_removed(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, make(step), keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000002", "step-000010"]
    found = latest_checkpoint(tmp_path, "recipe-a")
    assert found is not None and found.step == 10


def test_without_an_average_the_adapter_is_what_is_exported(tmp_path: Path) -> None:
    for step, ema in ((1, None), (2, make(3).ema)):
        found = read_checkpoint(save_checkpoint(tmp_path, replace(make(step), ema=ema)))
        assert (found.ema is None) == (ema is None)
        expected = found.adapter if ema is None else ema
        np.testing.assert_array_equal(found.exported["unet.a"], expected["unet.a"])


FILES = ["adapter.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["truncated", "changed", "missing"])
def test_a_torn_checkpoint_is_passed_over_with_a_warning(tmp_path: Path, file: str, damage: str) -> None:
    save_checkpoint(tmp_path, make(1))
    torn = save_checkpoint(tmp_path, make(2)) / file
    data = torn.read_bytes()
    if damage == "missing":
        torn.unlink()
    else:
        torn.write_bytes(data[: len(data) // 2] if damage == "truncated" else data[:-9] + b"#" + data[-8:])
    with pytest.warns(UserWarning, match="step-000002"):
        found = latest_checkpoint(tmp_path, "recipe-a")
    assert found is not None and found.step == 1


def test_an_unfinished_write_is_no_checkpoint_and_goes_with_the_next_one(tmp_path: Path) -> None:
    (tmp_path / ".step-000007.4711").mkdir()
    (tmp_path / "step-notes").mkdir()
    assert latest_checkpoint(tmp_path) is None
    save_checkpoint(tmp_path, make(8))
    assert sorted(os.listdir(tmp_path)) == ["step-000008", "step-notes"]


def test_a_disk_that_refuses_costs_neither_the_checkpoint_before_nor_the_room_of_the_torn_one(tmp_path: Path) -> None:
    """In a process of its own, that the kernel lets write only small files."""
    save_checkpoint(tmp_path, make(1))
    program = (
        "import resource, sys\n"
        "from tests.unit.test_checkpoint import make, save_checkpoint\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))\n"
        "try:\n    save_checkpoint(sys.argv[1], make(2))\n"
        "except OSError as error:\n    print(error.strerror)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert said.stdout == "File too large\n", said.stderr
    assert os.listdir(tmp_path) == ["step-000001"]
    found = latest_checkpoint(tmp_path, "recipe-a")
    assert found is not None and found.step == 1


def test_the_same_step_can_be_written_again(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, make(3))
    save_checkpoint(tmp_path, make(3, "recipe-b"))
    assert read_checkpoint(tmp_path / "step-000003").fingerprint == "recipe-b"


def test_another_recipes_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, make(5))
    with pytest.raises(CheckpointError, match=r"step-000005.*another recipe.*run\.name"):
        latest_checkpoint(tmp_path, "recipe-b")


@pytest.mark.parametrize("files", [FILES, ["state.json", "other.bin"]], ids=["same files", "other files"])
def test_a_checkpoint_of_another_format_is_refused_and_no_older_one_is_used(tmp_path: Path, files: list[str]) -> None:
    save_checkpoint(tmp_path, make(1))
    path = save_checkpoint(tmp_path, make(2))
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | {"format": 99}))
    (path / "other.bin").touch()
    names = [name for name in files if name != "manifest.json"]
    manifest = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in names}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"step-000002: has format 99, this version reads 1; .*run\.name"):
        latest_checkpoint(tmp_path, "recipe-a")


def test_metrics_of_steps_that_will_be_done_again_are_forgotten(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    for step in range(1, 6):
        append_row(file, {"step": step, "reward": step / 10})
    with open(file, "a") as handle:
        handle.write('{"step": 6, "rew')  # the process was killed here
    keep_rows_until(file, 3)
    assert [row["step"] for row in read_rows(file)] == [1, 2, 3]
