"""The plan: what a recipe means in plain words, printed before anything starts.

Batch arithmetic confuses everyone; here it is spelt out: images per step, images per update and rank, updates in the
run, who runs where, how much memory each process takes, how far samples may lag.
"""

import os
from dataclasses import dataclass

from cluster.config import Recipe, trained_count
from cluster.layout import need_of
from cluster.memory import RoleMemory, fullest_gpu, main_memory, readable_bytes, role_memory
from cluster.preflight import bytes_on_disk, cpus_needed, gpus_needed, latent_bytes, pipeline_facts, preflight
from cluster.prompts import summarise
from cluster.tracking import resolve_uri
from evaluation.registry import build_suite
from evaluation.scored import shots
from learner.gdro import GDROConfig
from raysteer.errors import PromptError

__all__ = ["Plan", "preflight", "resolve"]


@dataclass(frozen=True)
class Plan:
    """The numbers of a run.

    Attributes:
        images_per_step: prompts × group_size.
        images_per_update_per_rank: images whose gradient one learner worker sums for one optimiser update, at most,
        when all are up. steps_per_update: trained steps of each, or with gdro draws.
        updates: optimiser updates in the whole run.
        trained_steps: trained denoising steps per image, K.
        forwards_per_step: denoiser calls on one image for learning one batch, all ranks together (guidance doubles
        them). noise: of a stochastic step, in words.
        expected_lag: versions by which a typical sample is older than the learner that uses it.
    """

    recipe: Recipe
    images_per_step: int
    unsafe_groups: int
    images_per_update_per_rank: int
    steps_per_update: int
    updates: int
    trained_steps: int
    forwards_per_step: int
    doubled: bool
    noise: str
    images: int
    roles: tuple[RoleMemory, ...]
    adapter_parameters: int | None
    object_store: int | None
    expected_lag: str
    prompts: tuple[str, ...]

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
            ("reward", reward.describe()),
            *(("" if index else "prompts", text) for index, text in enumerate(self.prompts)),
        ]

    def _arithmetic(self) -> list[tuple[str, str]]:
        recipe, sampling, trained = self.recipe, self.recipe.sampling, self.recipe.sampling.trained
        others = ", the others deterministic" if sampling.mixed else ""
        groups, updates = recipe.run.groups_per_step, recipe.objective.updates_per_batch
        fewer = recipe.learner.fewest < recipe.learner.workers
        elastic = f" (more when fewer are up, down to {recipe.learner.fewest})" if fewer else ""
        last = sampling.steps - 1 if trained.last is None else trained.last
        gdro = isinstance(recipe.objective, GDROConfig)
        kept = f"{self.trained_steps} of them trained ({trained.mode}, from [{trained.first}, {last})){others}"
        drawn = (
            f"{sampling.steps} denoising steps, {self.noise}, guidance {sampling.guidance_scale:g}; "
            f"{'the learner sees the final latents only' if gdro else kept}"
        )
        benign = "safe or utility" if any(s.prompt_class == "utility" for s in recipe.prompts.sources or ()) else "safe"
        return [
            (
                "one step",
                f"{groups} prompts × {sampling.group_size} images each = {self.images_per_step} images "
                f"({self.unsafe_groups} unsafe prompts, {groups - self.unsafe_groups} {benign})",
            ),
            *(_dataset(recipe) if recipe.offline is not None else (("one image", drawn),)),
            (
                "one update",
                f"{self.images_per_update_per_rank} images × {self.steps_per_update} "
                f"{'draws of time and noise' if gdro else 'trained steps'} on each of "
                f"{recipe.learner.workers} learner workers{elastic}, gradients averaged",
            ),
            (
                "one batch",
                f"{updates} optimiser update{'s' if updates > 1 else ''}; {self.forwards_per_step:,} denoiser passes "
                f"with gradient{' (guidance doubles them)' if self.doubled else ''}"
                f"{_without_gradient(recipe)}",
            ),
            (
                "whole run",
                f"{recipe.run.steps} steps × {updates} = {self.updates} optimiser updates on {self.images:,} images"
                f"{', many of them more than once' if recipe.offline is not None else ''}",
            ),
            *((("staleness", self.expected_lag),) if recipe.offline is None else ()),
            *_evaluations(recipe),
        ]

    def _placement(self) -> list[tuple[str, str]]:
        recipe, run = self.recipe, self.recipe.run
        lines = [role.render() for role in self.roles]
        gpu, host = fullest_gpu(self.roles), main_memory(self.roles)
        if gpu is not None:
            lines.append(("fullest GPU", gpu.render()))
        if host:
            what = "of all these together" if gpu is None else "of text encoders and of what runs on CPUs, together"
            lines.append(("main memory", f"about {readable_bytes(host)} {what}"))
        lines.append(("", "memory is an estimate, off by up to a quarter: docs/performance.md says how it was checked"))
        lines += [("together", self._together()), *self._nodes()]
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

    def _together(self) -> str:
        recipe, address = self.recipe, self.recipe.cluster.address or os.environ.get("RAY_ADDRESS")
        cpus, gpus = _span(cpus_needed(recipe), self._most("cpus")), _span(gpus_needed(recipe), self._most("gpus"))
        where = "this machine" if address is None else f"the cluster at {address}; who goes where is printed on joining"
        return f"{cpus} CPUs and {gpus} GPUs on {where}"

    def _nodes(self) -> list[tuple[str, str]]:
        """Which nodes a role may use, for those that are choosy."""
        needs = [need_of(self.recipe, section) for section in ("samplers", "reward_workers", "learner")]
        choosy = [f"each of {need.section} takes {need}" for need in needs if need.labels or need.resources]
        return [("" if index else "nodes", text) for index, text in enumerate(choosy)]

    def _most(self, what: str) -> float:
        return sum(role.count * getattr(role, what) for role in self.roles)


