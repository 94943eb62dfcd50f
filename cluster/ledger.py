"""The ledger: where every group of a run is. Pure state machine, no Ray, no clock of its own.

    returned ──lease──▶ sampling ──submitted──▶ scoring ──scored──▶ ready ──deliver──▶ delivered ──commit──▶ committed
        ▲                  │ expired, lost         │ lost, dropped     │ lost             │ rewind: ready again,
        └──────────────────┴───────────────────────┴───────────────────┘                  └─ returned if data is gone

Invariant, checked after every transition:

    issued - returned == leased == in_flight + ready + delivered + committed + dropped,   in_flight = sampling + scoring

and, once a batch of B groups per step is consumed, delivered + committed is version * B or (version + 1) * B.
Committed tickets shrink to a cursor and a sparse set above it, so the ledger stays small for a run of any length.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from cluster.admission import choose_batch, may_lease


class State(StrEnum):
    RETURNED = "returned"
    SAMPLING = "sampling"
    SCORING = "scoring"
    READY = "ready"
    DELIVERED = "delivered"


UNCONSUMED = (State.SAMPLING, State.SCORING, State.READY)
IN_FLIGHT = (State.SAMPLING, State.SCORING)


class LedgerError(AssertionError):
    """A transition that must not happen, or a broken invariant: a bug of ours."""


@dataclass
class Entry:
    """One open ticket. `lease_id` is unique per lease: whoever holds an older one is told that it is too late."""

    ticket_id: int
    state: State = State.RETURNED
    lease_id: int = -1
    sampler_id: str = ""
    version: int = -1
    checksum: str = ""
    leased_at: float = 0.0
    step: int = -1
    data_lost: bool = False


class Ledger:
    """States of all groups of a run under the rules of `cluster.admission`.

    Args: groups_per_step (B), max_staleness (S), lease_ttl_s (seconds a sampler may draw before its lease expires),
    total_groups (what the whole run consumes; no more is leased).
    Times are whatever monotonic seconds the caller passes as `now`.
    """

    def __init__(
        self, groups_per_step: int, max_staleness: int, lease_ttl_s: float, total_groups: int | None = None
    ) -> None:
        self.groups_per_step = groups_per_step
        self.max_staleness = max_staleness
        self.lease_ttl_s = lease_ttl_s
        self.total_groups = total_groups
        self.version = 0
        self.checksum = ""  # of the adapter of `version`; empty while it has not been published (again)
        self.entries: dict[int, Entry] = {}
        self.dropped: dict[int, str] = {}
        self.events: Counter[str] = Counter()
        self._checksums: dict[int, str] = {}
        self._cursor = 0  # every ticket below it is committed or dropped
        self._dropped_below = 0
        self._sparse: set[int] = set()  # committed tickets at or above the cursor
        self._next_ticket = 0
        self._next_lease = 0
        self._states: Counter[State] = Counter()

    # -- questions -----------------------------------------------------------------------------------------------------

    @property
    def committed(self) -> int:
        return self._cursor - self._dropped_below + len(self._sparse)

    @property
    def consumed(self) -> int:
        return self.committed + self._states[State.DELIVERED]

    def counts(self) -> dict[str, Any]:
        """The invariant's terms and the lifetime counters, for metrics and ledger.json."""
        states = self._states
        return {
            "issued": self._next_ticket,
            "returned": states[State.RETURNED],
            "leased": self._next_ticket - states[State.RETURNED],
            "in_flight": states[State.SAMPLING] + states[State.SCORING],
            "ready": states[State.READY],
            "delivered": states[State.DELIVERED],
            "committed": self.committed,
            "dropped": dict(Counter(self.dropped.values())),
            "events": {name: count for name, count in self.events.items() if count},
        }

    def holds(self, ticket_id: int, lease_id: int) -> bool:
        """Whether this lease is still the current one of its ticket."""
        entry = self.entries.get(ticket_id)
        return entry is not None and entry.lease_id == lease_id and entry.state in UNCONSUMED

    def pending(self, now: float) -> list[str]:
        """Who is being waited for, in words, by ticket."""
        return [
            f"ticket {e.ticket_id} is {e.state.value} at {e.sampler_id}, leased {now - e.leased_at:.0f} s ago"
            for e in sorted(self.entries.values(), key=lambda entry: entry.ticket_id)
            if e.state in IN_FLIGHT
        ]

    def oldest_lease_s(self, now: float) -> float:
        """How long ago the oldest group still being drawn was leased; 0 when none is."""
        leased = [entry.leased_at for entry in self.entries.values() if entry.state is State.SAMPLING]
        return now - min(leased, default=now)

    def may_lease(self) -> bool:
        if not self.checksum:
            return False
        held = [e.version for e in self.entries.values() if e.state in UNCONSUMED]
        if self.total_groups is not None and self.consumed + len(held) >= self.total_groups:
            return False
        return may_lease(self.consumed, held, self.version, self.groups_per_step, self.max_staleness)

    # -- the way of a group --------------------------------------------------------------------------------------------

    def lease(self, sampler_id: str, now: float) -> Entry | None:
        """Lease the lowest returned ticket, else a new one; None when admission says wait."""
        if not self.may_lease():
            return None
        back = [e.ticket_id for e in self.entries.values() if e.state is State.RETURNED]
        if back:
            entry = self.entries[min(back)]
            self.events["leased_again"] += 1
        else:
            entry = self.entries[self._next_ticket] = Entry(self._next_ticket)
            self._states[State.RETURNED] += 1
            self._next_ticket += 1
        entry.lease_id, self._next_lease = self._next_lease, self._next_lease + 1
        entry.sampler_id, entry.leased_at = sampler_id, now
        entry.version, entry.checksum, entry.data_lost = self.version, self.checksum, False
        self._move(entry, State.SAMPLING)
        self.check()
        return entry

    def submitted(self, ticket_id: int, lease_id: int) -> bool:
        """The group is drawn and its score is awaited. False: the lease is no longer held, the group is not wanted."""
        entry = self.entries.get(ticket_id)
        if entry is None or entry.lease_id != lease_id or entry.state is not State.SAMPLING:
            self.events["late_submission"] += 1
            return False
        self._move(entry, State.SCORING)
        self.check()
        return True

    def scored(self, ticket_id: int, lease_id: int) -> bool:
        """The group has its rewards. False: it was given back meanwhile."""
        entry = self.entries.get(ticket_id)
        if entry is None or entry.lease_id != lease_id or entry.state is not State.SCORING:
            self.events["late_score"] += 1
            return False
        self._move(entry, State.READY)
        self.check()
        return True

    def drop(self, ticket_id: int, lease_id: int, reason: str) -> bool:
        """Close the ticket for good under a named reason; another ticket takes its place in admission."""
        entry = self.entries.get(ticket_id)
        if entry is None or entry.lease_id != lease_id or entry.state not in UNCONSUMED:
            return False
        self._states[entry.state] -= 1
        del self.entries[ticket_id]
        self.dropped[ticket_id] = reason
        self.check()
        return True

    def deliver(self, step: int) -> list[Entry] | None:
        """The batch of `step` in ticket order, or None while admission's rule wants to wait."""
        if step != self.version or self.consumed != step * self.groups_per_step:
            raise LedgerError(f"step {step} asked for at version {self.version} with {self.consumed} groups consumed")
        ready = [(e.version, e.ticket_id) for e in self.entries.values() if e.state is State.READY]
        waiting = [e.version for e in self.entries.values() if e.state in IN_FLIGHT]
        chosen = choose_batch(ready, waiting, step, self.groups_per_step, self.max_staleness)
        if chosen is None:
            return None
        batch = [self.entries[ticket_id] for ticket_id in chosen]
        for entry in batch:
            if not 0 <= step - entry.version <= self.max_staleness:
                raise LedgerError(f"ticket {entry.ticket_id} has lag {step - entry.version} at step {step}")
            entry.step = step
            self._move(entry, State.DELIVERED)
        self.check()
        return batch

    def published(self, version: int, checksum: str) -> list[int]:
        """Adapter `version` exists now. After a rewind the same bytes keep the groups drawn with them; other bytes do
        not: those groups' tickets are returned (and listed)."""
        if version not in (self.version, self.version + 1):
            raise LedgerError(f"version {version} published after {self.version}")
        if version == self.version + 1 and self.consumed != version * self.groups_per_step:
            raise LedgerError(f"version {version} published with {self.consumed} groups consumed")
        superseded: list[int] = []
        if self._checksums.get(version, checksum) != checksum:
            superseded = [e.ticket_id for e in self.entries.values() if e.state in UNCONSUMED and e.version >= version]
            self.give_back(superseded, "superseded_adapter")
            self._checksums = {v: c for v, c in self._checksums.items() if v < version}
        self.version, self.checksum = version, checksum
        self._checksums[version] = checksum
        self.check()
        return superseded

    def commit(self, step: int) -> None:
        """A durable checkpoint covers every step before `step`."""
        done = [e for e in self.entries.values() if e.state is State.DELIVERED and e.step < step]
        for entry in done:
            self._states[State.DELIVERED] -= 1
            del self.entries[entry.ticket_id]
            self._sparse.add(entry.ticket_id)
        self._cursor, self._sparse = _fold(self._cursor, self._sparse, self.dropped)
        self._dropped_below = sum(1 for ticket_id in self.dropped if ticket_id < self._cursor)
        self._checksums = {v: c for v, c in self._checksums.items() if v >= step}
        self.check()

    # -- the ways back -------------------------------------------------------------------------------------------------

    def expire(self, now: float) -> list[Entry]:
        """Return the tickets whose sampler took longer than the lease allows; the entries as they were are listed."""
        late = [e for e in self.entries.values() if e.state is State.SAMPLING and now - e.leased_at > self.lease_ttl_s]
        self.give_back([e.ticket_id for e in late], "lease_expired")
        return late

    def give_back(self, ticket_ids: Iterable[int], reason: str) -> None:
        """Unconsumed groups become returned tickets, to be leased again before any new one."""
        self._give_back(ticket_ids, reason)
        self.check()

    def _give_back(self, ticket_ids: Iterable[int], reason: str) -> None:
        for ticket_id in ticket_ids:
            entry = self.entries[ticket_id]
            if entry.state not in UNCONSUMED:
                raise LedgerError(f"ticket {ticket_id} is {entry.state}, it cannot be given back")
            entry.lease_id = -1
            self._move(entry, State.RETURNED)
            self.events[reason] += 1

    def sampler_lost(self, sampler_id: str) -> list[int]:
        """What this sampler was drawing or had drawn is gone with its process. Delivered groups are only marked: the
        learner may hold them already; should they be wanted again, they are drawn again."""
        mine = [e for e in self.entries.values() if e.sampler_id == sampler_id and e.state is not State.RETURNED]
        for entry in mine:
            entry.data_lost = True
        gone = [e.ticket_id for e in mine if e.state in UNCONSUMED]
        self.give_back(gone, "sampler_lost")
        return gone

    def report_lost(self, step: int, ticket_ids: Iterable[int]) -> None:
        """The learner could not fetch these groups of the batch of `step`: undo that delivery and draw them again."""
        lost = set(ticket_ids)
        for entry in self.entries.values():
            if entry.ticket_id in lost and entry.state is State.DELIVERED and entry.step == step:
                entry.data_lost = True
        self._undeliver(step)
        # Another rank may have undone the delivery just before: then the lost groups are among the ready ones.
        self._give_back([t for t in lost if t in self.entries and self.entries[t].state is State.READY], "data_lost")
        self.check()

    def rewind(self, step: int) -> None:
        """The learner is back at the checkpoint of `step`: what was delivered since is to be delivered again."""
        if not step * self.groups_per_step >= self.committed or step > self.version + 1:
            raise LedgerError(f"rewind to {step} with {self.committed} groups committed at version {self.version}")
        self._undeliver(step)
        self.events["rewinds"] += bool(self.checksum)  # a learner that starts for the first time goes back to nothing
        self.version, self.checksum = step, ""
        self.check()

    def _undeliver(self, step: int) -> None:
        again = [e for e in self.entries.values() if e.state is State.DELIVERED and e.step >= step]
        for entry in again:
            entry.step = -1
            self._move(entry, State.READY)
        self.events["delivered_again"] += sum(1 for e in again if not e.data_lost)
        self._give_back([e.ticket_id for e in again if e.data_lost], "data_lost")

    # -- durable form --------------------------------------------------------------------------------------------------

    def state_at(self, step: int) -> dict[str, Any]:
        """What a checkpoint of `step` stores: as if commit(step) had just happened. JSON types only."""
        done = {e.ticket_id for e in self.entries.values() if e.state is State.DELIVERED and e.step < step}
        cursor, sparse = _fold(self._cursor, self._sparse | done, self.dropped)
        return {
            "step": step,
            "closed_below": cursor,
            "committed_sparse": sorted(sparse),
            "dropped": {str(ticket): reason for ticket, reason in sorted(self.dropped.items())},
        }

    @classmethod
    def from_state(
        cls,
        state: dict[str, Any],
        groups_per_step: int,
        max_staleness: int,
        lease_ttl_s: float,
        total_groups: int | None = None,
    ) -> Ledger:
        """A ledger in a new process: whatever is neither committed nor dropped will be leased again."""
        ledger = cls(groups_per_step, max_staleness, lease_ttl_s, total_groups)
        ledger.version = int(state["step"])
        ledger.dropped = {int(ticket): str(reason) for ticket, reason in state["dropped"].items()}
        ledger._cursor = int(state["closed_below"])
        ledger._dropped_below = sum(1 for ticket_id in ledger.dropped if ticket_id < ledger._cursor)
        ledger._sparse = {int(ticket) for ticket in state["committed_sparse"]}
        closed = ledger._sparse | set(ledger.dropped)
        ledger._next_ticket = max(max(closed, default=-1) + 1, ledger._cursor)
        for ticket_id in range(ledger._cursor, ledger._next_ticket):
            if ticket_id not in closed:
                ledger.entries[ticket_id] = Entry(ticket_id)
                ledger._states[State.RETURNED] += 1
        ledger.check()
        return ledger

    # -- the invariant -------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise LedgerError unless the books balance; the running counters are compared with a fresh count."""
        fresh = Counter(entry.state for entry in self.entries.values())
        if {s: n for s, n in self._states.items() if n} != dict(fresh):
            raise LedgerError(f"state counters {dict(self._states)} differ from {dict(fresh)}")
        closed = self.committed + len(self.dropped)
        if self._next_ticket != len(self.entries) + closed:
            raise LedgerError(f"{self._next_ticket} issued, but {len(self.entries)} open and {closed} closed")
        if self.consumed not in (self.version * self.groups_per_step, (self.version + 1) * self.groups_per_step):
            raise LedgerError(f"{self.consumed} groups consumed at version {self.version}")

    def _move(self, entry: Entry, state: State) -> None:
        self._states[entry.state] -= 1
        self._states[state] += 1
        entry.state = state


def _fold(cursor: int, sparse: set[int], dropped: dict[int, str]) -> tuple[int, set[int]]:
    """Advance the cursor over closed tickets; committed tickets below it need no entry of their own."""
    left = set(sparse)
    while cursor in left or cursor in dropped:
        left.discard(cursor)
        cursor += 1
    return cursor, left
