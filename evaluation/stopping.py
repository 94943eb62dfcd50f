"""When to end a run by its evaluations: early stopping with patience (Prechelt 1998, "Early stopping, but when?").

A pure function of the evaluations in the order of their steps. It ends at the first evaluation that completes the
patience, whatever was evaluated after it, so the verdict does not depend on how far training was by then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

BASE_STEP = 0


@dataclass(frozen=True)
class Verdict:
    """What the evaluations so far say.

    Attributes:
        best_step, best: of the evaluation that the others have to exceed; None when none has the figure.
        export_step: whose adapter the run should leave: the best one, or if that is the base model the best of those
            trained; None when none has been trained.
        without: evaluations in a row without a new best.
        stops: the run is over: the patience is used up, or a guard is broken.
        broken, broken_step: the guard that ended it, in words, and at which evaluation (see `evaluation.guards`).
    """

    best_step: int | None = None
    best: float | None = None
    export_step: int | None = None
    without: int = 0
    stops: bool = False
    broken: str | None = None
    broken_step: int | None = None

    @property
    def base_is_best(self) -> bool:
        return self.best_step == BASE_STEP

    def words(self, figure: str) -> str:
        """Such as: reward_corrected has not risen for 2 evaluations; best 0.373 at step 20."""
        if self.broken is not None:
            return self.broken
        if self.best is None:
            return f"no evaluation has {figure}"
        times = "1 evaluation" if self.without == 1 else f"{self.without} evaluations"
        risen = f"{figure} has not risen for {times}; " if self.without else f"{figure} is "
        whose = " (the base model)" if self.base_is_best else ""
        return f"{risen}best {self.best:.3f} at step {self.best_step}{whose}"


def judge(rows: Iterable[Mapping[str, Any]], figure: str, patience: int | None = None, least: float = 0.0) -> Verdict:
    """The verdict on evaluations.

    Args:
        rows: each with `step` and `figures`, {name: {"value": ...}}; in any order, a step once. Those without the
            figure, such as one that failed, count as if they had not been asked for. Step 0 is the base model.
        figure: which has to rise.
        patience: evaluations in a row without a new best before the end; None: there is no end.
        least: a new best exceeds the old one by more than this.
    """
    values = sorted((row["step"], row["figures"][figure]["value"]) for row in rows if figure in row.get("figures", ()))
    best_step: int | None = None
    best = 0.0
    trained: tuple[float, int] | None = None  # value and step of the highest, the first of equals
    without = 0
    for step, value in values:
        if step != BASE_STEP and (trained is None or value > trained[0]):
            trained = (value, step)
        if best_step is None or value > best + least:
            best_step, best, without = step, value, 0
        else:
            without += 1
        if without == patience:
            break
    if best_step is None:
        return Verdict()
    export = best_step if best_step != BASE_STEP else trained[1] if trained is not None else None
    return Verdict(best_step, best, export, without, patience is not None and without >= patience)
