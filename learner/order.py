"""In which order the groups of a dataset are learned: shuffled anew every epoch, by the seed alone. Pure.

Files first, then groups: an epoch shuffles the files, takes `window` of them at a time, and shuffles the groups inside.
So a reader holds a few files at once, whatever the size of the dataset, and still hardly ever sees two groups of a
batch that were neighbours on disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Run:
    """Neighbours in the order that lie in the same files: `rows`, indices of groups, read together."""

    rows: tuple[int, ...]


class GroupOrder:
    """An endless sequence of epochs; position p is the same group whoever asks, whenever.

    Args:
        files: int [n], the file that each group lies in.
        seed: of the run.
        window: files whose groups are shuffled together.
    """

    def __init__(self, files: Sequence[int], seed: int, window: int) -> None:
        if not len(files):
            raise ValueError("there are no groups to put in order")
        self.files = np.asarray(files, np.int64)
        self.seed, self.window = seed, window
        self._epoch = -1
        self._rows = self._windows = np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self.files)

    def rows(self, start: int, stop: int) -> list[int]:
        """Indices of the groups at the positions from `start` to `stop`."""
        return [self._at(position)[0] for position in range(start, stop)]

    def runs(self, positions: Sequence[int]) -> list[Run]:
        """The same for ascending positions, cut where the files change: what one reader reads at a time."""
        found: list[Run] = []
        last: tuple[int, int] | None = None
        for position in positions:
            row, window = self._at(position)
            here = (position // len(self), window)
            if here == last:
                found[-1] = Run((*found[-1].rows, row))
            else:
                found.append(Run((row,)))
            last = here
        return found

    def _at(self, position: int) -> tuple[int, int]:
        epoch, place = divmod(position, len(self))
        if epoch != self._epoch:
            self._shuffle(epoch)
        return int(self._rows[place]), int(self._windows[place])

    def _shuffle(self, epoch: int) -> None:
        rng = np.random.default_rng([self.seed, epoch])
        names = rng.permutation(np.unique(self.files))
        rows, windows = [], []
        for number, start in enumerate(range(0, len(names), self.window)):
            inside = np.flatnonzero(np.isin(self.files, names[start : start + self.window]))
            rows.append(rng.permutation(inside))
            windows.append(np.full(len(inside), number))
        self._epoch, self._rows, self._windows = epoch, np.concatenate(rows), np.concatenate(windows)
