"""The recipe: one YAML file, one tree of frozen models, one fingerprint.

``load_recipe`` is strict: an unknown key, a wrong type or an impossible combination is refused before anything
starts, with the key's full path, the value found and what would be right. Component models live beside their
components; here they are assembled and checked against each other. YAML is read with the core schema of YAML 1.2
(``1e-4`` is a number, ``yes`` is text), because the surprises of 1.1 are the commonest cause of a wrong run that
starts.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from actors.reward_worker import RewardWorkersConfig
from actors.sampler import SamplersConfig
from cluster.buffer_settings import BufferConfig
from cluster.kubernetes.config import KubernetesConfig
from cluster.layout import check_needs
from cluster.prompts import PromptsConfig
from cluster.recipe_yaml import (
    apply_override,
    check_finite,
    dump_yaml,
    identity,
    parse_yaml,
    portable_paths,
    resolve_paths,
    to_config_error,
)
from cluster.storage import is_run_name
from cluster.tracking import TrackingConfig
from diffusion.policy import ModelConfig
from diffusion.sampling import SamplingConfig
from evaluation.config import EvaluationConfig, check_beside
from learner.dataset import find_dataset
from learner.gdro import GDROConfig
from learner.grpo import GRPOConfig
from learner.loop import LearnerConfig
from learner.optim import OptimizerConfig
from learner.sources import OfflineConfig
from raysteer.errors import ConfigError, DatasetError, UserError
from rewards.config import RewardConfig, map_files

Sections = TypeVar("Sections", bound=BaseModel)

# what decides training, apart from the weights themselves
_MODEL_KEYS = (
    *("revision", "variant", "dtype", "component_dtypes", "resolution"),
    *("use_t5", "t5_tokens", "family", "lora"),
)


class RunConfig(BaseModel, frozen=True, extra="forbid"):
    """Name, length and storage of a run. One step consumes one batch of ``groups_per_step`` groups."""

    name: str
    seed: int = Field(0, ge=0)
    steps: int = Field(ge=1)
    groups_per_step: int = Field(ge=1)
    storage: str = Field("runs", min_length=1)
    checkpoint_every: int = Field(10, ge=1)
    keep_checkpoints: int = Field(3, ge=1)

    @field_validator("name")
    @classmethod
    def _a_folder_name(cls, name: str) -> str:
        if not is_run_name(name):
            raise ValueError("it becomes a folder: begin with a letter or digit, go on with those or . _ -")
        return name


class GenerateConfig(BaseModel, frozen=True, extra="forbid"):
    """A dataset for offline objectives (``raysteer generate``): ``groups`` prompts with ``sampling.group_size`` images
    each, drawn as the pipeline itself draws them. Unset ``steps`` and ``guidance_scale`` are those of ``sampling``.
    """

    groups: int = Field(256, ge=1)
    steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = Field(None, ge=0.0, allow_inf_nan=False)


class ClusterConfig(BaseModel, frozen=True, extra="forbid"):
    """Where the actors run.

    ``address``: None starts a cluster on this machine (or joins the one of the surrounding ``ray job``), "auto" joins
    the cluster running here, "host:port" joins that head. ``autoscaling``: the cluster can grow, so its present size
    is not held against it.
    """

    address: str | None = Field(None, min_length=1)
    autoscaling: bool = False
    dashboard: bool = False
    dashboard_port: int = Field(8265, ge=1024, le=65535)
    object_store_mb: int | None = Field(None, ge=80)


def _objective(section: Any) -> str:
    """Whose parameters an objective section has: those of gdro, or of grpo, which those of one's own share."""
    name = section.get("name") if isinstance(section, Mapping) else getattr(section, "name", None)
    return "gdro" if name == "gdro" else "grpo"


ObjectiveConfig = Annotated[
    Annotated[GRPOConfig, Tag("grpo")] | Annotated[GDROConfig, Tag("gdro")], Discriminator(_objective)
]


