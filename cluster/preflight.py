"""Everything that can be known to be wrong before a cluster starts, checked within seconds.

Nothing is loaded, started or overwritten here; each complaint is one line that names the key or file, the value and
the remedy.
"""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config import Recipe, load_recipe
from cluster.layout import evaluator_need, lay_out
from cluster.memory import readable_bytes
from cluster.modelfiles import PipelineFacts, cached_folder, known_pipeline, read_json, read_pipeline
from cluster.placement import Node
from cluster.prompts import summarise
from cluster.runlock import RunLock, check_not_held
from cluster.runtime import probe_address, probe_free_port, target_address
from cluster.storage import RunFolder
from cluster.tracking import probe, resolve_uri
from diffusion.families.base import family_for, unsupported
from diffusion.loading import check_parts
from evaluation.registry import build_suite, check_detectors, detectors_of
from learner.checkpoint import latest_checkpoint
from learner.dataset import find_dataset
from learner.gdro import GDROConfig
from learner.objective import objective_class
from raysteer.errors import CheckpointError, ConfigError, ModelError, StorageError, UserError

if TYPE_CHECKING:
    from cluster.evalrecipe import EvaluationRecipe

_RESERVE_BYTES = 200 * 2**20
_FLOAT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_NEVER_DECIDE = (  # over training: keys that begin so
    "run.steps",
    "run.name",
    "run.storage",
    "run.checkpoint",
    "run.keep",
    "generate",
    "tracking",
    "evaluation",
    "cluster",
    "kubernetes",
)


def preflight(recipe: Recipe, hold: bool = True) -> RunLock | None:
    """Check a recipe against this machine and what it names.

    Args:
        recipe: as loaded.
        hold: take the run's lock (released by ``.release()`` or with the process); False only looks.

    Returns:
        The lock, or None with ``hold=False``.

    Raises:
        UserError: the first thing that is wrong (ConfigError, ModelError, PromptError, StorageError, CheckpointError,
            TrackingError, ClusterError).
    """
    check_model(recipe)
    check_schedule(recipe)
    objective_class(recipe.objective.name)
    check_offline_data(recipe)
    check_surroundings(recipe)
    check_earlier_run(recipe)
    probe(resolve_uri(recipe.tracking, recipe.run.storage))
    return RunLock(recipe.run_dir) if hold else None


def check_surroundings(recipe: Recipe) -> None:
    """Refuse prompts, rewards, cluster or storage with which no group can be drawn, and a run that is going on.

    Raises:
        UserError: the first thing that is wrong.
    """
    summarise(recipe.prompts)
    check_reward(recipe)
    check_cluster(recipe)
    check_storage(recipe)
    check_not_held(recipe.run_dir)


def check_model(recipe: "Recipe | EvaluationRecipe") -> None:
    """Refuse a missing model, a folder that is no pipeline, a class without a family, torn weights.

    Raises:
        ModelError: naming the folder.
    """
    folder = Path(recipe.model.path)
    if not folder.is_dir():
        from diffusion.loading import read_index  # imports diffusers (seconds): only for hub names

        if folder.is_absolute():
            raise ModelError(
                f"model.path {folder}",
                "there is no such folder",
                "set it to a folder made with pipe.save_pretrained, or to a hub name",
            )
        index = read_index(recipe.model)
    else:
        if not (folder / "model_index.json").is_file():
            raise ModelError(
                f"model.path {folder}",
                "this is not a diffusers pipeline (no model_index.json)",
                "set it to a folder made with pipe.save_pretrained",
            )
        index = read_json(folder / "model_index.json")
    name = str(index.get("_class_name"))
    if family_for(name, recipe.model.family) is None:
        raise unsupported(f"model.path {folder}", name)
    check_parts(recipe.model, index)
    facts = pipeline_facts(recipe)
    for target in recipe.model.lora.targets or ():
        if facts is not None and facts.component in facts.parameters and target not in facts.matched_targets:
            raise ConfigError(
                "model.lora.targets",
                target,
                f"no module of the denoiser has such a name; this model's own are {', '.join(facts.default_targets)}",
            )


