"""status.json: what a run is doing, kept fresh by its supervising loop, so that anybody who sees its storage can look.

format · run · state: starting, running, stopping, finished, stopped or failed · failure, reason: text or null
began, written, last_step: seconds since the epoch · host · pid · job: id of the Ray job or null
stage: null, or of a run in rounds {round, rounds, doing: generating or learning, groups: of the round's dataset that
are on disk, of: groups it is to have}; figures, ledger and members are those of what it is doing
step, steps, version · figures: of the last step · ledger: counts · learners: ranks · restarts: by role
samplers: {id: {groups, drawing_s: how long the present group has taken or null, group_s: mean of the last ones}}
reward_workers: ids · slow: who is, in words
"""

from __future__ import annotations

import json
import logging
import os
import socket
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from cluster.jobs import surrounding_job
from cluster.storage import RunFolder, write_json
from raysteer.errors import UserError

if TYPE_CHECKING:
    from cluster.config import Recipe

FORMAT = 1
WRITE_EVERY_S = 2.0
SLOW_FACTOR = 2.0  # times what the others take
NOTICEABLE_S = 2.0  # less than this over the others is not worth a word: times are seen about twice a second

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """What a run in rounds is doing in one of them.

    `round` of `rounds`, the first being 1; `steps` of the whole run; `of`: groups of the round's dataset; `began`: when
    the run did, seconds since the epoch.
    """

    round: int
    rounds: int
    doing: Literal["generating", "learning"]
    steps: int
    of: int
    began: float

    def __str__(self) -> str:
        return f"round {self.round} of {self.rounds}, {self.doing}"


