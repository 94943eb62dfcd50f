"""What the groups of a run are made with, as their journal says it in every part (see `learner.dataset`).

All of it decides what latents and rewards mean; only the run's name is there for people. Files count by content, as in
a recipe's fingerprint, so that a moved model is the same model.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cluster.config import Recipe, digest
from cluster.modelfiles import cached_folder, read_json
from cluster.preflight import pipeline_facts
from cluster.recipe_yaml import identity
from diffusion.loading import loaded_parts
from learner.dataset import FORMAT

if TYPE_CHECKING:
    from cluster.evalrecipe import EvaluationRecipe

# What decides the meaning of latents, and what a prompt says to the reference.
SAME_MODEL = ("family", "denoiser", "vae", "text_encoders", "resolution")


def journal_identity(recipe: Recipe, source: Literal["train", "generate"]) -> dict[str, Any]:
    """The identity of groups drawn for this recipe. Loads nothing; reads the weights of denoiser, VAE and text encoders
    once (of large files a part, see `cluster.recipe_yaml.identity`).

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


def model_identity(recipe: Recipe | EvaluationRecipe) -> dict[str, Any]:
    """The part of the identity that a dataset and the recipe that trains on it must share."""
    model, facts = recipe.model, pipeline_facts(recipe)
    folder = Path(model.path) if Path(model.path).is_dir() else cached_folder(model.path, model.revision)

    def content(part: str) -> str:
        return f"{model.path}/{part}@{model.revision or 'main'}" if folder is None else identity(str(folder / part))

    def text_encoders() -> str:
        if folder is None:
            return content("text_encoders" if model.use_t5 else "text_encoders without T5")
        parts = loaded_parts(model, read_json(folder / "model_index.json"))
        return digest({part: content(part) for part in parts if part.startswith("text_encoder")})

    return {
        "family": None if facts is None else facts.pipeline,
        "denoiser": content("denoiser" if facts is None else facts.component),
        "vae": content("vae"),
        "text_encoders": text_encoders(),
        "resolution": model.resolution if facts is None else facts.image_size,
    }
