"""``raysteer submit``: a recipe becomes a Ray job. What can be known to be wrong is known before anything is sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

from cluster.config import Recipe, RunConfig, load_recipe
from cluster.jobs import JobServer, holds_our_code, shared_folder
from cluster.packing import check_needed, check_size, travelling
from cluster.preflight import check_model, check_offline_data, check_reward, check_schedule
from cluster.prompts import summarise
from cluster.recipe_yaml import apply_override, parse_yaml
from learner.objective import objective_class
from raysteer.errors import UserError

_LOCAL_CLIP = "local-dir:"

Tell = Callable[[str], None]


def submit(
    recipe_file: str, overrides: Sequence[str], address: str, working_dir: str, wait: bool, notify: Tell, write: Tell
) -> int:
    """Train a recipe as a job of the cluster whose dashboard is at `address`.

    Args:
        recipe_file, overrides: as for training here; the file lies in the working directory.
        working_dir: what is packed and becomes the job's working directory: the project, with the recipe.
        wait: follow the log until the job ends. Interrupting that leaves the job running.
        notify: receives lines about the submission.
        write: receives the job's log as it comes.

    Returns:
        The job's exit code; 0 without waiting.

    Raises:
        UserError: something to fix. Nothing has been submitted, unless the message names a job.
    """
    folder = Path(working_dir).resolve()
    inside = _inside(Path(recipe_file), folder)
    with chdir(folder):  # paths in a recipe mean there what they will mean in the job
        recipe = load_recipe(inside, overrides)
        check_what_is_here(recipe)
    data = _as_written(folder / inside, overrides)
    server = JobServer(address)
    files = travelling(folder)
    needed = {"recipe": folder / inside} | needed_files(recipe)
    absolute = {path for path in map(_local_path, _texts(data)) if path.is_absolute()}
    warnings = check_size(folder, files) + check_needed(folder, files, needed, absolute, server.here)
    if not holds_our_code(folder):
        warnings.append(f"{folder} does not hold raysteer's code: the cluster must have it installed")
    command = ["python", "-m", "cluster", "train", str(inside), *overrides]
    written = str(data["run"].get("storage", RunConfig.model_fields["storage"].default))
    storage = shared_folder(server, written, "run.storage", folder)
    if storage != written:
        command.append(f"run.storage={storage}")
        warnings.append(f"run.storage {written} is {storage} on this machine, which is the cluster's head")
    for warning in warnings:
        notify(f"warning: {warning}")
    job_id = server.submit(command, folder, recipe.run.name)
    about = f"{recipe.run.name} --storage {storage} --address {server.url}"
    hint = f"status    raysteer status {about}\nstop      raysteer stop {about}\nlog       {server.log_command(job_id)}"
    notify(f"job       {job_id}\n{hint}")
    if not wait:
        return 0
    try:
        return server.follow(job_id, write)
    except KeyboardInterrupt:
        notify(f"\njob {job_id} goes on\n{hint}")
        raise


def check_what_is_here(recipe: Recipe) -> None:
    """Check the sections all of whose files are on this machine; the others are checked where the job runs.

    Raises:
        UserError: as the preflight of a training does.
    """
    missing = {key.partition(".")[0] for key, path in needed_files(recipe).items() if not path.exists()}
    objective_class(recipe.objective.name)
    if "model" not in missing and Path(recipe.model.path).is_dir():
        check_model(recipe)
        check_schedule(recipe)
        if "offline" not in missing:
            check_offline_data(recipe)
    if "prompts" not in missing:
        summarise(recipe.prompts)
    if "reward" not in missing:
        check_reward(recipe)


def needed_files(recipe: Recipe) -> dict[str, Path]:
    """Absolute paths of the files and folders that training reads, by key of the recipe; hub names are no files."""
    data = recipe.model_dump(mode="json", include={"model", "reward", "prompts", "offline"})
    found = ((key, _local_path(text)) for key, text in _leaves(data))
    return {key: path for key, path in found if path.is_absolute()}


def _inside(recipe_file: Path, folder: Path) -> Path:
    """The recipe's path within the working directory.

    Raises:
        UserError: no such folder or file, or the file lies elsewhere.
    """
    if not folder.is_dir():
        raise UserError(f"--working-dir {folder}", "there is no such folder", "give the folder of the project")
    if not recipe_file.is_file():
        raise UserError(str(recipe_file), "there is no such file", "see the folder recipes/ for examples")
    if not recipe_file.resolve().is_relative_to(folder):
        raise UserError(
            str(recipe_file),
            f"it lies outside the working directory {folder}, so it cannot travel",
            "copy it there, or give --working-dir",
        )
    return recipe_file.resolve().relative_to(folder)


def _as_written(file: Path, overrides: Sequence[str]) -> dict[str, Any]:
    data = parse_yaml(file.read_text(encoding="utf-8"), str(file))
    for override in overrides:
        apply_override(data, override)
    return data


def _local_path(text: str) -> Path:
    return Path(text.removeprefix(_LOCAL_CLIP)).expanduser()


def _texts(data: Any) -> list[str]:
    return [text for _, text in _leaves(data)]


def _leaves(data: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in nested dicts and lists, by dotted key."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for name, value in items:
        yield from _leaves(value, f"{key}.{name}" if key else str(name))
    if isinstance(data, str):
        yield key, data