class Recipe(BaseModel, frozen=True, extra="forbid"):
    """Everything that decides a run. Paths are absolute once loaded (see ``load_recipe``)."""

    run: RunConfig
    model: ModelConfig
    sampling: SamplingConfig = SamplingConfig()
    reward: RewardConfig
    objective: ObjectiveConfig = GRPOConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    samplers: SamplersConfig = SamplersConfig()
    reward_workers: RewardWorkersConfig = RewardWorkersConfig()
    learner: LearnerConfig = LearnerConfig()
    buffer: BufferConfig = BufferConfig()
    prompts: PromptsConfig
    generate: GenerateConfig = GenerateConfig()
    offline: OfflineConfig | None = None
    tracking: TrackingConfig = TrackingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    cluster: ClusterConfig = ClusterConfig()
    kubernetes: KubernetesConfig | None = None

    @model_validator(mode="after")
    def _cross_checks(self) -> "Recipe":
        check_batch_arithmetic(self)
        check_objective(self)
        check_offline(self)
        check_devices(self)
        check_needs(self)
        check_strict(self)
        check_beside(self.evaluation, self.run.checkpoint_every)
        return self

    @property
    def run_dir(self) -> Path:
        """Folder of the run: ``<run.storage>/<run.name>``."""
        return Path(self.run.storage) / self.run.name

    def fingerprint(self) -> str:
        """sha256 (hex) over everything that decides training.

        Files count by content, not by path, so that a moved checkout resumes and a changed prompt list does not. The
        length of the run, storage, tracking, evaluation, placement and the number of workers do not count: they may
        change between a run and its resumption.
        """
        return digest(self.deciding())

    def deciding(self) -> dict[str, Any]:
        """What the fingerprint covers, by section, with files by content."""
        data = self.model_dump(mode="json")
        return {
            "seed": data["run"]["seed"],
            "groups_per_step": data["run"]["groups_per_step"],
            "max_staleness": data["buffer"]["max_staleness"],
            "model": {key: data["model"][key] for key in _MODEL_KEYS} | {"weights": identity(self.model.path)},
            "reward": map_files(data["reward"] | {"detector": None}, identity),
            "prompts": self.prompts.identity(),
            "sampling": data["sampling"],
            "objective": data["objective"],
            "optimizer": data["optimizer"],
            **self._deciding_offline(),
        }

    def _deciding_offline(self) -> dict[str, Any]:
        if self.offline is None:
            return {}
        chosen: dict[str, Any] = {"window": self.offline.window}
        if self.offline.data is not None:
            return {"offline": chosen | {"data": _dataset_identity(self.offline.data)}}
        return {
            "offline": chosen | {"length": self.run.steps // self.offline.rounds},
            "generate": self.generate.model_dump(),
        }

    def to_yaml(self) -> str:
        """The resolved recipe as YAML, with paths below the working directory written relative to it."""
        return dump_yaml(portable_paths(self.model_dump(mode="json")))

    def flat(self) -> dict[str, Any]:
        """Leaves by dotted key, for tracking: ``{"sampling.eta": 1.0, ...}``."""
        return dict(_leaves(portable_paths(self.model_dump(mode="json"))))


def digest(parts: Mapping[str, Any]) -> str:
    """sha256 (hex) of JSON data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and validate a recipe.

    Args:
        path: the YAML file.
        overrides: ``"a.b=c"`` strings; the right side is YAML (number, text, true/false, null, list).

    Returns:
        The recipe; relative paths in it are looked up in the working directory first, then in the recipe's folder.

    Raises:
        ConfigError: with the dotted key, the value found and what would be right.
        UserError: the file cannot be read.
    """
    return validated(Recipe, read_sections(path, overrides), Path(path).parent)


def read_sections(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The sections of a recipe's file, overridden and not validated.

    Raises:
        ConfigError, UserError: as ``load_recipe``.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(str(path), "there is no such file", "see the folder recipes/ for examples") from None
    except (IsADirectoryError, PermissionError, UnicodeDecodeError) as error:
        raise UserError(str(path), f"cannot be read ({error})", "give a YAML file in UTF-8") from None
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        raise ConfigError(str(path), data, "a recipe is a mapping of sections such as run, model and sampling")
    # An empty section ("sampling:" and nothing below) means "all defaults", unless it may be null.
    sections = {key for key, field in Recipe.model_fields.items() if field.default is not None}
    data = {key: {} if value is None and key in sections else value for key, value in data.items()}
    for override in overrides:
        apply_override(data, override)
    return data


def recipe_from_dict(data: Mapping[str, Any], folder: str | Path = ".") -> Recipe:
    """Validate a recipe given as nested dicts; ``folder`` is the second place to look for relative paths.

    Raises:
        ConfigError: as ``load_recipe``.
    """
    return validated(Recipe, data, folder)


def validated(kind: type[Sections], data: Mapping[str, Any], folder: str | Path) -> Sections:
    """Sections of this kind from nested dicts, with absolute paths.

    Raises:
        ConfigError: as ``load_recipe``.
    """
    check_finite(data)
    try:
        # Strict JSON mode: 1 is not true, "5" is not 5, 10.0 is not 10, yet a list is a tuple.
        recipe = kind.model_validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        raise to_config_error(error, data, kind) from None
    resolved = resolve_paths(recipe.model_dump(mode="json"), Path(folder))
    return kind.model_validate_json(json.dumps(resolved), strict=True)


def trained_count(recipe: Recipe) -> int:
    """Number of trained denoising steps per image, K, as far as the recipe alone tells (unless ``count`` fixes it, the
    model's schedule may leave fewer with ``min_sigma``).
    """
    return recipe.sampling.trained.number(recipe.sampling.steps)


def check_batch_arithmetic(recipe: Recipe) -> None:
    """Refuse groups that cannot be shared out evenly, and ranks that would get none.

    Elastic ranks take uneven shares: each group weighs the same wherever it is learned, and the largest share is what
    a step waits for.

    Raises:
        ConfigError: naming the key to change.
    """
    groups, workers, fraction = recipe.run.groups_per_step, recipe.learner.workers, recipe.prompts.unsafe_fraction
    if groups % workers and recipe.learner.fewest == workers:
        nearest = max(workers, round(groups / workers) * workers)
        raise ConfigError(
            "run.groups_per_step", groups, f"it must be a multiple of learner.workers ({workers}); {nearest} would do"
        )
    if workers > groups:
        raise ConfigError(
            "learner.workers", workers, f"run.groups_per_step ({groups}) leaves some of them without work"
        )
    unsafe = groups * fraction
    if abs(unsafe - round(unsafe)) > 1e-6:
        raise ConfigError(
            "prompts.unsafe_fraction",
            fraction,
            f"it must give a whole number of unsafe groups out of run.groups_per_step ({groups}); "
            f"{round(unsafe)}/{groups} = {round(unsafe) / groups!r} would do",
        )


def check_objective(recipe: Recipe) -> None:
    """Refuse an objective that the groups of this recipe cannot serve.

    Raises:
        ConfigError: naming the key to change.
    """
    objective, count = recipe.objective, trained_count(recipe)
    if isinstance(objective, GDROConfig):
        objective.images(recipe.sampling.group_size)
        if objective.std == "none" and recipe.reward.mix == "group":
            raise ConfigError(
                "objective.std",
                objective.std,
                "reward.mix group gives rewards without units, so tau has none: use group, batch or mixed",
            )
    elif objective.updates_per_batch > 1 and count % objective.updates_per_batch:
        divisors = [n for n in range(1, count + 1) if count % n == 0]
        raise ConfigError(
            "objective.updates_per_batch",
            objective.updates_per_batch,
            f"it must divide the {count} trained steps (sampling.trained); one of {divisors} would do",
        )


def check_offline(recipe: Recipe) -> None:
    """Refuse an objective that needs more than clean images, and rounds of unequal length.

    Raises:
        ConfigError: naming the key to change.
    """
    offline, steps = recipe.offline, recipe.run.steps
    if offline is None:
        return
    if recipe.objective.name == "grpo":
        raise ConfigError(
            "objective.name",
            "grpo",
            "a dataset has final images, and no steps with their probabilities: use gdro, or leave out section offline",
        )
    if recipe.reward.mix == "group":
        raise ConfigError(
            "reward.mix",
            "group",
            "it mixes the parts of a reward as they arrive, and a dataset is learned by its totals: use sum",
        )
    if steps % offline.rounds:
        length = max(1, round(steps / offline.rounds))
        raise ConfigError(
            "run.steps",
            steps,
            f"it must be a multiple of offline.rounds ({offline.rounds}); {length * offline.rounds} would do",
        )
    if offline.data is None and recipe.generate.groups < recipe.run.groups_per_step:
        raise ConfigError(
            "generate.groups",
            recipe.generate.groups,
            f"a step takes run.groups_per_step ({recipe.run.groups_per_step}) of them: generate that many or more",
        )


def _dataset_identity(folder: str) -> str:
    try:
        return identity(str(find_dataset(folder)))
    except DatasetError:  # refused by its name before anything starts
        return folder


def check_devices(recipe: BaseModel, sections: Sequence[str] = ("samplers", "reward_workers", "learner")) -> None:
    """Refuse a CUDA role that asks Ray for no GPU: Ray would hide every GPU from it.

    Raises:
        ConfigError: naming the key to change.
    """
    for section in sections:
        role = getattr(recipe, section)
        if role.device == "cuda" and not role.num_gpus:
            raise ConfigError(
                f"{section}.num_gpus",
                role.num_gpus,
                f"{section}.device is cuda, so it must be above 0 (1, or a share such as 0.25)",
            )


def check_strict(recipe: Recipe) -> None:
    """Refuse a strictly on-policy run whose scores could depend on which groups arrived together.

    Raises:
        ConfigError: naming the key to change.
    """
    if recipe.buffer.max_staleness == 0 and recipe.reward_workers.batch_groups > 1:
        raise ConfigError(
            "reward_workers.batch_groups",
            recipe.reward_workers.batch_groups,
            "buffer.max_staleness 0 promises the same bits whatever arrives first, so groups are scored one by one; "
            "set this to 1, or max_staleness to 1",
        )


def _leaves(data: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in data.items():
        if isinstance(value, Mapping):
            found += _leaves(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found
