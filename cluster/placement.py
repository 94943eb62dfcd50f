"""Placement: which node a member goes to, and what is missing when there is no room.

Pure arithmetic over needs and rooms; the last section reads the nodes from Ray. A GPU share has to fit on one card, as
it does in Ray.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_ROUNDING = 1e-6
_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
LABEL_KEY = re.compile(rf"(?:[A-Za-z0-9.-]{{1,253}}/)?{_NAME}")
SELECTOR = re.compile(rf"(?P<negated>!?)(?:in\((?P<several>{_NAME}(?:, ?{_NAME})*)\)|(?P<one>{_NAME}))")


@dataclass(frozen=True)
class Need:
    """What one member takes of a node, and which nodes it may use.

    Attributes:
        section: of the recipe, "samplers", "reward_workers" or "learner"; or "evaluator", which has none.
        gpus: a share of one card, or whole cards.
        resources: custom resources by name.
        labels: node label -> selector ("a", "!a", "in(a, b)", "!in(a, b)"); all must match.
    """

    section: str
    cpus: float = 0.0
    gpus: float = 0.0
    resources: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def amounts(self) -> dict[str, float]:
        """As Ray counts them, without GPUs."""
        return {name: amount for name, amount in {"CPU": self.cpus, **self.resources}.items() if amount}

    def __str__(self) -> str:
        amounts = {"CPU": self.cpus, "GPU": self.gpus, **self.resources}
        takes = " + ".join(f"{amount:g} {name}" for name, amount in amounts.items() if amount) or "nothing"
        labels = ", ".join(f"{key}={selector}" for key, selector in self.labels.items())
        return f"{takes} on a node with {labels}" if labels else takes


@dataclass(frozen=True)
class Node:
    """A machine of the cluster. `resources` are all it has: CPU, GPU and custom ones."""

    id: str
    name: str
    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)

    def empty(self) -> Room:
        return Room.of(self, self.resources)


@dataclass(frozen=True)
class Room:
    """What is free on a node: amounts by name, and the free share of each card."""

    node: Node
    free: Mapping[str, float]
    cards: tuple[float, ...]

    @classmethod
    def of(cls, node: Node, free: Mapping[str, float]) -> Room:
        """`free` as Ray reports it: GPUs as one number, of which a fraction can only be one card's."""
        gpus = free.get("GPU", 0.0)
        whole, rest = divmod(gpus + _ROUNDING, 1.0)
        cards = (1.0,) * int(whole) + ((rest,) if rest > 2 * _ROUNDING else ())
        return cls(node, {name: amount for name, amount in free.items() if name != "GPU"}, cards)

    def lacks(self, need: Need) -> list[str]:
        """Why `need` does not fit here, in words; empty when it does."""
        reasons = [
            f"{key} is {self.node.labels.get(key) or 'not set'}"
            for key, selector in need.labels.items()
            if not matches(selector, self.node.labels.get(key))
        ]
        for name, amount in need.amounts.items():
            if self.free.get(name, 0.0) < amount - _ROUNDING:
                reasons.append(f"{self.free.get(name, 0.0):g} of {self.node.resources.get(name, 0.0):g} {name} free")
        if need.gpus and self._cards_for(need.gpus) is None:
            reasons.append(f"{sum(self.cards):g} of {self.node.resources.get('GPU', 0.0):g} GPU free")
        return reasons

    def after(self, need: Need) -> Room:
        """What is left once `need`, which fits, is here."""
        free = dict(self.free)
        for name, amount in need.amounts.items():
            free[name] -= amount
        cards = list(self.cards)
        for index in self._cards_for(need.gpus) or ():
            cards[index] -= min(need.gpus, 1.0)
        return Room(self.node, free, tuple(cards))

    def at_most(self, free: Mapping[str, float]) -> Room:
        """The same, or less where `free`, as Ray reports it, says so."""
        cards = self.cards if sum(self.cards) <= free.get("GPU", 0.0) + _ROUNDING else Room.of(self.node, free).cards
        least = {name: min(amount, free.get(name, 0.0)) for name, amount in self.free.items()}
        return Room(self.node, least, cards)

    @property
    def load(self) -> float:
        """Share in use of what is scarcest here, 0 to 1."""
        here = self.node.resources
        used = [1.0 - self.free.get("CPU", 0.0) / here["CPU"]] if here.get("CPU") else [1.0]
        return max(used + ([1.0 - sum(self.cards) / here["GPU"]] if here.get("GPU") else []))

    def _cards_for(self, gpus: float) -> list[int] | None:
        """The fullest card on which a share fits, or as many free cards; None when there are too few."""
        share, wanted = min(gpus, 1.0), max(1, round(gpus))
        fitting = [index for index, free in enumerate(self.cards) if free >= share - _ROUNDING]
        fitting.sort(key=lambda index: self.cards[index])
        return fitting[:wanted] if len(fitting) >= wanted else None


