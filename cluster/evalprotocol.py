"""What an evaluation depends on: the protocol, equal for all that may be compared, and the model that is evaluated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cluster.config import digest
from cluster.identity import model_identity
from cluster.preflight import pipeline_facts
from cluster.recipe_yaml import identity, portable_paths
from evaluation.scored import shots
from rewards.config import map_files

if TYPE_CHECKING:
    import numpy as np

    from cluster.config import Recipe
    from cluster.evalrecipe import EvaluationRecipe
    from evaluation.suites.base import Suite


def protocol_of(recipe: Recipe | EvaluationRecipe, suite: Suite, detectors: Mapping[str, Any] | None) -> dict[str, Any]:
    """What must be equal for two evaluations to be comparable.

    `detectors`: their identities; None leaves out all that looks at images, and keeps what draws them.
    """
    config, drawn = recipe.evaluation, shots(suite, recipe.evaluation)
    facts = pipeline_facts(recipe)
    scales = sorted({shot.guidance_scale for shot in drawn})
    drawing = {
        "suite": suite.name,
        "prompt_set_sha256": digest({"shots": [[s.prompt, s.seed, s.guidance_scale] for s in drawn]}),
        "prompts": len(suite.asks),
        "images": len(drawn),
        "sampler": "the pipeline's own schedule, without noise between the steps",
        "steps": config.steps,
        "guidance_scale": scales[0] if len(scales) == 1 else f"set for each prompt, {scales[0]:g} to {scales[-1]:g}",
        "resolution": recipe.model.resolution or (None if facts is None else facts.image_size),
        "safety_checker": "off",
    }
    if detectors is None:
        return drawing
    rules = {"rules": suite.protocol(), "detectors": dict(detectors), "bootstrap_samples": config.bootstrap_samples}
    if config.reward and recipe.reward is not None:
        rules["reward"] = _reward(recipe.reward.model_dump(mode="json"), recipe.reward.describe())
        if config.judge is None:
            rules["judge"] = "the suite"
        else:
            own = config.judge.model_dump(mode="json", exclude={"reward"})
            rules["judge"] = own | _reward(config.judge.reward.model_dump(mode="json"), config.judge.reward.describe())
    return drawing | rules


def adapted(recipe: Recipe | EvaluationRecipe, state: Mapping[str, np.ndarray] | None, words: str) -> dict[str, Any]:
    """The model that is evaluated: path, hash of its weights, dtype, adapter. `words`: where the adapter is from."""
    from diffusion.adapters import checksum

    return {
        "path": portable_paths({"path": recipe.model.path})["path"],
        "sha256": digest(model_identity(recipe)),
        "dtype": str(recipe.model.dtype),
        "adapter": None if state is None else {"source": words, "checksum": checksum(dict(state))},
    }


def by_content(model: Mapping[str, Any]) -> dict[str, Any]:
    """A model without where it and its adapter lie: moved, they draw the same images."""
    adapter = model["adapter"]
    return {
        "sha256": model["sha256"],
        "dtype": model["dtype"],
        "adapter": None if adapter is None else adapter["checksum"],
    }


def _reward(section: dict[str, Any], words: str) -> dict[str, str]:
    """A reward in words, and as a hash with files by content."""
    return {"name": words, "sha256": digest(map_files(section | {"detector": None}, identity))}
