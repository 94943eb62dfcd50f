"""train(recipe): one run from its first actor to its last file.

    check ─▶ join the cluster ─▶ services ─▶ members (samplers, reward workers) ┐
                                        └─▶ learner ranks (Ray Train, a thread) ├─▶ supervise ─▶ finish
                                                                                ┘
Who takes the batches, and what is left of them, is the run's `Purpose`: training here, a dataset in `cluster.generate`.
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
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cluster.identity import journal_identity
from cluster.jobs import surrounding_job
from cluster.metrics import RunMetrics
from cluster.preflight import cpus_needed, gpus_needed, preflight
from cluster.progress import Progress
from cluster.runtime import init_ray
from cluster.services import LearnerRoom, LearnerThread, Pulse, ask, end_services, roles, start_services
from cluster.status import StatusWriter
from cluster.stopping import withdraw_stop
from cluster.storage import RunFolder, write_atomic, write_json
from cluster.supervisor import Supervisor
from learner.checkpoint import Checkpoint, latest_checkpoint
from raysteer.calls import AGAIN
from raysteer.errors import ClusterError, DeadlineExceeded, StorageError
from raysteer.logs import log_as, log_version

if TYPE_CHECKING:
    from cluster.config import Recipe
    from cluster.runlock import RunLock
    from cluster.supervisor import Ranks, Role
    from learner.loop import Services

POLL_S = 0.5
START_S = 600.0  # longest until the learner ranks run: on a growing cluster machines have to come up first
MEMBERS_STOP_S = 30.0
_RAYS_COPIES = "working_dir_files"  # folder of a Ray node that holds the unpacked working directories of jobs

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """What became of a run. `status`: "finished" (adapter_dir is set if it trained) or "stopped" (the same command
    continues it).
    """

    status: str
    run_dir: Path
    adapter_dir: Path | None
    steps: int
    seconds: float
    ledger: dict[str, Any] = field(default_factory=dict)
    restarts: dict[str, int] = field(default_factory=dict)
    mlflow_run_id: str | None = None


Observer = Callable[[dict[str, Any]], None]


class Consumer(Protocol):
    """A thread that takes the batches of a run. `error` is what it raised."""

    error: Exception | None

    def start(self) -> None: ...
    def is_alive(self) -> bool: ...
    def join(self, timeout: float | None = None) -> None: ...


class Purpose(Protocol):
    """What a run draws its groups for.

    Attributes:
        recipe: of the run.
        folder: of the run.
    """

    recipe: Recipe
    folder: RunFolder

    def progress(self) -> tuple[int, Mapping[str, Any] | None]:
        """Steps that are done for good, and the ledger as it was after them."""
        ...

    def begin(self) -> None:
        """Write what a run leaves before its first step."""
        ...

    def services(self, ledger: Mapping[str, Any] | None) -> Services:
        """The service actors, going on from this state of the ledger."""
        ...

    def roles(self, services: Services) -> list[Role]: ...
    def ranks(self) -> Ranks | None: ...
    def consumer(self, services: Services) -> Consumer: ...

    def complete(self) -> Path | None:
        """All steps are done: write the final adapter, if this is what the run is for, and say where."""
        ...


class Training:
    """A run that trains: its batches go to the learner ranks, its checkpoints say how far it is."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.folder = recipe, RunFolder(recipe.run_dir)

    def progress(self) -> tuple[int, Mapping[str, Any] | None]:
        checkpoint = self._checkpoint()
        return (0, None) if checkpoint is None else (checkpoint.step, checkpoint.ledger)

    def begin(self) -> None:
        write_atomic(self.folder.recipe, self.recipe.to_yaml().encode())

    def services(self, ledger: Mapping[str, Any] | None) -> Services:
        return start_services(self.recipe, self.folder, journal_identity(self.recipe, "train"), ledger)

    def roles(self, services: Services) -> list[Role]:
        return roles(self.recipe, services)

    def ranks(self) -> Ranks:
        return LearnerRoom(self.recipe)

    def consumer(self, services: Services) -> Consumer:
        return LearnerThread(self.recipe, self.folder, services)

    def complete(self) -> Path:
        self.export(self.folder.adapter)
        return self.folder.adapter

    def export(self, folder: Path) -> None:
        """Write the adapter of the newest checkpoint into `folder`."""
        checkpoint = self._checkpoint()
        assert checkpoint is not None, "whoever exports has seen that there is a checkpoint"
        _export(self.recipe, folder, checkpoint)

    def _checkpoint(self) -> Checkpoint | None:
        return latest_checkpoint(self.folder.checkpoints, self.recipe.fingerprint())


