"""Metric cards side by side: figures, paired differences to the first card, and which of them chance does not explain.

Cards of different protocols are refused: their figures measure different things.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from evaluation.card import Card
from evaluation.card_markdown import BETTER, cell, flat, interval, markdown_table, number, plain
from evaluation.paired import BOOTSTRAP_SAMPLES, NOBODY_DIFFERS, holm, paired
from raysteer.errors import CardError
from raysteer.text import one_line

ALPHA = 0.05
_ABSENT = object()
_SHORT_LIST = 8


@dataclass(frozen=True)
class Difference:
    """A card's figure minus the first card's.

    Attributes:
        value: over the prompts that count in both, where the figure has a sample; else of the two figures.
        low, high: 95 %, paired bootstrap; None without a sample, as are the following.
        p: two-sided, of the sign-flip test.
        p_holm: `p`, corrected for all tests of the comparison.
        pairs: prompts that count in both.
        test: where `p` is from.
        reading: "better" or "worse" if `p_holm` is below `ALPHA`, "not clear" if not, "same" where no prompt differs;
            "better, untested", "worse, untested" and "same" without a sample.
    """

    value: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_holm: float | None = None
    pairs: int | None = None
    test: str | None = None
    reading: str = ""


@dataclass(frozen=True)
class Row:
    """A figure of all cards: as in the cards, None where a card has it not, and for each card but the first its
    difference, None where there is nothing to subtract."""

    name: str
    title: str
    better: str
    figures: tuple[Mapping[str, Any] | None, ...]
    differences: tuple[Difference | None, ...]


@dataclass(frozen=True)
class Comparison:
    """Cards of one protocol. `tests`: how many p-values the correction covers; `notes`: what a reader must know."""

    names: tuple[str, ...]
    cards: tuple[Card, ...]
    rows: tuple[Row, ...]
    tests: int
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        return {
            "suite": self.cards[0].suite,
            "protocol": self.cards[0].protocol,
            "alpha": ALPHA,
            "correction": "holm",
            "tests": self.tests,
            "notes": list(self.notes),
            "cards": [
                {
                    "name": name,
                    "label": card.label,
                    "created": card.created,
                    "model": card.model,
                    "software": card.software,
                    "counts": card.counts,
                    "groups": card.groups,
                    "sweeps": card.sweeps,
                }
                for name, card in zip(self.names, self.cards, strict=True)
            ],
            "figures": {
                row.name: {
                    "title": row.title,
                    "better": row.better,
                    "values": list(row.figures),
                    "differences": [None if found is None else asdict(found) for found in row.differences],
                }
                for row in self.rows
            },
        }


def compare(
    cards: Sequence[Card], names: Sequence[str] | None = None, samples: int = BOOTSTRAP_SAMPLES, seed: int = 0
) -> Comparison:
    """Compare cards with the first of them.

    Args:
        cards: at least two.
        names: what each is called, all different; their labels by default.
        samples: of the bootstrap.
        seed: of bootstrap and sign flips.

    Raises:
        CardError: fewer than two cards, different protocols (all fields that differ are named), or samples that cannot
            be of the same prompts.
    """
    names = [card.label for card in cards] if names is None else names
    if len(cards) < 2:
        raise CardError(", ".join(names) or "no card", "one card cannot be compared", "name a second one")
    first = cards[0]
    for name, card in zip(names[1:], cards[1:], strict=True):
        _check_protocol(first, card, names[0], name)
        _check_samples(first, card, names[0], name)
    rows = []
    for name in dict.fromkeys(name for card in cards for name in card.figures):
        figures = tuple(card.figures.get(name) for card in cards)
        known = next(figure for figure in figures if figure is not None)
        differences = tuple(_difference(name, first, card, samples, seed) for card in cards[1:])
        rows.append(Row(name, str(known["title"]), str(known["better"]), figures, differences))
    rows, tests = _corrected(rows)
    return Comparison(tuple(names), tuple(cards), tuple(rows), tests, tuple(_notes(names, cards, rows)))


def protocol_differences(first: Card, second: Card) -> list[str]:
    """What differs between two protocols, a line ``dotted.path value / value`` for each field."""
    return _differences({**first.protocol, "suite": first.suite}, {**second.protocol, "suite": second.suite})


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    one, other = flat(first), flat(second)
    return [
        _words(path, one.get(path, _ABSENT), other.get(path, _ABSENT))
        for path in dict.fromkeys([*one, *other])
        if not _equal(one.get(path, _ABSENT), other.get(path, _ABSENT))
    ]


def _equal(one: Any, other: Any) -> bool:
    """Equality of JSON values: 7 is 7.0, but true is not 1."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def _words(path: str, one: Any, other: Any) -> str:
    # Of long values only the beginning is shown, and that may be the same in both.
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other) > _SHORT_LIST:
        at = [index for index in range(len(one)) if not _equal(one[index], other[index])]
        more = f" (and {len(at) - 1} more of {len(one)})" if len(at) > 1 else ""
        return f"{path}[{at[0]}] {_shown(one[at[0]])} / {_shown(other[at[0]])}{more}"
    if isinstance(one, str) and isinstance(other, str) and plain(one) == plain(other):
        same = next(
            (i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), min(len(one), len(other))
        )
        return f"{path} …{plain(one[same:])} / …{plain(other[same:])}"
    return f"{path} {_shown(one)} / {_shown(other)}"


