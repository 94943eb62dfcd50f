"""A recipe that only evaluates: what ``raysteer eval`` takes instead of a training recipe, for any diffusers model.

It is made from the name of a model, or read from a file that has its few sections.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, field_validator, model_validator

from actors.reward_worker import RewardWorkersConfig
from actors.sampler import SamplersConfig
from cluster.config import ClusterConfig, Recipe, check_devices, read_sections, validated
from cluster.recipe_yaml import HUB_NAME, apply_override
from cluster.storage import is_run_name
from diffusion.policy import ModelConfig
from evaluation.config import EvaluationConfig
from raysteer.errors import ConfigError, UserError

_YAML = (".yaml", ".yml")


class PlaceConfig(BaseModel, frozen=True, extra="forbid"):
    """Where figures go: ``<storage>/<name>/evaluation/<suite>``."""

    name: str
    storage: str = Field("runs", min_length=1)

    @field_validator("name")
    @classmethod
    def _a_folder_name(cls, name: str) -> str:
        if not is_run_name(name):
            raise ValueError("it becomes a folder: begin with a letter or digit, go on with those or . _ -")
        return name


class EvaluationRecipe(BaseModel, frozen=True, extra="forbid"):
    """The sections of a recipe that an evaluation goes by. There is no reward, so none is a figure.

    ``samplers`` draw; ``reward_workers`` are the actors that look. Paths are absolute once loaded.
    """

    run: PlaceConfig
    model: ModelConfig
    samplers: SamplersConfig = SamplersConfig()
    reward_workers: RewardWorkersConfig = RewardWorkersConfig()
    evaluation: EvaluationConfig = EvaluationConfig(reward=False)
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _cross_checks(self) -> EvaluationRecipe:
        check_devices(self, ("samplers", "reward_workers"))
        for name, nothing in (("reward", False), ("judge", None), ("every", None), ("stop", None)):
            value = getattr(self.evaluation, name)
            if value != nothing:
                why = "without a training recipe there is no reward, and no training to evaluate beside"
                raise ConfigError(f"evaluation.{name}", value, f"{why}: leave it out, or give the training recipe")
        return self

    @property
    def reward(self) -> None:
        """A training recipe has one."""
        return None

    @property
    def run_dir(self) -> Path:
        """``<run.storage>/<run.name>``."""
        return Path(self.run.storage) / self.run.name


def load_evaluation(source: str, overrides: Sequence[str] = ()) -> Recipe | EvaluationRecipe:
    """What to evaluate.

    Args:
        source: a recipe's YAML file, a pipeline's folder (with model_index.json), or a hub name (owner/model).
        overrides: as in `cluster.config.load_recipe`.

    Returns:
        An `EvaluationRecipe` for a model, and for a file that has no other sections than that.

    Raises:
        ConfigError: with the dotted key, the value found and what would be right.
        UserError: it is none of the three.
    """
    path = Path(source)
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            remedy = "give a recipe, a folder made with pipe.save_pretrained, or a hub name"
            raise UserError(source, "this folder holds no diffusers pipeline (no model_index.json)", remedy)
        return _of_model(path.absolute().name, str(path), overrides)
    if not path.exists() and path.suffix not in _YAML and HUB_NAME.fullmatch(source):
        return _of_model(source.rpartition("/")[2], source, overrides)
    data = read_sections(source, overrides)
    if not data.keys() <= EvaluationRecipe.model_fields.keys():
        return validated(Recipe, data, path.parent)
    return _without_reward(data, path.parent)


def _of_model(name: str, path: str, overrides: Sequence[str]) -> EvaluationRecipe:
    name = re.sub(r"^[^A-Za-z0-9]+|[^A-Za-z0-9._-]", "", name)[:100] or "model"
    data: dict[str, Any] = {"run": {"name": name}, "model": {"path": path}}
    for override in overrides:
        apply_override(data, override)
    return _without_reward(data, Path())


def _without_reward(data: dict[str, Any], folder: Path) -> EvaluationRecipe:
    evaluation = data.get("evaluation")
    if isinstance(evaluation, dict) or evaluation is None:
        data = data | {"evaluation": {"reward": False, **(evaluation or {})}}
    return validated(EvaluationRecipe, data, folder)