def pipeline_facts(recipe: "Recipe | EvaluationRecipe") -> PipelineFacts | None:
    """Facts of the model: from its folder, from the local hub cache, or what is published about it; None: unknown."""
    model = recipe.model
    place: Path | None = Path(model.path)
    if place is not None and not place.is_dir():
        place = None if place.is_absolute() else cached_folder(model.path, model.revision)
    rank, targets = model.lora.rank, model.lora.targets
    if place is None:
        return known_pipeline(model.path, rank, targets, model.resolution) if model.family is None else None
    return read_pipeline(place, rank, targets, model.variant, model.resolution, model.family)


def check_schedule(recipe: Recipe) -> None:
    """Refuse trained steps that the model's own schedule does not offer, and a guidance it does not know.

    Raises:
        ConfigError: naming the key.
        ModelError: a schedule without densities, or for gdro a family without a forward process.
    """
    found = _schedule(recipe)
    if found is None:
        return
    from diffusion.sampling import choose_trained_steps

    family, config, shape = found
    stepper = family.schedule(config, recipe.sampling, shape)
    if recipe.sampling.mixed:
        family.schedule(config, recipe.sampling, shape, deterministic=True)
    count = len(choose_trained_steps(recipe.sampling, stepper, seed=0))
    updates = recipe.objective.updates_per_batch
    if isinstance(recipe.objective, GDROConfig):
        family.noising(config)
    elif count % updates:
        raise ConfigError(
            "objective.updates_per_batch", updates, f"it must divide the {count} trained steps (sampling.trained)"
        )


def check_deterministic(recipe: Recipe) -> None:
    """Refuse a guidance or a number of steps that the model cannot draw with when no step is trained.

    Raises:
        ConfigError: naming the key.
    """
    found = _schedule(recipe)
    if found is None:
        return
    from diffusion.sampling import deterministic_schedule

    family, config, shape = found
    family.schedule(config, deterministic_schedule(recipe.sampling.steps), shape, deterministic=True)


def _schedule(recipe: Recipe) -> tuple[Any, dict[str, Any], tuple[int, int, int]] | None:
    """Family, scheduler's config and shape of the latents of a model that can follow the recipe's guidance; None for a
    hub name, which the samplers check when they load it.
    """
    folder = Path(recipe.model.path)
    config = read_json(folder / "scheduler" / "scheduler_config.json")
    family = family_for(str(read_json(folder / "model_index.json").get("_class_name")), recipe.model.family)
    if not config or family is None:
        return None
    facts = pipeline_facts(recipe)
    if facts is None or facts.latent_shape is None:
        return None  # no configs to read the latents' shape from: loading names what is missing
    family.check_guidance(facts.embedded_guidance, recipe.sampling.guidance_scale)
    return family, config, facts.latent_shape


def check_offline_data(recipe: Recipe) -> None:
    """Refuse a dataset that this recipe cannot learn from, and an objective that does not learn from datasets.

    Raises:
        DatasetError: there is none, it cannot be read (all of it is), it was made with another model, or no group of it
            can be learned from.
        ConfigError: naming the key.
    """
    if recipe.offline is None:
        return
    if getattr(objective_class(recipe.objective.name), "parity_tolerance", None) is not None:
        raise ConfigError(
            "objective.name", recipe.objective.name, "it replays steps, and a dataset has final images only: use gdro"
        )
    if recipe.offline.data is not None:
        from cluster.fit import check_dataset, check_readable

        check_readable(check_dataset(recipe, find_dataset(recipe.offline.data, "offline.data")))


def check_reward(recipe: Recipe) -> None:
    """Refuse rewards whose weights, anchors, packages or detector are not there, or do not fit. Loads no model.

    Raises:
        ConfigError: naming the key.
    """
    from rewards.base import check_rewards

    check_rewards(recipe.reward)
    if recipe.evaluation.suite is not None:
        check_evaluation(recipe)


def check_evaluation(recipe: "Recipe | EvaluationRecipe") -> None:
    """Refuse a suite whose prompts, settings or detectors cannot be used. Loads no model.

    Raises:
        ConfigError, PromptError: naming the key or the file.
    """
    config = recipe.evaluation
    check_detectors(detectors_of(build_suite(config), config, recipe.reward), config)


