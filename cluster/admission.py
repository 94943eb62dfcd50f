"""Admission: when a group may be leased, and which groups make a batch. Pure functions of counts and versions.

Words: the learner's step s consumes a batch of B groups at adapter version s and publishes version s + 1. A group
carries the version it was leased under; its lag is s minus that version. S = max_staleness.

The bound is kept at both ends, never by throwing a group away:

* lease  under version v only while, for every u >= v,  consumed + #{unconsumed with version <= u} < (u + S + 1) * B.
  (Versions above v exist only after the learner went back to a checkpoint; without them only u = v counts.)
* deliver at step s only a batch after which, for every u in s..s+S,  #{left over with version <= u - S} <= (u - s) * B:
  whoever must be consumed by step u still can be. Taking the oldest versions first meets all of these if anything does,
  so a batch that cannot be formed now is waited for. For S = 0 the batch is B consecutive tickets, whatever the timing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def may_lease(consumed: int, versions: Iterable[int], version: int, groups_per_step: int, max_staleness: int) -> bool:
    """Whether one more group may be leased under `version`. `versions`: those of all unconsumed leased groups."""
    held = sorted(versions)
    thresholds = {version, *(u for u in held if u > version)}
    return all(
        consumed + sum(1 for v in held if v <= u) < (u + max_staleness + 1) * groups_per_step for u in thresholds
    )


def must_include(versions: Iterable[int], step: int, groups_per_step: int, max_staleness: int) -> dict[int, int]:
    """{version u: how many groups of version <= u the batch of `step` has to contain}, positive entries only."""
    held = list(versions)
    needed: dict[int, int] = {}
    for ahead in range(max_staleness + 1):
        bound = step + ahead - max_staleness
        count = sum(1 for v in held if v <= bound) - ahead * groups_per_step
        if count > 0:
            needed[bound] = count
    return needed


def choose_batch(
    ready: Sequence[tuple[int, int]], in_flight: Iterable[int], step: int, groups_per_step: int, max_staleness: int
) -> list[int] | None:
    """Ticket ids of the batch of `step` in ticket order, or None: not yet.

    `ready`: (version, ticket id) of the scored groups; `in_flight`: versions of the groups still being drawn or scored.
    """
    candidates = sorted((version, ticket) for version, ticket in ready if version <= step)
    if len(candidates) < groups_per_step:
        return None
    taken = candidates[:groups_per_step]
    everyone = [version for version, _ in ready] + list(in_flight)
    for bound, count in must_include(everyone, step, groups_per_step, max_staleness).items():
        if sum(1 for version, _ in taken if version <= bound) < count:
            return None
    return sorted(ticket for _, ticket in taken)
