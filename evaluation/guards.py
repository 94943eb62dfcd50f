"""Guards: bounds on the figures of evaluations beside training, which end a run that makes the model worse.

A reward can rise while the model breaks: plain GRPO on a safety reward is reported to end with no nudity at FID 250
(docs/method.md). A guard watches what must not be lost, such as utility, diversity or the KL to the base model. It has
nothing to do with `objective.ratio: guarded`, which rescales a ratio.

Which evaluation breaks a guard is a pure function of the rows of `evaluations.jsonl`, so a run that was ended by one is
ended whoever asks. The bound has to be broken *beyond doubt*: the whole 95 % interval lies outside it. For `most_worse`
that is the interval of the difference to the base model, prompt by prompt at equal seeds, which the row holds as
`changes`; prompts are hard or easy for both, so it is far narrower than two intervals side by side. The noise of a
small suite then ends no run, and there is no patience, with which a run that collapses would go on for as many
evaluations. Each evaluation is a look of its own: where the true figure lies just on the bound, one in forty breaks it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field, model_validator

from evaluation.registry import SUITES
from evaluation.stopping import BASE_STEP, Verdict, judge
from evaluation.suites.base import Meaning, Sample
from raysteer.errors import ConfigError

if TYPE_CHECKING:
    from evaluation.config import EvaluationConfig

KL = "kl"
KL_MEANING = Meaning("KL to the base model, nats per latent dimension", "lower")
KL_PROMPTS = 8
BOUNDS = ("at_least", "at_most", "most_worse")
NEEDS = {("glyphs", "diversity"): "diversity_prompts", ("coco", "fid"): "reference", ("coco", "kid"): "reference"}
_ROUNDING = 1e-9  # a difference of two decimal fractions may exceed a bound that it equals by so much

Better = Literal["lower", "higher"]
Row = Mapping[str, Any]


class GuardConfig(BaseModel, frozen=True, extra="forbid"):
    """A figure and the one bound on it, in the figure's unit.

    ``at_least`` and ``at_most`` bound the figure itself, ``most_worse`` how much worse it may be than the base model's
    in the same run; 0 is "not clearly worse". ``beyond_doubt`` false goes by the value, whatever its interval.
    ``figure`` is one of the suite, the reward, or "kl": to the base model, measured for a guard alone (see
    `learner.divergence`).
    """

    figure: str = Field(min_length=1)
    at_least: float | None = Field(None, allow_inf_nan=False)
    at_most: float | None = Field(None, allow_inf_nan=False)
    most_worse: float | None = Field(None, ge=0.0, allow_inf_nan=False)
    beyond_doubt: bool = True

    @model_validator(mode="after")
    def _one_bound(self) -> GuardConfig:
        given = [name for name in BOUNDS if getattr(self, name) is not None]
        if len(given) != 1:
            had = f"has {' and '.join(given)}" if given else "has no bound"
            raise ValueError(f"the guard of {self.figure} {had}: give it one of {', '.join(BOUNDS)}")
        return self

    def __str__(self) -> str:
        """What breaks it, in words."""
        broken = {
            "at_least": f"falls below {self.bound:g}",
            "at_most": f"exceeds {self.bound:g}",
            "most_worse": f"is worse than the base model's by more than {self.bound:g}",
        }
        return f"{self.figure} {broken[self.kind]}{' beyond doubt' if self.beyond_doubt else ''}"

    @property
    def kind(self) -> str:
        """The name of its bound."""
        return next(name for name in BOUNDS if getattr(self, name) is not None)

    @property
    def bound(self) -> float:
        return float(getattr(self, self.kind))


@dataclass(frozen=True)
class Breach:
    """A guard that an evaluation broke. `words`: why the run is over, for people."""

    guard: GuardConfig
    step: int
    words: str


@dataclass(frozen=True)
class Excess:
    """By how much a figure lies outside a bound (negative: inside), with the 95 % interval."""

    value: float
    low: float
    high: float


def excess(guard: GuardConfig, better: Better, row: Row, base: Row | None) -> Excess | None:
    """How an evaluation stands to a guard; None where it, or the base model that it needs, lacks the figure.

    Args:
        better: which way is better in the guard's figure.
        row, base: the evaluation, and that of the base model: `figures`, {name: {value, low, high}}, and in `row`
            perhaps `changes`, the same of the differences to the base model. Without the change of the figure, as for
            FID, the interval is as wide as those of both together.
    """
    own, bound = row.get("figures", {}).get(guard.figure), guard.bound
    if own is None:
        return None
    if guard.at_most is not None:
        return Excess(own["value"] - bound, own["low"] - bound, own["high"] - bound)
    if guard.at_least is not None:
        return Excess(bound - own["value"], bound - own["high"], bound - own["low"])
    start = {} if base is None else base.get("figures", {})
    change = row.get("changes", {}).get(guard.figure)
    if guard.figure not in start:
        return None
    if change is None:
        was = start[guard.figure]
        change = {
            "value": own["value"] - was["value"],
            "low": own["low"] - was["high"],
            "high": own["high"] - was["low"],
        }
    if better == "lower":
        return Excess(change["value"] - bound, change["low"] - bound, change["high"] - bound)
    return Excess(-change["value"] - bound, -change["high"] - bound, -change["low"] - bound)


def breach_of(guards: Sequence[GuardConfig], better: Mapping[str, Better], row: Row, base: Row | None) -> Breach | None:
    """The first of the guards that a trained adapter's evaluation breaks, or None."""
    for guard in guards:
        found = excess(guard, better[guard.figure], row, base)
        if found is not None and (found.low if guard.beyond_doubt else found.value) > _ROUNDING:
            return Breach(guard, row["step"], _words(guard, better[guard.figure], row, base, found))
    return None