def check_storage(recipe: Recipe) -> None:
    """Refuse a storage folder that cannot be written or has no room for the run.

    Raises:
        StorageError: naming the folder.
    """
    storage = Path(recipe.run.storage)
    existing = next(path for path in (storage, *storage.parents) if path.exists())
    if not existing.is_dir():
        raise StorageError(f"run.storage {storage}", f"{existing} is a file", "choose a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise StorageError(f"run.storage {storage}", f"cannot write in {existing}", "choose a folder you may write in")
    needed, free = bytes_on_disk(recipe), shutil.disk_usage(existing).free
    if free < needed:
        raise StorageError(
            f"run.storage {storage}",
            f"the run needs about {readable_bytes(needed)} and {readable_bytes(free)} are free",
            "free some space, choose another folder, or lower run.steps or run.keep_checkpoints",
        )


def bytes_on_disk(recipe: Recipe) -> int:
    """Estimate of what a run leaves on disk: checkpoints, journal (latents of every image) and a reserve for metrics
    and previews.
    """
    facts = pipeline_facts(recipe)
    if facts is None:
        return _RESERVE_BYTES
    checkpoint = (facts.adapter_parameters or 0) * 4 * 3  # adapter and two Adam moments, float32
    images = recipe.run.steps * recipe.run.groups_per_step * recipe.sampling.group_size
    journal = images * (latent_bytes(recipe) + 100)
    return _RESERVE_BYTES + (recipe.run.keep_checkpoints + 1) * checkpoint + journal


def latent_bytes(recipe: Recipe) -> int:
    """Size of one image's latents in the dtype they are stored in; of Stable Diffusion 1's where nothing is known."""
    facts = pipeline_facts(recipe)
    channels, height, width = (facts.latent_shape if facts is not None else None) or (4, 64, 64)
    dtype = recipe.model.dtype_of("" if facts is None else facts.component)
    return channels * height * width * _FLOAT_BYTES[dtype]


def check_earlier_run(recipe: Recipe) -> None:
    """Refuse to continue checkpoints that another recipe made.

    Raises:
        CheckpointError: naming the run folder and what differs.
        StorageError: the folder holds a generated dataset.
    """
    if RunFolder(recipe.run_dir).generation.exists():
        raise StorageError(
            str(recipe.run_dir), "it holds a dataset that raysteer generate made", "give this run another run.name"
        )
    earlier = latest_checkpoint(recipe.run_dir / "checkpoints")
    if earlier is None or earlier.fingerprint == recipe.fingerprint():
        return
    differing = ", ".join(differences(recipe)) or "a file it names has changed"
    raise CheckpointError(
        str(recipe.run_dir),
        f"its checkpoints come from another recipe ({differing})",
        "give this run another run.name, or restore the recipe (recipe.yaml in that folder) to continue it",
    )


def differences(recipe: Recipe, ignored: tuple[str, ...] = _NEVER_DECIDE) -> list[str]:
    """How a recipe differs from the one its run folder was begun with, as far as keys say: the first three, in words.

    `ignored`: beginnings of keys that do not matter.
    """
    try:
        earlier = load_recipe(recipe.run_dir / "recipe.yaml").flat()
    except UserError:
        return []
    return [
        f"{key} was {earlier.get(key)!r}, is {value!r}"
        for key, value in recipe.flat().items()
        if earlier.get(key) != value and not key.startswith(ignored)
    ][:3]


def check_cluster(recipe: Recipe) -> None:
    """Refuse an unreachable cluster, a taken port, and a run that this machine has no room for.

    Raises:
        ClusterError: naming key and value.
    """
    address = target_address(recipe.cluster)
    if address is not None:
        probe_address(address)  # its nodes are looked at on joining it
        return
    if recipe.cluster.dashboard:
        probe_free_port(recipe.cluster.dashboard_port, "cluster.dashboard_port")
    gpus = 0
    if gpus_needed(recipe) > 0:
        import torch

        gpus = torch.cuda.device_count()
    cpus = max(os.cpu_count() or 1, cpus_needed(recipe))
    lay_out(recipe, [Node("", "this machine", {"CPU": cpus, "GPU": gpus})], may_grow=False)


def gpus_needed(recipe: Recipe) -> float:
    """GPUs of all that a run begins with."""
    evaluator = evaluator_need(recipe)
    members = sum(role.fewest * role.num_gpus for role in (recipe.samplers, recipe.reward_workers, recipe.learner))
    return members + (0.0 if evaluator is None else evaluator.gpus)


def cpus_needed(recipe: Recipe) -> float:
    """CPUs of all that a run begins with; the service actors take none."""
    evaluator = evaluator_need(recipe)
    members = sum(role.fewest * role.num_cpus for role in (recipe.samplers, recipe.reward_workers, recipe.learner))
    return members + (0.0 if evaluator is None else evaluator.cpus)
