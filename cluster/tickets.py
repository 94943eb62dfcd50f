"""Tickets: what a group is to be, as a pure function of the run's seed and a counter.

Nothing about a ticket depends on which sampler executes it, when, or how often, so any group can be drawn again.
Randomness is counter based (BLAKE2b of the run seed, the ticket id and a purpose), never a stream with a position.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

from cluster.prompts import PromptClass, PromptSet


@dataclass(frozen=True)
class Ticket:
    """One group to draw: a prompt, one seed per image, and the seed that chooses the trained steps."""

    id: int
    prompt: str
    prompt_class: PromptClass
    seeds: tuple[int, ...]
    step_seed: int


def derive_seed(run_seed: int, *purpose: int | str) -> int:
    """A 63-bit seed that depends on nothing but its arguments."""
    text = "/".join(str(part) for part in (run_seed, *purpose))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def unsafe_before(ticket_id: int, unsafe_fraction: float) -> int:
    """How many of the tickets 0..ticket_id-1 are unsafe: floor(id * fraction).

    Spread evenly (Bresenham), so every aligned block of n tickets holds exactly n * fraction unsafe ones when that is
    whole.
    """
    return math.floor(ticket_id * Fraction(unsafe_fraction).limit_denominator(100_000))


@lru_cache(maxsize=8)
def _order(run_seed: int, prompt_class: str, epoch: int, count: int) -> np.ndarray:
    seed = derive_seed(run_seed, "order", prompt_class, epoch)
    return np.random.Generator(np.random.Philox(key=seed)).permutation(count)


def make_ticket(run_seed: int, ticket_id: int, prompts: PromptSet, unsafe_fraction: float, group_size: int) -> Ticket:
    """The ticket with this id. Each class is gone through in a fresh seeded order per epoch: no repeats within one."""
    earlier = unsafe_before(ticket_id, unsafe_fraction)
    is_unsafe = unsafe_before(ticket_id + 1, unsafe_fraction) > earlier
    prompt_class: PromptClass = "unsafe" if is_unsafe else "safe"
    position = earlier if is_unsafe else ticket_id - earlier
    pool = prompts.of(prompt_class)
    epoch, index = divmod(position, len(pool))
    return Ticket(
        id=ticket_id,
        prompt=pool[_order(run_seed, prompt_class, epoch, len(pool))[index]],
        prompt_class=prompt_class,
        seeds=tuple(derive_seed(run_seed, ticket_id, "image", image) for image in range(group_size)),
        step_seed=derive_seed(run_seed, ticket_id, "steps"),
    )


@dataclass(frozen=True)
class TicketSource:
    """Everything a ticket depends on, bound once."""

    run_seed: int
    prompts: PromptSet
    unsafe_fraction: float
    group_size: int

    def ticket(self, ticket_id: int) -> Ticket:
        return make_ticket(self.run_seed, ticket_id, self.prompts, self.unsafe_fraction, self.group_size)