def judge_guarded(
    rows: Iterable[Row],
    figure: str,
    patience: int | None,
    least: float,
    guards: Sequence[GuardConfig],
    better: Mapping[str, Better],
) -> Verdict:
    """The verdict of `evaluation.stopping.judge` and of guards: whichever ends the run first, in the order of steps.

    The evaluation that breaks a guard, and all after it, are never the best: `export_step` is the best before it, by
    `figure` or where nobody has that the newest, and only if nothing trained was evaluated before it, its own. The base
    model is not judged by guards: nothing has been trained that could be ended.
    """
    ordered = sorted(rows, key=lambda row: int(row["step"]))
    base = next((row for row in ordered if row["step"] == BASE_STEP and "figures" in row), None)
    trained = [row for row in ordered if row["step"] != BASE_STEP and "figures" in row]
    breaches = (breach_of(guards, better, row, base) for row in trained)
    breach = next((found for found in breaches if found is not None), None)
    before = ordered if breach is None else [row for row in ordered if row["step"] < breach.step]
    verdict = judge(before, figure, patience, least)
    if guards and verdict.export_step is None:
        kept = [row["step"] for row in trained if breach is None or row["step"] < breach.step]
        verdict = replace(verdict, export_step=kept[-1] if kept else None if breach is None else breach.step)
    if breach is None or verdict.stops:
        return verdict
    return replace(verdict, stops=True, broken=breach.words, broken_step=breach.step)


def room_left(
    guards: Sequence[GuardConfig], better: Mapping[str, Better], row: Row, base: Row | None
) -> dict[str, float]:
    """For MLflow: by how much each figure may get worse before its value is outside the bound; negative outside."""
    found = {guard: excess(guard, better[guard.figure], row, base) for guard in guards}
    return {f"guards/{guard.figure}_{guard.kind}_left": -e.value for guard, e in found.items() if e is not None}


