"""GenEval's rules (Ghosh et al. 2023, arXiv 2310.11513; djghosh13/geneval): what is wrong with the objects in an image?

Pure functions of what was asked and of what was found. Where the paper is silent they follow the published program:
scores must exceed their threshold, not reach it; colour and place are judged on the surest objects of a class alone, as
many as are asked for; an object is in its place only if it is so to every object that it is placed by.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COUNTING = "counting"
RELATIONS = ("left of", "right of", "above", "below")
_COMPONENT = 0.5
"""A relation holds when the offset's part along its axis exceeds this."""
_NOWHERE = 1e-3  # pixels: a shrunk offset below it has no direction
_PLURALS = {
    "person": "people",
    "sheep": "sheep",
    "skis": "skis",
    "scissors": "scissors",
    "knife": "knives",
    "computer mouse": "computer mice",
}


@dataclass(frozen=True)
class Clause:
    """So many objects of a class; of a colour; each in a relation to the objects of an earlier clause, by its index."""

    name: str
    count: int
    colour: str | None = None
    position: tuple[str, int] | None = None


@dataclass(frozen=True)
class Wanted:
    """What a prompt asks for: at least what each `include` says, and fewer than each `exclude` says."""

    task: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()


@dataclass(frozen=True)
class Found:
    """An object in an image: box [x0, y0, x1, y1] in pixels; no colour where none was told."""

    score: float
    box: tuple[float, float, float, float]
    colour: str | None = None


@dataclass(frozen=True)
class Thresholds:
    """The numbers of the published program.

    Attributes:
        confidence: an object counts when its score exceeds this;
        counting_confidence: in the task of counting this.
        max_objects: of one class, the surest.
        max_overlap: an object that overlaps a surer one of its class by this or more (intersection over union) does
            not count; 1 turns that off, as published.
        position_shrink: the offset between two objects is shortened by this part of their sizes.
    """

    confidence: float = 0.3
    counting_confidence: float = 0.9
    max_objects: int = 16
    max_overlap: float = 1.0
    position_shrink: float = 0.1


Objects = Mapping[str, Sequence[Found]]
"""By class, the surest first."""


def kept(verdict: Sequence[Mapping[str, Any]], task: str, at: Thresholds) -> dict[str, list[Found]]:
    """The objects of one image that count, by class, the surest first."""
    least = at.counting_confidence if task == COUNTING else at.confidence
    by_class: dict[str, list[Found]] = {}
    sure = [seen for seen in verdict if seen["score"] > least]
    for seen in sorted(sure, key=lambda seen: -seen["score"]):
        found = Found(seen["score"], tuple(seen["box"]), seen["colour"])
        by_class.setdefault(seen["class"], []).append(found)
    return {name: _apart(found[: at.max_objects], at.max_overlap) for name, found in by_class.items()}


def faults(wanted: Wanted, objects: Objects, at: Thresholds) -> tuple[str, ...]:
    """What is wrong, in words; empty: the image is right."""
    wrong: list[str] = []
    placed: list[Sequence[Found] | None] = []  # the objects of each clause that is fulfilled
    for clause in wanted.include:
        found = objects.get(clause.name, ())
        chosen = found[: clause.count]
        problem = (
            _too_few(clause, len(found))
            or _miscoloured(clause, chosen)
            or _misplaced(clause, chosen, wanted.include, placed, at.position_shrink)
        )
        wrong += [problem] if problem else []
        placed.append(None if problem else chosen)
    for clause in wanted.exclude:
        n = len(objects.get(clause.name, ()))
        if n >= clause.count:
            wrong.append(f"expected at most {counted(clause.name, clause.count - 1)}, found {n}")
    return tuple(wrong)


def relations(first: Sequence[float], second: Sequence[float], shrink: float = 0.1) -> tuple[str, ...]:
    """Where the first box is, seen from the second: none, one or two of ``RELATIONS``.

    The offset between the centres is moved towards zero by `shrink` times the sum of both sizes, on each axis alone,
    and then divided by the length that it had before.
    """
    boxes = np.array([first, second], float).reshape(2, 2, 2)  # box, corner, axis
    offset = boxes[0].mean(0) - boxes[1].mean(0)
    sizes = np.abs(boxes[:, 1] - boxes[:, 0]).sum(0)
    shrunk = np.sign(offset) * np.maximum(np.abs(offset) - shrink * sizes, 0.0)
    if (np.abs(shrunk) < _NOWHERE).all():
        return ()
    x, y = shrunk / np.hypot(*offset)
    holds = (x < -_COMPONENT, x > _COMPONENT, y < -_COMPONENT, y > _COMPONENT)
    return tuple(relation for relation, true in zip(RELATIONS, holds, strict=True) if true)


def overlap(first: Sequence[float], second: Sequence[float]) -> float:
    """Intersection over union of two boxes, both ends counted, as the published program has it."""

    def area(box: Sequence[float]) -> float:
        return max(box[2] - box[0] + 1, 0) * max(box[3] - box[1] + 1, 0)

    shared = area([*np.maximum(first[:2], second[:2]), *np.minimum(first[2:], second[2:])])
    whole = area(first) + area(second) - shared
    return shared / whole if whole else 0.0


def _apart(found: list[Found], most: float) -> list[Found]:
    if most >= 1.0:
        return found
    chosen: list[Found] = []
    for one in found:
        if all(overlap(surer.box, one.box) < most for surer in chosen):
            chosen.append(one)
    return chosen


def _too_few(clause: Clause, n: int) -> str | None:
    expected = counted(clause.name, clause.count, clause.colour)
    return None if n >= clause.count else f"expected {expected}, found {n}"


def _miscoloured(clause: Clause, chosen: Sequence[Found]) -> str | None:
    if clause.colour is None or all(found.colour == clause.colour for found in chosen):
        return None
    told = Counter(found.colour or "no colour told" for found in chosen)
    shown = " and ".join(colour if clause.count == 1 else f"{n} {colour}" for colour, n in sorted(told.items()))
    return f"expected {counted(clause.name, clause.count, clause.colour)}, found {shown}"


def _misplaced(
    clause: Clause,
    chosen: Sequence[Found],
    include: Sequence[Clause],
    placed: Sequence[Sequence[Found] | None],
    shrink: float,
) -> str | None:
    if clause.position is None:
        return None
    relation, index = clause.position
    expected = f"expected {clause.name} {relation} {include[index].name}"
    targets = placed[index]
    if targets is None:
        return f"{expected}, found no such {include[index].name}"
    for found in chosen:
        for target in targets:
            true = relations(found.box, target.box, shrink)
            if relation not in true:
                return f"{expected}, found {' and '.join(true) or 'neither beside, above nor below'} it"
    return None


def counted(name: str, n: int, colour: str | None = None) -> str:
    """As in "1 car" and "3 red buses"."""
    if n != 1:
        hissing = name.endswith(("s", "x", "ch", "sh"))
        name = _PLURALS.get(name, f"{name}es" if hissing else f"{name}s")
    return " ".join(filter(None, (str(n), colour, name)))