class StatusWriter:
    """Observer of a run that writes its status.json, and its end when the context is left.

    Args:
        folder: of the run.
        recipe: of the run.
        step: steps done already.
        stage: what is observed, if that is a part of a run in rounds.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        folder: RunFolder,
        recipe: Recipe,
        step: int = 0,
        stage: Stage | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        job = surrounding_job()
        self.folder, self.stage, self.clock = folder, stage, clock
        self.draws = DrawTimes()
        self.status: dict[str, Any] = {
            "format": FORMAT,
            "run": recipe.run.name,
            "state": "starting",
            "failure": None,
            "reason": None,
            "began": clock() if stage is None else stage.began,
            "written": clock(),
            "last_step": None,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job": job["metadata"].get("job_submission_id") if job is not None else None,
            "step": step,
            "steps": recipe.run.steps if stage is None else stage.steps,
            "version": step,
            "stage": None if stage is None else _stage(stage, stage.of if stage.doing == "learning" else 0),
            "figures": {},
            "ledger": {},
            "learners": 0,
            "restarts": {},
            "samplers": {},
            "reward_workers": [],
            "slow": [],
        }

    def __enter__(self) -> StatusWriter:
        self._write()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, KeyboardInterrupt):
            self.ended("stopped", self.status["step"])
        elif error is not None:
            self.ended("failed", self.status["step"], f"{type(error).__name__}: {' '.join(str(error).split())}")

    def __call__(self, snapshot: Mapping[str, Any]) -> None:
        """Take in how things stand (see RolloutBuffer.snapshot); write it every few seconds and at every change of
        state.
        """
        now, status = self.clock(), self.status
        self.draws.see(snapshot, now)
        generating = self.stage is not None and self.stage.doing == "generating"
        for figures in snapshot["reports"]:
            status |= {"last_step": now, "figures": dict(figures)}
            if not generating:
                status["step"] = int(figures["step"])
        if self.stage is not None and generating:
            status["stage"] = _stage(self.stage, snapshot["ledger"]["committed"])
        before = status["state"]
        failure = snapshot["failure"]
        status |= {
            "state": _state(snapshot),
            "failure": None if failure is None else str(failure),
            "version": status["version"] if generating else snapshot["version"],
            "ledger": snapshot["ledger"],
            "learners": 0 if generating else len(snapshot["learners"]),
            "restarts": snapshot["restarts"],
            "samplers": self.draws.members(snapshot, now),
            "reward_workers": list(snapshot["reward_workers"]),
            "slow": self.draws.slow(now),
        }
        if status["state"] != before or now - status["written"] >= WRITE_EVERY_S:
            self._write()

    def ended(
        self,
        state: str,
        step: int,
        failure: str | None = None,
        ledger: Mapping[str, Any] | None = None,
        reason: str | None = None,
    ) -> None:
        """The run is over: "finished", "stopped" or "failed"; `ledger`: its last counts, `reason`: why it finished
        before its last step. A stage that is finished before that without a reason is not the end of the run.
        """
        if state == "finished" and step < self.status["steps"] and reason is None:
            state = "running"
        self.status |= {"state": state, "step": step, "failure": failure, "reason": reason}
        self.status["ledger"] = dict(ledger or self.status["ledger"])
        self._write()

    def _write(self) -> None:
        self.status["written"] = self.clock()
        try:
            write_json(self.folder.status, self.status)
        except OSError as error:  # a view of the run must never end it; a full disk is noticed at the checkpoint
            logger.warning("%s could not be written: %s", self.folder.status, error)


class DrawTimes:
    """How long each sampler takes for a group, as far as snapshots show it."""

    def __init__(self) -> None:
        self._begun: dict[tuple[str, int], float] = {}
        self._taken: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=8))

    def see(self, snapshot: Mapping[str, Any], now: float) -> None:
        """Compare with the snapshot before: what is not being drawn any more has been."""
        drawing = {(sampler, ticket) for ticket, (state, sampler) in snapshot["open"].items() if state == "sampling"}
        for key in self._begun.keys() - drawing:
            self._taken[key[0]].append(now - self._begun.pop(key))
        for key in drawing - self._begun.keys():
            self._begun[key] = now
        for gone in self._taken.keys() - snapshot["samplers"].keys():
            del self._taken[gone]

    def members(self, snapshot: Mapping[str, Any], now: float) -> dict[str, dict[str, Any]]:
        """What is known of each sampler that is there."""
        drawing = self._drawing(now)
        return {
            name: {
                "groups": known["groups"],
                "drawing_s": drawing.get(name),
                "group_s": statistics.fmean(self._taken[name]) if self._taken.get(name) else None,
            }
            for name, known in sorted(snapshot["samplers"].items())
        }

    def slow(self, now: float) -> list[str]:
        """Samplers that take much longer for a group than the median of the others, in words."""
        found = []
        means = {name: statistics.fmean(taken) for name, taken in self._taken.items()}
        drawing = self._drawing(now)
        for name in sorted(means.keys() | drawing.keys()):
            others = [mean for other, mean in means.items() if other != name]
            takes = max(means.get(name, 0.0), drawing.get(name, 0.0))
            if others and takes > max(
                SLOW_FACTOR * statistics.median(others), statistics.median(others) + NOTICEABLE_S
            ):
                found.append(f"{name} takes {takes:.0f} s for a group, the others {statistics.median(others):.0f} s")
        return found

    def _drawing(self, now: float) -> dict[str, float]:
        return {sampler: now - begun for (sampler, _), begun in self._begun.items()}


def _stage(stage: Stage, groups: int) -> dict[str, Any]:
    return {"round": stage.round, "rounds": stage.rounds, "doing": stage.doing, "groups": groups, "of": stage.of}


def _state(snapshot: Mapping[str, Any]) -> str:
    if snapshot["stop"] is not None or snapshot["failure"] is not None:
        return "stopping"
    return "running" if snapshot["learners"] else "starting"


def read_status(folder: RunFolder) -> dict[str, Any]:
    """The status a run has left.

    Raises:
        UserError: it has left none, or one of another version.
    """
    try:
        status = dict(json.loads(folder.status.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            str(folder.status), f"cannot be read ({type(error).__name__})", "a run writes it when raysteer train begins"
        ) from None
    if status.get("format") != FORMAT:
        raise UserError(
            str(folder.status),
            f"has format {status.get('format')}, this version reads {FORMAT}",
            "use the version of raysteer that trains the run",
        )
    return status
