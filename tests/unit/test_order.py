"""The order of a dataset's groups: every group once an epoch, the same for whoever asks."""

from __future__ import annotations

import numpy as np
import pytest

from learner.order import GroupOrder

FILES = [0] * 5 + [1] * 3 + [2] * 4 + [3] * 6


def test_every_epoch_has_every_group_once_and_another_order() -> None:
    order, n = GroupOrder(FILES, seed=1, window=2), len(FILES)
    epochs = [order.rows(epoch * n, (epoch + 1) * n) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_position_is_the_same_group_wherever_one_begins() -> None:
    whole = GroupOrder(FILES, seed=1, window=2).rows(0, 50)
    assert GroupOrder(FILES, seed=1, window=2).rows(23, 50) == whole[23:]
    assert GroupOrder(FILES, seed=2, window=2).rows(0, 50) != whole


def test_a_run_lies_in_no_more_files_than_the_window_and_runs_are_the_order() -> None:
    order, positions = GroupOrder(FILES, seed=1, window=2), [p for p in range(4, 60) if p % 3]
    runs = order.runs(positions)
    assert [row for run in runs for row in run.rows] == [order.rows(p, p + 1)[0] for p in positions]
    assert all(len({FILES[row] for row in run.rows}) <= 2 for run in runs)
    assert max(len(run.rows) for run in runs) > 3, "files are read for more than one group"


def test_groups_of_a_window_are_mixed() -> None:
    order = GroupOrder(np.repeat(np.arange(10), 64).tolist(), seed=0, window=4)
    first = [row // 64 for row in order.rows(0, 64)]
    assert len(set(first)) == 4


def test_no_groups_are_no_order() -> None:
    with pytest.raises(ValueError, match="no groups"):
        GroupOrder([], 0, 4)
