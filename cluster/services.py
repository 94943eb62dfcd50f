"""The actors of a run: how each is made, which are supervised, and how one asks them.

Service actors (buffer, weights, journal, tracker) take no CPUs, or they could keep Ray Train from ever starting, and
stay on the driver's machine, where the run folder is. Members (samplers, reward workers) go wherever there is room.
"""

from __future__ import annotations

import logging
import re
import threading
import uuid
from typing import TYPE_CHECKING, Any

from actors.reward_worker import RewardWorker
from actors.sampler import Sampler
from cluster.buffer import BufferSettings, RolloutBuffer
from cluster.journal import Journal
from cluster.prompts import load_prompts
from cluster.storage import RunFolder
from cluster.supervisor import Role
from cluster.tickets import TicketSource
from cluster.tracking import Tracker
from cluster.weights import WeightStore
from learner.checkpoint import Checkpoint
from learner.loop import LoopSettings, Services, train_loop
from raysteer.errors import ClusterError, DeadlineExceeded

if TYPE_CHECKING:
    from cluster.config import Recipe

CALL_TIMEOUT_S = 300.0  # generous: the first call to an actor includes its start on a busy machine

logger = logging.getLogger(__name__)


def start_actor(cls: type, *arguments: Any, num_cpus: float = 0.0, num_gpus: float = 0.0, here: bool = False) -> Any:
    """An actor of a plain class, on this machine if `here`. Wrapped at use, so that Ray pickles the class by
    reference.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    options: dict[str, Any] = {"num_cpus": num_cpus, "num_gpus": num_gpus}
    if here:
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
    return ray.remote(**options)(cls).remote(*arguments)


def ask(method: Any, *arguments: Any) -> Any:
    """Call an actor's method and wait, but not for ever.

    Raises:
        ClusterError: its process is dead.
        DeadlineExceeded: no answer.
    """
    import ray

    try:
        return ray.get(method.remote(*arguments), timeout=CALL_TIMEOUT_S)
    except ray.exceptions.RayActorError as error:
        named = re.search(r"class_name: (\w+)", str(error))
        actor = named[1] if named else "a service actor"
        raise ClusterError(actor, "its process died", "the same command continues the run") from error
    except ray.exceptions.GetTimeoutError as error:
        name = getattr(method, "_method_name", "an actor")
        hint = "a service actor is not up or stuck: is the machine overloaded? see the Ray logs"
        raise DeadlineExceeded(f"the answer to {name}()", CALL_TIMEOUT_S, hint) from error


def start_services(recipe: Recipe, folder: RunFolder, checkpoint: Checkpoint | None) -> Services:
    """Buffer, weight store, journal and tracker, going on from `checkpoint`."""
    tickets = TicketSource(
        recipe.run.seed,
        load_prompts(recipe.prompts),
        recipe.prompts.unsafe_fraction,
        recipe.sampling.group_size,
        recipe.run.groups_per_step,
    )
    settings = BufferSettings(
        tickets=tickets,
        groups_per_step=recipe.run.groups_per_step,
        max_staleness=recipe.buffer.max_staleness,
        lease_ttl_s=recipe.buffer.lease_ttl_s,
        total_groups=recipe.run.steps * recipe.run.groups_per_step,
        max_attempts=recipe.reward_workers.max_attempts,
        score_timeout_s=recipe.reward_workers.timeout_s,
        preview_every=recipe.tracking.preview_every,
        preview_prompts=recipe.tracking.preview_prompts or tickets.prompts.examples(2),
        preview_seed=recipe.tracking.preview_seed,
    )
    ledger = dict(checkpoint.ledger) if checkpoint is not None else None
    journal = start_actor(Journal, str(folder.journal), here=True)
    buffer = start_actor(RolloutBuffer, settings, ledger, journal, here=True)
    weights = start_actor(WeightStore, buffer, recipe.buffer.max_staleness + 2, here=True)
    tracking = (recipe.tracking, recipe.run.name, str(folder.path), recipe.flat())
    return Services(buffer, weights, journal, start_actor(Tracker, *tracking, here=True))


def end_services(services: Services) -> None:
    import ray

    for handle in (services.buffer, services.weights, services.journal, services.tracker):
        ray.kill(handle)


def roles(recipe: Recipe, services: Services) -> list[Role]:
    """Samplers and reward workers as the supervisor sees them."""
    buffer, samplers, workers = services.buffer, recipe.samplers, recipe.reward_workers
    answer_timeout_s = workers.timeout_s * (workers.max_attempts + 1)
    shown = recipe.evaluation if recipe.evaluation.suite is not None else recipe.sampling
    look = (shown.steps, shown.guidance_scale)  # previews look like the pictures people will compare them with

    def sampler(name: str) -> Any:
        arguments = (name, recipe.model, recipe.sampling, samplers.device, answer_timeout_s)
        return start_actor(Sampler, *arguments, num_cpus=samplers.num_cpus, num_gpus=samplers.num_gpus)

    def reward_worker(name: str) -> Any:
        arguments = (name, recipe.reward, workers.device, workers.batch_groups)
        return start_actor(RewardWorker, *arguments, num_cpus=workers.num_cpus, num_gpus=workers.num_gpus)

    return [
        Role(
            "reward_worker",
            workers.count,
            create=reward_worker,
            run=lambda name, handle: handle.run.remote(buffer),
            stop=lambda handle: handle.stop.remote(),
            on_lost=lambda name: ask(buffer.reward_worker_lost, name),
            max_restarts=workers.max_restarts,
        ),
        Role(
            "sampler",
            samplers.count,
            create=sampler,
            run=lambda name, handle: handle.run.remote(buffer, services.tracker, look),
            stop=lambda handle: None,  # the buffer tells it at its next lease
            on_lost=lambda name: ask(buffer.sampler_lost, name),
            max_restarts=samplers.max_restarts,
        ),
    ]


class Pulse:
    """Notices the death of service actors that nobody may be waiting for at the moment."""

    def __init__(self, services: Services) -> None:
        self.methods = {
            "journal": services.journal.ping,
            "weight store": services.weights.ping,
            "tracker": services.tracker.get_run_id,
        }
        self.calls = {name: method.remote() for name, method in self.methods.items()}

    def check(self) -> None:
        """Raises ClusterError when the journal or the weight store is dead; a dead tracker is only reported."""
        import ray

        for name, call in list(self.calls.items()):
            if not ray.wait([call], timeout=0)[0]:
                continue
            try:
                ray.get(call)
                self.calls[name] = self.methods[name].remote()
            except ray.exceptions.RayError as error:
                del self.calls[name]
                if name != "tracker":
                    raise ClusterError(
                        name, f"its process died ({type(error).__name__})", "the same command continues the run"
                    ) from error
                logger.warning("the tracker died, MLflow gets nothing more; metrics.jsonl has everything")


class LearnerThread(threading.Thread):
    """TorchTrainer.fit, which blocks, beside the supervising main thread. `error` is what it raised."""

    def __init__(self, recipe: Recipe, folder: RunFolder, services: Services) -> None:
        super().__init__(name="learner", daemon=True)
        self.recipe, self.folder, self.services = recipe, folder, services
        self.error: Exception | None = None

    def run(self) -> None:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        learner = self.recipe.learner
        resources = {"CPU": learner.num_cpus} | ({"GPU": learner.num_gpus} if learner.num_gpus else {})
        try:
            TorchTrainer(
                train_loop,
                train_loop_config={"settings": self._settings(), "services": self.services},
                scaling_config=ScalingConfig(
                    num_workers=learner.workers, use_gpu=bool(learner.num_gpus), resources_per_worker=resources
                ),
                run_config=RunConfig(
                    # A fresh name: resuming is by our own checkpoints, so Ray Train must not find any of its own.
                    name=f"{self.recipe.run.name}-{uuid.uuid4().hex[:8]}",
                    storage_path=str(self.folder.train_logs.absolute()),
                    failure_config=FailureConfig(max_failures=learner.max_failures),
                ),
            ).fit()
        except Exception as error:  # handed to the main thread, which raises it
            self.error = error

    def _settings(self) -> LoopSettings:
        recipe = self.recipe
        return LoopSettings(
            model=recipe.model,
            sampling=recipe.sampling,
            objective=recipe.objective,
            optimizer=recipe.optimizer,
            learner=recipe.learner,
            seed=recipe.run.seed,
            steps=recipe.run.steps,
            checkpoint_every=recipe.run.checkpoint_every,
            keep_checkpoints=recipe.run.keep_checkpoints,
            checkpoints=str(self.folder.checkpoints.absolute()),
            metrics_file=str(self.folder.metrics.absolute()),
            fingerprint=recipe.fingerprint(),
            mixture=recipe.reward.mixture(),
        )
