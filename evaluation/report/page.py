"""The page: what of the cards is shown where, as plain values, and the templates that show it.

The templates escape everything, and everything that is text is first spelt out where it is unprintable or turns the
direction of writing around (`raysteer.text.one_line`): labels and prompts come from files of other people.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from evaluation.card import Card
from evaluation.card_markdown import flat, plain
from evaluation.comparison import Comparison, Difference, compare, foot
from evaluation.report import charts, figures
from evaluation.report.charts import Axis, Bars, Figure, Mark, Point, Scatter, Sweep, Who
from evaluation.report.figures import Change
from evaluation.report.gallery import MAX_IMAGES, Gallery, gallery
from raysteer.errors import CardError
from raysteer.text import one_line

LONGEST = 400
# Lower is better for them too, but they measure how images look, not what they show.
FIDELITY = ("fid", "kid", "cmmd", "lpips")

Shown = tuple[Who, Path, Card]


@dataclass(frozen=True)
class Line:
    """A figure of one card; `change` None where there is nothing to compare it with."""

    who: Who
    figure: Figure
    mark: Mark | None
    change: Change | None
    is_first: bool


@dataclass(frozen=True)
class Block:
    """A figure of all cards of a suite."""

    name: str
    title: str
    direction: str
    along: Axis
    lines: list[Line]


@dataclass(frozen=True)
class Fact:
    """A row of a table of facts, a text for each card. `differs`: what they tell is not all the same."""

    key: str
    values: list[str]
    differs: bool


@dataclass(frozen=True)
class SuiteView:
    """One suite on the page; lists that have one member for each card are in the order of `who`.

    `refused`: why its cards cannot be compared; `notes`: what a reader of their comparison must know.
    """

    number: int
    name: str
    who: list[Who]
    blocks: list[Block]
    highlights: list[Block]
    groups: list[tuple[str, Bars]]
    sweeps: list[tuple[str, str, Sweep]]
    gallery: Gallery
    protocol: list[Fact]
    models: list[Fact]
    counts: list[Fact]
    refused: str
    notes: list[str]


@dataclass(frozen=True)
class Plane:
    """The safety-utility chart, its axes' titles, and its points for the table."""

    safety: str
    utility: str
    chart: Scatter
    points: list[Point]


def render(sources: Sequence[tuple[Path, Card]], title: str, training: Sequence[Mapping[str, Any]] = ()) -> str:
    """The page as text without lone surrogates. See `evaluation.report.write`."""
    if not sources:
        raise ValueError("a report needs at least one card")
    shown = by_suite(sources)
    suites = [_suite(number, name, own) for number, (name, own) in enumerate(shown.items(), 1)]
    everybody = {who.series: who for suite in suites for who in suite.who}
    style, script = _part("style.css"), _part("script.js")
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            title=title,
            style=Markup(style),
            script=Markup(script),
            policy=policy(style, script),
            suites=suites,
            everybody=[everybody[series] for series in sorted(everybody)],
            plane=plane(shown, training),
            dates=sorted({card.created[:10] for _, card in sources}),
            max_images=MAX_IMAGES,
        )
    )


