"""The buffer alone, on an event loop, without a cluster: waiting, scoring, dropping, failing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np

from actors.leases import Lease, Outcome, Preview, Stop, Wait
from cluster.buffer import RolloutBuffer
from cluster.buffer_settings import BufferSettings
from cluster.prompts import PromptSet
from cluster.scoring import DROP_WINDOW
from cluster.tickets import TicketSource
from learner.batches import Batch, StopTraining
from raysteer.errors import DeadlineExceeded, UserError

SCORED = Outcome("scored", np.zeros(2, np.float32))
Story = Callable[[RolloutBuffer], Coroutine[Any, Any, None]]


def tell(story: Story, **changes: Any) -> None:
    """Run a story against a fresh buffer (2 groups a step, strict) whose version 0 is published."""
    tickets = TicketSource(0, PromptSet.of(safe=["a"], unsafe=["b"]), 0.5, 2, 2)
    defaults: dict[str, Any] = {
        "tickets": tickets,
        "groups_per_step": 2,
        "max_staleness": 0,
        "lease_ttl_s": 60.0,
        "total_groups": 1000,
        "max_attempts": 2,
        "score_timeout_s": 5.0,
    }

    async def run() -> None:
        buffer = RolloutBuffer(BufferSettings(**defaults | changes))
        await buffer.rewind(0, {0: 1})
        await buffer.set_adapter(0, ["ref"], "v0")
        await asyncio.wait_for(story(buffer), 20)

    asyncio.run(run())


class Worker:
    """A reward worker's handle, as far as the buffer uses it: gives the outcomes it was told to, then scores."""

    def __init__(self, *outcomes: Any) -> None:
        self.outcomes = list(outcomes)
        self.asked = 0
        self.score = self

    def remote(self, *_: Any) -> asyncio.Future[Outcome]:
        self.asked += 1
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        outcome = self.outcomes.pop(0) if self.outcomes else SCORED
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
        return future


async def draw(buffer: RolloutBuffer, sampler: str = "s") -> Lease:
    lease = await buffer.lease(sampler, 1, 0.0)
    assert isinstance(lease, Lease)
    timings = {"started": 0.0, "sampled": 1.0, "submitted": 1.0, "adapter_applied": 0.0}
    refs = {"images": "i", "trajectory": f"t{lease.ticket.id}"}
    if lease.reward_worker is not None:
        refs["outcome"] = lease.reward_worker.score.remote()
    await buffer.submit(lease.ticket.id, lease.lease_id, sampler, lease.checksum, refs, timings)
    return lease


def test_all_ranks_that_ask_get_the_same_batch() -> None:
    async def story(buffer: RolloutBuffer) -> None:
        await buffer.add_reward_worker("w", Worker())
        waiting = [asyncio.create_task(buffer.next_batch(0, 10.0)) for _ in range(3)]
        await draw(buffer)
        await draw(buffer)
        batches = [await task for task in waiting]
        assert isinstance(batches[0], Batch)
        assert batches[0] is batches[1] is batches[2]
        assert [group.ticket_id for group in batches[0].groups] == [0, 1]
        assert isinstance(await buffer.lease("s", 1, 0.0), Wait), "version 1 is not published yet"

    tell(story)


def test_a_rank_that_asks_before_rank_0_has_published_waits_for_it() -> None:
    async def story(buffer: RolloutBuffer) -> None:
        await buffer.add_reward_worker("w", Worker())
        await draw(buffer)
        await draw(buffer)
        await buffer.next_batch(0, 1.0)
        early = asyncio.create_task(buffer.next_batch(1, 10.0))
        await asyncio.sleep(0)
        await buffer.set_adapter(1, ["ref"], "v1")
        await draw(buffer)
        await draw(buffer)
        batch = await early
        assert isinstance(batch, Batch) and batch.step == 1

    tell(story)


