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

from cluster.prompts import PromptClass, PromptSet, PromptSource


@dataclass(frozen=True)
class Ticket:
    """One group to draw: a prompt, one seed per image, and the seed that chooses the trained steps.

    `step` is the learner step it is meant for; when groups were dropped, it may be consumed a little later. `category`
    holds the prompt's labels as "a, b"; `source` names where it came from.
    """

    id: int
    step: int
    prompt: str
    prompt_class: PromptClass
    category: str | None
    source: str
    seeds: tuple[int, ...]
    step_seed: int


def derive_seed(run_seed: int, *purpose: int | str) -> int:
    """A 63-bit seed that depends on nothing but its arguments."""
    text = "/".join(str(part) for part in (run_seed, *purpose))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def chosen_before(position: int, share: Fraction) -> int:
    """How many of the places 0..position-1 of a sequence are chosen, when a share of all is: floor(position * share).

    Spread evenly (Bresenham), so every aligned block of n places holds exactly n * share chosen ones when that is
    whole.
    """
    return math.floor(position * share)


def place(ticket_id: int, prompts: PromptSet, unsafe_fraction: float) -> tuple[PromptSource, int]:
    """The source a ticket draws from, and how many earlier tickets drew from it.

    The even choice of `chosen_before`, again and again: the unsafe side or the other, then the first source there or
    a later one. So each source gets its share, exactly in the long run and within the number of sources in any prefix.
    """
    fraction = Fraction(unsafe_fraction).limit_denominator(100_000)
    earlier = chosen_before(ticket_id, fraction)
    is_unsafe = chosen_before(ticket_id + 1, fraction) > earlier
    position = earlier if is_unsafe else ticket_id - earlier
    for source, share in prompts.side(is_unsafe):
        earlier = chosen_before(position, share)
        if chosen_before(position + 1, share) > earlier:
            return source, earlier
        position -= earlier
    raise AssertionError("the share of the last source is 1: of what the others leave it gets all")


@lru_cache(maxsize=32)
def _order(run_seed: int, order_key: str, epoch: int, count: int) -> np.ndarray:
    """A permutation, 4 bytes a prompt: two epochs of every source are in use at most, and few sources are large."""
    seed = derive_seed(run_seed, "order", order_key, epoch)
    return np.random.Generator(np.random.Philox(key=seed)).permutation(count).astype(np.uint32)


@dataclass(frozen=True)
class TicketSource:
    """Everything a ticket depends on, bound once."""

    run_seed: int
    prompts: PromptSet
    unsafe_fraction: float
    group_size: int
    groups_per_step: int

    def ticket(self, ticket_id: int) -> Ticket:
        """The ticket with this id. Each source is gone through in a fresh seeded order per epoch: no repeats within
        one.
        """
        source, position = place(ticket_id, self.prompts, self.unsafe_fraction)
        epoch, index = divmod(position, len(source))
        row = int(_order(self.run_seed, source.order_key, epoch, len(source))[index])
        return Ticket(
            id=ticket_id,
            step=ticket_id // self.groups_per_step,
            prompt=source.prompt(row),
            prompt_class=source.prompt_class,
            category=source.category_of(row),
            source=source.name,
            seeds=tuple(derive_seed(self.run_seed, ticket_id, "image", image) for image in range(self.group_size)),
            step_seed=derive_seed(self.run_seed, ticket_id, "steps"),
        )
