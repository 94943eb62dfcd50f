"""A snapshot of the buffer as the supervising loop gets it, made by a real buffer, for tests of whoever reads it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from cluster.buffer import RolloutBuffer
from cluster.buffer_settings import BufferSettings
from cluster.prompts import PromptSet
from cluster.tickets import TicketSource


def fresh_buffer(clock: Callable[[], float] = time.monotonic) -> RolloutBuffer:
    """A buffer of 3 steps of 2 groups of 4 images that nobody has talked to. Inside an event loop only."""
    settings = BufferSettings(
        tickets=TicketSource(0, PromptSet.of(safe=["a"], unsafe=["b"]), 0.5, 4, 2),
        groups_per_step=2,
        max_staleness=0,
        lease_ttl_s=60.0,
        total_groups=6,
        max_attempts=2,
        score_timeout_s=5.0,
    )
    return RolloutBuffer(settings, clock=clock)


def fresh_snapshot(**changes: Any) -> dict[str, Any]:
    """That of a fresh buffer; `changes` replace entries."""

    async def ask() -> dict[str, Any]:
        return await fresh_buffer().snapshot()

    return asyncio.run(ask()) | changes


def ledger(**changes: Any) -> dict[str, Any]:
    """Ledger counts with nothing in them but `changes`."""
    states = dict.fromkeys(("issued", "returned", "leased", "in_flight", "ready", "delivered", "committed"), 0)
    return states | {"dropped": {}, "events": {}} | changes
