"""Overlap is measured, not assumed."""

import pytest

from actors.leases import Outcome
from cluster.activity import ActivityClock, LearnerState, Meter

TIMINGS = {"started": 0.0, "sampled": 1.0, "submitted": 2.0, "adapter_applied": 0.0}


def test_reward_time_is_hidden_only_while_somebody_else_works() -> None:
    clock = ActivityClock(0.0)
    clock.sampling, clock.scoring, clock.samplers = 1, 1, 1
    clock.tick(3.0)  # three seconds of scoring beside sampling
    clock.sampling = 0
    figures = clock.take(4.0)  # one second of nothing but scoring
    assert figures["overlap/reward_s"] == pytest.approx(4.0)
    assert figures["overlap/reward_exposed_s"] == pytest.approx(1.0)
    assert figures["overlap/reward_hidden"] == pytest.approx(0.75)


def test_a_run_without_reward_time_hides_all_of_it() -> None:
    assert ActivityClock(0.0).take(5.0)["overlap/reward_hidden"] == 1.0


def test_idle_shares_are_shares_of_each_roles_own_time() -> None:
    clock = ActivityClock(0.0)
    clock.samplers, clock.waiting_samplers, clock.learner_waiting = 4, 1, True
    clock.tick(2.0)
    clock.waiting_samplers, clock.learner_waiting = 4, False
    figures = clock.take(4.0)
    assert figures["idle/samplers"] == pytest.approx((2 * 1 + 2 * 4) / (4 * 4))
    assert figures["idle/learner"] == pytest.approx(0.5)


def test_every_interval_is_accounted_for_once() -> None:
    clock = ActivityClock(0.0)
    clock.learning = True
    assert clock.take(1.0)["stage/wall_s"] == pytest.approx(1.0)
    clock.sampling = 1
    figures = clock.take(3.0)
    assert figures["stage/wall_s"] == pytest.approx(2.0)
    assert figures["overlap/sampling_while_learning"] == pytest.approx(1.0)


def test_sampled_and_scored_rates_are_those_since_the_last_look_and_images_count_by_group() -> None:
    now = [0.0]
    meter = Meter(lambda: now[0], group_size=4)
    for _ in range(3):
        meter.drawn("sampler-0", "v0", TIMINGS)
    meter.scored(TIMINGS, Outcome("scored"))
    now[0] = 2.0
    figures = meter.take()
    assert figures["throughput/sampled_groups_per_s"] == 1.5
    assert figures["throughput/sampled_images_per_s"] == 6.0
    assert figures["throughput/scored_images_per_s"] == 2.0
    now[0] = 3.0
    assert meter.take()["throughput/sampled_images_per_s"] == 0.0
    assert meter.groups == {"sampled": 3, "scored": 1}


def test_a_learner_that_saves_is_at_work_and_one_that_starts_neither_works_nor_waits() -> None:
    now = [0.0]
    meter = Meter(lambda: now[0])
    days: tuple[tuple[LearnerState, float], ...] = (
        ("starting", 5.0),
        ("waiting", 1.0),
        ("learning", 1.0),
        ("saving", 1.0),
    )
    for state, seconds in days:
        meter.learner(state)
        now[0] += seconds
    assert meter.take()["idle/learner"] == pytest.approx(1 / 8)


def test_the_share_of_prompts_that_were_cut_off_is_that_of_the_groups_since_the_last_look() -> None:
    meter = Meter(lambda: 0.0)
    for truncated in (1.0, 0.0, 0.0, 1.0):
        meter.scored(TIMINGS | {"truncated": truncated}, Outcome("scored"))
    assert meter.take()["prompts/truncated"] == 0.5
    assert "prompts/truncated" not in meter.take()