def _shown(value: Any) -> str:
    return "missing" if value is _ABSENT else plain(value)


def _check_protocol(first: Card, card: Card, first_name: str, name: str) -> None:
    differences = protocol_differences(first, card)
    if differences:
        raise CardError(
            f"{first_name} and {name}",
            f"their figures cannot be compared, because the protocols differ: {', '.join(differences)}",
            "evaluate both by one protocol, that is with the same evaluation section",
        )


def _check_samples(first: Card, card: Card, first_name: str, name: str) -> None:
    for figure in first.samples.keys() & card.samples.keys():
        one, other = first.samples[figure], card.samples[figure]
        if len(one["values"]) != len(other["values"]) or not _equal(one["strata"], other["strata"]):
            sizes = f"{len(one['values'])} and {len(other['values'])} values"
            raise CardError(
                f"{first_name} and {name}",
                f"their samples of {figure} are not of the same prompts ({sizes}, or other strata) under one protocol",
                "one of the cards is damaged; evaluate again",
            )


def _difference(name: str, first: Card, card: Card, samples: int, seed: int) -> Difference | None:
    if name not in first.figures or name not in card.figures:
        return None
    if name in first.samples and name in card.samples:
        one, other = first.samples[name], card.samples[name]
        found = paired(one["values"], other["values"], one["strata"], samples, seed)
        if found is not None:
            return Difference(**vars(found))
    return Difference(float(card.figures[name]["value"]) - float(first.figures[name]["value"]))


def _corrected(rows: Sequence[Row]) -> tuple[list[Row], int]:
    """The rows with Holm's correction over all their tests, and with readings; the number of tests."""
    tested = [found.p for row in rows for found in row.differences if found is not None and found.p is not None]
    corrected = iter(holm(tested))
    done = []
    for row in rows:
        differences = []
        for found in row.differences:
            if found is not None:
                p_holm = None if found.p is None else next(corrected)
                found = replace(found, p_holm=p_holm, reading=_reading(found, p_holm, row.better))
            differences.append(found)
        done.append(replace(row, differences=tuple(differences)))
    return done, len(tested)


def _reading(found: Difference, p_holm: float | None, better: str) -> str:
    direction = "better" if (found.value < 0) == (better == "lower") else "worse"
    if p_holm is None:
        return "same" if found.value == 0 else f"{direction}, untested"
    if p_holm < ALPHA:
        return direction
    return "same" if found.test == NOBODY_DIFFERS else "not clear"


def _notes(names: Sequence[str], cards: Sequence[Card], rows: Sequence[Row]) -> list[str]:
    notes = []
    for name, card in zip(names[1:], cards[1:], strict=True):
        software = _differences(cards[0].software, card.software)
        if software:
            notes.append(f"{names[0]} and {name} were made by other software: {', '.join(software)}")
    for row in rows:
        counted = [_counted(card, row.name) for card in cards]
        for name, found, other in zip(names[1:], row.differences, counted[1:], strict=True):
            if found is not None and found.pairs is not None and found.pairs < max(counted[0], other):
                both = f"{found.pairs} prompts that count in both ({counted[0]} and {other} count)"
                notes.append(f"{row.title}: the difference of {name} is over the {both}")
    return notes


