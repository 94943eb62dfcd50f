"""The adapter that a run leaves: of its newest checkpoint, or where evaluations say so, of the best of them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.evaluations import Evaluations
from learner.checkpoint import Checkpoint, DamagedCheckpoint, checkpoint_path, read_checkpoint

if TYPE_CHECKING:
    from cluster.config import Recipe
    from cluster.storage import RunFolder
    from evaluation.stopping import Verdict

logger = logging.getLogger(__name__)


def export_adapter(recipe: Recipe, folder: Path, checkpoint: Checkpoint) -> None:
    """Write the adapter of a checkpoint, averaged if the recipe says so, as plain diffusers loads it."""
    from diffusion.adapters import checksum, save_adapter

    state = dict(checkpoint.exported)
    metadata = {
        "run": recipe.run.name,
        "step": str(checkpoint.step),
        "fingerprint": checkpoint.fingerprint,
        "checksum": checksum(state),
        "base_model": Path(recipe.model.path).name,
    }
    if checkpoint.ema is not None:
        metadata["ema_decay"] = str(recipe.optimizer.ema_decay)
    save_adapter(state, folder, metadata)


def leave_adapter(recipe: Recipe, folder: RunFolder, newest: Checkpoint) -> Path:
    """Write the final adapter of a run and say where.

    With evaluation.stop, or where a guard is broken, it is the one in `best`, if there is one.
    """
    from diffusion.adapters import adapter_metadata, load_adapter_file, save_adapter

    stop = recipe.evaluation.stop
    verdict = Evaluations(recipe, folder).verdict if recipe.evaluation.may_end else None
    if verdict is None or (stop is None and verdict.broken is None):
        export_adapter(recipe, folder.adapter, newest)
        return folder.adapter
    if verdict.broken is not None:
        _mend_best(recipe, folder, verdict)
    if verdict.export_step is None or kept_step(folder) != verdict.export_step:
        why = "" if verdict.broken is None else f"{verdict.broken}; "
        logger.warning("%sno adapter of an evaluation is at hand: the newest is taken, of step %d", why, newest.step)
        export_adapter(recipe, folder.adapter, newest)
        return folder.adapter
    if verdict.broken is not None:
        _say_broken(verdict)
    elif stop is not None and verdict.base_is_best:
        logger.warning(
            "no evaluation beat the base model, whose %s is %.3f: the adapter is that of step %d, the best of "
            "those that were trained",
            stop.figure,
            verdict.best,
            verdict.export_step,
        )
    save_adapter(load_adapter_file(folder.best), folder.adapter, adapter_metadata(folder.best))
    return folder.adapter


def _mend_best(recipe: Recipe, folder: RunFolder, verdict: Verdict) -> None:
    """Fill `best` from a checkpoint, if it is there: whoever adds a guard to a run that breaks it has kept none."""
    step = verdict.export_step
    if step is None or kept_step(folder) == step or not checkpoint_path(folder.checkpoints, step).exists():
        return
    try:
        checkpoint = read_checkpoint(checkpoint_path(folder.checkpoints, step), optimizer=False)
    except DamagedCheckpoint as error:
        logger.warning("the adapter of step %d cannot be had from its checkpoint: %s", step, error.problem)
        return
    export_adapter(recipe, folder.best, checkpoint)


def _say_broken(verdict: Verdict) -> None:
    """Which adapter a run leaves that broke a guard."""
    if verdict.export_step == verdict.broken_step:
        what = "nothing trained was evaluated before it, so the adapter is the one that broke it: do not use it unseen"
    else:
        what = f"the adapter is that of step {verdict.export_step}, the best before it"
    logger.warning("%s; %s", verdict.broken, what)


def kept_step(folder: RunFolder) -> int | None:
    """The step of the adapter in `best`, None if none is there."""
    from diffusion.adapters import WEIGHTS_NAME, adapter_metadata

    if not (folder.best / WEIGHTS_NAME).is_file():
        return None
    return int(adapter_metadata(folder.best)["step"])
