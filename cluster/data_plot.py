"""The picture of a dataset: spread of the scores inside groups, balance of the prompt classes, reward by version."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from cluster.data import DataReport, Facts, figures
from raysteer.text import one_line

COLOURS = {"safe": "#1b7f9e", "unsafe": "#d1603d", "utility": "#6a8d3a"}
_OTHER = "#777777"
_BINS = 30


def draw(report: DataReport, file: Path) -> None:
    """Write the PNG. Names of classes are data: they are never read as mathematics."""
    figure = Figure(figsize=(11.5, 3.4), layout=ConstrainedLayoutEngine(w_pad=0.08))
    spread, balance, versions = figure.subplots(1, 3)
    _spread(spread, report)
    _balance(balance, report)
    _versions(versions, report)
    for axis in (spread, balance, versions):
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
        axis.grid(axis="y", color="#e6e6e6", linewidth=0.7)
        axis.set_axisbelow(True)
    title = one_line(f"{report.dataset.folder}: {len(report.groups)} groups")
    figure.suptitle(title, fontsize=10, parse_math=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130, facecolor="white")


def _spread(axis: Any, report: DataReport) -> None:
    by_class = {name: [float(g.reward.std()) for g in groups] for name, groups in report.classes().items()}
    bins = np.linspace(0.0, max([1e-6, *(value for values in by_class.values() for value in values)]), _BINS + 1)
    for name, values in by_class.items():
        axis.hist(values, bins, color=_colour(name), alpha=0.55, linewidth=0)
    axis.set_title("spread inside groups", fontsize=10, loc="left")
    axis.set_xlabel("standard deviation of a group's rewards")
    axis.set_ylabel("groups")


def _balance(axis: Any, report: DataReport) -> None:
    counts = {name: len(groups) for name, groups in report.classes().items()}
    places = np.arange(len(counts))
    axis.bar(places, list(counts.values()), color=[_colour(name) for name in counts], width=0.6)
    axis.set_xticks(places, [one_line(name[:24]) for name in counts], parse_math=False)
    axis.set_title("groups by prompt class", fontsize=10, loc="left")


def _versions(axis: Any, report: DataReport) -> None:
    def line(groups: Sequence[Facts], colour: str) -> None:
        by_version = report.versions(groups)
        means = [figures(found)["reward_mean"] for found in by_version.values()]
        axis.plot(list(by_version), means, color=colour, linewidth=1.4, marker=".", markersize=4)

    for name, groups in report.classes().items():
        line(groups, _colour(name))
    line(report.groups, "#333333")
    axis.set_title("mean reward by version (black: all)", fontsize=10, loc="left")
    axis.set_xlabel("adapter version that drew the groups")


def _colour(prompt_class: str) -> str:
    return COLOURS.get(prompt_class, _OTHER)
