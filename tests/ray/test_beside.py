"""Evaluation beside training on a real cluster: equal figures, a killed evaluator, and runs that are ended by them."""

from __future__ import annotations

import json
import os
import re
import signal
from typing import Any

import pytest

from benchmarks.loop import processes_below
from cluster.status import read_status
from cluster.storage import RunFolder
from diffusion.adapters import adapter_metadata, load_adapter_file
from evaluation.bootstrap import Figure
from learner.records import read_rows
from tests.ray.conftest import World
from tests.ray.test_offline import OBJECTIVE, assert_same_bits

pytestmark = pytest.mark.timeout(600)
SUITE = {"suite": "glyphs", "glyphs": {"prompts_unsafe": 4, "prompts_safe": 6, "diversity_prompts": 0}, "steps": 2}
NEVER_BETTER = 1e6  # a new best would have to exceed the old by so much


def evaluations(run_dir: Any) -> list[dict[str, Any]]:
    return read_rows(RunFolder(run_dir).evaluations)


class KillsOneEvaluator:
    """An observer of a run."""

    def __init__(self) -> None:
        self.killed = 0

    def __call__(self, snapshot: dict[str, Any]) -> None:
        found = [pid for pid, title in processes_below(os.getpid()).items() if re.match(r"ray::Evaluator\b", title)]
        if found and not self.killed:
            self.killed = found[0]
            os.kill(self.killed, signal.SIGKILL)


def test_figures_beside_training_are_those_of_eval_to_the_bit_whatever_happens_to_the_evaluator(
    world: World, ray_cluster: Any
) -> None:
    from cluster.evaluate import run_evaluation
    from cluster.tracking import open_client
    from cluster.train import train

    world.plan_faults()
    # The driver looks for checkpoints twice a second, and on an idle machine two of them may come in that time.
    changes = {"run__steps": 5, "run__checkpoint_every": 2, "run__keep_checkpoints": 2}
    guards = [{"figure": "utility", "most_worse": 1.0}, {"figure": "kl", "at_most": 1e6}]  # nothing breaks these
    recipe = world.recipe("beside", **changes, evaluation=SUITE | {"every": 2, "guards": guards})
    killing = KillsOneEvaluator()
    result = train(recipe, killing)
    assert killing.killed and (result.status, result.steps, result.reason) == ("finished", 5, None)
    rows = evaluations(result.run_dir)
    assert [row["step"] for row in rows] == [0, 2, 4, 5], "the base model, multiples of two, and the last step"
    assert not any("error" in row for row in rows) and rows[0]["is_best"]

    assert result.adapter_dir is not None
    adapter = load_adapter_file(result.adapter_dir)
    found = run_evaluation(recipe, {"base": None, "adapted": adapter}, world.folder / "beside-evaluation")
    for label, row in (("base", rows[0]), ("adapted", rows[-1])):
        ours = {name: Figure(**figure).as_dict() for name, figure in row["figures"].items() if name != "kl"}
        theirs = found.figures[label]
        assert ours == {name: {key: figure[key] for key in ours[name]} for name, figure in theirs.items()}
        samples = found.cards[label].samples["reward"]["values"]
        assert row["step"] or row["rewards"] == list(samples), "not only as they are rounded in the card"
        assert {"reward", "reward_corrected", "inappropriate_rate", "utility"} <= ours.keys()
    first, last = rows[0]["figures"], rows[-1]["figures"]
    assert first["reward"] != last["reward"], "the adapter makes a difference"
    assert first["kl"]["value"] == 0.0 < last["kl"]["value"]
    assert rows[-1]["changes"]["reward"]["value"] == pytest.approx(last["reward"]["value"] - first["reward"]["value"])

    client = open_client(f"sqlite:///{world.folder}/runs/mlflow.db")

    def logged(name: str) -> dict[int, float]:
        return {point.step: point.value for point in client.get_metric_history(result.mlflow_run_id, name)}

    assert logged("evaluation/reward_corrected") == {
        row["step"]: row["figures"]["reward_corrected"]["value"] for row in rows
    }
    assert logged("guards/kl_at_most_left") == {row["step"]: 1e6 - row["figures"]["kl"]["value"] for row in rows}
    assert client.get_run(result.mlflow_run_id).data.tags["raysteer.guard"] == "none is broken"


