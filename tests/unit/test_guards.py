"""Guards of a run: what is refused, the rule at its edges, which adapter is left, and the KL that they may go by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from cluster.config import Recipe, load_recipe
from cluster.evaluations import Evaluations
from cluster.final import export_adapter
from cluster.plan import resolve
from cluster.purpose import Training
from cluster.storage import RunFolder
from diffusion.adapters import adapter_metadata
from diffusion.sampling import SamplingConfig
from evaluation.config import EvaluationConfig
from evaluation.guards import GuardConfig, breach_of, changes, excess, judge_guarded, known_figures, room_left
from evaluation.stopping import judge
from evaluation.suites.base import Sample
from learner.divergence import kl_to_base
from learner.grpo import GRPO, GRPOConfig
from raysteer.errors import ConfigError
from tests.conftest import RecipeFactory
from tests.policies import drawn, load, moved
from tests.unit.test_beside import EVERY, checkpoints, found

BETTER: dict[str, Any] = {"utility": "higher", "blank": "lower", "kl": "lower"}
UTILITY = GuardConfig(figure="utility", most_worse=0.05)
BLANK = GuardConfig(figure="blank", at_most=0.1)


def figure(value: float, half: float = 0.0) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def row(step: int, half: float = 0.0, **values: float) -> dict[str, Any]:
    return {"step": step, "figures": {name: figure(value, half) for name, value in values.items()}}


BASE = row(0, utility=0.6, blank=0.3, f=0.0)


def broken(guard: GuardConfig, evaluated: dict[str, Any], base: dict[str, Any] | None = BASE) -> bool:
    return breach_of([guard], BETTER, evaluated, base) is not None


# ---- the recipe -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("guard", "changed", "key", "said"),
    [
        (
            {"figure": "fid", "at_most": 60},
            {},
            ".0.figure",
            "the suite glyphs has no such figure; use one of .*utility.*kl",
        ),
        ({"figure": "utility"}, {}, ".0", "has no bound: give it one of at_least, at_most, most_worse"),
        ({"figure": "utility", "at_least": 0, "most_worse": 1}, {}, ".0", "has at_least and most_worse: give it one"),
        (
            {"figure": "utility", "at_most": 0.5},
            {},
            ".0.at_most",
            "better when it is higher: use at_least or most_worse",
        ),
        ({"figure": "kl", "at_least": 0.5}, {}, ".0.at_least", "better when it is lower: use at_most or most_worse"),
        ({"figure": "utility", "most_worse": -0.1}, {}, ".0.most_worse", "greater than or equal to 0"),
        ({"figure": "diversity", "most_worse": 0}, {}, ".0.figure", "only with evaluation.glyphs.diversity_prompts"),
        ({"figure": "reward", "most_worse": 0}, {"reward": False}, ".0.figure", "evaluation.reward is false"),
    ],
)
def test_a_guard_that_could_not_be_broken_or_by_what_is_good_is_refused(
    tiny_recipe: RecipeFactory, guard: dict[str, Any], changed: dict[str, Any], key: str, said: str
) -> None:
    file = tiny_recipe({"run.checkpoint_every": 2, "evaluation": EVERY | changed | {"guards": [guard]}})
    with pytest.raises(ConfigError, match=said) as caught:
        load_recipe(file)
    assert caught.value.key == f"evaluation.guards{key}"


def test_guards_need_evaluations_and_no_two_are_the_same(tiny_recipe: RecipeFactory) -> None:
    guards = [{"figure": "utility", "most_worse": 0.1}]
    for every, twice, key in ((None, 1, "evaluation.every"), (2, 2, "evaluation.guards.1")):
        evaluation = EVERY | {"every": every, "guards": guards * twice}
        with pytest.raises(ConfigError) as caught:
            load_recipe(tiny_recipe({"run.checkpoint_every": 2, "evaluation": evaluation}))
        assert caught.value.key == key


def test_the_corrected_score_needs_somebody_who_judges() -> None:
    coco = {"suite": "coco", "coco": {"file": "x.csv"}, "every": 2}
    with pytest.raises(ConfigError, match=r"add evaluation\.judge"):
        check(coco | {"guards": [{"figure": "reward_corrected", "most_worse": 0.0}]})
    check(coco | {"guards": [{"figure": "reward", "most_worse": 0.0}]})


def check(section: dict[str, Any]) -> None:
    from evaluation.config import check_beside

    check_beside(EvaluationConfig.model_validate(section), 2)


def test_every_figure_of_every_suite_can_be_guarded() -> None:
    for suite in ("glyphs", "i2p", "nudity", "attacks", "geneval", "coco"):
        assert {"kl", "reward"} < known_figures(EvaluationConfig.model_validate({"suite": suite})).keys()


def test_guards_change_neither_the_fingerprint_nor_what_evaluations_are_comparable(tiny_recipe: RecipeFactory) -> None:
    guarded = {"guards": [{"figure": "utility", "most_worse": 0.05}]}
    without, recipe = (load_recipe(tiny_recipe({"evaluation": EVERY | more})) for more in ({}, guarded))
    assert recipe.fingerprint() == without.fingerprint()
    protocols = {Evaluations(each, RunFolder(each.run_dir)).protocol for each in (without, recipe)}
    assert len(protocols) == 1
    said = "the run ends when utility is worse than the base model's by more than 0.05 beyond doubt"
    assert said in resolve(recipe).render() and "\nguard" not in resolve(without).render()


# ---- the rule -------------------------------------------------------------------------------------------------------


def test_a_bound_that_is_reached_is_not_broken() -> None:
    assert not broken(UTILITY, row(10, utility=0.55)), "although 0.6 - 0.55 exceeds 0.05 in floating point"
    assert broken(UTILITY, row(10, utility=0.549))
    assert not broken(BLANK, row(10, blank=0.1)) and broken(BLANK, row(10, blank=0.101))
    least = GuardConfig(figure="utility", at_least=0.5)
    assert not broken(least, row(10, utility=0.5)) and broken(least, row(10, utility=0.499))


def test_worse_is_the_way_that_the_figure_says() -> None:
    rising = GuardConfig(figure="blank", most_worse=0.05)
    assert broken(rising, row(10, blank=0.4)) and not broken(rising, row(10, blank=0.0))
    assert not broken(UTILITY, row(10, utility=0.9))
    both = row(10, utility=0.5, blank=0.3)
    assert room_left([UTILITY, BLANK], BETTER, both, BASE) == pytest.approx(
        {"guards/utility_most_worse_left": -0.05, "guards/blank_at_most_left": -0.2}
    )


def test_a_bound_is_broken_when_the_whole_interval_is_outside_it() -> None:
    assert not broken(BLANK, row(10, blank=0.15, half=0.06)) and broken(BLANK, row(10, blank=0.15, half=0.04))
    hasty = BLANK.model_copy(update={"beyond_doubt": False})
    assert broken(hasty, row(10, blank=0.15, half=0.06))


def test_the_change_prompt_by_prompt_decides_where_there_is_one() -> None:
    wide, base = row(10, utility=0.5, half=0.04), row(0, utility=0.6, half=0.04)
    assert not broken(UTILITY, wide, base), "two intervals side by side say too little"
    paired = wide | {"changes": {"utility": {"value": -0.1, "low": -0.12, "high": -0.08}}}
    assert broken(UTILITY, paired, base)
    unsure = wide | {"changes": {"utility": {"value": -0.1, "low": -0.16, "high": -0.04}}}
    assert not broken(UTILITY, unsure, base)
    found = excess(UTILITY, "higher", paired, base)
    assert found is not None and (found.value, found.low, found.high) == pytest.approx((0.05, 0.03, 0.07))


def test_changes_are_paired_over_the_prompts_that_count_in_both() -> None:
    first = {"a": Sample((1.0, 0.0, None, 0.5)), "b": Sample((1.0,))}
    second = {"a": Sample((0.5, 0.0, 1.0, None)), "c": Sample((1.0,))}
    assert changes(first, second, 100).keys() == {"a"}
    assert changes(first, second, 100)["a"]["value"] == pytest.approx(-0.25)
    strata = ("x", "x", "x", "y")
    made = changes({"a": Sample((0.0,) * 4, strata)}, {"a": Sample((1.0, 1.0, 1.0, 0.0), strata)}, 100)
    assert made["a"] == {"value": 0.5, "low": 0.5, "high": 0.5}, "the mean of the strata's means, as the figure"


def test_a_figure_that_is_missing_breaks_nothing() -> None:
    assert not broken(UTILITY, row(10, blank=0.5)) and not broken(UTILITY, row(10, utility=0.0), base=None)
    assert room_left([UTILITY], BETTER, row(10, utility=0.0), None) == {}
    failed = [BASE, {"step": 10, "error": "x"}, row(20, utility=0.6)]
    assert not judge_guarded(failed, "f", None, 0.0, [UTILITY], BETTER).stops


def test_the_base_model_is_not_judged_by_guards() -> None:
    assert not judge_guarded([BASE], "f", None, 0.0, [BLANK], BETTER).stops


def test_without_guards_the_rule_is_the_other_one() -> None:
    rows = [row(10 * i, f=value) for i, value in enumerate((0.1, 0.3, 0.2, 0.2))]
    for patience in (None, 1, 2, 3):
        assert judge_guarded(rows, "f", patience, 0.0, [], {}) == judge(rows, "f", patience)


# ---- what is left ---------------------------------------------------------------------------------------------------


def verdict(rows: list[dict[str, Any]], patience: int | None = None) -> Any:
    return judge_guarded(rows, "f", patience, 0.0, [UTILITY, BLANK], BETTER)


def test_the_best_before_the_breach_is_left_and_nothing_after_it_counts() -> None:
    rows = [BASE, row(10, f=0.5, utility=0.6), row(20, f=0.4, utility=0.6), row(30, f=0.9, utility=0.4)]
    assert not verdict(rows[:3]).stops
    ended = verdict(rows)
    assert (ended.stops, ended.broken_step, ended.best_step, ended.export_step) == (True, 30, 10, 10)
    assert ended.words("f") == (
        "utility fell from 0.600 (the base model) to 0.400 at step 30, by 0.200 [0.200, 0.200]: "
        "evaluation.guards allows 0.05"
    )
    assert verdict([*reversed(rows), row(40, f=2.0, utility=0.9)]) == ended


def test_where_the_first_breaks_it_its_own_adapter_is_left_for_there_is_no_other() -> None:
    ended = verdict([BASE, row(10, f=0.5, blank=0.2)])
    assert (ended.stops, ended.broken_step, ended.export_step) == (True, 10, 10)
    assert ended.words("f") == "blank is 0.200 [0.200, 0.200] at step 10: evaluation.guards wants at most 0.1"


def test_without_a_score_the_newest_that_broke_nothing_is_left() -> None:
    rows = [row(0, utility=0.6), row(10, utility=0.6), row(20, utility=0.6), row(30, utility=0.1)]
    assert [verdict(rows[:count]).export_step for count in (1, 2, 3, 4)] == [None, 10, 20, 20]


def test_patience_and_guards_end_it_whichever_comes_first() -> None:
    level = [BASE, row(10, f=0.0, utility=0.6), row(20, f=0.0, utility=0.1), row(30, f=0.0)]
    assert verdict(level, patience=1).broken is None
    assert verdict(level, patience=2).broken_step == 20, "of the same evaluation the guard is what is said"
    assert verdict(level, patience=3).broken_step == 20


@pytest.fixture
def recipe(tiny_recipe: RecipeFactory) -> Recipe:
    guards = [{"figure": "utility", "most_worse": 0.05}]
    return load_recipe(tiny_recipe({"run.steps": 8, "evaluation": EVERY | {"guards": guards}}))


def evaluated(recipe: Recipe, *values: tuple[float, float]) -> Evaluations:
    """Rows of steps 0, 2, ...: corrected score and utility."""
    evaluations = Evaluations(recipe, RunFolder(recipe.run_dir).create())
    for index, (score, utility) in enumerate(values):
        made = found(score)
        made["figures"]["utility"] = found(utility)["figures"]["reward_corrected"]
        evaluations.add(2 * index, made, 1.0)
    return evaluations


def test_a_run_that_a_guard_has_ended_is_finished_until_the_guard_is_changed(
    recipe: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    made, training = checkpoints(recipe, 2, 4, 6), Training(recipe)
    evaluations = evaluated(recipe, (0.1, 0.6), (0.3, 0.6), (0.2, 0.6))
    assert training.ended_early() is None
    export_adapter(recipe, evaluations.folder.best, made[4])
    assert adapter_metadata(training.complete())["step"] == "6", "guards that hold choose nothing"
    evaluated(recipe, (0.1, 0.6), (0.3, 0.6), (0.2, 0.6), (0.9, 0.5))
    why = training.ended_early()
    assert why is not None and why.startswith(
        "stopped early: utility fell from 0.600 (the base model) to 0.500 at step 6"
    )
    assert adapter_metadata(training.complete())["step"] == "2", "from its checkpoint, where another had been kept"
    assert "the adapter is that of step 2, the best before it" in caplog.text
    for guards in ((), (GuardConfig(figure="utility", most_worse=0.2),)):
        changed = recipe.evaluation.model_copy(update={"guards": guards})
        other = Training(recipe.model_copy(update={"evaluation": changed}))
        assert other.ended_early() is None and adapter_metadata(other.complete())["step"] == "6"


def test_samples_of_the_base_model_are_read_back_and_a_guard_without_a_figure_is_known(recipe: Recipe) -> None:
    evaluations = Evaluations(recipe, RunFolder(recipe.run_dir).create())
    made = found(0.1) | {"samples": {"utility": {"values": [1.0, None], "strata": ["a", "b"]}}}
    evaluations.add(0, made, 1.0)
    assert evaluations.base_samples == {"utility": Sample((1.0, None), ("a", "b"))}
    again = Evaluations(recipe, evaluations.folder)
    assert again.rows == evaluations.rows and again.base_samples == evaluations.base_samples
    assert again.unwatched() == ["utility"]


# ---- the KL ---------------------------------------------------------------------------------------------------------

SAMPLING = SamplingConfig.model_validate({"steps": 4, "guidance_scale": 5.0, "group_size": 4, "trained": {"count": 1}})


def test_the_kl_is_zero_for_the_base_model_and_grows_as_the_adapter_moves(tiny_pipeline: Path) -> None:
    values = [kl_to_base(moved(load(tiny_pipeline), scale), "a sign", (3, 4), SAMPLING) for scale in (0.0, 0.05, 0.2)]
    assert values[0] == 0.0 < values[1] < values[2]
    assert values[1] == kl_to_base(moved(load(tiny_pipeline), 0.05), "a sign", (3, 4), SAMPLING)


def test_the_kl_is_that_of_the_objective(tiny_pipeline: Path) -> None:
    sampling = SamplingConfig.model_validate(SAMPLING.model_dump() | {"trained": {"mode": "all"}})
    policy, stepper, rollout = drawn(tiny_pipeline, sampling)
    seeds = tuple(range(sampling.group_size))
    positions = list(range(rollout.trajectory.num_positions))
    advantages = np.zeros(sampling.group_size, np.float32)
    _, figures = GRPO(GRPOConfig(kl_coef=1.0)).loss(
        policy, stepper, rollout.trajectory, advantages, positions, sampling.guidance_scale
    )
    assert kl_to_base(policy, rollout.trajectory.prompt, seeds, sampling) == pytest.approx(figures["kl_ref"], rel=1e-5)


def test_a_guard_has_one_bound() -> None:
    with pytest.raises(ValidationError, match="has no bound"):
        GuardConfig(figure="kl")
