"""Charts as numbers: where axes, bars, points and curves lie, in percent of the plot; the templates draw them as SVG.

In percent, because plots are as wide as the page allows while their text keeps its size. In plots with two axes `y` is
measured from the top, as SVG does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from evaluation.report.figures import bounded, finite, in_words, typeset

Figure = Mapping[str, Any]
# What a plot is taken to measure where labels must not cover each other: a phone's width, in pixels.
NOMINAL_WIDTH, NOMINAL_HEIGHT = 290, 320
LETTER_WIDTH, LINE_HEIGHT = 7, 15


@dataclass(frozen=True)
class Who:
    """A model in charts: its name, and its number, which is its colour and shape all over the page."""

    name: str
    series: int


@dataclass(frozen=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True)
class Axis:
    """A linear axis with round ticks; `at` gives percent of its length."""

    low: float
    high: float
    ticks: tuple[Tick, ...] = ()

    def at(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(100 * min(1.0, max(0.0, share)), 2)


def axis(values: Iterable[Any], zero: Literal["always", "near", "never"] = "near", most: int = 5) -> Axis:
    """An axis that holds all finite values; without any it goes from 0 to 1.

    Args:
        zero: when it is stretched to hold zero too.
        most: about so many steps between ticks.
    """
    found = [float(value) for value in values if finite(value)] or [0.0, 1.0]
    low, high = min(found), max(found)
    if low == high:
        room = abs(high) / 2 or 0.5
        low, high = low - room, high + room
        low, high = (max(0.0, low), min(1.0, high)) if 0 <= found[0] <= 1 else (low, high)
    if zero == "always" or (zero == "near" and 0 <= low <= high - low):
        low, high = min(low, 0.0), max(high, 0.0)
    raw = (high - low) / most
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    low, high = first * step, last * step
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    bare = Axis(low, high)
    values = [i * step for i in range(first, last + 1)]
    return Axis(low, high, tuple(Tick(bare.at(value), typeset(f"{value:,.{decimals}f}")) for value in values))


@dataclass(frozen=True)
class Mark:
    """A value with its interval, on one axis or on two.

    Attributes:
        words: all of it in words, for the tooltip.
        label: what stands beside it, shifted by `label_x` and `label_y` pixels, anchored at its start, middle or end.
    """

    series: int
    x: float
    y: float = 50.0
    x_low: float | None = None
    x_high: float | None = None
    y_low: float | None = None
    y_high: float | None = None
    words: str = ""
    label: str = ""
    label_x: int = 0
    label_y: int = 0
    anchor: str = "start"


def mark(who: Who, figure: Figure | None, along: Axis, what: str) -> Mark | None:
    """A figure on a horizontal axis; None where there is none."""
    if figure is None or not finite(figure.get("value")):
        return None
    low, high = (along.at(figure["low"]), along.at(figure["high"])) if bounded(figure) else (None, None)
    words = f"{what}, {who.name}: {in_words(figure)}"
    return Mark(who.series, along.at(figure["value"]), x_low=low, x_high=high, words=words)


def extent(figures: Iterable[Figure | None]) -> list[Any]:
    """Every number that an axis of these figures has to hold."""
    return [figure.get(key) for figure in figures if figure is not None for key in ("value", "low", "high")]


@dataclass(frozen=True)
class Bars:
    """A row of bars for each label, one for each model; `origin` is where zero is."""

    along: Axis
    origin: float
    rows: list[tuple[str, list[Mark | None], list[Figure | None]]]


def bars(who: Sequence[Who], groups: Sequence[Mapping[str, Figure]]) -> Bars:
    """`groups`: of each model, label to figure. Labels stand in the order of their first appearance."""
    along = axis(extent(figure for group in groups for figure in group.values()), zero="always")
    rows = []
    for label in dict.fromkeys(label for group in groups for label in group):
        own = [group.get(label) for group in groups]
        rows.append((label, [mark(one, figure, along, label) for one, figure in zip(who, own, strict=True)], own))
    return Bars(along, along.at(0.0), rows)


@dataclass(frozen=True)
class Curve:
    """A model's figure over thresholds: its points, a path through them, and the band of their intervals."""

    series: int
    path: str
    band: str
    points: list[Mark]


@dataclass(frozen=True)
class Sweep:
    """Curves over a threshold. `headline`: every threshold that a headline is taken at; `rows`: threshold to figures,
    and whether it is a headline's."""

    x: Axis
    y: Axis
    curves: list[Curve]
    headline: list[Tick]
    rows: list[tuple[str, bool, list[Figure | None]]]


def sweep(who: Sequence[Who], sweeps: Sequence[Mapping[str, Any] | None]) -> Sweep | None:
    """`sweeps`: of each model, as in a card; None where it has none. Returns None when there is nothing to draw."""
    tables: list[dict[float, Figure]] = []
    for one in sweeps:
        pairs = zip(one["thresholds"], one["figures"], strict=True) if one else ()
        tables.append({float(at): figure for at, figure in sorted(pairs, key=lambda pair: pair[0])})
    every = sorted({at for table in tables for at in table})
    if not every:
        return None
    headline = sorted({float(one["at"]) for one in sweeps if one})
    x = axis([*every, *headline], zero="never")
    y = axis(extent(figure for table in tables for figure in table.values()), zero="always")
    curves = [_curve(one, table, x, y) for one, table in zip(who, tables, strict=True)]
    rows = [(f"{at:g}", at in headline, [table.get(at) for table in tables]) for at in every]
    return Sweep(x, y, [one for one in curves if one.points], [Tick(x.at(at), f"{at:g}") for at in headline], rows)


