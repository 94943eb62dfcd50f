"""The ledger's books balance through every sequence of leases, losses, drops, rewinds and restarts."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from cluster.ledger import IN_FLIGHT, UNCONSUMED, Entry, Ledger, LedgerError, State

TTL = 10.0


def fresh(batch: int = 2, staleness: int = 0) -> Ledger:
    ledger = Ledger(batch, staleness, TTL)
    ledger.published(0, "v0")
    return ledger


def draw(ledger: Ledger, sampler: str = "a") -> Entry:
    entry = ledger.lease(sampler, 0.0)
    assert entry is not None
    assert ledger.submitted(entry.ticket_id, entry.lease_id)
    assert ledger.scored(entry.ticket_id, entry.lease_id)
    return entry


def step(ledger: Ledger, number: int) -> list[int]:
    batch = ledger.deliver(number)
    assert batch is not None
    ledger.published(number + 1, f"v{number + 1}")
    return [entry.ticket_id for entry in batch]


def test_an_undisturbed_strict_run_consumes_tickets_in_order() -> None:
    ledger = fresh(batch=3)
    for number in range(4):
        for _ in range(3):
            draw(ledger)
        assert ledger.lease("a", 0.0) is None
        assert step(ledger, number) == [3 * number, 3 * number + 1, 3 * number + 2]
        ledger.commit(number + 1)
    assert ledger.counts()["committed"] == 12 and not ledger.entries


def test_an_expired_lease_is_leased_again_first_and_the_late_group_is_refused() -> None:
    ledger = fresh()
    slow = ledger.lease("a", 0.0)
    assert slow is not None
    old_lease = slow.lease_id
    assert [e.ticket_id for e in ledger.expire(TTL + 1)] == [0]
    again = ledger.lease("b", TTL + 1)
    assert again is not None and again.ticket_id == 0
    assert not ledger.submitted(0, old_lease)
    assert ledger.submitted(0, again.lease_id)
    assert ledger.events["lease_expired"] == ledger.events["late_submission"] == 1


def test_a_lease_does_not_expire_while_its_score_is_awaited() -> None:
    ledger = fresh()
    entry = ledger.lease("a", 0.0)
    assert entry is not None and ledger.submitted(0, entry.lease_id)
    assert ledger.expire(100 * TTL) == []


def test_everything_a_dead_sampler_drew_is_drawn_again_and_nothing_else() -> None:
    ledger = fresh(batch=4)
    draw(ledger, "a")
    draw(ledger, "b")
    ledger.lease("a", 0.0)
    assert ledger.sampler_lost("a") == [0, 2]
    assert [draw(ledger, "c").ticket_id for _ in range(3)] == [0, 2, 3]
    assert step(ledger, 0) == [0, 1, 2, 3]


def test_a_dropped_group_is_replaced_by_the_next_ticket_and_its_reason_is_kept() -> None:
    ledger = fresh()
    draw(ledger)
    entry = ledger.lease("a", 0.0)
    assert entry is not None and ledger.drop(1, entry.lease_id, "reward_not_finite")
    draw(ledger)
    assert step(ledger, 0) == [0, 2]
    assert ledger.counts()["dropped"] == {"reward_not_finite": 1}


def test_a_batch_whose_data_is_lost_is_delivered_whole_after_redrawing() -> None:
    ledger = fresh()
    draw(ledger, "a")
    draw(ledger, "b")
    assert ledger.deliver(0) is not None
    ledger.report_lost(0, [1])
    assert ledger.deliver(0) is None
    assert draw(ledger, "c").ticket_id == 1
    assert step(ledger, 0) == [0, 1]


def test_a_rewind_delivers_again_what_no_checkpoint_covers_without_drawing_it_again() -> None:
    ledger = fresh()
    for number in range(3):
        draw(ledger)
        draw(ledger)
        step(ledger, number)
        if number == 0:
            ledger.commit(1)
    ledger.rewind(1)
    assert ledger.lease("a", 0.0) is None, "no adapter is published yet"
    ledger.published(1, "v1")
    assert step(ledger, 1) == [2, 3]
    assert step(ledger, 2) == [4, 5]
    assert ledger.events["delivered_again"] == 4


def test_groups_of_an_adapter_that_came_out_differently_are_drawn_again() -> None:
    ledger = fresh(staleness=1)
    for _ in range(4):
        draw(ledger)
    assert step(ledger, 0) == [0, 1]
    assert draw(ledger).version == 1
    ledger.rewind(0)
    ledger.published(0, "v0")
    assert ledger.deliver(0) is not None
    assert ledger.published(1, "another v1") == [4]
    assert ledger.counts()["returned"] == 1


def test_a_sampler_that_died_after_delivery_costs_nothing_unless_the_learner_goes_back() -> None:
    ledger = fresh()
    draw(ledger, "a")
    draw(ledger, "a")
    step(ledger, 0)
    assert ledger.sampler_lost("a") == []
    ledger.rewind(0)
    assert ledger.counts()["returned"] == 2


def test_a_restarted_run_leases_every_uncommitted_ticket_again_and_no_dropped_one() -> None:
    ledger = fresh(batch=2, staleness=1)
    for _ in range(3):
        draw(ledger)
    entry = ledger.lease("a", 0.0)
    assert entry is not None and ledger.drop(3, entry.lease_id, "reward_failed")
    draw(ledger)
    assert ledger.deliver(0) is not None
    state = ledger.state_at(1)
    assert state == {"step": 1, "closed_below": 2, "committed_sparse": [], "dropped": {"3": "reward_failed"}}
    again = Ledger.from_state(state, 2, 1, TTL)
    again.published(1, "v1")
    assert [draw(again).ticket_id for _ in range(4)] == [2, 4, 5, 6]


def test_no_group_is_drawn_that_the_run_will_not_consume() -> None:
    ledger = Ledger(2, 1, TTL, total_groups=4)
    ledger.published(0, "v0")
    for _ in range(4):
        draw(ledger)
    step(ledger, 0)
    assert ledger.lease("a", 0.0) is None
    assert step(ledger, 1) == [2, 3]


def test_learner_steps_out_of_order_are_refused() -> None:
    ledger = fresh()
    with pytest.raises(LedgerError):
        ledger.deliver(1)
    with pytest.raises(LedgerError):
        ledger.published(1, "v1")


class Walk:
    """A random run: every actor does whatever it may do next, and everything that can fail does."""

    def __init__(self, seed: int, batch: int, staleness: int, same_adapters: bool) -> None:
        self.random = random.Random(seed)
        self.batch, self.staleness, self.same_adapters = batch, staleness, same_adapters
        self.ledger = Ledger(batch, staleness, TTL)
        self.now, self.timeline, self.checkpoint = 0.0, 0, self.ledger.state_at(0)
        self.trained: list[tuple[int, ...]] = []
        self.publish(0)

    def publish(self, version: int) -> None:
        self.ledger.published(version, f"v{version}" if self.same_adapters else f"v{version}.{self.timeline}")

    def pick(self, *states: State) -> Entry | None:
        entries = [e for e in self.ledger.entries.values() if e.state in states]
        return self.random.choice(entries) if entries else None

    def deliver(self) -> bool:
        number = self.ledger.version
        batch = self.ledger.deliver(number)
        if batch is None:
            return False
        assert all(0 <= number - e.version <= self.staleness for e in batch)
        assert len(batch) == self.batch
        if self.random.random() < 0.1:
            self.ledger.report_lost(number, [e.ticket_id for e in batch if self.random.random() < 0.5])
            return True
        self.trained = [*self.trained[:number], tuple(e.ticket_id for e in batch)]
        self.publish(number + 1)
        if self.random.random() < 0.4:
            self.checkpoint = self.ledger.state_at(number + 1)
            if self.random.random() < 0.8:
                self.ledger.commit(number + 1)
        return True

    def act(self) -> None:
        ledger, choice = self.ledger, self.random.random()
        self.now += self.random.random()
        if choice < 0.35:
            ledger.lease(f"s{self.random.randrange(3)}", self.now)
        elif choice < 0.55 and (e := self.pick(State.SAMPLING)):
            ledger.submitted(e.ticket_id, e.lease_id)
        elif choice < 0.75 and (e := self.pick(State.SCORING)):
            ledger.scored(e.ticket_id, e.lease_id)
        elif choice < 0.90:
            self.deliver()
        elif choice < 0.93 and (e := self.pick(*IN_FLIGHT)):
            ledger.drop(e.ticket_id, e.lease_id, "reward_failed")
        elif choice < 0.95:
            ledger.sampler_lost(f"s{self.random.randrange(3)}")
        elif choice < 0.97:
            ledger.expire(self.now)
        elif choice < 0.985:
            self.timeline += 1
            ledger.rewind(self.checkpoint["step"])
            self.publish(ledger.version)
        elif choice < 0.99:
            self.timeline += 1
            self.ledger = Ledger.from_state(self.checkpoint, self.batch, self.staleness, TTL)
            self.publish(self.ledger.version)

    def finish_step(self) -> None:
        """Nobody fails any more: the next batch must come, or the run would hang."""
        target = self.ledger.version + 1
        for _ in range(200):
            while e := self.ledger.lease("s", self.now):
                pass
            for state, move in ((State.SAMPLING, self.ledger.submitted), (State.SCORING, self.ledger.scored)):
                while e := self.pick(state):
                    move(e.ticket_id, e.lease_id)
            self.deliver()
            if self.ledger.version == target:
                return
        raise AssertionError(f"stuck: {self.ledger.counts()}")


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("staleness", [0, 1, 2, 4])
@pytest.mark.parametrize("same_adapters", [True, False])
def test_no_run_breaks_the_books_the_lag_bound_or_hangs(batch: int, staleness: int, same_adapters: bool) -> None:
    for seed in range(4):
        walk = Walk(seed, batch, staleness, same_adapters)
        for number in range(900):
            walk.act()
            walk.ledger.check()
            if number % 90 == 89:
                walk.finish_step()
        counts = walk.ledger.counts()
        assert counts["leased"] == sum(counts[k] for k in ("in_flight", "ready", "delivered", "committed")) + sum(
            counts["dropped"].values()
        )
        consumed = Counter(ticket for batch_ids in walk.trained[: walk.ledger.version] for ticket in batch_ids)
        assert max(consumed.values()) == 1, "no group is trained on twice within one history"
        assert not set(consumed) & set(walk.ledger.dropped)


def test_a_strict_random_run_without_drops_trains_on_the_tickets_in_order() -> None:
    walk = Walk(7, 3, 0, True)
    walk.ledger.drop = lambda *_: False  # type: ignore[method-assign]
    for _ in range(4000):
        walk.act()
        walk.ledger.drop = lambda *_: False  # type: ignore[method-assign]
    assert walk.ledger.version > 20
    assert [t for ids in walk.trained[: walk.ledger.version] for t in ids] == list(range(3 * walk.ledger.version))


def test_open_states_are_what_they_say() -> None:
    assert set(IN_FLIGHT) < set(UNCONSUMED)
