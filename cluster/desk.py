"""Desk: the asyncio actor that a learner on a dataset reports to, in the place of the buffer of a live run.

There are no tickets to lease and no scores to wait for, but whoever watches a run (supervising loop, `raysteer status`
and `stop`, metrics) asks the same questions and gets the same answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from raysteer.logs import log_version


class Desk:
    """See the module.

    Args:
        steps: learner steps of the run; group_size: images of a group; groups_per_step.
        skipped: groups of the dataset that cannot be learned from, by reason.
    """

    def __init__(self, steps: int, groups_per_step: int, group_size: int, skipped: Mapping[str, int]) -> None:
        self.steps, self.groups_per_step, self.group_size = steps, groups_per_step, group_size
        self.skipped = dict(skipped)
        self.version = 0
        self._committed = 0
        self._trained: Counter[str] = Counter()
        self._events: Counter[str] = Counter()
        self._learners: dict[int, int] = {}
        self._learner = "starting"
        self._reports: list[dict[str, float]] = []
        self._stop: str | None = None
        self._failure: Exception | None = None

    # -- for the learner -----------------------------------------------------------------------------------------------

    async def rewind(self, step: int, learners: Mapping[int, int] | None = None) -> None:
        """The learner (`learners`: pid by rank) starts at the checkpoint of `step`."""
        if self._learners:
            self._events["rewinds"] += 1
        self.version, self._committed = step, step
        self._learners, self._learner = dict(learners or {}), "starting"

    async def may_go_on(self, step: int) -> bool:
        """Whether the batch of `step` is to be learned; False when the run is to end."""
        self._learner = "learning"
        return self._failure is None and self._stop is None

    async def set_adapter(self, version: int, refs: list[Any], checksum: str) -> None:
        """Version `version` exists."""
        self.version = version
        log_version(version)

    async def ledger_state(self, step: int) -> dict[str, Any]:
        """What the checkpoint of `step` holds of the dataset: nothing, its place there is the step itself."""
        self._learner = "saving"
        return {}

    async def commit(self, step: int) -> None:
        """The checkpoint of `step` is durable."""
        self._committed, self._learner = step, "learning"

    async def report(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures of a finished step, for whoever watches the run."""
        self._reports.append({"step": step, **figures})
        self._trained["trained"] += self.groups_per_step

    # -- for the supervisor --------------------------------------------------------------------------------------------

    async def request_stop(self, reason: str) -> None:
        """Let the learner come to an end, with a checkpoint."""
        self._stop = self._stop or reason

    async def fail(self, error: Exception) -> None:
        """End the run because of `error`; the first failure is the one that is reported."""
        self._failure = self._failure or error

    async def snapshot(self) -> dict[str, Any]:
        """How things stand, as RolloutBuffer.snapshot says it; whatever concerns samplers is empty, and `dataset` says
        that it is meant to be.
        """
        reports, self._reports = self._reports, []
        committed = self._committed * self.groups_per_step
        counts = dict.fromkeys(("returned", "in_flight", "ready"), 0)
        counts |= {"delivered": self.version * self.groups_per_step - committed, "committed": committed}
        return {
            "dataset": True,
            "version": self.version,
            "steps": self.steps,
            "group_size": self.group_size,
            "ledger": counts | {"dropped": self.skipped, "events": dict(self._events)},
            "groups": {"sampled": 0, "scored": 0, "trained": self._trained["trained"]},
            "open": {},
            "oldest_lease_s": 0.0,
            "samplers": {},
            "silent": {},
            "reward_workers": [],
            "group_seconds": {"sampler": {}, "reward_worker": {}},
            "lost": {"sampler": 0, "reward_worker": 0},
            "learners": self._learners,
            "learner": self._learner,
            "reports": reports,
            "stop": self._stop,
            "failure": self._failure,
        }
