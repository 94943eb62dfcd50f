"""``raysteer eval``: find the adapter, evaluate it against its base model, keep the figures with the run."""

import shutil
from collections.abc import Callable
from pathlib import Path

from cluster.config import Recipe
from cluster.evaluate import Evaluation, run_evaluation
from cluster.preflight import check_cluster, check_model
from cluster.runlock import check_not_held
from cluster.source import find_adapter
from cluster.tracking import RUN_ID_FILE, Tracker
from raysteer.errors import StorageError

BEFORE, AFTER = "base", "adapted"


def evaluate_and_record(
    recipe: Recipe, adapter: str | None, json_path: Path | None, notify: Callable[[str], None]
) -> str:
    """Evaluate base model and adapter; figures go to the run folder, to MLflow if the run is known there, and to
    ``json_path``.

    Args:
        recipe: its ``evaluation`` section decides what is evaluated.
        adapter: run, checkpoint or adapter folder; None means the recipe's own run.
        json_path: a further place for ``evaluation.json``.
        notify: receives progress lines.

    Returns:
        What to show: the table, and where the files are.
    """
    check_model(recipe)
    check_cluster(recipe)
    found = find_adapter(adapter or recipe.run_dir, recipe.run.storage)
    notify(f"adapter: {found.words}")
    result = run_evaluation(recipe, {BEFORE: None, AFTER: found.state}, recipe.run_dir / "evaluation", notify)
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(result.json_path, json_path)
    lines = [result.table(), "", f"figures {result.json_path}", f"picture {result.picture}"]
    if adapter is None:
        lines.append(_record(recipe, result))
    return "\n".join(lines)


def _record(recipe: Recipe, result: Evaluation) -> str:
    if not (recipe.run_dir / RUN_ID_FILE).is_file():
        return "MLflow  this run is not tracked; figures stay in the run folder"
    try:
        check_not_held(recipe.run_dir)  # one writer per run
    except StorageError:
        return "MLflow  the run is still training and has its writer; evaluate again when it is over to record them"
    tracker = Tracker(recipe.tracking, recipe.run.name, recipe.run_dir, recipe.flat())
    tracker.log_summary(figures(result), "evaluation/")
    tracker.log_table(rows(result), "evaluation/table.json")
    tracker.log_artifact(result.json_path, "evaluation")
    tracker.log_artifact(result.picture, "evaluation")
    tracker.finish()
    return f"MLflow  recorded as evaluation/... in run {tracker.run_id} at {tracker.uri}"


def figures(result: Evaluation) -> dict[str, float]:
    """``{"after/inappropriate_rate": 0.1, ...}`` of every model evaluated."""
    return {
        f"{label}/{name}": float(figure["value"])
        for label, report in result.figures.items()
        for name, figure in report.items()
        if isinstance(figure, dict) and "value" in figure
    }


def rows(result: Evaluation) -> dict[str, list]:
    """The metric card as a table: one row for each figure of each model, with its 95 % interval."""
    table: dict[str, list] = {"model": [], "figure": [], "value": [], "low": [], "high": [], "n": []}
    for label, report in result.figures.items():
        for name, figure in report.items():
            if isinstance(figure, dict) and "value" in figure:
                cells = (label, name, figure["value"], figure["low"], figure["high"], figure["n"])
                for column, cell in zip(table.values(), cells, strict=True):
                    column.append(cell)
    return table
