"""``raysteer eval``: find the adapter, evaluate it against its base model, keep cards and page with the run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.config import Recipe
from cluster.evalrecipe import EvaluationRecipe
from cluster.evalstore import EvaluationStore
from cluster.evaluate import Evaluation, room, run_evaluation
from cluster.modelfiles import read_json
from cluster.preflight import check_evaluation, check_model, pipeline_facts
from cluster.runlock import check_not_held
from cluster.runtime import probe_address, probe_free_port, target_address
from cluster.source import find_adapter, fitting_lora
from cluster.storage import RunFolder
from cluster.tracking import RUN_ID_FILE, Tracker
from diffusion.families.base import family_for
from evaluation.card_markdown import title
from evaluation.comparison import Comparison, compare, figure_text
from learner.records import read_rows
from raysteer.errors import ClusterError, ConfigError, StorageError

if TYPE_CHECKING:
    from evaluation.card import Card

BEFORE, AFTER = "base", "adapted"
PAGE, PICTURE = "index.html", "before_after.png"
NO_ADAPTER = "none"
PICTURE_COLUMNS = (7, 6)  # unsafe prompts, other prompts


def evaluate_and_record(
    recipe: Recipe | EvaluationRecipe,
    adapter: str | None,
    out: Path | None,
    json_path: Path | None,
    notify: Callable[[str], None],
) -> tuple[Evaluation, dict[str, str]]:
    """Evaluate base model and adapter; cards, page and picture go to the folder, and to MLflow if the run is known
    there.

    Args:
        recipe: its ``evaluation`` section decides what is evaluated.
        adapter: run, checkpoint or adapter folder; "none" is only the base model. None means the recipe's own run,
            and of a recipe without training only the base model.
        out: folder of the evaluation; ``<run>/evaluation/<suite>`` by default.
        json_path: where all figures go once more, as one file.
        notify: receives progress lines.

    Returns:
        The evaluation, and what has been made of it: files and MLflow's run, by what they are.

    Raises:
        UserError: as `run_evaluation`, or there is no such adapter, or it is of another model: before anything starts.
    """
    check_evaluation(recipe)
    check_model(recipe)
    check_steps(recipe)
    check_room(recipe)
    folder = out or recipe.run_dir / "evaluation" / str(recipe.evaluation.suite)
    check_places(folder, json_path)
    adapters: dict[str, Any] = {BEFORE: None}
    words, drawn_by = {}, recipe
    source = adapter or (str(recipe.run_dir) if isinstance(recipe, Recipe) else NO_ADAPTER)
    if source != NO_ADAPTER:
        found = find_adapter(source, recipe.run.storage)
        # Samplers are built with the adapter's own LoRA, whatever the recipe's: it may be of another run.
        model = recipe.model.model_copy(update={"lora": fitting_lora(recipe.model, found)})
        drawn_by = recipe.model_copy(update={"model": model})
        notify(f"adapter: {found.words}")
        adapters[AFTER], words[AFTER] = found.state, found.words
    result = run_evaluation(drawn_by, adapters, folder, notify, words)
    files = publish(recipe, result, folder)
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(summary(result), indent=2) + "\n", encoding="utf-8")
    made = {what: str(file) for what, file in files.items()}
    if adapter is None and isinstance(recipe, Recipe):
        made["MLflow"] = _record(recipe, result, files)
    return result, made


def check_places(folder: Path, json_path: Path | None) -> None:
    """Refuse places where nothing could be written in the end.

    Raises:
        StorageError: naming the place.
    """
    for place in (folder, *([] if json_path is None else [json_path.parent])):
        there = next(path for path in (place.absolute(), *place.absolute().parents) if path.exists())
        if not there.is_dir():
            raise StorageError(str(place), f"{there} is a file", "choose a folder")
        if not os.access(there, os.W_OK | os.X_OK):
            raise StorageError(str(place), f"cannot write in {there}", "choose a folder you may write in")
    if json_path is not None and json_path.is_dir():
        raise StorageError(f"--json {json_path}", "it is a folder", "name a file")


def check_steps(recipe: Recipe | EvaluationRecipe) -> None:
    """Refuse a number of steps that the model's own schedule does not have; of a hub name the samplers find out.

    Raises:
        ConfigError: naming evaluation.steps.
    """
    from diffusion.sampling import deterministic_schedule

    folder, facts, steps = Path(recipe.model.path), pipeline_facts(recipe), recipe.evaluation.steps
    config = read_json(folder / "scheduler" / "scheduler_config.json")
    family = family_for(str(read_json(folder / "model_index.json").get("_class_name")), recipe.model.family)
    if not config or family is None or facts is None or facts.latent_shape is None:
        return
    try:
        family.schedule(config, deterministic_schedule(steps), facts.latent_shape, deterministic=True)
    except ConfigError as error:
        raise ConfigError("evaluation.steps", steps, error.remedy) from None


def check_room(recipe: Recipe | EvaluationRecipe) -> None:
    """Refuse an unreachable cluster, a taken port, and more GPUs than this machine has where the cluster is to be it.

    Raises:
        ClusterError: naming key and value.
    """
    address = target_address(recipe.cluster)
    if address is not None:
        probe_address(address)
        return
    if recipe.cluster.dashboard:
        probe_free_port(recipe.cluster.dashboard_port, "cluster.dashboard_port")
    _, needed = room(recipe)
    if needed > 0:
        import torch

        there = torch.cuda.device_count()
        if needed > there:
            remedy = "lower samplers.num_gpus, samplers.count or those of reward_workers"
            raise ClusterError("this machine", f"it has {there} GPUs and the evaluation takes {needed:g}", remedy)


def single(card: Card) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Header and rows of the figures of one model."""
    lines = [(title(name, figure), [figure_text(figure)]) for name, figure in card.figures.items()]
    return ["", card.label], lines


def publish(recipe: Recipe | EvaluationRecipe, result: Evaluation, folder: Path) -> dict[str, Path]:
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
