"""Looking at a run and ending it, from its folder alone."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from pathlib import Path
from typing import Any, Literal

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from cluster.config import Recipe, load_recipe
from cluster.desk import Desk
from cluster.runlock import Holder, RunLock, read_holder
from cluster.status import Stage, StatusWriter, read_status
from cluster.status_view import render
from cluster.stopping import find_run, request_stop, wait_for_end
from cluster.storage import RunFolder
from raysteer.errors import DeadlineExceeded, UserError
from tests.conftest import RecipeFactory

FIGURES = {
    "step": 3,
    "throughput/images_per_s": 4.25,
    "staleness/max": 1.0,
    "idle/samplers": 0.05,
    "idle/reward_workers": 0.75,
    "idle/learner": 0.5,
}
COUNTS = {
    **{"issued": 21, "returned": 1, "leased": 20, "in_flight": 2, "ready": 1, "delivered": 4, "committed": 12},
    "dropped": {"reward_not_finite:x": 1},
    "events": {},
}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def snapshot(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "version": 3,
        "ledger": COUNTS,
        "open": {},
        "samplers": {"sampler-0": {"pid": 1, "groups": 9}, "sampler-1": {"pid": 2, "groups": 4}},
        "silent": [],
        "reward_workers": ["reward_worker-0"],
        "learners": {0: 77},
        "reports": [],
        "stop": None,
        "failure": None,
        "restarts": {"sampler": 1, "reward_worker": 0},
    }
    return base | changes


@pytest.fixture
def recipe(tiny_recipe: RecipeFactory) -> Recipe:
    return load_recipe(tiny_recipe({"run.steps": 8}))


@pytest.fixture
def folder(recipe: Recipe) -> RunFolder:
    folder = RunFolder(recipe.run_dir).create()
    folder.recipe.write_text(recipe.to_yaml())
    return folder


def holder(age_s: float = 1.0) -> Holder:
    """Of the run's lock, on another host, `age_s` seconds after it was refreshed."""
    return Holder(pid=1, host="far-away", started=0.0, age_s=age_s)


def test_status_shows_version_throughput_lag_ledger_and_who_sets_the_pace(folder: RunFolder, recipe: Recipe) -> None:
    clock = Clock()
    with StatusWriter(folder, recipe, clock=clock) as status:
        clock.now += 60
        status(snapshot(reports=[FIGURES]))
        shown = render(read_status(folder), holder(), clock.now + 4)
    lines = {line.split()[0]: line for line in shown.splitlines()}
    assert "tiny running for 1 min 00 s: step 3 of 8, version 3" in lines["run"]
    assert "4.25 images/s, lag 1, last step 4 s ago" in lines["speed"]
    assert "the pace is set by the samplers" in lines["busy"]
    assert "20 groups leased: 2 in flight, 1 ready, 4 delivered, 12 committed, 1 dropped" in lines["ledger"]
    assert "reward_not_finite:x 1" in lines["ledger"]
    assert "1 × sampler" in lines["replaced"]
    assert "slow" not in lines


def desk_snapshot(version: int, *figures: dict[str, float]) -> dict[str, Any]:
    """What the supervising loop sees of a learner on a dataset that has made `version` steps of 2 groups."""

    async def ask() -> dict[str, Any]:
        desk = Desk(8, 2, 4, {"flat": 3})
        await desk.rewind(2, {0: 77})
        await desk.set_adapter(version, [], "sum")
        for row in figures:
            await desk.report(int(row["step"]), row)
        return await desk.snapshot()

    return asyncio.run(ask()) | {"restarts": {}, "members": {}}


