"""train(recipe): one run from its first actor to its last file.

    check ─▶ join the cluster ─▶ services ─▶ members (samplers, reward workers) ┐
                                        └─▶ learner ranks (Ray Train, a thread) ├─▶ supervise ─▶ finish
                                                                                ┘
The main thread supervises and takes signals. Every way out ends in `_finish`: everybody is told to stop, the ledger
is written, MLflow is closed, the actors are gone. The same call with the same recipe continues a run that was stopped
or killed.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.reward_worker import RewardWorker
from actors.sampler import Sampler
from cluster.buffer import BufferSettings, RolloutBuffer
from cluster.journal import Journal
from cluster.preflight import cpus_needed, gpus_needed, preflight
from cluster.progress import Progress
from cluster.prompts import load_prompts
from cluster.runtime import init_ray
from cluster.storage import RunFolder, write_atomic, write_json
from cluster.supervisor import Role, Supervisor
from cluster.tickets import TicketSource
from cluster.tracking import Tracker
from cluster.weights import WeightStore
from learner.checkpoint import Checkpoint, latest_checkpoint
from learner.loop import LoopSettings, Services, train_loop
from raysteer.errors import ClusterError, DeadlineExceeded

if TYPE_CHECKING:
    from cluster.config import Recipe

POLL_S = 0.5
CALL_TIMEOUT_S = 300.0
MEMBERS_STOP_S = 30.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """What became of a run. `status`: "finished" (adapter_dir is set) or "stopped" (the same command continues it)."""

    status: str
    run_dir: Path
    adapter_dir: Path | None
    steps: int
    seconds: float
    ledger: dict[str, Any] = field(default_factory=dict)
    restarts: dict[str, int] = field(default_factory=dict)
    mlflow_run_id: str | None = None


def train(recipe: Recipe, observe: Callable[[dict[str, Any]], None] | None = None) -> RunResult:
    """Run or continue the training a recipe describes.

    Args:
        recipe: as loaded by `load_recipe`.
        observe: called about twice a second with the buffer's snapshot (see RolloutBuffer.snapshot).

    Raises:
        UserError: something to fix, found before or during the run.
        DeadlineExceeded, ParityError: the run could not go on. Its last checkpoint is kept.
    """
    started = time.monotonic()
    lock = preflight(recipe)
    folder = RunFolder(recipe.run_dir).create()
    try:
        checkpoint = latest_checkpoint(folder.checkpoints, recipe.fingerprint())
        if checkpoint is not None and checkpoint.step >= recipe.run.steps:
            logger.warning("run %s is finished already (%d steps)", recipe.run.name, checkpoint.step)
            _export(recipe, folder, checkpoint)
            return RunResult(
                "finished", folder.path, folder.adapter, checkpoint.step, 0.0, mlflow_run_id=_mlflow_run_id(folder)
            )
        write_atomic(folder.recipe, recipe.to_yaml().encode())
        with _cluster(recipe), _Signals() as signals:
            return _Run(recipe, folder, checkpoint, signals, observe).run(started)
    finally:
        if lock is not None:
            lock.release()


class _Run:
    """The actors of one run, and what is to be done with them."""

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        checkpoint: Checkpoint | None,
        signals: _Signals,
        observe: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        self.recipe, self.folder, self.signals, self.observe = recipe, folder, signals, observe
        self.first_step = checkpoint.step if checkpoint is not None else 0
        self.services = start_services(recipe, folder, checkpoint)
        self.supervisor = Supervisor(roles(recipe, self.services))
        self.learner = _LearnerThread(recipe, folder, self.services)

    def run(self, started: float) -> RunResult:
        failure: BaseException | None = None
        try:
            self.learner.start()
            self.supervisor.start()
            mlflow_run_id = _get(self.services.tracker.get_run_id)
            self._supervise()
        except BaseException as error:  # whatever it is, the actors have to go and the files have to be written
            failure = error
        return self._finish(failure, started, mlflow_run_id if failure is None else None)

    def _supervise(self) -> None:
        """Until the learner has returned: replace the dead, end the silent, pass on signals, show progress."""
        buffer, patience_s = self.services.buffer, self.recipe.learner.batch_timeout_s
        begun, ending = time.monotonic(), 0.0
        with Progress(self.recipe.run.steps, self.first_step) as progress:
            while self.learner.is_alive():
                try:
                    self.supervisor.poll(POLL_S)
                except ClusterError as error:
                    _get(buffer.fail, error)
                snapshot = _get(buffer.snapshot)
                for figures in snapshot["reports"]:
                    progress.on_step(figures)
                for member_id in snapshot["silent"]:
                    self.supervisor.kill(member_id, "it neither draws nor asks")
                if self.observe is not None:
                    self.observe(snapshot)
                if self.signals.received and snapshot["stop"] is None:
                    progress.message("stopping: a checkpoint is written, the same command continues the run")
                    _get(buffer.request_stop, self.signals.received)
                now = time.monotonic()
                if not snapshot["learners"] and now - begun > patience_s:
                    hint = "the cluster has no room for learner.workers, or they cannot load the model: see ray logs"
                    raise DeadlineExceeded("the learner workers to start", now - begun, hint)
                if snapshot["stop"] or snapshot["failure"]:
                    ending = ending or now
                    if now - ending > patience_s:
                        raise DeadlineExceeded("the learner to end", now - ending, "it is stuck in a step: see its log")

    def _finish(self, failure: BaseException | None, started: float, mlflow_run_id: str | None) -> RunResult:
        """End everybody, write what is left to write, and report or raise."""
        counts: dict[str, Any] = {}
        try:
            _get(self.services.buffer.request_stop, "the run is over")
            late = self.supervisor.stop(0.0 if isinstance(failure, KeyboardInterrupt) else MEMBERS_STOP_S)
            if late:
                logger.warning("ended by force: %s", ", ".join(late))
            snapshot = _get(self.services.buffer.snapshot)
            counts = snapshot["ledger"]
            failure = failure or snapshot["failure"] or self.learner.error
            _get(self.services.journal.flush)
        except Exception as error:  # the buffer itself is gone: report that, unless something worse is known
            failure = failure or error
        checkpoint = latest_checkpoint(self.folder.checkpoints, self.recipe.fingerprint())
        steps = checkpoint.step if checkpoint is not None else 0
        finished = failure is None and checkpoint is not None and steps >= self.recipe.run.steps
        status = "finished" if finished else "stopped" if failure is None else "failed"
        if finished and checkpoint is not None:
            _export(self.recipe, self.folder, checkpoint)
        record = {"status": status, "steps": steps, "ledger": counts, "restarts": self.supervisor.restarts}
        if failure is not None:
            record["failure"] = f"{type(failure).__name__}: {failure}"
        write_json(self.folder.ledger, record)
        self._close_tracking(status)
        end_actors([self.services.buffer, self.services.weights, self.services.journal, self.services.tracker])
        if failure is not None:
            raise failure
        return RunResult(
            status,
            self.folder.path,
            self.folder.adapter if finished else None,
            steps,
            time.monotonic() - started,
            counts,
            dict(self.supervisor.restarts),
            mlflow_run_id,
        )

    def _close_tracking(self, status: str) -> None:
        tracker = self.services.tracker
        try:
            if status == "finished":
                _get(tracker.log_artifact, str(self.folder.adapter), "adapter")
            _get(tracker.log_artifact, str(self.folder.ledger), None)
            _get(tracker.finish, {"finished": "FINISHED", "stopped": "KILLED"}.get(status, "FAILED"))
        except Exception as error:  # tracking must never decide over a finished training
            logger.warning("MLflow could not be closed: %s", error)


# -- the parts of a run ------------------------------------------------------------------------------------------------


def start_services(recipe: Recipe, folder: RunFolder, checkpoint: Checkpoint | None) -> Services:
    """Buffer, weight store, journal and tracker: no CPUs, or they could keep Ray Train from ever starting."""
    tickets = TicketSource(
        recipe.run.seed, load_prompts(recipe.prompts), recipe.prompts.unsafe_fraction, recipe.sampling.group_size
    )
    shown = recipe.tracking.preview_prompts or (*tickets.prompts.safe[:2], *tickets.prompts.unsafe[:2])
    settings = BufferSettings(
        tickets=tickets,
        groups_per_step=recipe.run.groups_per_step,
        max_staleness=recipe.buffer.max_staleness,
        lease_ttl_s=recipe.buffer.lease_ttl_s,
        total_groups=recipe.run.steps * recipe.run.groups_per_step,
        max_attempts=recipe.reward_workers.max_attempts,
        score_timeout_s=recipe.reward_workers.timeout_s,
        preview_every=recipe.tracking.preview_every,
        preview_prompts=shown,
        preview_seed=recipe.tracking.preview_seed,
    )
    journal = start_actor(Journal, str(folder.journal))
    buffer = start_actor(RolloutBuffer, settings, dict(checkpoint.ledger) if checkpoint is not None else None, journal)
    weights = start_actor(WeightStore, buffer, recipe.buffer.max_staleness + 2)
    tracker = start_actor(Tracker, recipe.tracking, recipe.run.name, str(folder.path), recipe.flat())
    return Services(buffer, weights, journal, tracker)


def roles(recipe: Recipe, services: Services) -> list[Role]:
    """Samplers and reward workers as the supervisor sees them."""
    buffer, samplers, workers = services.buffer, recipe.samplers, recipe.reward_workers
    batch_groups = workers.batch_groups if recipe.buffer.max_staleness else 1
    answer_timeout_s = workers.timeout_s * (workers.max_attempts + 1)
    look = (recipe.sampling.steps, recipe.sampling.guidance_scale)

    def sampler(name: str) -> Any:
        arguments = (name, recipe.model, recipe.sampling, samplers.device, answer_timeout_s)
        return start_actor(Sampler, *arguments, num_cpus=samplers.num_cpus, num_gpus=samplers.num_gpus)

    def reward_worker(name: str) -> Any:
        arguments = (name, recipe.reward, workers.device, batch_groups)
        return start_actor(RewardWorker, *arguments, num_cpus=workers.num_cpus, num_gpus=workers.num_gpus)

    def run_reward_worker(name: str, handle: Any) -> Any:
        _get(buffer.add_reward_worker, name, handle)
        return handle.run.remote()

    return [
        Role(
            "reward_worker",
            workers.count,
            reward_worker,
            run_reward_worker,
            lambda handle: handle.stop.remote(),
            lambda name: _get(buffer.reward_worker_lost, name),
            workers.max_restarts,
        ),
        Role(
            "sampler",
            samplers.count,
            sampler,
            lambda name, handle: handle.run.remote(buffer, services.tracker, look),
            lambda handle: None,  # the buffer tells it at its next lease
            lambda name: _get(buffer.sampler_lost, name),
            samplers.max_restarts,
        ),
    ]


class _LearnerThread(threading.Thread):
    """TorchTrainer.fit, which blocks, beside the supervising main thread. `error` is what it raised."""

    def __init__(self, recipe: Recipe, folder: RunFolder, services: Services) -> None:
        super().__init__(name="learner", daemon=True)
        self.recipe, self.folder, self.services = recipe, folder, services
        self.error: Exception | None = None

    def run(self) -> None:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        recipe, learner = self.recipe, self.recipe.learner
        resources = {"CPU": learner.num_cpus} | ({"GPU": learner.num_gpus} if learner.num_gpus else {})
        settings = LoopSettings(
            model=recipe.model,
            sampling=recipe.sampling,
            objective=recipe.objective,
            optimizer=recipe.optimizer,
            learner=learner,
            seed=recipe.run.seed,
            steps=recipe.run.steps,
            checkpoint_every=recipe.run.checkpoint_every,
            keep_checkpoints=recipe.run.keep_checkpoints,
            checkpoints=str(self.folder.checkpoints.absolute()),
            metrics_file=str(self.folder.metrics.absolute()),
            fingerprint=recipe.fingerprint(),
        )
        try:
            TorchTrainer(
                train_loop,
                train_loop_config={"settings": settings, "services": self.services},
                scaling_config=ScalingConfig(
                    num_workers=learner.workers, use_gpu=bool(learner.num_gpus), resources_per_worker=resources
                ),
                run_config=RunConfig(
                    # A fresh name: resuming is by our own checkpoints, so Ray Train must not find any of its own.
                    name=f"{recipe.run.name}-{uuid.uuid4().hex[:8]}",
                    storage_path=str(self.folder.train_logs.absolute()),
                    failure_config=FailureConfig(max_failures=learner.max_failures),
                ),
            ).fit()
        except Exception as error:  # handed to the main thread, which raises it
            self.error = error


class _Signals:
    """First SIGINT or SIGTERM: asks for an orderly end. Second: KeyboardInterrupt. Only in the main thread."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._earlier[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: Any) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name