def test_a_failed_score_is_tried_again_with_another_worker_and_counts() -> None:
    async def story(buffer: RolloutBuffer) -> None:
        worker = Worker(Outcome("retryable", reason="reward_failed:ValueError"))
        await buffer.add_reward_worker("w", worker)
        await draw(buffer)
        assert worker.asked == 2
        assert buffer.ledger.counts()["ready"] == 1
        assert buffer.ledger.events["score_retried"] == 1

    tell(story)


def test_a_group_whose_score_keeps_failing_is_dropped_by_name_and_replaced() -> None:
    async def story(buffer: RolloutBuffer) -> None:
        failed = Outcome("retryable", reason="reward_failed:ValueError", detail="ValueError: no")
        await buffer.add_reward_worker("w", Worker(failed, failed))
        for _ in range(3):
            await draw(buffer)
        batch = await buffer.next_batch(0, 1.0)
        assert isinstance(batch, Batch)
        assert [group.ticket_id for group in batch.groups] == [1, 2]
        assert buffer.ledger.counts()["dropped"] == {"reward_failed:ValueError": 1}

    tell(story)


def test_a_reward_that_is_not_a_number_is_dropped_without_another_attempt() -> None:
    async def story(buffer: RolloutBuffer) -> None:
        worker = Worker(Outcome("poisoned", reason="reward_not_finite:total"))
        await buffer.add_reward_worker("w", worker)
        await draw(buffer)
        assert worker.asked == 1
        assert buffer.ledger.counts()["dropped"] == {"reward_not_finite:total": 1}

    tell(story)


def test_a_dead_worker_is_not_asked_again_and_the_next_one_is_waited_for() -> None:
    from ray.exceptions import ActorDiedError

    async def story(buffer: RolloutBuffer) -> None:
        dead, alive = Worker(ActorDiedError()), Worker()
        await buffer.add_reward_worker("dead", dead)
        drawing = asyncio.create_task(draw(buffer))
        while not buffer.ledger.events["score_retried"]:
            await asyncio.sleep(0)
        assert not buffer.scorer.workers
        await buffer.add_reward_worker("alive", alive)
        await drawing
        assert (dead.asked, alive.asked) == (1, 1)

    tell(story)


def test_a_group_whose_turn_never_came_is_not_charged_for_the_hang_of_its_worker() -> None:
    untried = Outcome("untried", reason="reward_worker_ended")

    async def story(buffer: RolloutBuffer) -> None:
        failed = Outcome("retryable", reason="reward_failed:ValueError")
        await buffer.add_reward_worker("hung", Worker(untried))
        drawing = asyncio.create_task(draw(buffer))
        while buffer.scorer.workers:
            await asyncio.sleep(0)
        await buffer.add_reward_worker("next", Worker(failed))
        await drawing
        assert buffer.ledger.counts()["ready"] == 1, "one of two attempts was left"

    tell(story)


def test_a_worker_that_owes_scores_and_says_nothing_is_asked_no_more_and_listed_as_silent() -> None:
    class Mute(Worker):
        def remote(self, *_: Any) -> asyncio.Future[Outcome]:
            self.asked += 1
            return asyncio.get_running_loop().create_future()

    async def story(buffer: RolloutBuffer) -> None:
        mute, alive = Mute(), Worker()
        await buffer.add_reward_worker("mute", mute)
        drawing = asyncio.create_task(draw(buffer))
        while not buffer.ledger.events["score_retried"]:
            await asyncio.sleep(0.01)
        assert "mute" in (await buffer.snapshot())["silent"]
        await buffer.add_reward_worker("alive", alive)
        await drawing
        assert (mute.asked, alive.asked) == (1, 1)
        await buffer.reward_worker_lost("mute")
        assert not (await buffer.snapshot())["silent"]

    tell(story, score_timeout_s=0.05)