def test_a_run_on_a_dataset_shows_its_learner_and_nobody_who_draws(folder: RunFolder, recipe: Recipe) -> None:
    clock = Clock()
    with StatusWriter(folder, recipe, clock=clock) as status:
        status(desk_snapshot(3, {"step": 3, "throughput/images_per_s": 4.25}))
        shown = render(read_status(folder), holder(), clock.now + 4)
    lines = {line.split()[0]: line for line in shown.splitlines()}
    assert "tiny running for 0 s: step 3 of 8, version 3" in lines["run"]
    assert lines["speed"].endswith("4.25 images/s, last step 4 s ago") and lines["learner"].endswith("1 rank")
    assert lines["ledger"].endswith("6 groups learned, 4 in a checkpoint; left out of the dataset: flat 3")
    assert not lines.keys() & {"busy", "sampler", "rewards"}


def test_a_run_in_rounds_says_which_round_it_is_in_and_how_far(folder: RunFolder, recipe: Recipe) -> None:
    clock = Clock()

    def shown() -> dict[str, str]:
        text = render(read_status(folder), holder(), clock.now)
        return {line.split()[0]: line for line in text.splitlines()}

    def stage(number: int, doing: Literal["generating", "learning"]) -> Stage:
        return Stage(number, 2, doing, steps=8, of=6, began=1000.0)

    clock.now += 30
    with StatusWriter(folder, recipe, 4, stage(2, "generating"), clock) as status:
        assert "tiny starting for 30 s: generating (0 of 6 groups), round 2 of 2, step 4 of 8" in shown()["run"]
        status(snapshot(version=1, ledger=COUNTS | {"committed": 2}, reports=[FIGURES | {"step": 1}]))
        lines = shown()
        assert "running for 30 s: generating (2 of 6 groups), round 2 of 2, step 4 of 8, version 4" in lines["run"]
        assert {"busy", "sampler", "rewards"} <= lines.keys() and "learner" not in lines
        status.ended("finished", 4)
    assert read_status(folder)["state"] == "running", "the end of a stage is not that of the run"
    clock.now += 30
    learning = recipe.model_copy(update={"run": recipe.run.model_copy(update={"steps": 6})})
    with StatusWriter(folder, learning, 4, stage(2, "learning"), clock) as status:
        status(desk_snapshot(5, {"step": 5, "throughput/images_per_s": 4.25}))
        assert "running for 1 min 00 s: learning, round 2 of 2, step 5 of 8, version 5" in shown()["run"]
        assert "rewards" not in shown() and shown()["learner"].endswith("1 rank")
        status.ended("stopped", 5)
        assert "stopped 0 s ago, after 1 min 00 s: learning, round 2 of 2, step 5 of 8" in shown()["run"]
        status.ended("finished", 8)
    assert "tiny finished 0 s ago, after 1 min 00 s: step 8 of 8" in shown()["run"]


def test_a_status_of_a_version_that_knew_no_rounds_is_shown(folder: RunFolder, recipe: Recipe) -> None:
    with StatusWriter(folder, recipe) as status:
        status(snapshot())
    older = read_status(folder)
    del older["stage"]
    assert "step 0 of 8" in render(older, None, time.time())


def test_a_sampler_that_takes_much_longer_than_the_others_is_called_slow(folder: RunFolder, recipe: Recipe) -> None:
    clock = Clock()
    status = StatusWriter(folder, recipe, clock=clock)
    status(snapshot(open={0: ("sampling", "sampler-0"), 1: ("sampling", "sampler-1")}))
    clock.now += 10
    status(snapshot(open={0: ("scoring", "sampler-0"), 1: ("sampling", "sampler-1")}))
    assert not status.status["slow"], "it is no longer at it than the other was"
    clock.now += 15
    status(snapshot(open={1: ("sampling", "sampler-1")}))
    assert status.status["slow"] == ["sampler-1 takes 25 s for a group, the others 10 s"]
    assert status.status["samplers"]["sampler-0"] == {"groups": 9, "drawing_s": None, "group_s": 10.0}
    clock.now += 1
    status(snapshot(samplers={"sampler-0": {"pid": 1, "groups": 9}}))
    assert not status.status["slow"], "one that is gone is not slow"


