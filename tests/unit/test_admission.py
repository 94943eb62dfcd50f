"""Admission bounds the lag of every consumed group without ever discarding one."""

from cluster.admission import choose_batch, may_lease, must_include


def test_strict_mode_leases_exactly_one_batch_per_version() -> None:
    assert may_lease(0, [0, 0, 0], 0, 4, 0)
    assert not may_lease(0, [0, 0, 0, 0], 0, 4, 0)
    assert not may_lease(4, [], 0, 4, 0), "the batch is delivered, the next version is not published yet"
    assert may_lease(4, [], 1, 4, 0)


def test_staleness_lets_samplers_run_ahead_by_that_many_batches() -> None:
    assert may_lease(0, [0] * 7, 0, 4, 1)
    assert not may_lease(0, [0] * 8, 0, 4, 1)
    assert may_lease(4, [0] * 7, 1, 4, 1)


def test_groups_of_a_later_version_do_not_block_the_redrawing_of_a_lost_one() -> None:
    assert may_lease(0, [0, 1, 1], 0, 2, 0), "after a rewind ticket 0 is lost and tickets 2, 3 of version 1 still wait"


def test_groups_of_a_later_version_still_count_against_their_own_bound() -> None:
    assert not may_lease(0, [0, 1, 1], 0, 1, 1), (
        "one more now could not be consumed in time beside the two of version 1"
    )


def test_a_batch_waits_for_the_group_that_would_grow_too_old() -> None:
    assert choose_batch([(1, 5), (1, 6)], [0], 1, 2, 1) is None
    assert choose_batch([(1, 5), (1, 6), (0, 7)], [], 1, 2, 1) == [5, 7]


def test_a_batch_waits_when_a_later_one_could_no_longer_hold_the_old_ones() -> None:
    ready, slow = [(1, 3)], [0, 0]
    assert must_include([1, 0, 0], step=1, groups_per_step=1, max_staleness=2)[0] == 1
    assert choose_batch(ready, slow, 1, 1, 2) is None, "two groups of version 0 must fit into steps 1 and 2"


def test_a_strict_batch_is_in_ticket_order_and_complete() -> None:
    assert choose_batch([(0, 2), (0, 0), (0, 1)], [], 0, 3, 0) == [0, 1, 2]
    assert choose_batch([(0, 2), (0, 0)], [0], 0, 3, 0) is None


def test_a_group_of_a_later_version_is_not_consumed_early() -> None:
    assert choose_batch([(0, 0), (1, 1)], [], 0, 2, 0) is None
