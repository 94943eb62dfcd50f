"""What the groups of a run are made with, as their journal says it in every part (see `learner.dataset`).

All of it decides what latents and rewards mean; only the run's name is there for people. Files count by content, as in
a recipe's fingerprint, so that a moved model is the same model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from cluster.config import Recipe, digest
from cluster.modelfiles import cached_folder
from cluster.preflight import pipeline_facts
from cluster.recipe_yaml import identity
from learner.dataset import FORMAT


def journal_identity(recipe: Recipe, source: Literal["train", "generate"]) -> dict[str, Any]:
    """The identity of groups drawn for this recipe. Loads nothing; reads the weights of denoiser and VAE once.

    A hub name that is not in the local cache stands for its parts itself.
    """
    return {
        "format": FORMAT,
        "source": source,
        "run": recipe.run.name,
        "reward": digest(recipe.deciding()["reward"]),
        "sampling": {
            "steps": recipe.sampling.steps,
            "guidance_scale": recipe.sampling.guidance_scale,
            "deterministic": source == "generate",
        },
        **model_identity(recipe),
    }


def model_identity(recipe: Recipe) -> dict[str, Any]:
    """The part of the identity that a dataset and the recipe that trains on it must share."""
    model, facts = recipe.model, pipeline_facts(recipe)
    folder = Path(model.path) if Path(model.path).is_dir() else cached_folder(model.path, model.revision)

    def content(part: str) -> str:
        return f"{model.path}/{part}@{model.revision or 'main'}" if folder is None else identity(str(folder / part))

    return {
        "family": None if facts is None else facts.pipeline,
        "denoiser": content("denoiser" if facts is None else facts.component),
        "vae": content("vae"),
        "resolution": model.resolution if facts is None else facts.image_size,
    }