def test_a_run_whose_process_is_gone_shows_no_sign_of_life(folder: RunFolder, recipe: Recipe) -> None:
    clock = Clock()
    with StatusWriter(folder, recipe, clock=clock) as status:
        status(snapshot())
        found = read_status(folder)
    for gone in (None, holder(age_s=3600.0)):
        assert "no sign of life since 5 min 00 s" in render(found, gone, clock.now + 300)
    assert "has not reported for 5 min 00 s" in render(found, holder(), clock.now + 300), "alive, yet stuck"


@pytest.mark.parametrize("error", [UserError("reward", "is broken\nin two lines", "mend it"), KeyboardInterrupt()])
def test_the_end_of_a_run_is_its_last_status(folder: RunFolder, recipe: Recipe, error: BaseException) -> None:
    with pytest.raises(type(error)), StatusWriter(folder, recipe) as status:
        status(snapshot(reports=[FIGURES]))
        raise error
    shown = render(read_status(folder), None, time.time())
    if isinstance(error, UserError):
        assert "tiny failed" in shown and "failure   UserError: reward: is broken in two lines; mend it" in shown
    else:
        assert "tiny stopped" in shown
    assert "step 3 of 8" in shown and "the same command continues it" in shown


def test_a_status_that_cannot_be_written_does_not_end_the_run(
    folder: RunFolder, recipe: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    folder.status.mkdir()
    with StatusWriter(folder, recipe) as status:
        status(snapshot())
    assert "could not be written" in caplog.text


def test_the_command_reads_a_run_by_name_and_as_json(folder: RunFolder, recipe: Recipe) -> None:
    with StatusWriter(folder, recipe) as status:
        status.ended("finished", 8)
    storage = ["--storage", str(folder.path.parent)]
    shown = CliRunner().invoke(app, ["status", "tiny", *storage])
    assert shown.exit_code == 0 and "tiny finished" in shown.stdout
    as_json = CliRunner().invoke(app, ["status", str(folder.path), "--json"])
    assert json.loads(as_json.stdout)["state"] == "finished"
    missing = CliRunner().invoke(app, ["status", "other", *storage])
    assert missing.exit_code == 2 and "run other" in missing.stderr


@pytest.mark.parametrize("text", ["", "[1]", '{"format": 99}'])
def test_a_torn_or_foreign_status_is_one_line(folder: RunFolder, text: str) -> None:
    folder.status.write_text(text)
    shown = CliRunner().invoke(app, ["status", str(folder.path)])
    assert shown.exit_code == 2 and len(shown.stderr.splitlines()) == 1


def test_only_a_run_that_is_being_trained_can_be_stopped(folder: RunFolder) -> None:
    with pytest.raises(UserError, match="nobody is training it"):
        request_stop(folder)
    assert not folder.stop_request.exists()


def test_stop_waits_until_the_run_has_let_go(folder: RunFolder, recipe: Recipe) -> None:
    lock = RunLock(folder.path)

    def train() -> None:
        while not folder.stop_request.exists():
            time.sleep(0.01)
        with StatusWriter(folder, recipe) as status:
            status.ended("stopped", 3)
        lock.release()

    trainer = threading.Thread(target=train)
    trainer.start()
    stopped = CliRunner().invoke(app, ["stop", str(folder.path)])
    trainer.join()
    assert stopped.exit_code == 0, stopped.output
    assert "tiny stopped" in stopped.stdout and read_holder(folder.path) is None


def test_waiting_for_the_end_has_a_deadline_that_leaves_the_request(folder: RunFolder) -> None:
    with RunLock(folder.path):
        request_stop(folder)
        with pytest.raises(DeadlineExceeded, match="run tiny to end; the request stands"):
            wait_for_end(folder, 0.01, notify=lambda line: None)
    assert folder.stop_request.exists()


def test_a_run_is_found_by_name_before_a_folder_of_that_name(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_run("tiny", "runs").path == Path("runs/tiny")
