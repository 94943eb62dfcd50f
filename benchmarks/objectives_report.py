"""What `benchmarks.objectives` has measured, as tables and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure as Canvas
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

FIGURES = ("reward", "reward_corrected", "inappropriate_rate", "utility", "diversity", "blank_rate_unsafe")
WITH_INTERVAL = ("reward", "inappropriate_rate")
PLOTTED = {
    "reward": "reward (dashed: corrected)",
    "inappropriate_rate": "inappropriate rate",
    "utility": "utility",
    "diversity": "diversity",
}
COSTS = {"forwards": "denoiser forwards", "seconds": "wall-clock seconds", "images": "images drawn"}


@dataclass(frozen=True)
class Point:
    """A checkpoint: what it has cost until then, and its figures {name: {value, low, high}}.

    `err`: err_theta / err_ref of the steps before it, None where an objective has none.
    """

    method: str
    seed: int
    step: int
    forwards: int
    seconds: float
    images: int
    err: float | None
    figures: dict[str, dict[str, float]]


def curves(points: Sequence[Point]) -> dict[tuple[str, int], list[Point]]:
    """Points by method and seed, in the order of their steps."""
    found: dict[tuple[str, int], list[Point]] = {}
    for point in points:
        found.setdefault((point.method, point.seed), []).append(point)
    return {name: sorted(own, key=lambda point: point.step) for name, own in found.items()}


def cost_of(points: Sequence[Point], reward: float, cost: str) -> float | None:
    """What it took to reach a reward first, along a line between two checkpoints; None if it never did."""
    for before, after in pairwise(points):
        low, high = before.figures["reward"]["value"], after.figures["reward"]["value"]
        if high >= reward > low:
            share = (reward - low) / (high - low)
            return float((1 - share) * getattr(before, cost) + share * getattr(after, cost))
    return None


def tables(points: Sequence[Point]) -> str:
    """Where every run ends and its best reward on the way, and what it took to a reward that all have reached."""
    runs = curves(points)
    start = next(iter(runs.values()))[0]
    head = ("method", "seed", "steps", *FIGURES, "best reward (at step)", "err_theta / err_ref", *COSTS.values())
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head), _row(["start", "", "", *_cells(start), *[""] * 5])]
    for (method, seed), own in runs.items():
        last, best = own[-1], max(own, key=lambda point: point.figures["reward"]["value"])
        err = "" if last.err is None else f"{last.err:.2f}"
        at = f"{best.figures['reward']['value']:.3f} ({best.step})"
        costs = (f"{last.forwards:,}", f"{last.seconds:.0f}", f"{last.images:,}")
        lines.append(_row([method, str(seed), str(last.step), *_cells(last), at, err, *costs]))
    reached = min(max(point.figures["reward"]["value"] for point in own) for own in runs.values())
    lines += ["", f"What it took to a reward of {reached:.3f}, the highest that all runs have reached:", ""]
    lines += [_row(["method", "seed", *COSTS.values()]), "|" + "---|" * (2 + len(COSTS))]
    for (method, seed), own in runs.items():
        found = [cost_of(own, reached, cost) for cost in COSTS]
        lines.append(_row([method, str(seed), *("" if value is None else f"{value:,.0f}" for value in found)]))
    return "\n".join(lines)


def plot(points: Sequence[Point], file: Path) -> None:
    """The figures against each cost, with 95 % bootstrap intervals; a colour for each method."""
    canvas = Canvas(figsize=(12, 11), layout=ConstrainedLayoutEngine())
    axes = canvas.subplots(len(PLOTTED), len(COSTS), sharex="col", sharey="row")
    methods = list(dict.fromkeys(point.method for point in points))
    for column, (cost, words) in enumerate(COSTS.items()):
        for (method, _), own in curves(points).items():
            colour, x = f"C{methods.index(method)}", [getattr(point, cost) for point in own]
            for row, name in enumerate(PLOTTED):
                y, low, high = (np.array([p.figures[name][key] for p in own]) for key in ("value", "low", "high"))
                axes[row][column].errorbar(x, y, (y - low, high - y), color=colour, marker="o", ms=4, elinewidth=0.7)
            credited = [point.figures["reward_corrected"]["value"] for point in own]
            axes[0][column].plot(x, credited, color=colour, lw=1.2, ls="--")
        axes[-1][column].set_xlabel(words)
    for row, words in enumerate(PLOTTED.values()):
        axes[row][0].set_ylabel(words)
    handles = [Line2D([], [], color=f"C{index}", marker="o", ms=4) for index in range(len(methods))]
    axes[0][-1].legend(handles, methods, frameon=False, fontsize=9)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#e6e6e6", linewidth=0.7)
    canvas.savefig(file, dpi=110, facecolor="white")


def _cells(point: Point) -> list[str]:
    def cell(name: str) -> str:
        figure = point.figures[name]
        interval = f" [{figure['low']:.3f}, {figure['high']:.3f}]" if name in WITH_INTERVAL else ""
        return f"{figure['value']:.3f}{interval}"

    return [cell(name) for name in FIGURES]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