def train(recipe: Recipe, observe: Observer | None = None) -> RunResult:
    """Run or continue the training a recipe describes.

    Args:
        recipe: as loaded by `load_recipe`.
        observe: called about twice a second with the buffer's snapshot (see RolloutBuffer.snapshot) and `restarts`,
            the replacements by role.

    Raises:
        UserError: something to fix, found before or during the run.
        DeadlineExceeded, ParityError: the run could not go on. Its last checkpoint is kept.
    """
    log_as(recipe.run.name, "driver")
    lock = preflight(recipe)
    if recipe.offline is not None:
        from cluster.offline import train_offline

        return train_offline(recipe, lock, observe)
    return carry_out(Training(recipe), lock, observe)


def carry_out(purpose: Purpose, lock: RunLock | None, observe: Observer | None = None) -> RunResult:
    """Begin or continue a run that has been checked. `lock`: of its folder, released at the end."""
    started = time.monotonic()
    recipe, folder = purpose.recipe, purpose.folder.create()
    if surrounding_job() is not None and _RAYS_COPIES in folder.path.parts:
        logger.warning(
            "run.storage %s lies in Ray's copy of the working directory and goes with it: to keep results and to "
            "resume, set it to the absolute path of a folder that the whole cluster shares",
            recipe.run.storage,
        )
    try:
        withdraw_stop(folder)
        done, _ = purpose.progress()
        with StatusWriter(folder, recipe, done) as status:
            if done >= recipe.run.steps:
                logger.warning("run %s is finished already (%d steps)", recipe.run.name, done)
                id_of_run = _mlflow_run_id(folder)
                result = RunResult("finished", folder.path, purpose.complete(), done, 0.0, mlflow_run_id=id_of_run)
            else:
                purpose.begin()
                with _cluster(recipe), _Signals() as signals:
                    metrics = RunMetrics(recipe.run.name)
                    observers: list[Observer] = [status, metrics, *([observe] if observe is not None else [])]
                    result = _Run(purpose, signals, observers).run(started)
            status.ended(result.status, result.steps, ledger=result.ledger)
        return result
    finally:
        withdraw_stop(folder)
        if lock is not None:
            lock.release()


