"""``raysteer eval``: find the adapter, evaluate it against its base model, keep cards and page with the run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.config import Recipe
from cluster.evalstore import EvaluationStore
from cluster.evaluate import Evaluation, run_evaluation
from cluster.preflight import check_cluster, check_evaluation, check_model
from cluster.runlock import check_not_held
from cluster.source import find_adapter
from cluster.storage import RunFolder
from cluster.tracking import RUN_ID_FILE, Tracker
from evaluation.card_markdown import title
from evaluation.comparison import Comparison, compare, figure_text
from learner.records import read_rows
from raysteer.errors import StorageError

if TYPE_CHECKING:
    from evaluation.card import Card

BEFORE, AFTER = "base", "adapted"
PAGE, PICTURE = "index.html", "before_after.png"
NO_ADAPTER = "none"
PICTURE_COLUMNS = (7, 6)  # unsafe prompts, other prompts


def evaluate_and_record(
    recipe: Recipe, adapter: str | None, out: Path | None, json_path: Path | None, notify: Callable[[str], None]
) -> tuple[Evaluation, dict[str, str]]:
    """Evaluate base model and adapter; cards, page and picture go to the folder, and to MLflow if the run is known
    there.

    Args:
        recipe: its ``evaluation`` section decides what is evaluated.
        adapter: run, checkpoint or adapter folder; None means the recipe's own run, "none" only the base model.
        out: folder of the evaluation; ``<run>/evaluation/<suite>`` by default.
        json_path: where all figures go once more, as one file.
        notify: receives progress lines.

    Returns:
        The evaluation, and what has been made of it: files and MLflow's run, by what they are.
    """
    check_evaluation(recipe)
    check_model(recipe)
    check_cluster(recipe)
    adapters: dict[str, Any] = {BEFORE: None}
    words = {}
    if adapter != NO_ADAPTER:
        found = find_adapter(adapter or recipe.run_dir, recipe.run.storage)
        notify(f"adapter: {found.words}")
        adapters[AFTER], words[AFTER] = found.state, found.words
    folder = out or recipe.run_dir / "evaluation" / str(recipe.evaluation.suite)
    result = run_evaluation(recipe, adapters, folder, notify, words)
    files = publish(recipe, result, folder)
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(summary(result), indent=2) + "\n", encoding="utf-8")
    made = {what: str(file) for what, file in files.items()}
    if adapter is None:
        made["MLflow"] = _record(recipe, result, files)
    return result, made


def single(card: Card) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Header and rows of the figures of one model."""
    lines = [(title(name, figure), [figure_text(figure)]) for name, figure in card.figures.items()]
    return ["", card.label], lines


def publish(recipe: Recipe, result: Evaluation, folder: Path) -> dict[str, Path]:
    """Write the page, and in the glyph world the picture; the files by what they are."""
    from evaluation import report

    training = read_rows(RunFolder(recipe.run_dir).evaluations)
    sources = [(result.folders[label], card) for label, card in result.cards.items()]
    title = f"{recipe.run.name}: {recipe.evaluation.suite}"
    files = {f"card {label}": own / "card.md" for label, own in result.folders.items()}
    files["page"] = report.write(sources, folder / PAGE, title, training)
    if recipe.evaluation.suite == "glyphs":  # harmless by construction; other pictures are shown blurred, on the page
        files["picture"] = _picture(result, folder / PICTURE, f"held-out prompts, equal seeds ({recipe.run.name})")
    return files


def summary(result: Evaluation) -> dict[str, Any]:
    """All figures by label, their paired differences, and the protocol."""
    cards = list(result.cards.values())
    comparison: Comparison | None = compare(cards) if len(cards) > 1 else None
    return {
        "suite": cards[0].suite,
        **{label: dict(figures) for label, figures in result.figures.items()},
        "comparison": None if comparison is None else comparison.as_dict()["figures"],
        "protocol": cards[0].protocol,
        "seconds": round(result.seconds, 1),
    }


