"""The plan: what a recipe means in plain words, printed before anything starts.

Batch arithmetic confuses everyone; here it is spelt out: images per step, images per update and rank, updates in the
run, who runs where, how much memory the weights take, how far samples may lag.
"""

from dataclasses import dataclass
from pathlib import Path

from cluster.config import Recipe, trained_count
from cluster.modelfiles import count_parameters
from cluster.preflight import bytes_on_disk, cpus_needed, gpus_needed, pipeline_facts, preflight, readable_bytes
from cluster.tracking import resolve_uri

__all__ = ["Plan", "preflight", "resolve"]

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class RoleMemory:
    """Bytes of one process of a role; ``weights`` is frozen, ``training`` is adapter, gradient and optimiser state."""

    role: str
    count: int
    where: str
    weights: int | None
    training: int

    def render(self) -> tuple[str, str]:
        """Label and text of its line in the plan."""
        known = "weights on the hub: unknown" if self.weights is None else f"weights {readable_bytes(self.weights)}"
        kept = "adapter, gradients and optimiser" if self.role == "learner" else "adapter"
        training = f" + {kept} {readable_bytes(self.training)}" if self.training else ""
        return self.role, f"{self.count} × {self.where}; {known}{training} each, activations not counted"


@dataclass(frozen=True)
class Plan:
    """The numbers of a run.

    Attributes:
        images_per_step: prompts × group_size.
        images_per_update_per_rank: images whose gradient one learner worker sums for one optimiser update.
        updates: optimiser updates in the whole run.
        trained_steps: trained denoising steps per image, K.
        forwards_per_step: denoiser calls on one image for learning one batch, all ranks together (guidance doubles
        them). expected_lag: versions by which a typical sample is older than the learner that uses it.
    """

    recipe: Recipe
    images_per_step: int
    unsafe_groups: int
    images_per_update_per_rank: int
    steps_per_update: int
    updates: int
    trained_steps: int
    forwards_per_step: int
    images: int
    roles: tuple[RoleMemory, ...]
    adapter_parameters: int | None
    object_store: int | None
    expected_lag: str

    def render(self) -> str:
        """The plan as text, one fact per line."""
        blocks = (self._subject(), self._arithmetic(), self._placement())
        return "\n\n".join("\n".join(f"{label:<15}{text}" for label, text in block) for block in blocks)

    def _subject(self) -> list[tuple[str, str]]:
        recipe = self.recipe
        adapter = (
            "unknown (hub model)" if self.adapter_parameters is None else f"{self.adapter_parameters:,} parameters"
        )
        model, reward = recipe.model, recipe.reward
        return [
            ("run", f"{recipe.run.name}: {recipe.run.steps} steps, seed {recipe.run.seed}, folder {recipe.run_dir}"),
            ("model", f"{model.path} in {model.dtype}; LoRA rank {model.lora.rank}, {adapter}"),
            ("reward", f"{reward.name}, alpha {reward.alpha:g}, CLIP {reward.clip.model}"),
        ]

    def _arithmetic(self) -> list[tuple[str, str]]:
        recipe, sampling, trained = self.recipe, self.recipe.sampling, self.recipe.sampling.trained
        groups, updates = recipe.run.groups_per_step, recipe.objective.updates_per_batch
        last = sampling.steps - 1 if trained.last is None else trained.last
        both = sampling.guidance_scale != 1 and recipe.objective.train_guidance == "both"
        return [
            (
                "one step",
                f"{groups} prompts × {sampling.group_size} images each = {self.images_per_step} images "
                f"({self.unsafe_groups} unsafe prompts, {groups - self.unsafe_groups} safe)",
            ),
            (
                "one image",
                f"{sampling.steps} denoising steps, eta {sampling.eta:g}, guidance {sampling.guidance_scale:g}; "
                f"{self.trained_steps} of them trained ({trained.mode}, from [{trained.first}, {last}))",
            ),
            (
                "one update",
                f"{self.images_per_update_per_rank} images × {self.steps_per_update} trained steps on each of "
                f"{recipe.learner.workers} learner workers, gradients averaged",
            ),
            (
                "one batch",
                f"{updates} optimiser update{'s' if updates > 1 else ''}; {self.forwards_per_step:,} denoiser passes "
                f"with gradient{' (guidance doubles them)' if both else ''}",
            ),
            (
                "whole run",
                f"{recipe.run.steps} steps × {updates} = {self.updates} optimiser updates on {self.images:,} images",
            ),
            ("staleness", self.expected_lag),
        ]

    def _placement(self) -> list[tuple[str, str]]:
        recipe, run = self.recipe, self.recipe.run
        lines = [role.render() for role in self.roles]
        lines.append(("together", f"{cpus_needed(recipe):g} CPUs and {gpus_needed(recipe):g} GPUs on {self._where()}"))
        if self.object_store is not None:
            store = readable_bytes(self.object_store)
            lines.append(("object store", f"up to {store} of images and trajectories at once"))
        disk = readable_bytes(bytes_on_disk(recipe))
        uri = resolve_uri(recipe.tracking, run.storage)
        return [
            *lines,
            ("disk", f"about {disk}; checkpoint every {run.checkpoint_every} steps, {run.keep_checkpoints} kept"),
            ("tracking", f"{uri}, experiment {recipe.tracking.experiment}"),
        ]

    def _where(self) -> str:
        address = self.recipe.cluster.address
        return "this machine" if address is None else f"the cluster at {address}"


