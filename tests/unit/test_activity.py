"""Overlap is measured, not assumed."""

import pytest

from actors.leases import Outcome
from cluster.activity import ActivityClock, Meter


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


def test_the_share_of_prompts_that_were_cut_off_is_that_of_the_groups_since_the_last_look() -> None:
    meter = Meter(lambda: 0.0)
    timings = {"started": 0.0, "sampled": 1.0, "submitted": 2.0}
    for truncated in (1.0, 0.0, 0.0, 1.0):
        meter.scored(timings | {"truncated": truncated}, Outcome("scored"))
    assert meter.take()["prompts/truncated"] == 0.5
    assert "prompts/truncated" not in meter.take()