@contextmanager
def _cluster(recipe: Recipe) -> Iterator[None]:
    """The recipe's cluster; left again at the end unless somebody had joined it before."""
    # Not imported here: init_ray first sets what ray reads when it is imported.
    joined_before = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    ray = init_ray(recipe.cluster, cpus_needed(recipe), gpus_needed(recipe))
    try:
        yield
    finally:
        if not joined_before:
            ray.shutdown()


def start_actor(cls: type, *arguments: Any, num_cpus: float = 0.0, num_gpus: float = 0.0) -> Any:
    """An actor of a plain class. Wrapped here and not at its definition, so that Ray pickles it by reference."""
    import ray

    return ray.remote(num_cpus=num_cpus, num_gpus=num_gpus)(cls).remote(*arguments)


def end_actors(handles: list[Any]) -> None:
    import ray

    for handle in handles:
        ray.kill(handle)


def _get(method: Any, *arguments: Any) -> Any:
    import ray

    try:
        return ray.get(method.remote(*arguments), timeout=CALL_TIMEOUT_S)
    except ray.exceptions.GetTimeoutError as error:
        name = getattr(method, "_method_name", "an actor")
        hint = "a service actor is not up or stuck: is the machine overloaded? see the Ray logs"
        raise DeadlineExceeded(f"the answer to {name}()", CALL_TIMEOUT_S, hint) from error


def _export(recipe: Recipe, folder: RunFolder, checkpoint: Checkpoint) -> None:
    """The final adapter as plain diffusers loads it."""
    from diffusion.adapters import checksum, save_adapter

    state = dict(checkpoint.adapter)
    metadata = {
        "run": recipe.run.name,
        "step": str(checkpoint.step),
        "fingerprint": checkpoint.fingerprint,
        "checksum": checksum(state),
        "base_model": Path(recipe.model.path).name,
    }
    save_adapter(state, folder.adapter, metadata)


def _mlflow_run_id(folder: RunFolder) -> str | None:
    from cluster.tracking import RUN_ID_FILE

    file = folder.path / RUN_ID_FILE
    return file.read_text(encoding="utf-8").strip() if file.exists() else None