def resolve(recipe: Recipe) -> Plan:
    """Work out the numbers of a recipe. Reads headers of the model's files, loads nothing.

    Raises:
        ModelError: a weights file is torn.
    """
    groups, size = recipe.run.groups_per_step, recipe.sampling.group_size
    count, updates = trained_count(recipe), recipe.objective.updates_per_batch
    facts = pipeline_facts(recipe)
    images = groups * size
    double = 2 if recipe.sampling.guidance_scale != 1 and recipe.objective.train_guidance == "both" else 1
    staleness = recipe.buffer.max_staleness
    if staleness == 0:
        lag = "0: strictly on-policy; samplers wait while the learner learns"
    else:
        lag = f"at most {staleness}; about {staleness} while samplers draw the next batch as the learner learns"
    store = None
    if facts is not None and facts.latent_shape is not None and facts.image_size is not None:
        latent = facts.latent_shape[0] * facts.latent_shape[1] * facts.latent_shape[2] * _BYTES[recipe.model.dtype]
        store = (staleness + 1) * images * (3 * facts.image_size**2 + latent * (2 * count + 1))
    return Plan(
        recipe=recipe,
        images_per_step=images,
        unsafe_groups=round(groups * recipe.prompts.unsafe_fraction),
        images_per_update_per_rank=images // recipe.learner.workers,
        steps_per_update=count // updates,
        updates=recipe.run.steps * updates,
        trained_steps=count,
        forwards_per_step=images * count * double,
        images=images * recipe.run.steps,
        roles=_roles(recipe),
        adapter_parameters=None if facts is None else facts.adapter_parameters,
        object_store=store,
        expected_lag=lag,
    )


def _roles(recipe: Recipe) -> tuple[RoleMemory, ...]:
    facts = pipeline_facts(recipe)
    weights, adapter = None, 0
    if facts is not None:
        weights, adapter = sum(facts.parameters.values()) * _BYTES[recipe.model.dtype], facts.adapter_parameters * 4
    clip, clip_weights = recipe.reward.clip, None
    if clip.model.startswith("local-dir:"):
        clip_weights = count_parameters(Path(clip.model.removeprefix("local-dir:"))) * _BYTES[clip.precision]
    samplers, rewards, learner = recipe.samplers, recipe.reward_workers, recipe.learner
    return (
        RoleMemory("samplers", samplers.count, _share(samplers.num_cpus, samplers.num_gpus), weights, adapter),
        RoleMemory("reward workers", rewards.count, _share(rewards.num_cpus, rewards.num_gpus), clip_weights, 0),
        # adapter, its gradient and Adam's two moments
        RoleMemory("learner", learner.workers, _share(learner.num_cpus, learner.num_gpus), weights, 4 * adapter),
    )


def _share(cpus: float, gpus: float) -> str:
    return f"{gpus:g} GPU" if gpus else f"{cpus:g} CPU"
