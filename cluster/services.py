"""The actors of a run: how each is made, which are supervised, and how one asks them.

Service actors (buffer, weights, journal, tracker) take no CPUs, or they could keep Ray Train from ever starting, and
stay on the driver's machine, where the run folder is. Members (samplers, reward workers) go where the supervisor finds
room for them, learner ranks where Ray Train does.
"""

from __future__ import annotations

import functools
import logging
import threading
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from actors.reward_worker import RewardWorker
from actors.sampler import Sampler
from cluster.buffer import RolloutBuffer
from cluster.buffer_settings import BufferSettings
from cluster.desk import Desk
from cluster.journal import Journal
from cluster.layout import lay_out, need_of
from cluster.placement import Need, live_nodes
from cluster.prompts import load_prompts
from cluster.storage import RunFolder
from cluster.supervisor import Role
from cluster.tickets import TicketSource
from cluster.tracking import Tracker
from cluster.weights import WeightStore
from learner.loop import LoopSettings, Services, train_loop
from raysteer import calls
from raysteer.errors import ClusterError, UserError
from raysteer.logs import log_as_actor

if TYPE_CHECKING:
    from cluster.config import Recipe
    from learner.dataset import GroupDataset
    from learner.sources import OfflineSettings

CALL_TIMEOUT_S = 300.0  # generous: the first call to an actor includes its start on a busy machine

ask = functools.partial(calls.ask, timeout_s=CALL_TIMEOUT_S)
logger = logging.getLogger(__name__)