def matches(selector: str, value: str | None) -> bool:
    """Whether a node whose label has `value` (None: it has no such label) satisfies a selector, as in Ray."""
    parsed = SELECTOR.fullmatch(selector)
    assert parsed is not None, "selectors are checked with the recipe"
    wanted = [name.strip() for name in (parsed["several"] or parsed["one"]).split(",")]
    return (value in wanted) != bool(parsed["negated"])


# ---- packing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packing:
    """`places`: by need, the index of its room or None. `rooms`: what is left of them."""

    places: tuple[int | None, ...]
    rooms: tuple[Room, ...]

    @property
    def complete(self) -> bool:
        return None not in self.places


def pack(needs: Sequence[Need], rooms: Sequence[Room]) -> Packing:
    """Give every need a room: the choosy and the large first, spread over the nodes, or tightly if that finds more.

    A heuristic, deterministic; it may miss a packing only where roles of very different shapes fill nodes to the brim.
    """
    best: Packing | None = None
    for fit in (_spread, _tight):
        for size in (_gpus_first, _cpus_first):
            found = _pack(needs, rooms, size, fit)
            if best is None or found.places.count(None) < best.places.count(None):
                best = found
            if best.complete:
                return best
    assert best is not None
    return best


def pack_run(rank: Need, most: int, fewest: int, others: Sequence[Need], rooms: Sequence[Room]) -> tuple[int, Packing]:
    """Pack `others` with as many learner ranks as possible, at least `fewest`. Returns that number and the packing of
    ranks, then others; of the last attempt if even the fewest find no room together.
    """
    ranks = most
    while True:
        packing = pack([rank] * ranks + list(others), rooms)
        if packing.complete or ranks <= fewest:
            return ranks, packing
        ranks -= 1


def shortfall(needs: Sequence[Need], packing: Packing) -> tuple[str, str]:
    """Section of the first need without a place, and in words what it needs and why the nearest nodes do not do."""
    without = [need for need, place in zip(needs, packing.places, strict=True) if place is None]
    need = without[0]
    count = sum(other.section == need.section for other in without)
    total = sum(other.section == need.section for other in needs)
    nearest = sorted(packing.rooms, key=lambda room: (len(room.node.empty().lacks(need)), len(room.lacks(need))))[:3]
    reasons = "; ".join(f"{room.node.name}: {', '.join(room.lacks(need))}" for room in nearest)
    who = need.section.replace("_", " ") if need.section != "learner" else "learner ranks"
    return (
        need.section,
        f"no room for {count} of {total} {who}, one needs {need}; nearest {reasons or 'none: no node is up'}",
    )


def _pack(
    needs: Sequence[Need],
    rooms: Sequence[Room],
    size: Callable[[Need], tuple[float, ...]],
    fit: Callable[[Room], float],
) -> Packing:
    left = list(rooms)
    places: list[int | None] = [None] * len(needs)
    distinct = {id(need): need for need in needs}  # members of a role share one
    choices = {key: sum(not room.node.empty().lacks(need) for room in rooms) for key, need in distinct.items()}
    for index in sorted(range(len(needs)), key=lambda index: (choices[id(needs[index])], *size(needs[index]), index)):
        need = needs[index]
        fitting = [place for place, room in enumerate(left) if not room.lacks(need)]
        if fitting:
            place = min(fitting, key=lambda place: (fit(left[place].after(need)), place))
            places[index] = place
            left[place] = left[place].after(need)
    return Packing(tuple(places), tuple(left))


def _spread(room: Room) -> float:
    return room.load


def _tight(room: Room) -> float:
    return -room.load


def _gpus_first(need: Need) -> tuple[float, ...]:
    return (-need.gpus, -need.cpus, -sum(need.resources.values()))


def _cpus_first(need: Need) -> tuple[float, ...]:
    return (-need.cpus, -need.gpus, -sum(need.resources.values()))


# ---- what Ray knows -------------------------------------------------------------------------------------------------


def live_nodes() -> list[Node]:
    """Nodes that are up, in an order that does not change."""
    import ray

    return sorted((_node(row) for row in ray.nodes() if row["Alive"]), key=lambda node: (node.name, node.id))


def free_rooms(taken: Iterable[tuple[str | None, Need]]) -> list[Room]:
    """What is free on each live node: all it has without what is `taken` by us (node id and need), and no more than Ray
    reports, which knows of others but lags behind.
    """
    from ray._private.state import available_resources_per_node  # the public API only tells the sum over all nodes

    rooms = {node.id: node.empty() for node in live_nodes()}
    for node, need in taken:
        if node in rooms and not rooms[node].lacks(need):
            rooms[node] = rooms[node].after(need)
    available: dict[str, dict[str, float]] = available_resources_per_node()
    return [room.at_most(available.get(node, {})) for node, room in rooms.items()]


def _node(row: Mapping[str, Any]) -> Node:
    name = f"{row['NodeManagerHostname']} ({row['NodeID'][:8]})"
    return Node(row["NodeID"], name, row["Resources"], row["Labels"] or {})