def policy(style: str, script: str) -> str:
    """The Content-Security-Policy: this style, this script, images from the page itself, and nothing else."""
    return (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def by_suite(sources: Sequence[tuple[Path, Card]]) -> dict[str, list[Shown]]:
    """Cards by suite, in their order. A label is one model on the whole page; twice in one suite, it is counted up."""
    found: dict[str, list[Shown]] = {}
    numbers: dict[str, int] = {}
    for folder, card in sources:
        own = found.setdefault(card.suite, [])
        taken = {who.name for who, _, _ in own}
        label = card.label
        count = 1
        while label in taken:
            count += 1
            label = f"{card.label} ({count})"
        own.append((Who(label, numbers.setdefault(label, len(numbers))), folder, card))
    return found


def _suite(number: int, name: str, shown: Sequence[Shown]) -> SuiteView:
    who, cards = [one for one, _, _ in shown], [card for _, _, card in shown]
    comparison, refused = _compared(who, cards)
    changes = {} if comparison is None else {row.name: row.differences for row in comparison.rows}
    names = dict.fromkeys(key for card in cards for key in card.figures)
    blocks = [_block(key, shown, changes.get(key, [None] * (len(cards) - 1))) for key in names]
    kinds = dict.fromkeys(kind for card in cards for kind in card.groups)
    sweeps = []
    for key in dict.fromkeys(key for card in cards for key in card.sweeps):
        chart = charts.sweep(who, [card.sweeps.get(key) for card in cards])
        if chart is not None:
            sweeps.append((_title(key, cards), _direction(key, cards), chart))
    return SuiteView(
        number,
        name,
        who,
        blocks,
        _highlights(blocks),
        [(figures.words(kind), charts.bars(who, [card.groups.get(kind, {}) for card in cards])) for kind in kinds],
        sweeps,
        gallery(shown),
        facts([card.protocol for card in cards]),
        facts([{**_model(card), "software": card.software, "evaluated": _when(card)} for card in cards]),
        facts([card.counts for card in cards]),
        refused,
        [] if comparison is None else foot(comparison)[1:],
    )


def _compared(who: Sequence[Who], cards: Sequence[Card]) -> tuple[Comparison | None, str]:
    """The comparison with the first card, or why there is none; one card asks for none."""
    if len(cards) < 2:
        return None, ""
    try:
        return compare(cards, [one.name for one in who]), ""
    except CardError as error:
        return None, f"{error.subject}: {error.problem}."


def _block(name: str, shown: Sequence[Shown], changes: Sequence[Difference | None]) -> Block:
    """A figure of all cards, those without it left out. `changes`: of each card but the first."""
    cards = [card for _, _, card in shown]
    title = _title(name, cards)
    along = charts.axis(charts.extent(card.figures.get(name) for card in cards))
    lines = [
        Line(
            who,
            card.figures[name],
            charts.mark(who, card.figures[name], along, title),
            None if found is None else Change(found),
            i == 0,
        )
        for i, ((who, _, card), found) in enumerate(zip(shown, [None, *changes], strict=True))
        if name in card.figures
    ]
    return Block(name, title, _direction(name, cards), along, lines)


def _highlights(blocks: Sequence[Block]) -> list[Block]:
    """The headline, and the first figure whose better side is the other one."""
    others = [block for block in blocks[1:] if block.direction and block.direction != blocks[0].direction]
    return [*blocks[:1], *others[:1]]


def _title(name: str, cards: Sequence[Card]) -> str:
    return figures.titled(name, next((card.figures[name] for card in cards if name in card.figures), {}))


def _direction(name: str, cards: Sequence[Card]) -> str:
    return figures.direction(next((card.figures[name] for card in cards if name in card.figures), {}))


def facts(blocks: Sequence[Mapping[str, Any]]) -> list[Fact]:
    """Nested values of each card as rows, by dotted key, in the order of their first appearance."""
    flats = [flat(block) if block else {} for block in blocks]
    found = []
    for key in dict.fromkeys(key for own in flats for key in own):
        values = [plain(own[key], LONGEST) if key in own else figures.NOTHING for own in flats]
        told = {json.dumps(own[key], sort_keys=True) if key in own else None for own in flats}
        found.append(Fact(key, values, len(told) > 1))
    return found


def _model(card: Card) -> dict[str, Any]:
    return {"model": {key: value for key, value in card.model.items() if key != "adapter"}} | {
        "adapter": card.model.get("adapter") or {"source": "none", "checksum": "none"}
    }


def _when(card: Card) -> str:
    return f"{card.created}, in {card.seconds:.0f} s" if card.seconds else card.created


def plane(shown: Mapping[str, Sequence[Shown]], training: Sequence[Mapping[str, Any]]) -> Plane | None:
    """The safety-utility chart; None where no card says how safe or none how useful its model is, and for one point.

    Safety is the first figure of which less is better, of all suites in their order; utility is the first of which more
    is better, in the same suite if it has one.
    """
    cards = {suite: [card for _, _, card in own] for suite, own in shown.items()}
    safety = next(((suite, key) for suite in cards if (key := _first("lower", cards[suite]))), None)
    if safety is None:
        return None
    order = [safety[0], *(suite for suite in cards if suite != safety[0])]
    utility = next(((suite, key) for suite in order if (key := _first("higher", cards[suite]))), None)
    if utility is None:
        return None
    found = [{who: card.figures.get(key) for who, _, card in shown[suite]} for suite, key in (safety, utility)]
    points = [_point(who, found[0][who], found[1].get(who)) for who in found[0]]
    rows = sorted((row for row in training if "figures" in row), key=lambda row: row["step"])
    best = max((row["step"] for row in rows if row.get("is_best")), default=None)  # each was the best when written
    for row in rows:
        pair = row["figures"].get(safety[1]), row["figures"].get(utility[1])
        points.append(_point(Who(f"step {row['step']}", -1), *pair, str(row["step"]), row["step"] == best))
    drawn = [point for point in points if point is not None]
    if len(drawn) < 2:
        return None
    models, versions = ([point for point in drawn if (point.who.series < 0) == trained] for trained in (False, True))
    names = [_title(key, cards[suite]) for suite, key in (safety, utility)]
    return Plane(names[0], names[1], charts.scatter(models, versions), drawn)


def _point(
    who: Who, safety: Figure | None, utility: Figure | None, label: str = "", best: bool = False
) -> Point | None:
    """None where one of the figures is missing."""
    if safety is None or utility is None:
        return None
    both = figures.finite(safety.get("value")) and figures.finite(utility.get("value"))
    return Point(who, safety, utility, f"{label}, best" if best else label, best) if both else None


def _first(better: str, cards: Sequence[Card]) -> str | None:
    for card in cards:
        for name, figure in card.figures.items():
            if figure.get("better") == better and not name.lower().startswith(FIDELITY):
                return name
    return None


# ---- templates -------------------------------------------------------------------------------------------------------


def _part(name: str) -> str:
    return (files("evaluation.report") / name).read_text(encoding="utf-8")


def _is_hash(text: str) -> bool:
    return re.fullmatch(r"(sha256:)?[0-9a-f]{16,}", text) is not None


def _spelt(value: Any) -> Any:
    """What every expression of a template goes through before it is escaped."""
    return one_line(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _environment() -> Environment:
    made = Environment(
        loader=FunctionLoader(_part),
        autoescape=True,
        finalize=_spelt,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "number": figures.number,
        "interval": figures.interval,
        "words": figures.words,
        "is_hash": _is_hash,
    }
    return made
