"""Which adapter versions get preview images, and that each gets them once."""

from __future__ import annotations

from typing import Any

from actors.leases import Preview
from cluster.tickets import derive_seed


class PreviewSchedule:
    """Every `every`-th version and the last one; `every` of 0: none. The seeds are the same for every version.

    Args: every; last_version; prompts, one image each; seed of the run.
    """

    def __init__(self, every: int, last_version: int, prompts: tuple[str, ...], seed: int) -> None:
        self.every, self.last_version, self.prompts = every, last_version, prompts
        self.seeds = tuple(derive_seed(seed, "preview", i) for i in range(len(prompts)))
        self._given: set[int] = set()

    def take(self, version: int, checksum: str, adapter: list[Any]) -> Preview | None:
        """Leave to draw the previews of this version, for whoever asks first; None when none are due."""
        due = self.every and (version % self.every == 0 or version == self.last_version)
        if not due or version in self._given or not checksum:
            return None
        self._given.add(version)
        return Preview(version, checksum, adapter, self.prompts, self.seeds)