def _counted(card: Card, name: str) -> int:
    return sum(value is not None for value in card.samples[name]["values"]) if name in card.samples else 0


# ---- for people ------------------------------------------------------------------------------------------------------


def table(comparison: Comparison, only: str | None = None) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Header and rows. `only`: keep figures whose name contains this text; the correction covers all of them anyway.

    Raises:
        CardError: no figure's name does.
    """
    rows = [row for row in comparison.rows if only is None or only in row.name]
    if not rows:
        there = ", ".join(row.name for row in comparison.rows)
        raise CardError(f"--only {only}", "no figure's name contains this", f"there are: {there}")
    header = ["", comparison.names[0]]
    for name in comparison.names[1:]:
        header += [name, f"difference to {comparison.names[0]}", "p (Holm)", "reading"]
    lines = []
    for row in rows:
        cells = [figure_text(row.figures[0])]
        for figure, found in zip(row.figures[1:], row.differences, strict=True):
            cells += [figure_text(figure), *_told(found)]
        lines.append((f"{row.title or row.name} {BETTER[row.better]}", cells))
    return header, lines


def foot(comparison: Comparison) -> list[str]:
    """What the table's columns mean, and the notes; each a line that is safe to print."""
    arrows = f"{BETTER['lower']} lower is better, {BETTER['higher']} higher is better"
    covered = f"the {comparison.tests} tests" if comparison.tests > 1 else "the one test"
    tests = (
        f"p: two-sided sign-flip test over prompts, Holm-corrected over {covered} of this comparison; "
        f"'better' and 'worse' are said below {ALPHA:g}; a figure without a value for each prompt is not tested."
    )
    return [
        f"{arrows}; in parentheses 95 % intervals, by bootstrap over prompts, of a difference over pairs.",
        tests if comparison.tests else "No figure of both has a value for each prompt: nothing is tested.",
        *map(one_line, comparison.notes),
    ]


def comparison_markdown(comparison: Comparison, pictures: Sequence[str] = ()) -> str:
    """The comparison as a page: figures, groups, models, protocol. `pictures` are file names beside it."""
    names, cards = comparison.names, comparison.cards
    header, lines = table(comparison)
    parts = [
        f"# {cell(cards[0].suite)}: {' / '.join(map(cell, names))}",
        markdown_table(header, ([label, *cells] for label, cells in lines)),
        "\n".join(f"- {cell(line, None)}" for line in foot(comparison)),
        *(f"![{name.removesuffix('.png')}]({name})" for name in pictures),
    ]
    for kind in dict.fromkeys(kind for card in cards for kind in card.groups):
        found = [card.groups.get(kind, {}) for card in cards]
        labels = dict.fromkeys(label for groups in found for label in groups)
        rows = ([label, *(figure_text(groups.get(label)) for groups in found)] for label in labels)
        parts += [f"## By {cell(kind)}", "Not tested.", markdown_table([kind, *names], rows)]
    blocks = {"Models": [card.model for card in cards], "Software": [card.software for card in cards]}
    for heading, block in blocks.items():
        told = [flat(facts) for facts in block]
        paths = dict.fromkeys(path for facts in told for path in facts)
        rows = ([path, *(plain(facts[path]) if path in facts else "–" for facts in told)] for path in paths)
        parts += [f"## {heading}", markdown_table(["", *names], rows, right=len(names) + 1)]
    protocol = ([path, plain(value)] for path, value in flat(cards[0].protocol).items())
    parts += ["## Protocol", "The same for all.", markdown_table(["", ""], protocol, right=2)]
    return "\n\n".join(parts) + "\n"


def p_text(p: float | None) -> str:
    """A p-value as it is printed: three digits, and no zero."""
    return "–" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def figure_text(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return "–"
    bounds = interval(figure)
    return number(figure["value"]) if bounds == "–" else f"{number(figure['value'])} ({bounds})"


def _told(found: Difference | None) -> list[str]:
    if found is None:
        return ["–", "–", ""]
    value = f"{'+' if found.value > 0 else ''}{number(found.value)}"
    bounds = interval({"low": found.low, "high": found.high})
    return [value if bounds == "–" else f"{value} ({bounds})", p_text(found.p_holm), found.reading]
