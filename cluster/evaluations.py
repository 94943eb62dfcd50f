"""The record of what evaluating beside training has found: `evaluations.jsonl`, one row for each evaluation.

    step · protocol: what its figures depend on beside the adapter, as a hash
    figures: {name: {value, low, high, standard_error, n}} · is_best: when it was written · seconds
    rewards, samples: of the base model, in the row of step 0, which all others are compared with: of each image, and
        {name: {values, strata}} of each prompt
    changes: {name: {value, low, high}}, figures less those of the base model, prompt by prompt
    error: why there are no figures, after as many attempts as there may be

Whether a run is to end is read from these rows alone (see `evaluation.stopping` and `evaluation.guards`): a run that
was ended by them is finished, whoever asks and whenever.
"""

from __future__ import annotations

import logging
from dataclasses import astuple
from typing import TYPE_CHECKING, Any

from cluster.config import digest
from cluster.recipe_yaml import identity
from evaluation.config import StopConfig
from evaluation.guards import directions, judge_guarded, room_left
from evaluation.stopping import BASE_STEP, Verdict
from evaluation.suites.base import Sample
from learner.records import append_row, keep_rows_until, read_rows
from rewards.config import map_files

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cluster.config import Recipe
    from cluster.storage import RunFolder

logger = logging.getLogger(__name__)


class Evaluations:
    """Rows of a run that a recipe's evaluation section can be asked about; of other sections' rows they are kept apart.

    Args:
        recipe: with `evaluation.every`.
        folder: of the run.
        until: rows of later steps do not count.
    """

    def __init__(self, recipe: Recipe, folder: RunFolder, until: int | None = None) -> None:
        self.config, self.folder = recipe.evaluation, folder
        self.rule = self.config.stop or StopConfig()
        self.better = directions(self.config)
        self.protocol = protocol_hash(recipe)
        rows = [row for row in read_rows(folder.evaluations) if until is None or row["step"] <= until]
        self.rows = {row["step"]: row for row in rows if row["protocol"] == self.protocol}
        self.others = sum(row["protocol"] != self.protocol for row in rows)

    @property
    def verdict(self) -> Verdict:
        """What the rows say; without `evaluation.stop` and `evaluation.guards` they never end a run."""
        return self._judge(self.rows)

    @property
    def done(self) -> set[int]:
        """Steps that have figures."""
        return {step for step, row in self.rows.items() if "error" not in row}

    @property
    def base_rewards(self) -> Sequence[float] | None:
        """Rewards of the base model's images, None while there are none."""
        found: Sequence[float] | None = self.rows.get(BASE_STEP, {}).get("rewards")
        return found

    @property
    def base_samples(self) -> dict[str, Sample] | None:
        """Of the base model's figures, None while there are none."""
        found = self.rows.get(BASE_STEP, {}).get("samples")
        if found is None:
            return None
        return {
            name: Sample(tuple(sample["values"]), None if sample["strata"] is None else tuple(sample["strata"]))
            for name, sample in found.items()
        }

    def room_left(self, step: int) -> dict[str, float]:
        """How far from each guard the figures of an evaluated step are, by the name of the metric."""
        return room_left(self.config.guards, self.better, self.rows[step], self.rows.get(BASE_STEP))

    def unwatched(self) -> list[str]:
        """Guarded figures that the base model's evaluation lacks, so that nobody watches them."""
        figures = self.rows.get(BASE_STEP, {}).get("figures")
        return [] if figures is None else [name for name in self.better if name not in figures]

    def forget_after(self, step: int) -> None:
        """Drop rows of later steps: they are about to be trained again. Raises OSError when the disk refuses."""
        if self.folder.evaluations.exists():
            keep_rows_until(self.folder.evaluations, step)
        self.rows = {row_step: row for row_step, row in self.rows.items() if row_step <= step}

    def add(self, step: int, found: dict[str, Any], seconds: float) -> bool:
        """Record the figures of a step (see `actors.evaluator.Evaluator.judge`). Returns whether it is the best so far.

        Raises OSError when the disk refuses; the row counts all the same until the process ends.
        """
        row: dict[str, Any] = {"step": step, "figures": found["figures"]}
        if found["changes"]:
            row["changes"] = found["changes"]
        row["is_best"] = self._judge(self.rows | {step: row}).best_step == step
        row |= {"seconds": round(seconds, 1), "protocol": self.protocol}
        if step == BASE_STEP:
            row |= {"rewards": found["rewards"], "samples": found["samples"]}
        self.rows[step] = row
        append_row(self.folder.evaluations, row)
        return bool(row["is_best"])

    def add_failure(self, step: int, why: str) -> None:
        """Record that a step has no figures. Raises OSError as `add`."""
        self.rows[step] = {"step": step, "error": why, "protocol": self.protocol}
        append_row(self.folder.evaluations, self.rows[step])

    def _judge(self, rows: dict[int, dict[str, Any]]) -> Verdict:
        patience = None if self.config.stop is None else self.rule.patience
        rule, guards = self.rule, self.config.guards
        return judge_guarded(rows.values(), rule.figure, patience, rule.least, guards, self.better)


def protocol_hash(recipe: Recipe) -> str:
    """What must be equal for two evaluations of one run to be comparable: prompts, seeds, sampling, judge.

    The reward is not in it: it belongs to the run's fingerprint.
    """
    from evaluation.registry import build_suite, detectors_of
    from evaluation.scored import shots

    config = recipe.evaluation
    suite = build_suite(config)
    parts: dict[str, Any] = {
        "suite": suite.name,
        "shots": [astuple(shot) for shot in shots(suite, config)],
        "rules": suite.protocol(),
        "detectors": {
            name: own.model_dump(mode="json") for name, (*_, own) in detectors_of(suite, config, None).items()
        },
        "steps": config.steps,
        "reward": config.reward,
        "bootstrap_samples": config.bootstrap_samples,
    }
    if config.judge is not None:
        judged = config.judge.model_dump(mode="json")
        parts["judge"] = judged | {"reward": map_files(judged["reward"], identity)}
    return digest(parts)[:16]
