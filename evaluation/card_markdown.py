"""A metric card as Markdown, for a repository or a model's page. Every text in it is data: it is shown, never read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from raysteer.text import one_line

if TYPE_CHECKING:
    from evaluation.card import Card

# As entities, what ends a cell, opens a tag, code or mathematics, or escapes: a backslash before `|` is read
# differently from parser to parser. What only means emphasis or a link gets a backslash.
_ENTITIES = {character: f"&#{ord(character)};" for character in "&<>|`$\\"}
_ESCAPED = {character: f"\\{character}" for character in "*_[]~"}
_MARKUP = str.maketrans({**_ENTITIES, **_ESCAPED})
_ADDRESS = re.compile(r"(?i)(?<=[a-z]):(?=//)|(?<=www)\.")
_LONGEST = 200
BETTER = {"lower": "↓", "higher": "↑"}


def cell(text: Any, limit: int | None = _LONGEST) -> str:
    """Text for a cell or a heading that stands for itself: no markup, link, tag or line break in it works; cut after
    `limit` characters."""
    line = one_line(str(text).strip())
    line = line if limit is None or len(line) <= limit else line[: limit - 1] + "…"
    return _ADDRESS.sub(lambda found: f"&#{ord(found.group())};", line.translate(_MARKUP))


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]], right: int = 1) -> str:
    """A table; columns from `right` on are aligned right. Cells are escaped here."""
    rule = ["---" if index < right else "---:" for index in range(len(header))]
    lines = [[cell(text) for text in header], rule, *([cell(text) for text in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None) -> str:
    """Two to four digits behind the point, by the figure's size; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    size = abs(value)
    digits = 4 if 0 < size < 0.01 else 3 if size < 10 else 2 if size < 100 else 1
    return f"{value:.{digits}f}"


def interval(figure: Mapping[str, Any]) -> str:
    """``low to high``, or a dash. (Brackets would need escapes.)"""
    bounds = [figure.get("low"), figure.get("high")]
    if any(bound is None or not math.isfinite(bound) for bound in bounds):
        return "–"
    return f"{number(bounds[0])} to {number(bounds[1])}"


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """A nested mapping as dotted path to value; lists and empty mappings are values."""
    if isinstance(value, Mapping) and (value or not path):
        return {
            below: leaf
            for key, inner in value.items()
            for below, leaf in flat(inner, f"{path}.{key}" if path else str(key)).items()
        }
    return {path: value}


def plain(value: Any, limit: int = 80) -> str:
    """A JSON value for people: texts without quotes, long lists by their first members and their length."""
    if isinstance(value, str):
        words = value
    elif isinstance(value, list | tuple):
        words = ", ".join(plain(one) for one in value)
        if len(words) > limit:
            shown = ", ".join(plain(one, 20) for one in value[:3])
            words = f"{shown}, … ({len(value)} values)"
    else:
        words = "none" if value is None else json.dumps(value, ensure_ascii=False)
    return words if len(words) <= limit else words[: limit - 1] + "…"


def title(name: str, figure: Mapping[str, Any]) -> str:
    """What a figure is called, with an arrow to where better is."""
    return f"{figure['title'] or name} {BETTER[figure['better']]}"


def markdown(card: Card) -> str:
    """The whole card: figures with intervals, groups, thresholds, protocol, model, software, counts."""
    parts = [
        f"# {cell(card.suite)}: {cell(card.label)}",
        f"Made {cell(card.created)} in {card.seconds:.0f} s. Intervals are 95 %, by bootstrap over prompts; "
        f"{BETTER['lower']} lower is better, {BETTER['higher']} higher is better.",
        "## Figures",
        markdown_table(
            ["figure", "name", "value", "95 % interval", "standard error", "n"],
            ([title(name, figure), name, *_cells(figure, error=True)] for name, figure in card.figures.items()),
            right=2,
        ),
    ]
    for kind, groups in card.groups.items():
        rows = ([label, *_cells(figure)] for label, figure in groups.items())
        parts += [f"## By {cell(kind)}", markdown_table([kind, "value", "95 % interval", "n"], rows)]
    for name, sweep in card.sweeps.items():
        named = title(name, card.figures[name]) if name in card.figures else name
        swept = zip(sweep["thresholds"], sweep["figures"], strict=True)
        rows = ([_threshold(at, sweep["at"]), *_cells(figure)] for at, figure in swept)
        parts += [
            f"## Thresholds: {cell(named)}",
            f"The figure above is taken at {cell(plain(sweep['at']))}.",
            markdown_table(["threshold", "value", "95 % interval", "n"], rows),
        ]
    blocks = {"Protocol": card.protocol, "Model": card.model, "Counts": card.counts, "Software": card.software}
    notes = {"Protocol": "Two cards are comparable where all of this is equal."}
    for heading, block in blocks.items():
        rows = ([path, plain(value)] for path, value in flat(block).items())
        parts += [f"## {heading}", *([notes[heading]] if heading in notes else [])]
        parts.append(markdown_table(["", ""], rows, right=2) if block else "None.")
    return "\n\n".join(parts) + "\n"


def _cells(figure: Mapping[str, Any], error: bool = False) -> list[str]:
    spread = [number(figure["standard_error"])] if error else []
    return [number(figure["value"]), interval(figure), *spread, str(figure["n"])]


def _threshold(value: float, at: float) -> str:
    return f"{plain(value)} (headline)" if value == at else plain(value)
