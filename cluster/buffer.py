"""RolloutBuffer: the asyncio actor between samplers, reward workers and learner. Holds references and the ledger, no
tensors.

A shell: what may happen is decided by `cluster.ledger` and `cluster.admission`; here are the waiting, the scoring of
groups and the measuring. Every wait has an end and says whom it waited for. Once the run has failed or is to stop,
every question is answered with that, so that all actors come to an end by themselves.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from actors.leases import Lease, Outcome, Preview, Stop, Wait
from cluster.activity import Meter
from cluster.buffer_settings import BufferSettings
from cluster.ledger import Ledger, LedgerError, State
from cluster.previews import PreviewSchedule
from cluster.roster import Roster
from cluster.scoring import DrawnGroup, DropWatch, Scorer, as_coroutine, journal_row
from learner.batches import Batch, StopTraining
from raysteer.calls import plain
from raysteer.errors import DeadlineExceeded, UserError
from raysteer.logs import log_version

TICK_S = 1.0
JOURNAL_TIMEOUT_S = 90.0  # less than the learner waits for a checkpoint's ledger, so that the journal is named

logger = logging.getLogger(__name__)


class RolloutBuffer:
    """See the module. Args: settings; ledger_state of the checkpoint a run goes on from; journal actor; clock for
    tests.
    """

    def __init__(
        self,
        settings: BufferSettings,
        ledger_state: Mapping[str, Any] | None = None,
        journal: Any = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        rules = (settings.groups_per_step, settings.max_staleness, settings.lease_ttl_s, settings.total_groups)
        self.settings = settings
        self.ledger = Ledger.from_state(dict(ledger_state), *rules) if ledger_state else Ledger(*rules)
        self.clock = clock
        self.meter = Meter(clock, settings.tickets.group_size)
        self.scorer = Scorer(self, settings.max_attempts, settings.score_timeout_s)
        self.samplers = Roster(clock, 2 * settings.lease_ttl_s)
        self.drops = DropWatch(settings.groups_per_step)
        self.previews = PreviewSchedule(
            settings.preview_every, settings.steps, settings.preview_prompts, settings.preview_seed
        )
        self._journal = journal
        self._drawn: dict[int, DrawnGroup] = {}
        self._adapter: list[Any] = []
        self._batch: Batch | None = None
        self._journaling: list[Any] = []
        self._reports: list[dict[str, float]] = []
        self._learners: dict[int, int] = {}
        self._learner_life = 0
        self._lost: Counter[str] = Counter({"sampler": 0, "reward_worker": 0})
        self._stop: str | None = None
        self._failure: Exception | None = None
        self._changed = asyncio.Event()

    # -- for samplers --------------------------------------------------------------------------------------------------

    async def lease(self, sampler_id: str, pid: int, wait_s: float) -> Lease | Preview | Wait | Stop:
        """A ticket to draw, as soon as admission allows one; `Wait` after `wait_s` seconds without."""
        sampler = self.samplers.hear(sampler_id, pid)
        deadline = self.clock() + wait_s
        while (ending := self._ending()) is None:
            # It may have died while it waited here: a lease would be lost until it expires.
            if sampler is None or self.samplers.is_given_up(sampler_id):
                return Stop(f"{sampler_id} was given up")
            self._expire()
            preview = self.previews.take(self.ledger.version, self.ledger.checksum, self._adapter)
            if preview is not None:
                return preview
            entry = self.ledger.lease(sampler_id, self.clock())
            if entry is not None:
                sampler.groups += 1
                self._notify()
                ticket, worker = self.settings.tickets.ticket(entry.ticket_id), self.scorer.assign(entry.lease_id)
                return Lease(ticket, entry.lease_id, entry.version, entry.checksum, self._adapter, worker)
            if self.clock() >= deadline:
                return Wait()
            with self.samplers.waits(sampler):
                self._account()
                await self.wait_for_change(deadline)
            self._account()
        return Stop(ending)

    async def submit(
        self,
        ticket_id: int,
        lease_id: int,
        sampler_id: str,
        checksum: str,
        refs: Mapping[str, Any],
        timings: Mapping[str, float],
    ) -> bool:
        """A drawn group: `refs` are "images", "trajectory" and, when a score was asked for, the future "outcome".

        Answers when the group is scored or dropped; False when nobody wants it any more.
        """
        self.samplers.hear(sampler_id)
        if self.samplers.is_given_up(sampler_id) or not self.ledger.submitted(ticket_id, lease_id):
            self._notify()
            return False
        entry = self.ledger.entries[ticket_id]
        if checksum != entry.checksum:
            await self.fail(RuntimeError(f"{sampler_id} drew ticket {ticket_id} with another adapter than it was lent"))
            return False
        ticket = self.settings.tickets.ticket(ticket_id)
        group = DrawnGroup(ticket, lease_id, sampler_id, entry.version, checksum, dict(refs), dict(timings))
        self._drawn[ticket_id] = group
        self.meter.drawn(sampler_id, checksum, timings)
        self._notify()
        try:
            await self.scorer.score(group)
        except LedgerError as error:  # our bug: end the run with the reason instead of letting it wait for ever
            await self.fail(error)
        finally:
            self._notify()
        return self.ledger.holds(ticket_id, lease_id)

    # -- what scoring leads to (called by the scorer) ------------------------------------------------------------------

    def wanted(self, group: DrawnGroup) -> bool:
        """Whether a score of this group still means anything."""
        return self._ending() is None and self.ledger.holds(group.ticket.id, group.lease_id)

    def accept(self, group: DrawnGroup, outcome: Outcome) -> None:
        if not self.ledger.scored(group.ticket.id, group.lease_id):
            return
        group.outcome = outcome
        group.refs.pop("images", None)
        self.drops.note("")
        self.meter.scored(group.timings, outcome)
        if self._journal is not None:
            self._journaling.append(self._journal.append.remote(journal_row(group), [group.refs["trajectory"]]))

    def lost(self, group: DrawnGroup) -> None:
        """The images went with their owner before they were scored."""
        if self.ledger.holds(group.ticket.id, group.lease_id):
            self.ledger.give_back([group.ticket.id], "data_lost")
            self._drawn.pop(group.ticket.id, None)

    async def drop(self, group: DrawnGroup, outcome: Outcome) -> None:
        if not self.ledger.drop(group.ticket.id, group.lease_id, outcome.reason):
            return
        self._drawn.pop(group.ticket.id, None)
        whose = f"ticket {group.ticket.id}, {group.ticket.prompt_class} prompt {group.ticket.prompt!r}"
        logger.warning("%s is dropped: %s (%s)", whose, outcome.reason, outcome.detail)
        problem = self.drops.note(outcome.reason)
        if problem:
            await self.fail(
                UserError("reward", f"{problem}; last: {whose}: {outcome.detail}", "correct the reward or its input")
            )

    # -- for the learner -----------------------------------------------------------------------------------------------

    async def next_batch(self, step: int, timeout_s: float) -> Batch | StopTraining:
        """The batch of `step`: every rank that asks gets the same one. Ends the run when it does not come in time."""
        started, life = self.clock(), self._learner_life
        while True:
            if life != self._learner_life:
                return StopTraining()  # whoever asked is dead: its successor has begun anew
            if self._batch is not None and self._batch.step == step:
                return self._batch
            if self._ending() is not None:
                return StopTraining(None if self._failure is None else str(self._failure))
            self._expire()
            try:
                # A rank may ask before rank 0 has published the version this step trains: it waits like everybody.
                entries = None if step == self.ledger.version + 1 else self.ledger.deliver(step)
            except LedgerError as error:
                await self.fail(error)
                continue
            if entries is not None:
                self.meter.learner("learning")
                self._account()
                groups = tuple(self._drawn[entry.ticket_id].as_group() for entry in entries)
                self._batch = Batch(step, groups, self.meter.take(len(entries)) | self._totals())
                self._notify()
            elif self.clock() - started >= timeout_s:
                await self.fail(self._overdue(step, self.clock() - started))
            else:
                self.meter.learner("waiting")
                await self.wait_for_change(started + timeout_s)

    async def report_lost(self, step: int, ticket_ids: Sequence[int]) -> None:
        """A rank could not fetch these groups of the batch of `step`: draw them again, then deliver anew."""
        if self.ledger.version != step:
            return
        self.ledger.report_lost(step, ticket_ids)
        self._batch = None
        self._forget_returned()
        self._notify()

    async def rewind(self, step: int, learners: Mapping[int, int] | None = None) -> None:
        """The learner (`learners`: pid by rank) starts at the checkpoint of `step`. Nothing is leased until it
        publishes.
        """
        self._learner_life += 1
        self._batch = None
        self._learners = dict(learners or {})
        try:
            self.ledger.rewind(step)
        except LedgerError as error:
            await self.fail(error)
            raise
        self._forget_returned()
        self.meter.learner("starting")
        self._notify()

    async def set_adapter(self, version: int, refs: list[Any], checksum: str) -> None:
        """Version `version` exists; `refs` holds one reference to its state, owned by the weight store."""
        try:
            self.ledger.published(version, checksum)
        except LedgerError as error:
            await self.fail(error)
            raise
        if not self._adapter:
            self.meter.take()  # what happened before anybody could draw was starting up
        self._adapter = refs
        log_version(version)
        self._forget_returned()
        self.meter.published(checksum)
        self._notify()

    async def ledger_state(self, step: int) -> dict[str, Any]:
        """What the checkpoint of `step` has to hold. Every group scored so far has reached the journal by then.

        Raises what the journal raises, ClusterError when it is dead, DeadlineExceeded when it does not answer.
        """
        from ray.exceptions import RayError

        self.meter.learner("saving")
        appended = list(self._journaling)
        try:
            await asyncio.wait_for(asyncio.gather(*map(as_coroutine, appended)), JOURNAL_TIMEOUT_S)
        except TimeoutError as error:
            waited_for = f"the journal to take {len(appended)} scored groups"
            raise DeadlineExceeded(waited_for, JOURNAL_TIMEOUT_S, "its process is stuck: see its log") from error
        except RayError as error:
            raise plain(error) from None
        self._journaling = self._journaling[len(appended) :]
        return self.ledger.state_at(step)

    async def commit(self, step: int) -> None:
        """The checkpoint of `step` is durable."""
        self.meter.learner("learning")
        before = set(self.ledger.entries)
        self.ledger.commit(step)
        for ticket_id in before - set(self.ledger.entries):
            self._drawn.pop(ticket_id, None)
        self._notify()

    async def report(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures of a finished step, for whoever watches the run."""
        self._reports.append({"step": step, **figures})
        self.meter.groups["trained"] += self.settings.groups_per_step

    # -- for the supervisor --------------------------------------------------------------------------------------------

    async def sampler_lost(self, sampler_id: str) -> list[int]:
        """This sampler is dead: what it drew and nobody consumed is drawn again (the tickets are listed)."""
        self.samplers.give_up(sampler_id)
        self._lost["sampler"] += 1
        gone = self.ledger.sampler_lost(sampler_id)
        self._forget_returned()
        self._notify()
        return gone

    async def add_reward_worker(self, worker_id: str, handle: Any) -> float:
        """A worker is ready. Answers how long one call of its reward may take, in seconds."""
        self.scorer.workers[worker_id] = handle
        self._notify()
        return self.settings.score_timeout_s

    async def reward_worker_lost(self, worker_id: str) -> None:
        self.scorer.forget(worker_id)
        self._lost["reward_worker"] += 1
        self._notify()

    async def request_stop(self, reason: str) -> None:
        """Let everybody come to an end: the learner writes a checkpoint, samplers and waiting calls return."""
        self._stop = self._stop or reason
        self._notify()

    async def fail(self, error: Exception) -> None:
        """End the run because of `error`; the first failure is the one that is reported."""
        self._failure = self._failure or error
        self._notify()

    async def snapshot(self) -> dict[str, Any]:
        """How things stand: ledger counts, version, who is there, who is silent and why, what failed.

        Seconds are ages. `groups` counts what was sampled, scored and trained since the buffer began, `lost` the
        members that died; `reports` are the figures of the steps finished since the last snapshot.
        """
        self._expire()
        reports, self._reports = self._reports, []
        return {
            "version": self.ledger.version,
            "steps": self.settings.steps,
            "group_size": self.settings.tickets.group_size,
            "ledger": self.ledger.counts(),
            "groups": dict(self.meter.groups),
            "open": {e.ticket_id: (e.state.value, e.sampler_id) for e in self.ledger.entries.values()},
            "oldest_lease_s": self.ledger.oldest_lease_s(self.clock()),
            "samplers": self.samplers.as_dict(),
            "silent": dict.fromkeys(self.samplers.mute(), "it neither draws nor asks") | self.scorer.stuck,
            "reward_workers": sorted(self.scorer.workers),
            "group_seconds": {
                role: {name: seconds for name, seconds in self.meter.group_seconds[role].items() if name in there}
                for role, there in (("sampler", self.samplers.there), ("reward_worker", self.scorer.workers))
            },
            "lost": dict(self._lost),
            "learners": dict(self._learners),
            "learner": self.meter.learner_state,
            "reports": reports,
            "stop": self._stop,
            "failure": self._failure,
        }

    # -- inside --------------------------------------------------------------------------------------------------------

    def _ending(self) -> str | None:
        return str(self._failure) if self._failure is not None else self._stop

    def _expire(self) -> None:
        for entry in self.ledger.expire(self.clock()):
            logger.warning("ticket %d: lease of %s expired", entry.ticket_id, entry.sampler_id)

    def _forget_returned(self) -> None:
        for ticket_id in [t for t in self._drawn if not self._is_held(t)]:
            del self._drawn[ticket_id]

    def _is_held(self, ticket_id: int) -> bool:
        entry = self.ledger.entries.get(ticket_id)
        return entry is not None and entry.state is not State.RETURNED

    def _totals(self) -> dict[str, float]:
        counts = self.ledger.counts()
        states = ("returned", "in_flight", "ready", "delivered", "committed")
        totals = {f"ledger/{name}": float(counts[name]) for name in states}
        totals["ledger/dropped"] = float(sum(counts["dropped"].values()))
        totals["ledger/oldest_lease_s"] = self.ledger.oldest_lease_s(self.clock())
        totals |= {f"dropped/{reason}": float(count) for reason, count in counts["dropped"].items()}
        totals |= {f"lost/{role}": float(count) for role, count in self._lost.items()}
        return totals | {f"ledger/{name}": float(count) for name, count in counts["events"].items()}

    def _overdue(self, step: int, waited_s: float) -> DeadlineExceeded:
        pending = self.ledger.pending(self.clock())
        who = "; ".join(pending[:4]) + (f"; and {len(pending) - 4} more" if len(pending) > 4 else "")
        if not pending:
            who = f"nothing is being drawn by the {len(self.samplers.there)} samplers that are there"
        if not self.scorer.workers:
            who += "; no reward worker is there"
        there = f"{self.ledger.counts()['ready']} of {self.settings.groups_per_step} groups ready"
        return DeadlineExceeded(f"the batch of step {step} ({there})", waited_s, who)

    def _account(self) -> None:
        states = Counter(entry.state for entry in self.ledger.entries.values())
        samplers, workers = self.samplers, len(self.scorer.workers)
        there = (samplers.waiting, len(samplers.there), workers)
        self.meter.now(states[State.SAMPLING], states[State.SCORING], *there)

    def _notify(self) -> None:
        self._account()
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def wait_for_change(self, deadline: float) -> None:
        """Until something changes, but no longer than the deadline or one tick (leases expire without an event)."""
        try:
            await asyncio.wait_for(self._changed.wait(), min(max(deadline - self.clock(), 0.0), TICK_S))
        except TimeoutError:
            pass
