"""The adapter that a run leaves: of its newest checkpoint, or where evaluations may end it, of the best of them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.evaluations import Evaluations

if TYPE_CHECKING:
    from cluster.config import Recipe
    from cluster.storage import RunFolder
    from learner.checkpoint import Checkpoint

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
    """Write the final adapter of a run and say where. With evaluation.stop it is the one in `best`, if there is one."""
    from diffusion.adapters import adapter_metadata, load_adapter_file, save_adapter

    stop = recipe.evaluation.stop
    verdict = Evaluations(recipe, folder).verdict if stop is not None else None
    if stop is not None and verdict is not None and kept_step(folder) == verdict.export_step is not None:
        if verdict.base_is_best:
            logger.warning(
                "no evaluation beat the base model, whose %s is %.3f: the adapter is that of step %d, the best of "
                "those that were trained",
                stop.figure,
                verdict.best,
                verdict.export_step,
            )
        save_adapter(load_adapter_file(folder.best), folder.adapter, adapter_metadata(folder.best))
        return folder.adapter
    if stop is not None:
        logger.warning("no adapter of an evaluation is at hand: the newest is taken, of step %d", newest.step)
    export_adapter(recipe, folder.adapter, newest)
    return folder.adapter


def kept_step(folder: RunFolder) -> int | None:
    """The step of the adapter in `best`, None if none is there."""
    from diffusion.adapters import WEIGHTS_NAME, adapter_metadata

    if not (folder.best / WEIGHTS_NAME).is_file():
        return None
    return int(adapter_metadata(folder.best)["step"])