class _Run:
    """The actors of one run, and what is to be done with them."""

    def __init__(self, purpose: Purpose, signals: _Signals, observers: Sequence[Observer]) -> None:
        self.purpose, self.signals, self.observers = purpose, signals, observers
        self.recipe, self.folder = purpose.recipe, purpose.folder
        self.first_step, ledger = purpose.progress()
        self.services = purpose.services(ledger)
        growing = self.recipe.cluster.autoscaling
        self.supervisor = Supervisor(purpose.roles(self.services), purpose.ranks(), growing)
        self.learner = purpose.consumer(self.services)

    def run(self, started: float) -> RunResult:
        failure: BaseException | None = None
        try:
            self.learner.start()
            self.supervisor.start()
            mlflow_run_id = ask(self.services.tracker.get_run_id)
            self._supervise()
        except BaseException as error:  # whatever it is, the actors have to go and the files have to be written
            failure = error
        return self._finish(failure, started, mlflow_run_id if failure is None else None)

    def _supervise(self) -> None:
        """Until the learner has returned: replace the dead, end the silent, pass on signals, show progress."""
        buffer, patience_s = self.services.buffer, self.recipe.learner.batch_timeout_s
        pulse, begun, ending = Pulse(self.services), time.monotonic(), 0.0
        with Progress(self.recipe.run.steps, self.first_step) as progress:
            while self.learner.is_alive():
                try:
                    self.supervisor.poll(POLL_S)
                    pulse.check()
                except ClusterError as error:
                    if error.subject == "learner":  # nobody is there who could write a checkpoint first
                        raise
                    ask(buffer.fail, error)  # the learner is told so, writes a checkpoint if it can, and returns
                snapshot = self._look(progress)
                for member_id, why in snapshot["silent"].items():
                    self.supervisor.kill(member_id, why)
                if snapshot["stop"] is None and (reason := self._asked_to_stop()):
                    progress.message(f"{reason}: a checkpoint is written, the same command continues the run")
                    ask(buffer.request_stop, reason)
                now = time.monotonic()
                if not snapshot["learners"] and now - begun > max(START_S, patience_s):
                    hint = "the cluster has no room for learner.workers, or they cannot load the model: see ray logs"
                    raise DeadlineExceeded("the learner workers to start", now - begun, hint)
                if snapshot["stop"] or snapshot["failure"]:
                    ending = ending or now
                    if now - ending > patience_s:
                        raise DeadlineExceeded("the learner to end", now - ending, "it is stuck in a step: see its log")
            self._look(progress)  # the figures of the last step

    def _look(self, progress: Progress) -> dict[str, Any]:
        """Ask the buffer how things stand, and show it to everybody who watches."""
        members = Counter(member.slot.role.name for member in self.supervisor.members)
        ours = {"members": members, "restarts": dict(self.supervisor.restarts)}
        snapshot: dict[str, Any] = ask(self.services.buffer.snapshot) | ours
        log_version(snapshot["version"])
        for figures in snapshot["reports"]:
            progress.on_step(figures)
        for observe in (progress.on_snapshot, *self.observers):
            observe(snapshot)
        return snapshot

    def _asked_to_stop(self) -> str | None:
        return self.signals.received or ("raysteer stop" if self.folder.stop_request.exists() else None)

    def _finish(self, failure: BaseException | None, started: float, mlflow_run_id: str | None) -> RunResult:
        """End everybody, write what is left to write, and report or raise."""
        counts: dict[str, Any] = {}
        patience_s = 0.0 if isinstance(failure, KeyboardInterrupt) else MEMBERS_STOP_S
        try:
            ask(self.services.buffer.request_stop, "the run is over")
        except Exception as error:  # the buffer itself is gone: report that, unless something worse is known
            failure = failure or error
        late = self.supervisor.stop(patience_s)
        if late:
            logger.warning("ended by force: %s", ", ".join(late))
        self.learner.join(patience_s)  # leaving Ray under a thread that waits in it can hang
        try:
            snapshot = ask(self.services.buffer.snapshot)
            counts = snapshot["ledger"]
            failure = failure or snapshot["failure"] or self.learner.error
            if self.services.journal is not None:
                ask(self.services.journal.flush)
        except Exception as error:
            failure = failure or error
        steps, _ = self.purpose.progress()
        finished = failure is None and steps >= self.recipe.run.steps
        status = "finished" if finished else "stopped" if failure is None else "failed"
        record = {"status": status, "steps": steps, "ledger": counts, "restarts": self.supervisor.restarts}
        if failure is not None:
            record["failure"] = f"{type(failure).__name__}: {failure}"
        adapter: Path | None = None
        try:
            if finished:
                adapter = self.purpose.complete()
            write_json(self.folder.ledger, record)
        except OSError as error:  # a full disk must not keep the actors alive, nor hide an earlier failure
            problem = f"cannot be written ({error.strerror})"
            failure = failure or StorageError(str(self.folder.path), problem, f"free some space; {AGAIN}")
        self._close_tracking(status, adapter)
        end_services(self.services)
        if failure is not None:
            raise failure
        return RunResult(
            status,
            self.folder.path,
            adapter,
            steps,
            time.monotonic() - started,
            counts,
            dict(self.supervisor.restarts),
            mlflow_run_id,
        )

    def _close_tracking(self, status: str, adapter: Path | None) -> None:
        tracker = self.services.tracker
        try:
            if adapter is not None:
                ask(tracker.log_artifact, str(adapter), "adapter")
            ask(tracker.log_artifact, str(self.folder.ledger), None)
            ask(tracker.finish, {"finished": "FINISHED", "stopped": "KILLED"}.get(status, "FAILED"))
        except Exception as error:  # tracking must never decide over a finished training
            logger.warning("MLflow could not be closed: %s", error)


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


def _export(recipe: Recipe, folder: Path, checkpoint: Checkpoint) -> None:
    """The final adapter, averaged if the recipe says so, as plain diffusers loads it."""
    from diffusion.adapters import checksum, save_adapter

    state = dict(checkpoint.exported)
    metadata = {
        "run": recipe.run.name,
        "step": str(checkpoint.step),
        "fingerprint": checkpoint.fingerprint,
        "checksum": checksum(state),
        "base_model": Path(recipe.model.path).name,
    }
    if checkpoint.ema is not None:
        metadata["ema_decay"] = str(recipe.optimizer.ema_decay)
    save_adapter(state, folder, metadata)


def _mlflow_run_id(folder: RunFolder) -> str | None:
    from cluster.tracking import RUN_ID_FILE

    file = folder.path / RUN_ID_FILE
    return file.read_text(encoding="utf-8").strip() if file.exists() else None