def test_a_slow_queue_is_no_silence() -> None:
    class Slow(Worker):
        """Answers one request at a time, each within the time allowed, the last one long after it was asked."""

        def __init__(self) -> None:
            super().__init__()
            self.owed: list[asyncio.Future[Outcome]] = []

        def remote(self, *_: Any) -> asyncio.Future[Outcome]:
            self.owed.append(asyncio.get_running_loop().create_future())
            return self.owed[-1]

    async def story(buffer: RolloutBuffer) -> None:
        slow = Slow()
        await buffer.add_reward_worker("slow", slow)
        drawing = [asyncio.create_task(draw(buffer)) for _ in range(6)]
        while len(slow.owed) < 6:
            await asyncio.sleep(0)
        for owed in slow.owed:
            await asyncio.sleep(0.25)  # the allowance is 0.4 s of silence
            owed.set_result(SCORED)
        await asyncio.gather(*drawing)
        assert not buffer.ledger.events["score_retried"] and not buffer.scorer.stuck

    tell(story, groups_per_step=6, score_timeout_s=0.2)


def test_images_lost_before_scoring_are_drawn_again_not_dropped() -> None:
    from ray.exceptions import OwnerDiedError

    async def story(buffer: RolloutBuffer) -> None:
        await buffer.add_reward_worker("w", Worker(OwnerDiedError("00", None, "")))
        lease = await draw(buffer)
        again = await draw(buffer)
        assert again.ticket.id == lease.ticket.id
        assert buffer.ledger.counts()["dropped"] == {}

    tell(story)


def test_a_run_whose_groups_are_mostly_dropped_stops_and_says_why() -> None:
    async def story(buffer: RolloutBuffer) -> None:
        poison = Outcome("poisoned", reason="reward_not_finite:total", detail="total holds a value that is not finite")
        await buffer.add_reward_worker("w", Worker(*[poison] * DROP_WINDOW))
        for _ in range(DROP_WINDOW):
            await draw(buffer)
        answer = await buffer.next_batch(0, 1.0)
        assert isinstance(answer, StopTraining)
        failure = (await buffer.snapshot())["failure"]
        assert isinstance(failure, UserError)
        assert f"{DROP_WINDOW} of the last {DROP_WINDOW} groups were dropped (reward_not_finite:total" in str(failure)
        assert isinstance(await buffer.lease("s", 1, 0.0), Stop)

    tell(story)


def test_an_overdue_batch_names_the_ticket_and_the_sampler_it_waits_for() -> None:
    async def story(buffer: RolloutBuffer) -> None:
        await buffer.add_reward_worker("w", Worker())
        await draw(buffer, "quick")
        await buffer.lease("stuck", 2, 0.0)
        assert isinstance(await buffer.next_batch(0, 0.05), StopTraining)
        failure = (await buffer.snapshot())["failure"]
        assert isinstance(failure, DeadlineExceeded)
        assert "ticket 1 is sampling at stuck" in str(failure) and "1 of 2 groups ready" in str(failure)

    tell(story)


def test_a_stop_ends_every_wait_but_not_a_batch_that_other_ranks_already_have() -> None:
    async def story(buffer: RolloutBuffer) -> None:
        await buffer.add_reward_worker("w", Worker())
        await draw(buffer)
        await draw(buffer)
        assert isinstance(await buffer.next_batch(0, 1.0), Batch)
        lease = asyncio.create_task(buffer.lease("s", 1, 10.0))
        await buffer.request_stop("SIGTERM")
        assert isinstance(await buffer.next_batch(0, 1.0), Batch), "rank 1 must not stop where rank 0 learns"
        await buffer.set_adapter(1, ["ref"], "v1")
        assert isinstance(await buffer.next_batch(1, 1.0), StopTraining)
        assert isinstance(await lease, Stop)

    tell(story)


def test_a_dead_learners_question_does_not_disturb_its_successor() -> None:
    async def story(buffer: RolloutBuffer) -> None:
        await buffer.add_reward_worker("w", Worker())
        await draw(buffer)
        await draw(buffer)
        await buffer.next_batch(0, 1.0)
        await buffer.set_adapter(1, ["ref"], "v1")
        asked_by_the_dead = asyncio.create_task(buffer.next_batch(1, 10.0))
        await asyncio.sleep(0)
        await buffer.rewind(0, {0: 2})
        assert isinstance(await asked_by_the_dead, StopTraining)
        await buffer.set_adapter(0, ["ref"], "v0")
        assert isinstance(await buffer.next_batch(0, 1.0), Batch)
        assert (await buffer.snapshot())["failure"] is None

    tell(story)


