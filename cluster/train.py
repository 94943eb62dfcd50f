"""train(recipe): one run from its first actor to its last file.

    check ─▶ join the cluster ─▶ services ─▶ members (samplers, reward workers) ┐
                                        └─▶ learner ranks (Ray Train, a thread) ├─▶ supervise ─▶ finish
                                                                                ┘
Who takes the batches, and what is left of them, is the run's `Purpose` (`cluster.purpose`).
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.jobs import surrounding_job
from cluster.metrics import RunMetrics
from cluster.preflight import cpus_needed, gpus_needed, preflight
from cluster.progress import Progress
from cluster.purpose import Purpose, Training
from cluster.runtime import init_ray
from cluster.services import Pulse, ask, end_services
from cluster.status import StatusWriter
from cluster.stopping import withdraw_stop
from cluster.storage import RunFolder, write_json
from cluster.supervisor import Supervisor
from raysteer.calls import AGAIN
from raysteer.errors import ClusterError, DeadlineExceeded, StorageError
from raysteer.logs import log_as, log_version

if TYPE_CHECKING:
    from cluster.config import Recipe
    from cluster.runlock import RunLock

POLL_S = 0.5
START_S = 600.0  # longest until the learner ranks run: on a growing cluster machines have to come up first
MEMBERS_STOP_S = 30.0
_RAYS_COPIES = "working_dir_files"  # folder of a Ray node that holds the unpacked working directories of jobs

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """What became of a run. `status`: "finished" (adapter_dir is set if it trained) or "stopped" (the same command
    continues it). `reason`: why it finished before its last step, in words.
    """

    status: str
    run_dir: Path
    adapter_dir: Path | None
    steps: int
    seconds: float
    ledger: dict[str, Any] = field(default_factory=dict)
    restarts: dict[str, int] = field(default_factory=dict)
    mlflow_run_id: str | None = None
    reason: str | None = None


Observer = Callable[[dict[str, Any]], None]


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
        early = purpose.ended_early()
        with StatusWriter(folder, recipe, done, purpose.stage) as status:
            if done >= recipe.run.steps or early is not None:
                how = f"{done} steps{'' if early is None else f'; {early}'}"
                logger.warning("run %s is finished already (%s)", recipe.run.name, how)
                adapter, run_id = purpose.complete(), _mlflow_run_id(folder)
                result = RunResult("finished", folder.path, adapter, done, 0.0, mlflow_run_id=run_id, reason=early)
            else:
                purpose.begin()
                with _cluster(recipe), _Signals() as signals:
                    others = [] if observe is None else [observe]
                    result = _Run(purpose, signals, [status, RunMetrics(recipe.run.name), *others]).run(started)
            status.ended(result.status, result.steps, ledger=result.ledger, reason=result.reason)
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
        self.beside = purpose.beside(self.services)
        growing, others = self.recipe.cluster.autoscaling, tuple if self.beside is None else self.beside.taken
        self.supervisor = Supervisor(purpose.roles(self.services), purpose.ranks(), growing, others)
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
        with Progress(self.recipe.run.steps, self.first_step, self.purpose.title) as progress:
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
                if snapshot["stop"] is None and (reason := self._reason_to_stop()):
                    early = self.beside is not None and self.beside.end is not None
                    comes = "the run ends" if early else "the same command continues the run"
                    progress.message(f"{reason}: a checkpoint is written, {comes}")
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
            self._finish_evaluations(progress)

    def _finish_evaluations(self, progress: Progress) -> None:
        """Wait for what is still to be evaluated, unless the run was stopped or has failed."""
        beside = self.beside
        if beside is None or self.learner.error is not None:
            return
        snapshot = self._look(progress)
        if snapshot["stop"] or snapshot["failure"]:
            return
        if beside.pending:
            progress.message("training is over; the last evaluations are awaited")
        while beside.pending and not self._reason_to_stop():
            beside.wait(POLL_S)
            self._look(progress)

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
        if self.beside is not None:
            self.beside(snapshot)
            while self.beside.news:
                progress.message(self.beside.news.pop(0))
        return snapshot

    def _reason_to_stop(self) -> str | None:
        if self.beside is not None and self.beside.end is not None:
            return f"stopped early: {self.beside.end}"
        return self.signals.received or ("raysteer stop" if self.folder.stop_request.exists() else None)

    def _finish(self, failure: BaseException | None, started: float, mlflow_run_id: str | None) -> RunResult:
        """End everybody, write what is left to write, and report or raise."""
        counts: dict[str, Any] = {}
        patience_s = 0.0 if isinstance(failure, KeyboardInterrupt) else MEMBERS_STOP_S
        if self.beside is not None:
            self.beside.close()
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
        early = self.purpose.ended_early() if failure is None else None
        finished = failure is None and (steps >= self.recipe.run.steps or early is not None)
        status = "finished" if finished else "stopped" if failure is None else "failed"
        record = {"status": status, "steps": steps, "ledger": counts, "restarts": self.supervisor.restarts}
        if early is not None:
            record["reason"] = early
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
            early,
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


def _mlflow_run_id(folder: RunFolder) -> str | None:
    from cluster.tracking import RUN_ID_FILE

    file = folder.path / RUN_ID_FILE
    return file.read_text(encoding="utf-8").strip() if file.exists() else None