def test_a_run_that_breaks_a_guard_ends_before_its_last_step_and_stays_ended(
    world: World, ray_cluster: Any, caplog: pytest.LogCaptureFixture
) -> None:
    from cluster.tracking import open_client
    from cluster.train import train

    world.plan_faults()
    # Any training moves the policy, so the first adapter breaks it. The patience is used up at the same evaluation.
    rules = {
        "stop": {"patience": 1, "least": NEVER_BETTER},
        "guards": [{"figure": "utility", "most_worse": 1.0}, {"figure": "kl", "at_most": 0.0}],
    }
    evaluation = SUITE | {"every": 2, **rules}
    recipe = world.recipe("stops", run__steps=1000, run__keep_checkpoints=3, evaluation=evaluation)
    result = train(recipe)
    assert result.status == "finished" and 2 <= result.steps < 1000
    rows = evaluations(result.run_dir)
    assert [row["step"] for row in rows] == [0, 2] and not rows[1]["is_best"]
    assert result.reason is not None
    assert re.fullmatch(
        r"stopped early: kl is \S+ \[\S+, \S+\] at step 2: evaluation.guards wants at most 0", result.reason
    )
    folder = RunFolder(result.run_dir)
    assert json.loads(folder.ledger.read_text())["reason"] == read_status(folder)["reason"] == result.reason
    assert result.adapter_dir is not None
    assert_same_bits(result.adapter_dir, folder.best)
    assert adapter_metadata(result.adapter_dir)["step"] == "2", "the first that was trained, not the newest"
    assert "do not use it unseen" in caplog.text, "for it is the one that broke the guard"
    tags = open_client(f"sqlite:///{world.folder}/runs/mlflow.db").get_run(result.mlflow_run_id).data.tags
    assert tags["raysteer.guard"] == result.reason.removeprefix("stopped early: ")

    again = train(recipe)
    assert (again.status, again.steps, again.reason, again.seconds) == ("finished", result.steps, result.reason, 0.0)
    assert [row["step"] for row in evaluations(result.run_dir)] == [0, 2]
    assert again.adapter_dir is not None
    assert_same_bits(again.adapter_dir, folder.best)


def test_evaluations_go_on_from_round_to_round_and_end_all_of_them(world: World, ray_cluster: Any) -> None:
    from cluster.train import train

    world.plan_faults()
    changes = {
        "objective": OBJECTIVE,
        "offline": {"rounds": 3},
        "generate": {"groups": 4},
        "run__steps": 3,
        "run__checkpoint_every": 1,
        "evaluation": SUITE | {"every": 1, "stop": {"patience": 2, "least": NEVER_BETTER}},
    }
    recipe = world.recipe("rounds-stop", **changes)
    result = train(recipe)
    assert (result.status, result.steps) == ("finished", 2)
    assert result.reason is not None and "has not risen for 2 evaluations" in result.reason
    rows = evaluations(result.run_dir)
    assert [row["step"] for row in rows] == [0, 1, 2], "the second round goes by the base model's row of the first"
    assert not (RunFolder(result.run_dir).rounds / "rounds-stop-round-3").exists()
    values = {row["step"]: row["figures"]["reward_corrected"]["value"] for row in rows[1:]}
    assert result.adapter_dir is not None
    assert adapter_metadata(result.adapter_dir)["step"] == str(max(values, key=lambda step: values[step]))
    again = train(recipe)
    assert (again.status, again.steps, again.reason) == ("finished", 2, result.reason)
    status = read_status(RunFolder(result.run_dir))
    assert (status["state"], status["step"], status["steps"]) == ("finished", 2, 3)
