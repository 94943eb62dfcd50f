"""Getting a group scored: the first future comes from its sampler, further attempts are asked for here.

Used by the buffer and only there; kept apart because "who scores it now, and what does a failure mean" is a matter of
its own.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actors.leases import Outcome
from cluster.tickets import Ticket
from learner.batches import Group

if TYPE_CHECKING:
    from cluster.buffer import RolloutBuffer


DROP_WINDOW = 16  # groups; a run in which more than half of the last so many were dropped is stopped


@dataclass
class DrawnGroup:
    """A group on its way from a sampler to the learner."""

    ticket: Ticket
    lease_id: int
    sampler_id: str
    version: int
    checksum: str
    refs: dict[str, Any]
    timings: dict[str, float]
    outcome: Outcome | None = None

    def as_group(self) -> Group:
        """As the learner receives it."""
        assert self.outcome is not None and self.outcome.reward is not None, "only scored groups are delivered"
        return Group(
            self.ticket.id,
            self.ticket.prompt,
            self.ticket.prompt_class,
            self.version,
            self.checksum,
            self.sampler_id,
            self.outcome.reward,
            self.outcome.parts,
            [self.refs["trajectory"]],
            self.timings,
        )


def journal_row(group: DrawnGroup) -> dict[str, Any]:
    """What the journal keeps of a scored group, apart from its final latents."""
    outcome = group.outcome
    assert outcome is not None
    return {
        "ticket": group.ticket.id,
        "prompt": group.ticket.prompt,
        "prompt_class": group.ticket.prompt_class,
        "category": group.ticket.category,
        "seeds": list(group.ticket.seeds),
        "step_seed": group.ticket.step_seed,
        "version": group.version,
        "checksum": group.checksum,
        "sampler": group.sampler_id,
        "reward_worker": outcome.worker_id,
        "reward": outcome.reward,
        "parts": dict(outcome.parts),
        "truncated": bool(group.timings.get("truncated")),
        "sample_s": group.timings["sampled"] - group.timings["started"],
        "score_s": outcome.ended - outcome.started,
        "scored_at": outcome.ended,
    }


class DropWatch:
    """Whether most of what was drawn lately is dropped: then the reward is at fault, not an image."""

    def __init__(self, groups_per_step: int) -> None:
        self._recent: deque[str] = deque(maxlen=max(DROP_WINDOW, 2 * groups_per_step))

    def note(self, reason: str) -> str | None:
        """A group was scored (`reason` empty) or dropped. Returns the problem, when it has become one."""
        self._recent.append(reason)
        dropped = Counter(reason for reason in self._recent if reason)
        if len(self._recent) < DROP_WINDOW or dropped.total() <= len(self._recent) / 2:
            return None
        reasons = ", ".join(f"{reason} x{count}" for reason, count in dropped.most_common(3))
        return f"{dropped.total()} of the last {len(self._recent)} groups were dropped ({reasons})"


class Scorer:
    """The reward workers that are alive, and the patience one has with them.

    A worker notices itself when its reward hangs for `timeout_s`. One that answers nobody for twice as long although it
    owes scores is stuck as a process: it is asked no more, and listed in `stuck` for the supervisor.
    """

    def __init__(self, buffer: RolloutBuffer, max_attempts: int, timeout_s: float) -> None:
        self.buffer = buffer
        self.max_attempts = max_attempts
        self.timeout_s = timeout_s
        self.workers: dict[str, Any] = {}
        self.stuck: dict[str, str] = {}  # workers that do not even answer, and what they owe: to be ended
        self._heard: dict[str, float] = {}
        self._assigned: dict[int, str] = {}
        self._turn = 0

    def assign(self, lease_id: int) -> Any:
        """The worker that is to score the group of this lease first: in turn; None when there is none."""
        if not self.workers:
            return None
        names = sorted(self.workers)
        self._turn += 1
        self._assigned[lease_id] = names[self._turn % len(names)]
        return self.workers[self._assigned[lease_id]]

    def forget(self, worker_id: str) -> None:
        """This worker is gone."""
        for known in (self.workers, self.stuck, self._heard):
            known.pop(worker_id, None)

    async def score(self, group: DrawnGroup) -> None:
        """Until the group is scored, given up, or wanted no more.

        A dead worker, an exception and a hanging reward are attempts. That its worker ended before this group's turn is
        none: whoever is scored when a reward hangs must not decide over its neighbours.
        """
        name, future = self._assigned.pop(group.lease_id, ""), group.refs.pop("outcome", None)
        attempts = 0
        while self.buffer.wanted(group):
            if future is None:
                name = await self._alive(group)
                if not name:
                    return
                future = self.workers[name].score.remote(group.refs["images"], group.ticket.prompt)
            outcome, future = await self._outcome(future, name), None
            attempts += outcome.kind != "untried"
            if outcome.kind == "scored":
                return self.buffer.accept(group, outcome)
            if outcome.reason == "images_lost":
                return self.buffer.lost(group)
            if outcome.reason in ("reward_timeout", "reward_worker_ended", "reward_worker_died"):
                self.workers.pop(name, None)  # do not ask it again before the supervisor has noticed
            if outcome.kind == "poisoned" or attempts >= self.max_attempts:
                return await self.buffer.drop(group, outcome)
            self.buffer.ledger.events["score_retried"] += 1

    async def _alive(self, group: DrawnGroup) -> str:
        """A worker to ask next; empty when the group is wanted no more.

        While there is none (they load, or the supervisor replaces dead ones) this waits; the learner's deadline for its
        batch ends the run, and with it the wait, if none ever comes.
        """
        while self.buffer.wanted(group):
            if self.workers:
                self._turn += 1
                return sorted(self.workers)[self._turn % len(self.workers)]
            await self.buffer.wait_for_change(self.buffer.clock() + self.timeout_s)
        return ""

    async def _outcome(self, future: Any, name: str) -> Outcome:
        from ray.exceptions import ActorDiedError, ObjectLostError, RayActorError, RayError

        asked, patience_s = self.buffer.clock(), 2 * self.timeout_s
        answer = asyncio.ensure_future(as_coroutine(future))
        while not answer.done():
            silent_s = self.buffer.clock() - max(asked, self._heard.get(name, asked))
            if silent_s >= patience_s:
                answer.cancel()
                self.stuck[name] = f"it owes scores and has given none for {silent_s:.0f} s"
                return _failed("reward_timeout", f"{name} gave no sign of life for {silent_s:.0f} s")
            await asyncio.wait({answer}, timeout=patience_s - silent_s)
        self._heard[name] = self.buffer.clock()
        try:
            return answer.result()
        except ActorDiedError:
            return _failed("reward_worker_died", f"{name} died while it scored")
        except RayActorError as error:
            return _failed("reward_worker_unreachable", str(error)[:300])
        except ObjectLostError as error:
            return _failed("images_lost", str(error))
        except RayError as error:
            if isinstance(getattr(error, "cause", None), ObjectLostError):
                return _failed("images_lost", str(error))
            return _failed(f"reward_call_failed:{type(error).__name__}", str(error)[:300])


def _failed(reason: str, detail: str) -> Outcome:
    return Outcome("retryable", reason=reason, detail=detail)


async def as_coroutine(future: Any) -> Any:
    """asyncio wants coroutines where Ray gives awaitable references."""
    return await future
