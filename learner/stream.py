"""Ray Data as the source of groups: tasks read files ahead of the learner, in order, and never all at once.

Each rank has a stream of its own over its own share of the groups, so ranks need no agreement, and a restarted rank
begins exactly where its checkpoint ends, in the middle of an epoch too.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from raysteer.errors import DeadlineExceeded

if TYPE_CHECKING:
    from learner.dataset import GroupDataset, OfflineGroup
    from learner.order import Run

READER_CPUS = 0.1  # reading is waiting for a disk; a whole CPU each could leave none for the ranks


class GroupStream:
    """The groups of `runs`, one after the other.

    Args:
        dataset: what the runs' rows are of.
        runs: see `GroupOrder.runs`.
        ahead: groups read before they are asked for, beside what Ray Data holds in the object store.
    """

    def __init__(self, dataset: GroupDataset, runs: Sequence[Run], ahead: int) -> None:
        self.dataset = dataset
        self._arrived: queue.Queue[Any] = queue.Queue(max(1, ahead))
        self._reader = threading.Thread(target=self._read, args=(list(runs),), name="group-stream", daemon=True)
        self._reader.start()

    def take(self, count: int, timeout_s: float) -> list[OfflineGroup]:
        """The next groups.

        Raises:
            DeadlineExceeded: they do not come in time.
            UserError: a file cannot be read.
        """
        groups: list[OfflineGroup] = []
        started = time.monotonic()
        while len(groups) < count:
            left = timeout_s - (time.monotonic() - started)
            try:
                arrived = self._arrived.get(timeout=max(0.0, left))
            except queue.Empty:
                waited_for = f"{count - len(groups)} groups of {self.dataset.folder}"
                raise DeadlineExceeded(
                    waited_for, timeout_s, "no room for Ray Data's readers, or a slow disk"
                ) from None
            if isinstance(arrived, BaseException):
                raise arrived
            groups.append(arrived)
        return groups

    def _read(self, runs: list[Run]) -> None:
        from raysteer.calls import plain

        try:
            for group in stream(self.dataset, runs):
                self._arrived.put(group)
        except BaseException as error:  # whoever takes next has to hear of it
            self._arrived.put(plain(error) if isinstance(error, Exception) else error)


def stream(dataset: GroupDataset, runs: Sequence[Run]) -> Iterator[OfflineGroup]:
    """The groups of `runs` in order, read by Ray Data."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    items = [{"rows": list(run.rows)} for run in runs]
    if not items:
        return
    read = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _Reader(dataset), batch_size=1, batch_format="numpy", num_cpus=READER_CPUS
    )
    for row in read.iter_rows():
        yield row["group"]


class _Reader:
    """One run after another; every group is a row of its own."""

    def __init__(self, dataset: GroupDataset) -> None:
        self.dataset = dataset

    def __call__(self, items: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for rows in items["rows"]:
            for group in self.dataset.read([self.dataset.rows[int(row)] for row in rows]):
                yield {"group": [group]}