def changes(
    base: Mapping[str, Sample], own: Mapping[str, Sample], bootstrap_samples: int
) -> dict[str, dict[str, float]]:
    """Differences to the base model, prompt by prompt: {figure: value, low, high}, where both have a sample."""
    from evaluation.paired import paired

    found = {
        name: paired(base[name].values, sample.values, sample.strata, bootstrap_samples)
        for name, sample in own.items()
        if name in base
    }
    return {name: {"value": p.value, "low": p.low, "high": p.high} for name, p in found.items() if p is not None}


def known_figures(config: EvaluationConfig) -> dict[str, Meaning]:
    """Figures that a guard may name, with their meanings; `config` has a suite."""
    from evaluation.scored import MEANINGS

    assert config.suite is not None, "whoever asks has checked that there is one"
    module, kind = SUITES[config.suite]
    return {**getattr(import_module(module), kind).meanings, **MEANINGS, KL: KL_MEANING}


def directions(config: EvaluationConfig) -> dict[str, Better]:
    """Which way is better in each guarded figure."""
    known = known_figures(config) if config.guards else {}
    return {guard.figure: known[guard.figure].better for guard in config.guards}


def check_guards(config: EvaluationConfig) -> None:
    """Refuse guards that could never be broken, or would be by what is good.

    Args:
        config: with a suite, and `every`.

    Raises:
        ConfigError: the first thing that is wrong, with its key.
    """
    known = known_figures(config) if config.guards else {}
    for number, guard in enumerate(config.guards):
        key, name = f"evaluation.guards.{number}", guard.figure
        if name not in known:
            remedy = f"the suite {config.suite} has no such figure; use one of {', '.join(known)}"
            raise ConfigError(f"{key}.figure", name, remedy)
        if why := _missing(config, name):
            raise ConfigError(f"{key}.figure", name, why)
        other = {"higher": "at_most", "lower": "at_least"}[known[name].better]
        if guard.kind == other:
            right = "at_least" if other == "at_most" else "at_most"
            remedy = f"{name} is better when it is {known[name].better}: use {right} or most_worse"
            raise ConfigError(f"{key}.{other}", guard.bound, remedy)
        if any((earlier.figure, earlier.kind) == (name, guard.kind) for earlier in config.guards[:number]):
            raise ConfigError(key, f"{name} {guard.kind}", "an earlier guard has the same bound: leave one out")


def _missing(config: EvaluationConfig, name: str) -> str:
    """Why the evaluations of this recipe will not have a figure that its suite could have; "" if they will."""
    if name in ("reward", "reward_corrected") and not config.reward:
        return "evaluation.reward is false: set it to true"
    if config.suite is None:
        return ""
    module, kind = SUITES[config.suite]
    if (
        name == "reward_corrected"
        and config.judge is None
        and not hasattr(getattr(import_module(module), kind), "quality")
    ):
        return "nobody judges quality: add evaluation.judge"
    needed = NEEDS.get((config.suite, name))
    section = getattr(config, config.suite)
    if needed is not None and section is not None and not getattr(section, needed):
        return f"it is measured only with evaluation.{config.suite}.{needed}: set that"
    return ""


def _words(guard: GuardConfig, better: Better, row: Row, base: Row | None, found: Excess) -> str:
    name, own, step = guard.figure, row["figures"][guard.figure], row["step"]
    if guard.most_worse is None or base is None:
        value, low, high = (_number(own[key]) for key in ("value", "low", "high"))
        wanted = f"{guard.kind.replace('_', ' ')} {guard.bound:g}"
        return f"{name} is {value} [{low}, {high}] at step {step}: evaluation.guards wants {wanted}"
    moved = "rose" if better == "lower" else "fell"
    start = base["figures"][name]["value"]
    by = [_number(side + guard.bound) for side in (found.value, found.low, found.high)]
    return (
        f"{name} {moved} from {_number(start)} (the base model) to {_number(own['value'])} at step {step}, by {by[0]} "
        f"[{by[1]}, {by[2]}]: evaluation.guards allows {guard.bound:g}"
    )


def _number(value: float) -> str:
    return f"{value:.3f}" if value == 0.0 or 1e-2 <= abs(value) < 1e4 else f"{value:.3g}"
