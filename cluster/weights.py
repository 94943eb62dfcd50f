"""WeightStore: the long-lived owner of published adapters.

An object dies with the process that put it. Were the learner's rank to put adapters itself, samplers could never
fetch the last one it made before it ended (and would go on with an older one unnoticed). So the learner sends the
arrays here, this actor puts them once per version, and samplers receive the reference with their next lease.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from raysteer.calls import ask, put

REGISTER_TIMEOUT_S = 60.0


class WeightStore:
    """Actor. Args: buffer (handle), keep: how many of the newest versions stay fetchable (max_staleness + 2)."""

    def __init__(self, buffer: Any, keep: int) -> None:
        self.buffer = buffer
        self.keep = keep
        self._versions: dict[int, Any] = {}

    def publish(self, version: int, state: Mapping[str, np.ndarray], checksum: str) -> None:
        """Make `state` (float32 arrays by name) version `version` and return when the buffer lends it. Idempotent.

        Raises ClusterError when the object store is full, DeadlineExceeded when the buffer does not answer.
        """
        reference = put({name: np.asarray(array) for name, array in state.items()})
        self._versions[version] = reference
        for old in sorted(self._versions)[: -self.keep]:
            del self._versions[old]
        ask(self.buffer.set_adapter, version, [reference], checksum, timeout_s=REGISTER_TIMEOUT_S)

    def ping(self) -> None:
        """Answers while the process lives."""

    def versions(self) -> list[int]:
        """Versions that are still fetchable, ascending."""
        return sorted(self._versions)