def start_actor(cls: type, *arguments: Any, need: Need | None = None, node: str | None = None) -> Any:
    """An actor of a plain class that takes `need` (nothing by default), on the node with this id or anywhere `need`
    allows. Wrapped at use, so that Ray pickles the class by reference.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    options: dict[str, Any] = {"num_cpus": 0}
    if need is not None:
        options = {"num_cpus": need.cpus, "num_gpus": need.gpus, "resources": dict(need.resources)}
    if node is not None:
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=False)
    elif need is not None and need.labels:
        options["label_selector"] = dict(need.labels)
    return ray.remote(**options)(cls).remote(*arguments)


def logging_as(run: str, role: str, member: str, handle: Any) -> Any:
    """The same actor, whose log lines say who it is (as soon as its constructor is done)."""
    handle.__ray_call__.remote(log_as_actor, run, role, member)  # not from here: the import would bring torch along
    return handle


def start_services(
    recipe: Recipe, folder: RunFolder, identity: Mapping[str, Any], ledger: Mapping[str, Any] | None
) -> Services:
    """Buffer, weight store, journal and tracker, on this node.

    Args:
        recipe: of the run.
        folder: of the run.
        identity: what its groups are made with (see `cluster.identity`).
        ledger: the state that a run goes on from.

    Raises:
        ClusterError: the cluster has no room for the run.
    """
    import ray

    nodes = live_nodes()
    layout = lay_out(recipe, nodes, recipe.cluster.autoscaling)
    if len(nodes) > 1:
        print(layout.render(), flush=True)
    here = ray.get_runtime_context().get_node_id()
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

    def service(cls: type, *arguments: Any) -> Any:
        return logging_as(recipe.run.name, cls.__name__, "", start_actor(cls, *arguments, node=here))

    journal = service(Journal, str(folder.journal), dict(identity))
    buffer = service(RolloutBuffer, settings, ledger, journal)
    weights = service(WeightStore, buffer, recipe.buffer.max_staleness + 2)
    tracking = (recipe.tracking, recipe.run.name, str(folder.path), recipe.flat())
    return Services(buffer, weights, journal, service(Tracker, *tracking))


def start_desk(recipe: Recipe, folder: RunFolder, dataset: GroupDataset) -> Services:
    """Desk and tracker, on this node: what a run needs that learns from a dataset.

    Raises:
        ClusterError: the cluster has no room for the learner.
    """
    import ray

    lay_out(recipe, live_nodes(), recipe.cluster.autoscaling)
    here = ray.get_runtime_context().get_node_id()
    run, tracking = recipe.run, (recipe.tracking, recipe.run.name, str(folder.path), recipe.flat())
    about = (run.steps, run.groups_per_step, recipe.sampling.group_size, dataset.skipped)
    desk = logging_as(run.name, "Desk", "", start_actor(Desk, *about, node=here))
    return Services(desk, tracker=logging_as(run.name, "Tracker", "", start_actor(Tracker, *tracking, node=here)))


def end_services(services: Services) -> None:
    import ray

    for handle in (services.buffer, services.weights, services.journal, services.tracker):
        if handle is not None:
            ray.kill(handle)


def roles(recipe: Recipe, services: Services, deterministic: bool = False) -> list[Role]:
    """Samplers and reward workers as the supervisor sees them. `deterministic`: how samplers draw."""
    buffer, samplers, workers = services.buffer, recipe.samplers, recipe.reward_workers
    answer_timeout_s = workers.timeout_s * (workers.max_attempts + 1)
    shown = recipe.evaluation if recipe.evaluation.suite is not None else recipe.sampling
    look = (shown.steps, shown.guidance_scale)  # previews look like the pictures people will compare them with

    drawing, scoring = need_of(recipe, "samplers"), need_of(recipe, "reward_workers")

    def sampler(name: str, node: str | None) -> Any:
        arguments = (name, recipe.model, recipe.sampling, samplers.device, answer_timeout_s, deterministic)
        return logging_as(recipe.run.name, "sampler", name, start_actor(Sampler, *arguments, need=drawing, node=node))

    def reward_worker(name: str, node: str | None) -> Any:
        arguments = (name, recipe.reward, workers.device, workers.batch_groups)
        actor = start_actor(RewardWorker, *arguments, need=scoring, node=node)
        return logging_as(recipe.run.name, "reward_worker", name, actor)

    return [
        Role(
            "reward_worker",
            scoring,
            workers.fewest,
            workers.most,
            create=reward_worker,
            run=lambda name, handle: handle.run.remote(buffer),
            stop=lambda handle: handle.stop.remote(),
            on_lost=lambda name: ask(buffer.reward_worker_lost, name),
            max_restarts=workers.max_restarts,
            start_timeout_s=workers.start_timeout_s,
        ),
        Role(
            "sampler",
            drawing,
            samplers.fewest,
            samplers.most,
            create=sampler,
            run=lambda name, handle: handle.run.remote(buffer, services.tracker, look),
            stop=lambda handle: None,  # the buffer tells it at its next lease
            on_lost=lambda name: ask(buffer.sampler_lost, name),
            max_restarts=samplers.max_restarts,
            start_timeout_s=samplers.start_timeout_s,
        ),
    ]


class Pulse:
    """Notices the death of service actors that nobody may be waiting for at the moment."""

    def __init__(self, services: Services) -> None:
        self.methods = {"tracker": services.tracker.get_run_id}
        if services.journal is not None:
            self.methods["journal"] = services.journal.ping
        if services.weights is not None:
            self.methods["weight store"] = services.weights.ping
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


def rank_resources(recipe: Recipe) -> dict[str, float]:
    """What one learner rank takes, as Ray Train and its placement groups write it."""
    need = need_of(recipe, "learner")
    return {"CPU": need.cpus} | ({"GPU": need.gpus} if need.gpus else {}) | dict(need.resources)


class LearnerRoom:
    """The room that the learner ranks hold and lack, as seen in Ray's placement groups.

    Ray Train makes a new group of bundles, one for each rank, whenever it starts the ranks, and tells nobody. Groups
    that were there before this run began belong to others.
    """

    def __init__(self, recipe: Recipe) -> None:
        from ray.util import placement_group_table

        self.need = need_of(recipe, "learner")
        self.fewest, self.most = recipe.learner.fewest, recipe.learner.workers
        self.start_timeout_s = recipe.learner.start_timeout_s
        self._bundle = {name: amount for name, amount in rank_resources(recipe).items() if amount}
        self._others = set(placement_group_table())

    def look(self) -> tuple[list[str], bool]:
        """Node of every rank that has its room, and whether a group waits for room."""
        from ray.util import placement_group_table

        held: list[str] = []
        waits = False
        for name, group in placement_group_table().items():
            if name in self._others or group["state"] == "REMOVED" or not self._is_ours(group["bundles"]):
                continue
            if group["state"] == "CREATED":
                held += group["bundles_to_node_id"].values()
            else:
                waits = True
        return held, waits

    def _is_ours(self, bundles: dict[int, dict[str, float]]) -> bool:
        return all(
            bundle.keys() == self._bundle.keys()
            and all(abs(bundle[name] - amount) < 1e-3 for name, amount in self._bundle.items())
            for bundle in bundles.values()
        )


def _too_often(rank: int, max_failures: int, cause: Exception) -> ClusterError:
    said = cause.problem if isinstance(cause, ClusterError) else f"{type(cause).__name__}: {cause}"
    last = " ".join(said.split())[:300]
    return ClusterError(
        f"learner rank {rank}",
        f"failed {max_failures + 1} times; the last time: {last}",
        f"correct the cause, or raise learner.max_failures; {calls.AGAIN}",
    )


class LearnerThread(threading.Thread):
    """TorchTrainer.fit, which blocks, beside the supervising main thread. `error` is what it raised.

    `offline`: the dataset to learn from, instead of the buffer's batches.
    """

    def __init__(
        self, recipe: Recipe, folder: RunFolder, services: Services, offline: OfflineSettings | None = None
    ) -> None:
        super().__init__(name="learner", daemon=True)
        self.recipe, self.folder, self.services, self.offline = recipe, folder, services, offline
        self.error: Exception | None = None

    def run(self) -> None:
        from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
        from ray.train.torch import TorchTrainer

        learner = self.recipe.learner
        elastic = learner.fewest < learner.workers
        try:
            TorchTrainer(
                train_loop,
                train_loop_config={"settings": self._settings(), "services": self.services},
                scaling_config=ScalingConfig(
                    num_workers=(learner.fewest, learner.workers) if elastic else learner.workers,
                    use_gpu=bool(learner.num_gpus),
                    resources_per_worker=rank_resources(self.recipe),
                    label_selector=dict(learner.labels) or None,
                ),
                run_config=RunConfig(
                    # A fresh name: resuming is by our own checkpoints, so Ray Train must not find any of its own.
                    name=f"{self.recipe.run.name}-{uuid.uuid4().hex[:8]}",
                    storage_path=str(self.folder.train_logs.absolute()),
                    failure_config=FailureConfig(max_failures=learner.max_failures),
                ),
            ).fit()
        except WorkerGroupError as error:
            rank, failure = next(iter(error.worker_failures.items()))
            cause = calls.plain(getattr(failure, "health_check_failure", failure))
            fixable = isinstance(cause, UserError) and not isinstance(cause, ClusterError)  # what the rank itself found
            self.error = cause if fixable else _too_often(rank, learner.max_failures, cause)
        except Exception as error:  # handed to the main thread, which raises it
            self.error = error

    def _settings(self) -> LoopSettings:
        recipe = self.recipe
        return LoopSettings(
            run=recipe.run.name,
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
            offline=self.offline,
        )
