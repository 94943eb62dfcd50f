"""Evaluation beside training as far as it needs no cluster: what is refused, the rule, the rows, the adapter left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.beside import due_steps
from cluster.config import Recipe, load_recipe
from cluster.evaluations import Evaluations
from cluster.final import export_adapter, kept_step, leave_adapter
from cluster.layout import lay_out
from cluster.placement import Node
from cluster.plan import resolve
from cluster.preflight import cpus_needed, gpus_needed
from cluster.purpose import Training
from cluster.storage import RunFolder
from diffusion.adapters import adapter_metadata, load_adapter_file
from evaluation.config import StopConfig
from evaluation.stopping import Verdict, judge
from learner.checkpoint import Checkpoint, checkpoint_path, read_checkpoint, save_checkpoint
from raysteer.errors import ClusterError, ConfigError
from tests.conftest import RecipeFactory
from tests.policies import load

EVERY = {"suite": "glyphs", "glyphs": {"prompts_unsafe": 4, "prompts_safe": 6, "diversity_prompts": 0}, "every": 2}


def rows(*values: float | None, every: int = 10) -> list[dict[str, Any]]:
    """Rows of steps 0, `every`, ... with these figures; None: an evaluation that failed."""
    return [
        {"step": every * i, **({"error": "x"} if v is None else {"figures": {"f": {"value": v}}})}
        for i, v in enumerate(values)
    ]


# ---- the recipe -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "key", "said"),
    [
        ({"suite": None}, "evaluation.suite", "such as glyphs"),
        ({"suite": "refusal"}, "evaluation.suite", "nobody keeps beside training"),
        ({"every": 3}, "evaluation.every", r"multiple of run.checkpoint_every \(2\).*; 4 would do"),
        ({"every": 1}, "evaluation.every", "2 would do"),
        ({"every": 0}, "evaluation.every", "greater than or equal to 1"),
        ({"every": None, "stop": {}}, "evaluation.every", "evaluation.stop needs it"),
        ({"reward": False, "stop": {}}, "evaluation.reward", "goes by reward_corrected"),
        ({"stop": {"patience": 0}}, "evaluation.stop.patience", "greater than or equal to 1"),
        ({"stop": {"least": -0.1}}, "evaluation.stop.least", "greater than or equal to 0"),
        ({"stop": {"figure": "reward"}}, "evaluation.stop.figure", "reward_corrected"),
    ],
)
def test_what_cannot_be_evaluated_or_stopped_by_is_refused(
    tiny_recipe: RecipeFactory, changes: dict[str, Any], key: str, said: str
) -> None:
    file = tiny_recipe({"run.checkpoint_every": 2, "evaluation": EVERY | changes})
    with pytest.raises(ConfigError, match=said) as caught:
        load_recipe(file)
    assert caught.value.key == key


def test_the_evaluator_is_one_more_process_and_without_it_nothing_changes(tiny_recipe: RecipeFactory) -> None:
    sampler = {"samplers.num_cpus": 1.0, "samplers.num_gpus": 0.25}
    without = load_recipe(tiny_recipe(sampler))
    recipe = load_recipe(tiny_recipe(sampler | {"evaluation": EVERY}))
    assert cpus_needed(recipe) == cpus_needed(without) + 1.0
    assert gpus_needed(recipe) == gpus_needed(without) + 0.25
    assert recipe.fingerprint() == without.fingerprint()
    text = resolve(recipe).render()
    assert "\nevaluator      1 × 0.25 GPU" in text and "every 2 steps, at the first and at the last: 10 images" in text
    assert "\nevaluator" not in resolve(without).render()
    roomy = [Node("n1", "n1", {"CPU": 8, "GPU": 1})]
    found = lay_out(recipe, roomy, may_grow=False)
    assert found.evaluator == "n1" and found.nodes["n1"]["evaluator"] == 1
    assert lay_out(without, roomy, may_grow=False).evaluator is None
    full = [Node("n1", "n1", {"CPU": 8, "GPU": 0.25})]
    lay_out(without, full, may_grow=False)
    with pytest.raises(ClusterError, match=r"no room for 1 of 1 evaluator, .*or set evaluation\.every to null"):
        lay_out(recipe, full, may_grow=False)


# ---- the rule -------------------------------------------------------------------------------------------------------


def test_what_rises_for_ever_is_never_stopped() -> None:
    verdict = judge(rows(*np.linspace(0.0, 1.0, 30).tolist()), "f", patience=1)
    assert verdict == Verdict(290, 1.0, 290, 0, False)
    assert verdict.words("f") == "f is best 1.000 at step 290"


def test_a_plateau_ends_after_the_patience_and_leaves_what_came_before_it() -> None:
    assert not judge(rows(0.1, 0.3, 0.2), "f", patience=2).stops
    verdict = judge(rows(0.1, 0.3, 0.2, 0.3), "f", patience=2)
    assert verdict == Verdict(10, 0.3, 10, 2, True), "an equal value is no new best"
    assert verdict.words("f") == "f has not risen for 2 evaluations; best 0.300 at step 10"
    assert judge(rows(0.1, 0.3, 0.2, 0.4, 0.2), "f", patience=2).without == 1, "a new best begins the patience anew"
    assert not judge(rows(0.1, 0.3, 0.2, 0.1, 0.0), "f").stops, "there is no end without a patience"


def test_the_verdict_does_not_depend_on_what_was_evaluated_after_it() -> None:
    values = [0.1, 0.3, 0.2, 0.2]
    for later in ([], [0.9], [0.9, 1.0, None]):
        assert judge(rows(*values, *later), "f", patience=2) == Verdict(10, 0.3, 10, 2, True)
    shuffled = list(reversed(rows(*values, 0.9)))
    assert judge(shuffled, "f", patience=2).best_step == 10, "rows are taken in the order of their steps"


def test_a_patience_of_one_ends_at_the_first_that_does_not_rise() -> None:
    assert judge(rows(0.1, 0.1), "f", patience=1) == Verdict(0, 0.1, 10, 1, True)


def test_where_the_base_model_is_best_the_best_of_those_trained_is_left() -> None:
    verdict = judge(rows(0.5, 0.2, 0.4, 0.4), "f", patience=3)
    assert verdict == Verdict(0, 0.5, 20, 3, True) and verdict.base_is_best
    assert "best 0.500 at step 0 (the base model)" in verdict.words("f")
    assert judge(rows(0.5), "f", patience=1) == Verdict(0, 0.5, None, 0, False)


def test_a_new_best_exceeds_the_old_by_more_than_least() -> None:
    assert judge(rows(0.0, 0.5, 1.0, 1.25), "f", patience=1, least=0.25) == Verdict(20, 1.0, 20, 1, True)
    assert judge(rows(0.0, 0.2, 0.24), "f", patience=2, least=0.25) == Verdict(0, 0.0, 20, 2, True)


def test_an_evaluation_that_failed_counts_as_if_nobody_had_asked_for_it() -> None:
    assert judge(rows(0.1, None, 0.3, None, 0.2), "f", patience=2) == Verdict(20, 0.3, 20, 1, False)
    assert judge(rows(None), "f", patience=1) == Verdict()


def test_due_are_the_base_model_multiples_and_the_last_step() -> None:
    assert due_steps(4, 10, 0) == [0]
    assert due_steps(4, 10, 7) == [0, 4]
    assert due_steps(4, 10, 10) == [0, 4, 8, 10]
    assert due_steps(5, 10, 10) == [0, 5, 10]


# ---- the record -----------------------------------------------------------------------------------------------------


def found(value: float) -> dict[str, Any]:
    figure = {"value": value, "low": value, "high": value, "standard_error": 0.0, "n": 10}
    return {"figures": {"reward_corrected": figure}, "rewards": [value] * 10, "samples": {}, "changes": {}}


@pytest.fixture
def recipe(tiny_recipe: RecipeFactory) -> Recipe:
    return load_recipe(tiny_recipe({"run.steps": 8, "evaluation": EVERY | {"stop": {"patience": 2}}}))


def record(recipe: Recipe, *values: float) -> Evaluations:
    evaluations = Evaluations(recipe, RunFolder(recipe.run_dir).create())
    for index, value in enumerate(values):
        evaluations.add(2 * index, found(value), 1.0)
    return evaluations


def test_rows_are_read_back_as_they_were_written(recipe: Recipe) -> None:
    written = record(recipe, 0.1, 1 / 3)
    written.add_failure(4, "three evaluators died")
    again = Evaluations(recipe, written.folder)
    assert again.rows == written.rows and again.verdict == written.verdict
    assert again.done == {0, 2}, "what failed may be tried again"
    assert again.base_rewards == [0.1] * 10
    assert [row["is_best"] for row in again.rows.values() if "error" not in row] == [True, True]
    assert not again.add(4, found(0.2), 1.0)
    assert Evaluations(recipe, written.folder).done == {0, 2, 4}


def test_steps_that_are_trained_again_are_evaluated_again(recipe: Recipe) -> None:
    evaluations = record(recipe, 0.1, 0.3, 0.2)
    evaluations.forget_after(2)
    assert evaluations.done == Evaluations(recipe, evaluations.folder).done == {0, 2}


def test_rows_of_other_evaluation_settings_do_not_count(recipe: Recipe) -> None:
    folder = record(recipe, 0.1, 0.3).folder
    other = recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update={"seed": 5})})
    evaluations = Evaluations(other, folder)
    assert (evaluations.done, evaluations.others) == (set(), 2)
    longer = recipe.evaluation.model_copy(update={"every": 4, "stop": None})
    assert Evaluations(recipe.model_copy(update={"evaluation": longer}), folder).done == {0, 2}


def checkpoints(recipe: Recipe, *steps: int) -> dict[int, Checkpoint]:
    """A checkpoint of each step in the run's folder; the adapter of a step is filled with its number."""
    state = load(Path(recipe.model.path), rank=2).adapter_state()
    made = {}
    for step in steps:
        values = {k: v if k.endswith("alpha") else np.full_like(v, step) for k, v in state.items()}
        made[step] = Checkpoint(step, recipe.fingerprint(), values, {}, {})
        save_checkpoint(RunFolder(recipe.run_dir).checkpoints, made[step])
    return made