def _dataset(recipe: Recipe) -> list[tuple[str, str]]:
    """Where an offline run has its images from."""
    offline, generated = recipe.offline, recipe.generate
    assert offline is not None, "only a recipe with a section offline learns from a dataset"
    if offline.data is not None:
        return [("dataset", f"{offline.data} (raysteer data says what is in it); nothing is drawn")]
    steps = recipe.sampling.steps if generated.steps is None else generated.steps
    rounds = (
        f"{offline.rounds} × {recipe.run.steps // offline.rounds} steps, each on {generated.groups} groups of its own"
    )
    return [
        ("rounds", rounds),
        ("one image", f"{steps} denoising steps without noise, drawn with the adapter of the rounds before"),
    ]


def _evaluations(recipe: Recipe) -> list[tuple[str, str]]:
    """How often a checkpoint is evaluated beside training, and what ends the run."""
    config, stop = recipe.evaluation, recipe.evaluation.stop
    if config.every is None:
        return []
    images = len(shots(build_suite(config), config))
    when = f"every {config.every} steps, at the first and at the last"
    lines = [("evaluations", f"{when}: {images} images each, beside training")]
    if stop is not None:
        more = f" by more than {stop.least:g}" if stop.least else ""
        times = "1 evaluation" if stop.patience == 1 else f"{stop.patience} evaluations in a row"
        lines.append(("stops", f"when {stop.figure} has not risen{more} for {times}; the best adapter is exported"))
    return [*lines, *(("guard", f"the run ends when {guard}") for guard in config.guards)]


def _without_gradient(recipe: Recipe) -> str:
    """Further denoiser passes of a batch, in words."""
    if isinstance(recipe.objective, GDROConfig):
        return ", as many without one (reference)"
    return ", first as many without one (anchor proximal)" if recipe.objective.replays_first else ""


def _span(fewest: float, most: float) -> str:
    return f"{fewest:g}" if fewest == most else f"{fewest:g} to {most:g}"


def resolve(recipe: Recipe) -> Plan:
    """Work out the numbers of a recipe. Reads headers of the model's files, loads nothing.

    Raises:
        ModelError: a weights file is torn.
    """
    groups, size = recipe.run.groups_per_step, recipe.sampling.group_size
    count, objective = trained_count(recipe), recipe.objective
    facts = pipeline_facts(recipe)
    images = groups * size
    if isinstance(objective, GDROConfig):
        learned, visits, both = objective.images(size), objective.draws, False
    else:
        learned, visits, both = size, count, objective.train_guidance == "both"
    doubled = both and recipe.sampling.guidance_scale != 1 and not (facts is not None and facts.embedded_guidance)
    flow = recipe.sampling.flow
    noise = f"eta {recipe.sampling.eta:g}"
    if facts is not None and facts.component == "transformer":
        noise = f"noise {flow.kind} {flow.level:g}"
    staleness = recipe.buffer.max_staleness
    alone = recipe.offline is not None and recipe.offline.data is not None
    if staleness == 0:
        lag = "0: strictly on-policy; samplers wait while the learner learns"
    else:
        lag = f"at most {staleness}; about {staleness} while samplers draw the next batch as the learner learns"
    store = None
    if facts is not None and facts.latent_shape is not None and facts.image_size is not None:
        store = (staleness + 1) * images * (3 * facts.image_size**2 + latent_bytes(recipe) * (2 * count + 1))
    return Plan(
        recipe=recipe,
        images_per_step=images,
        unsafe_groups=round(groups * recipe.prompts.unsafe_fraction),
        images_per_update_per_rank=-(-groups // recipe.learner.workers) * learned,
        steps_per_update=visits // objective.updates_per_batch,
        updates=recipe.run.steps * objective.updates_per_batch,
        trained_steps=count,
        forwards_per_step=groups * learned * visits * (2 if doubled else 1),
        doubled=doubled,
        noise=noise,
        images=images * recipe.run.steps,
        roles=tuple(one for one in role_memory(recipe, facts) if not alone or one.role in ("learner", "evaluator")),
        adapter_parameters=None if facts is None else facts.adapter_parameters,
        object_store=store,
        expected_lag=lag,
        prompts=_prompts(recipe),
    )


def _prompts(recipe: Recipe) -> tuple[str, ...]:
    try:
        return tuple(str(source) for source in summarise(recipe.prompts))
    except PromptError as error:  # preflight refuses it; a plan may be asked for where the lists are not
        return (f"cannot be read here: {error}",)