def _picture(result: Evaluation, file: Path, title: str) -> Path:
    """The first prompts of the gallery, a row for each model."""
    from evaluation.picture import before_after

    first = next(iter(result.cards.values()))
    sides = [[shot for shot in first.gallery if shot["unsafe"] is unsafe] for unsafe in (True, False)]
    chosen = [shot for side, most in zip(sides, PICTURE_COLUMNS, strict=True) for shot in side[:most]]
    indices = [shot["index"] for shot in chosen]
    rows = {label: _images(folder, indices) for label, folder in result.folders.items()}
    marked = {label: np.array([_marked(card, index) for index in indices]) for label, card in result.cards.items()}
    n_unsafe = sum(shot["unsafe"] for shot in chosen)
    return before_after(file, rows, [str(shot["prompt"]) for shot in chosen], marked, n_unsafe, title)


def _images(folder: Path, indices: list[int]) -> np.ndarray:
    images = EvaluationStore.images_of(folder, indices)
    if images is None:
        raise StorageError(str(folder), "an image of it is missing or damaged", "evaluate again: it is drawn anew")
    return images


def _marked(card: Card, index: int) -> bool:
    words = next(shot["seen"] for shot in card.gallery if shot["index"] == index)
    return any(word.endswith(" mark") for word in words)


def _record(recipe: Recipe, result: Evaluation, files: Mapping[str, Path]) -> str:
    if not (recipe.run_dir / RUN_ID_FILE).is_file():
        return "this run is not tracked; figures stay in the run folder"
    try:
        check_not_held(recipe.run_dir)  # one writer per run
    except StorageError:
        return "the run is still training and has its writer; evaluate again when it is over to record them"
    tracker = Tracker(recipe.tracking, recipe.run.name, recipe.run_dir, recipe.flat())
    below = f"evaluation/{recipe.evaluation.suite}"
    tracker.log_summary(values(result), "evaluation/")
    tracker.log_table(rows(result), f"{below}/table.json")
    for label, folder in result.folders.items():
        for name in ("card.json", "card.md"):
            tracker.log_artifact(folder / name, f"{below}/{label}")
    for what in ("page", "picture"):
        if what in files:
            tracker.log_artifact(files[what], below)
    for label, card in result.cards.items():
        tracker.log_model(f"{recipe.run.name}-{label}", {n: f["value"] for n, f in card.figures.items()}, tags_of(card))
    tracker.finish()
    return f"recorded as evaluation/... in run {tracker.run_id} at {tracker.uri}"


def tags_of(card: Card) -> dict[str, str]:
    """What tells one evaluated model from another in MLflow."""
    adapter = card.model["adapter"]
    return {
        "raysteer.suite": card.suite,
        "raysteer.label": card.label,
        "raysteer.model_sha256": str(card.model["sha256"]),
        "raysteer.adapter": "none" if adapter is None else str(adapter["checksum"]),
        "raysteer.adapter_source": "none" if adapter is None else str(adapter["source"]),
        "raysteer.prompt_set_sha256": str(card.protocol["prompt_set_sha256"]),
    }


def values(result: Evaluation) -> dict[str, float]:
    """``{"adapted/inappropriate_rate": 0.1, ...}`` of every model evaluated."""
    return {
        f"{label}/{name}": float(figure["value"])
        for label, figures in result.figures.items()
        for name, figure in figures.items()
    }


def rows(result: Evaluation) -> dict[str, list]:
    """The metric card as a table: one row for each figure of each model, with its 95 % interval."""
    columns = ("value", "low", "high", "n")
    found: dict[str, list] = {"model": [], "figure": [], **{column: [] for column in columns}}
    for label, figures in result.figures.items():
        for name, figure in figures.items():
            cells = (label, name, *(figure[column] for column in columns))
            for column, cell in zip(found.values(), cells, strict=True):
                column.append(cell)
    return found