def _curve(who: Who, table: Mapping[float, Figure], x: Axis, y: Axis) -> Curve:
    known = {at: figure for at, figure in table.items() if finite(figure.get("value"))}
    points = [
        Mark(who.series, x.at(at), 100 - y.at(figure["value"]), words=f"{who.name} at {at:g}: {in_words(figure)}")
        for at, figure in known.items()
    ]
    spans = [(x.at(at), figure) for at, figure in known.items() if bounded(figure)]
    upper = [(at, 100 - y.at(figure["high"])) for at, figure in spans]
    lower = [(at, 100 - y.at(figure["low"])) for at, figure in spans]
    band = path([*upper, *reversed(lower)]) + "Z" if len(spans) > 1 else ""
    return Curve(who.series, path([(point.x, point.y) for point in points]), band, points)


def path(points: Sequence[tuple[float, float]]) -> str:
    """SVG path data through points; empty for less than two."""
    return "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in points) if len(points) > 1 else ""


@dataclass(frozen=True)
class Point:
    """A model, or a version of a training (its series is negative), in the safety-utility plane. `label`: its short
    name."""

    who: Who
    safety: Figure
    utility: Figure
    label: str = ""
    best: bool = False


@dataclass(frozen=True)
class Scatter:
    x: Axis
    y: Axis
    marks: list[Mark]
    versions: list[Mark]
    path: str


def scatter(models: Sequence[Point], versions: Sequence[Point]) -> Scatter:
    """Models with their intervals, and versions of a training joined in their order.

    Models are labelled first, then the best version, both always; then the last version, the first and the others where
    they cover nothing. A version without a label keeps its tooltip and its row in the table.
    """
    points = [*models, *versions]
    x = axis(extent(point.safety for point in points))
    y = axis(extent(point.utility for point in points))
    placed = [_placed(point, x, y) for point in points]
    trained = range(len(models), len(points))
    best = [i for i in trained if points[i].best]
    order = dict.fromkeys([*range(len(models)), *best, *trained[-1:], *trained])
    taken = [box for i, one in enumerate(placed) for box in _covered(one, i < len(models))]
    for i in order:
        placed[i] = _labelled(placed[i], taken, crossed=i < len(models), always=i < len(models) or i in best)
    own, versions_placed = placed[: len(models)], placed[len(models) :]
    return Scatter(x, y, own, versions_placed, path([(one.x, one.y) for one in versions_placed]))


def _placed(point: Point, x: Axis, y: Axis) -> Mark:
    words = f"{point.who.name}: safety {in_words(point.safety)}; utility {in_words(point.utility)}"
    at, up = x.at(point.safety["value"]), 100 - y.at(point.utility["value"])
    one = Mark(point.who.series, at, up, words=words, label=point.label or point.who.name)
    if bounded(point.safety):
        one = replace(one, x_low=x.at(point.safety["low"]), x_high=x.at(point.safety["high"]))
    if bounded(point.utility):
        one = replace(one, y_low=100 - y.at(point.utility["low"]), y_high=100 - y.at(point.utility["high"]))
    return one


_SIDES = ((10, -6, "start"), (-10, -6, "end"), (10, 14, "start"), (-10, 14, "end"))  # beside the cross of intervals
_ABOVE_BELOW = ((0, -9, "middle"), (0, 18, "middle"))  # for marks without one
Box = tuple[float, float, float, float]


def _labelled(one: Mark, taken: list[Box], crossed: bool, always: bool) -> Mark:
    """With its label where it is free, without one where it is not; `taken` grows by it."""
    width = min(len(one.label), 24) * LETTER_WIDTH
    around = _SIDES if crossed else _ABOVE_BELOW + _SIDES
    sides = [(side, _box(one.x, one.y, side[0], side[1], width, side[2])) for side in around]
    inside = [(side, box) for side, box in sides if box[0] >= 0 and box[2] <= NOMINAL_WIDTH and box[1] >= 0]
    free = [(side, box) for side, box in inside if not any(_overlap(box, other) for other in taken)]
    if not free and not always:
        return replace(one, label="")
    (dx, dy, anchor), box = (free or inside or sides)[0]
    taken.append(box)
    return replace(one, label_x=dx, label_y=dy, anchor=anchor)


def _covered(one: Mark, crossed: bool) -> list[Box]:
    """What a mark covers: itself and, if it is drawn with them, its intervals."""
    boxes = [_box(one.x, one.y, 0, 4, 10, "middle")]
    across, down = NOMINAL_WIDTH / 100, NOMINAL_HEIGHT / 100
    if crossed and one.x_low is not None and one.x_high is not None:
        boxes.append((one.x_low * across, one.y * down - 1, one.x_high * across, one.y * down + 1))
    if crossed and one.y_low is not None and one.y_high is not None:
        boxes.append((one.x * across - 1, one.y_high * down, one.x * across + 1, one.y_low * down))
    return boxes


def _box(x: float, y: float, dx: float, dy: float, width: float, anchor: str) -> Box:
    """Left, top, right and bottom of a text, in nominal pixels."""
    left = x / 100 * NOMINAL_WIDTH + dx - {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor] * width
    middle = y / 100 * NOMINAL_HEIGHT + dy - 4
    return left, middle - LINE_HEIGHT / 2, left + width, middle + LINE_HEIGHT / 2


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