def test_a_run_that_its_evaluations_have_ended_is_finished_and_leaves_the_best(recipe: Recipe) -> None:
    made, training = checkpoints(recipe, 2, 4, 6), Training(recipe)
    evaluations = record(recipe, 0.1, 0.3, 0.2)
    assert training.ended_early() is None, "there is patience left"
    export_adapter(recipe, evaluations.folder.best, made[2])
    evaluations.add(6, found(0.2), 1.0)
    why = training.ended_early()
    assert why == "stopped early: reward_corrected has not risen for 2 evaluations; best 0.300 at step 2"
    left = training.complete()
    assert adapter_metadata(left)["step"] == "2" and kept_step(evaluations.folder) == 2
    assert all((v == 2).all() for k, v in load_adapter_file(left).items() if not k.endswith("alpha"))
    unhurried = recipe.evaluation.model_copy(update={"stop": StopConfig(patience=3)})
    assert Training(recipe.model_copy(update={"evaluation": unhurried})).ended_early() is None


def test_without_a_rule_and_without_a_kept_adapter_the_newest_is_left(
    recipe: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    made = checkpoints(recipe, 2, 4)
    folder = record(recipe, 0.1, 0.3, 0.2).folder
    assert adapter_metadata(leave_adapter(recipe, folder, made[4]))["step"] == "4"
    assert "the newest is taken, of step 4" in caplog.text
    export_adapter(recipe, folder.best, made[2])
    free = recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update={"stop": None})})
    assert adapter_metadata(leave_adapter(free, folder, made[4]))["step"] == "4"
    assert adapter_metadata(leave_adapter(recipe, folder, made[4]))["step"] == "2"


def test_that_no_evaluation_beat_the_base_model_is_said(recipe: Recipe, caplog: pytest.LogCaptureFixture) -> None:
    made = checkpoints(recipe, 2, 4)
    folder = record(recipe, 0.5, 0.3, 0.2).folder
    export_adapter(recipe, folder.best, made[2])
    assert adapter_metadata(leave_adapter(recipe, folder, made[4]))["step"] == "2"
    assert "no evaluation beat the base model, whose reward_corrected is 0.500" in caplog.text


def test_the_adapter_of_a_checkpoint_is_read_without_its_moments(recipe: Recipe) -> None:
    made = checkpoints(recipe, 2)
    path = checkpoint_path(RunFolder(recipe.run_dir).checkpoints, 2)
    (path / "optimizer.safetensors").unlink()
    light = read_checkpoint(path, optimizer=False)
    assert light.step == 2 and light.optimizer == {}
    assert all(np.array_equal(light.exported[name], value) for name, value in made[2].exported.items())
