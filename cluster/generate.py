"""generate(recipe): a dataset of scored groups for offline objectives, drawn without a learner.

All is as in a training run (leases, retries, replacements, drops, figures, stopping), but for who takes the batches: a
*collector*, a thread of the driver. Batch after batch it has the journal flushed, writes down how far the run is, and
publishes the same adapter as the next version. Images are drawn as the pipeline itself draws them, without noise
between the steps, so a group is a function of its ticket alone: whatever is killed, and drawn again, has the same bits.

    <run folder>/generation.json   format, fingerprint, groups_per_step, step, ledger: the checkpoint of a generation
    <run folder>/journal           the dataset (see `learner.dataset`)
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cluster.config import Recipe, digest
from cluster.identity import journal_identity
from cluster.preflight import check_deterministic, check_model, check_surroundings, differences
from cluster.runlock import RunLock
from cluster.services import ask, roles, start_services
from cluster.source import Source, find_adapter, fitting_lora
from cluster.status import Stage
from cluster.storage import RunFolder, write_atomic, write_json
from cluster.supervisor import Role
from cluster.tracking import probe, resolve_uri
from cluster.train import Observer, RunResult, carry_out
from learner.batches import Batch, StopTraining, batch_metrics
from learner.loop import LearnerConfig, Services
from learner.records import append_row, keep_rows_until
from raysteer.calls import AGAIN
from raysteer.errors import CheckpointError, ConfigError, StorageError
from raysteer.logs import log_as

FORMAT = 1
CALL_TIMEOUT_S = 120.0  # beyond the patience for a batch
# Keys that do not decide what a dataset holds, by their beginning.
_NEVER_DECIDE = (
    *("run.steps", "run.name", "run.storage", "run.checkpoint", "run.keep", "run.groups", "generate.groups"),
    *("model.lora", "model.gradient", "model.offload", "sampling.eta", "sampling.flow", "sampling.mixed"),
    *("sampling.shift", "sampling.same", "sampling.trained", "objective", "optimizer", "samplers", "reward_workers"),
    *("learner", "buffer", "tracking", "evaluation", "cluster", "kubernetes"),
)


def generate(recipe: Recipe, adapter: str | None = None, observe: Observer | None = None, title: str = "") -> RunResult:
    """Draw and score the groups a recipe describes, or go on with it; they are in `journal` of the run folder.

    Args:
        recipe: as loaded by `load_recipe`; its section `generate` says how many groups.
        adapter: run, checkpoint or adapter to draw with; None: the base model.
        observe: as for `cluster.train.train`.
        title: which part of a run in rounds this is.

    Raises:
        UserError: something to fix, found before or during the run.
        DeadlineExceeded: the run could not go on. What it has is kept.
    """
    log_as(recipe.run.name, "driver")
    generation = prepare(recipe, adapter)
    generation.title = title
    return carry_out(generation, RunLock(recipe.run_dir), observe)


def prepare(recipe: Recipe, adapter: str | None = None) -> Generation:
    """Check everything that can be known to be wrong, and start nothing. Raises as `generate`."""
    check_model(recipe)
    source = None if adapter is None else find_adapter(adapter, recipe.run.storage)
    generation = Generation(recipe, source)
    try:
        check_deterministic(generation.recipe)
    except ConfigError as error:
        own = error.key.removeprefix("sampling.")
        if getattr(recipe.generate, own, None) is None:
            raise
        raise ConfigError(f"generate.{own}", error.value, error.remedy) from None
    check_surroundings(generation.recipe)
    generation.check_folder()
    probe(resolve_uri(recipe.tracking, recipe.run.storage))
    return generation


def batch_size(recipe: Recipe) -> int:
    """Groups of a batch: as many as a training step has, or the next smaller number that divides `generate.groups`.

    Raises:
        ConfigError: the dataset was begun with batches that do not divide it.
    """
    groups, earlier = recipe.generate.groups, read_state(RunFolder(recipe.run_dir))
    if not earlier:
        return max(size for size in range(1, recipe.run.groups_per_step + 1) if groups % size == 0)
    size = int(earlier["groups_per_step"])
    if groups % size:
        raise ConfigError(
            "generate.groups",
            groups,
            f"this dataset was begun in batches of {size}: {max(1, round(groups / size)) * size} would do",
        )
    return size


def collecting(recipe: Recipe, source: Source | None) -> Recipe:
    """The recipe as the run goes by it: batches for steps, no learner, the schedule of the images, the adapter's LoRA.

    Raises:
        ConfigError: see `batch_size`.
        ModelError: the adapter is of another model.
    """
    size, wanted, sampling = batch_size(recipe), recipe.generate, recipe.sampling
    steps = sampling.steps if wanted.steps is None else wanted.steps
    guidance = sampling.guidance_scale if wanted.guidance_scale is None else wanted.guidance_scale
    nothing = LearnerConfig(num_cpus=0.0, batch_timeout_s=recipe.learner.batch_timeout_s)
    lora = recipe.model.lora if source is None else fitting_lora(recipe.model, source)
    changed = {
        "run": {"groups_per_step": size, "steps": wanted.groups // size},
        "model": {"lora": lora, "gradient_checkpointing": False},
        "sampling": {"steps": steps, "guidance_scale": guidance},
        "tracking": {"preview_every": 0},
        "evaluation": {"every": None, "stop": None},
    }
    sections = {name: getattr(recipe, name).model_copy(update=keys) for name, keys in changed.items()}
    return recipe.model_copy(update=sections | {"learner": nothing})


def read_state(folder: RunFolder) -> dict[str, Any]:
    """What `generation.json` says; {} when nothing has been generated here.

    Raises:
        CheckpointError: it is damaged, or of another format.
    """
    if not folder.generation.exists():
        return {}
    try:
        state = dict(json.loads(folder.generation.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            str(folder.generation), f"cannot be read ({type(error).__name__})", "generate under another run.name"
        ) from None
    if state.get("format") != FORMAT:
        raise CheckpointError(
            str(folder.generation),
            f"has format {state.get('format')}, this version reads {FORMAT}",
            "use the version that wrote it, or begin anew with another run.name",
        )
    return state


class Generation:
    """A run that leaves a dataset (a `cluster.train.Purpose`). `source`: the adapter to draw with.

    `recipe` is the one the run goes by, `written` the one that was given.
    """

    stage: Stage | None = None  # a run in rounds has its status elsewhere: this is that of the dataset
    title = ""

    def __init__(self, recipe: Recipe, source: Source | None) -> None:
        from diffusion.adapters import checksum

        self.recipe, self.written = collecting(recipe, source), recipe
        self.folder = RunFolder(recipe.run_dir)
        self.words = "the base model" if source is None else source.words
        self.adapter: Mapping[str, np.ndarray] = {} if source is None else source.state  # empty: the base model
        self.checksum = checksum(self.adapter)

    def fingerprint(self) -> str:
        """sha256 (hex) over everything that decides the groups. How many they are, and who draws them, does not."""
        deciding, sampling = self.recipe.deciding(), self.recipe.sampling
        parts = {name: deciding[name] for name in ("seed", "reward", "prompts")}
        parts["model"] = {key: value for key, value in deciding["model"].items() if key != "lora"}
        parts["adapter"] = self.checksum
        parts["sampling"] = {name: getattr(sampling, name) for name in ("steps", "guidance_scale", "group_size")}
        return digest(parts)

    def check_folder(self) -> None:
        """Refuse a folder that holds something else.

        Raises:
            StorageError: a training run.
            CheckpointError: a dataset of another recipe or adapter.
        """
        state = read_state(self.folder)
        if not state and (self.folder.recipe.exists() or self.folder.journal.exists()):
            raise StorageError(str(self.folder.path), "it holds a training run", "give this dataset another run.name")
        if state and state["fingerprint"] != self.fingerprint():
            found = differences(self.written, _NEVER_DECIDE)
            if not found:
                found = ["another adapter" if state["adapter"] != self.checksum else "a file it names has changed"]
            raise CheckpointError(
                str(self.folder.path),
                f"its groups come from another recipe ({', '.join(found)})",
                "give this dataset another run.name, or restore the recipe (recipe.yaml in that folder) to continue it",
            )

    def describe(self) -> str:
        """What is about to be drawn, one fact per line."""
        run, sampling = self.recipe.run, self.recipe.sampling
        groups = self.recipe.generate.groups
        lines = {
            "dataset": f"{self.folder.journal}, seed {run.seed}",
            "model": f"{self.recipe.model.path} in {self.recipe.model.dtype}; drawn by {self.words}",
            "reward": self.recipe.reward.describe(),
            "groups": f"{groups} prompts × {sampling.group_size} images each = {groups * sampling.group_size} images, "
            f"written every {run.groups_per_step} groups",
            "one image": f"{sampling.steps} denoising steps, deterministic, guidance {sampling.guidance_scale:g}",
        }
        return "\n".join(f"{label:<15}{text}" for label, text in lines.items())

    # -- as a purpose --------------------------------------------------------------------------------------------------

    def progress(self) -> tuple[int, Mapping[str, Any] | None]:
        state = read_state(self.folder)
        return int(state.get("step", 0)), state.get("ledger")

    def begin(self) -> None:
        step, ledger = self.progress()
        self.keep(step, ledger)  # first: without it the folder would pass for a training run
        write_atomic(self.folder.recipe, self.written.to_yaml().encode())

    def services(self, ledger: Mapping[str, Any] | None) -> Services:
        return start_services(self.recipe, self.folder, journal_identity(self.recipe, "generate"), ledger)

    def roles(self, services: Services) -> list[Role]:
        return roles(self.recipe, services, deterministic=True)

    def ranks(self) -> None:
        return None

    def consumer(self, services: Services) -> Collector:
        return Collector(self, services)

    def beside(self, services: Services) -> None:
        return None

    def ended_early(self) -> None:
        return None

    def complete(self) -> None:
        return None

    def keep(self, step: int, ledger: Mapping[str, Any] | None) -> None:
        """Write down that the groups of the first `step` batches are in the journal."""
        state = {
            "format": FORMAT,
            "fingerprint": self.fingerprint(),
            "adapter": self.checksum,
            "groups_per_step": self.recipe.run.groups_per_step,
            "step": step,
            "ledger": ledger,
        }
        write_json(self.folder.generation, state)


class Collector(threading.Thread):
    """In the learner's place: makes one batch after another durable. `error` is what it raised."""

    def __init__(self, generation: Generation, services: Services) -> None:
        super().__init__(name="collector", daemon=True)
        self.generation, self.services = generation, services
        self.error: Exception | None = None
        self._reported: list[Any] = []

    def run(self) -> None:
        try:
            self._collect()
        except OSError as error:
            where = error.filename or self.generation.folder.path
            remedy = f"free some space or correct the folder; {AGAIN}"
            self.error = StorageError(str(where), f"cannot be written ({error.strerror})", remedy)
        except Exception as error:  # handed to the main thread, which raises it
            self.error = error

    def _collect(self) -> None:
        generation, services = self.generation, self.services
        step, _ = generation.progress()
        ask(services.buffer.rewind, step, {0: os.getpid()})
        keep_rows_until(generation.folder.metrics, step)
        self._publish(step)
        while step < generation.recipe.run.steps:
            received = self._receive(step)
            if received is None:
                break
            batch, ledger = received
            step += 1
            ask(services.journal.flush)
            self._report(step, batch)
            generation.keep(step, ledger)
            self._publish(step)
            ask(services.buffer.commit, step)
        self._wait_for_reports()

    def _receive(self, step: int) -> tuple[Batch, dict[str, Any]] | None:
        """The batch of `step`, once the journal has all its latents, and the ledger after it; None: the run ends."""
        buffer, patience_s = self.services.buffer, self.generation.recipe.learner.batch_timeout_s
        while True:
            batch = ask(buffer.next_batch, step, patience_s, timeout_s=patience_s + CALL_TIMEOUT_S)
            if isinstance(batch, StopTraining):
                return None
            ledger = ask(buffer.ledger_state, step + 1)  # every scored group has reached the journal by now
            lost = ask(self.services.journal.lost_among, [group.ticket_id for group in batch.groups])
            if not lost:
                return batch, ledger
            ask(buffer.report_lost, step, lost)

    def _publish(self, version: int) -> None:
        generation = self.generation
        ask(self.services.weights.publish, version, dict(generation.adapter), generation.checksum)

    def _report(self, step: int, batch: Batch) -> None:
        """Record the figures of a batch, without waiting for whoever keeps them."""
        figures = batch_metrics(batch) | dict(batch.telemetry)
        images = self.generation.recipe.sampling.group_size * figures.pop("batch/groups")
        figures["throughput/images_per_s"] = images / figures["stage/wall_s"]
        tickets = [group.ticket_id for group in batch.groups]
        append_row(self.generation.folder.metrics, {"step": step, "tickets": tickets} | figures)
        self._reported.append(self.services.buffer.report.remote(step, figures))
        self._reported.append(self.services.tracker.log_metrics.remote(step, figures))

    def _wait_for_reports(self) -> None:
        """Calls still queued die with the process that made them."""
        import ray

        if self._reported:
            ray.wait(self._reported, num_returns=len(self._reported), timeout=CALL_TIMEOUT_S)


def dataset_of(result: RunResult) -> Path:
    """The dataset that a generation has left."""
    return RunFolder(result.run_dir).journal
