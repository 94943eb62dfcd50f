"""Pictures of a comparison: every figure with its interval, and every figure over its thresholds."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Canvas
from matplotlib.layout_engine import ConstrainedLayoutEngine

from evaluation.card_markdown import number, title
from evaluation.comparison import Comparison
from raysteer.text import one_line

FIGURES, SWEEPS = "figures.png", "thresholds.png"
# Okabe and Ito 2008: told apart by people with any colour vision.
COLOURS = ("#7f7f7f", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_COLUMNS = 3


def draw(comparison: Comparison, folder: Path) -> list[Path]:
    """Write the pictures, each whole or not at all, and say which there are; without a sweep there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [_save(_bars(comparison), folder / FIGURES)]
    sweeps = list(dict.fromkeys(name for card in comparison.cards for name in card.sweeps))
    if sweeps:
        written.append(_save(_sweeps(comparison, sweeps), folder / SWEEPS))
    return written


def _bars(comparison: Comparison) -> Canvas:
    """A panel for each figure, because a rate and a FID share no axis; a bar for each card."""
    names = comparison.names
    canvas, axes = _panels(len(comparison.rows), 0.9 + 0.36 * len(names), comparison)
    for axis, row in zip(axes, comparison.rows, strict=False):
        for place, figure in enumerate(row.figures):
            if figure is None:
                continue
            value = float(figure["value"])
            axis.barh(place, value, color=_colour(place), height=0.62, alpha=0.85)
            low, high = _bounds(figure)
            axis.plot([low, high], [place, place], color="#222222", linewidth=1.3, solid_capstyle="butt")
            axis.annotate(
                number(value), (max(value, high), place), (4, 0), textcoords="offset points", fontsize=8, va="center"
            )
        axis.set_yticks(range(len(names)), [_short(name) for name in names], parse_math=False)
        axis.set_ylim(len(names) - 0.4, -0.6)
        left, right = axis.get_xlim()
        axis.set_xlim(left, right + 0.18 * (right - left))  # room for the numbers
        _dress(axis, title(row.name, {"title": row.title, "better": row.better}), "x")
    return canvas


def _sweeps(comparison: Comparison, sweeps: list[str]) -> Canvas:
    """A panel for each sweep, a line with its band for each card, and where the headline is taken."""
    canvas, axes = _panels(len(sweeps), 2.5, comparison)
    for axis, name in zip(axes, sweeps, strict=False):
        named = name
        for place, card in enumerate(comparison.cards):
            if name not in card.sweeps:
                continue
            sweep = card.sweeps[name]
            bounds = [_bounds(figure) for figure in sweep["figures"]]
            values = [float(figure["value"]) for figure in sweep["figures"]]
            colour = _colour(place)
            low, high = [bound[0] for bound in bounds], [bound[1] for bound in bounds]
            axis.fill_between(sweep["thresholds"], low, high, color=colour, alpha=0.18, linewidth=0)
            axis.plot(sweep["thresholds"], values, color=colour, linewidth=1.6, marker=".", label=str(place))
            axis.axvline(float(sweep["at"]), color="#333333", linewidth=0.9, linestyle=":")
            named = title(name, card.figures[name]) if name in card.figures else name
        axis.set_xlabel("threshold", fontsize=9)
        _dress(axis, named, "y")
        for text in axis.legend(frameon=False, fontsize=8).get_texts():
            text.set_parse_math(False)  # names are data, and a label may not begin with an underscore
            text.set_text(_short(comparison.names[int(text.get_text())]))
    return canvas


def _panels(count: int, height: float, comparison: Comparison) -> tuple[Canvas, list[Any]]:
    columns = min(_COLUMNS, count)
    rows = math.ceil(count / columns)
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)
    canvas = Canvas(figsize=(max(5.0, 4.0 * columns), 0.5 + height * rows), layout=layout)
    axes = list(canvas.subplots(rows, columns, squeeze=False).flat)
    for spare in axes[count:]:
        spare.set_visible(False)
    heading = one_line(f"{comparison.cards[0].suite}: {' / '.join(map(_short, comparison.names))}")
    canvas.suptitle(heading, fontsize=11, parse_math=False)
    return canvas, axes[:count]


def _dress(axis: Any, heading: str, grid: str) -> None:
    axis.set_title(_short(heading, 48), fontsize=10, loc="left", parse_math=False)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8.5)
    axis.grid(axis=grid, color="#e6e6e6", linewidth=0.7)
    axis.set_axisbelow(True)


def _bounds(figure: Mapping[str, Any]) -> tuple[float, float]:
    """The interval; the value twice where there is none."""
    low, high = figure["low"], figure["high"]
    value = float(figure["value"])
    return (value, value) if low is None or high is None else (float(low), float(high))


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def _short(text: str, limit: int = 28) -> str:
    line = one_line(text)
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _save(canvas: Canvas, file: Path) -> Path:
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    canvas.savefig(beside, format="png", dpi=130, facecolor="white")
    os.replace(beside, file)
    return file