def test_groups_the_learner_could_not_fetch_are_drawn_again_and_the_batch_is_whole() -> None:
    async def story(buffer: RolloutBuffer) -> None:
        await buffer.add_reward_worker("w", Worker())
        await draw(buffer, "a")
        await draw(buffer, "b")
        await buffer.next_batch(0, 1.0)
        await buffer.report_lost(0, [1])
        waiting = asyncio.create_task(buffer.next_batch(0, 10.0))
        assert (await draw(buffer, "c")).ticket.id == 1
        batch = await waiting
        assert isinstance(batch, Batch)
        assert [group.sampler_id for group in batch.groups] == ["a", "c"]

    tell(story)


def test_a_given_up_sampler_gets_no_lease_and_its_late_group_is_refused() -> None:
    async def story(buffer: RolloutBuffer) -> None:
        lease = await buffer.lease("s", 1, 0.0)
        assert isinstance(lease, Lease)
        assert await buffer.sampler_lost("s") == [0]
        assert not await buffer.submit(0, lease.lease_id, "s", lease.checksum, {}, {})
        assert isinstance(await buffer.lease("s", 1, 0.0), Stop)

    tell(story)


def test_a_sampler_that_dies_while_it_waits_for_a_lease_takes_none_with_it() -> None:
    async def story(buffer: RolloutBuffer) -> None:
        first = await buffer.lease("dead", 1, 0.0)
        assert isinstance(first, Lease)
        while isinstance(await buffer.lease("alive", 2, 0.0), Lease):
            pass
        waiting = asyncio.create_task(buffer.lease("dead", 1, 10.0))
        await asyncio.sleep(0)  # it waits: admission allows no more
        assert await buffer.sampler_lost("dead") == [first.ticket.id]
        assert isinstance(await waiting, Stop)
        again = await buffer.lease("alive", 2, 0.0)
        assert isinstance(again, Lease) and again.ticket.id == first.ticket.id

    tell(story)


def test_a_group_drawn_with_another_adapter_than_lent_ends_the_run() -> None:
    async def story(buffer: RolloutBuffer) -> None:
        lease = await buffer.lease("s", 1, 0.0)
        assert isinstance(lease, Lease)
        await buffer.submit(0, lease.lease_id, "s", "other", {"images": "i", "trajectory": "t"}, {})
        assert "another adapter" in str((await buffer.snapshot())["failure"])

    tell(story)


def test_each_preview_is_lent_once_per_version_that_is_due() -> None:
    async def story(buffer: RolloutBuffer) -> None:
        first = await buffer.lease("s", 1, 0.0)
        assert isinstance(first, Preview) and (first.version, first.prompts) == (0, ("look",))
        assert isinstance(await buffer.lease("s", 1, 0.0), Lease)

    tell(story, preview_every=2, preview_prompts=("look",))


def test_a_checkpoint_state_waits_until_the_journal_has_every_scored_group() -> None:
    class SlowJournal:
        def __init__(self) -> None:
            self.append = self
            self.pending: list[asyncio.Future[None]] = []

        def remote(self, *_: Any) -> asyncio.Future[None]:
            self.pending.append(asyncio.get_running_loop().create_future())
            return self.pending[-1]

    async def story(buffer: RolloutBuffer) -> None:
        journal = SlowJournal()
        buffer._journal = journal
        await buffer.add_reward_worker("w", Worker())
        await draw(buffer)
        asking = asyncio.create_task(buffer.ledger_state(0))
        await asyncio.sleep(0)
        assert not asking.done()
        journal.pending[0].set_result(None)
        assert (await asking)["closed_below"] == 0

    tell(story)
