"""The picture of an anchors report: one row per set, the scores of the prompts left, the sweep of alpha right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from cluster.anchors import SIDES, AnchorsReport, SetReport
from rewards.steering import kept_cosine

COLOURS = {"safe": "#1b7f9e", "unsafe": "#d1603d"}
_BINS = 40


def draw(report: AnchorsReport, file: Path) -> None:
    """Write the PNG."""
    rows = report.good
    layout = ConstrainedLayoutEngine(h_pad=0.06, w_pad=0.08)
    figure = Figure(figsize=(11, 1.1 + 2.3 * len(rows)), layout=layout)
    axes = figure.subplots(len(rows), 2, sharex="col", squeeze=False)
    everything = np.concatenate([scores for row in rows for scores in row.scores.values()])
    margin = 0.05 * float(np.ptp(everything)) + 1e-6
    bins = np.linspace(min(everything.min(), 0) - margin, max(everything.max(), 0) + margin, _BINS + 1)
    least = min(
        float(np.quantile(kept_cosine(row.scores[side], report.alphas[-1], report.term.mode), 0.05))
        for row in rows
        for side in SIDES
    )
    lowest = min(0.0, least - 0.03)
    for index, row in enumerate(rows):
        _histogram(axes[index, 0], report, row, bins, index == 0)
        _sweep(axes[index, 1], report, row, index == 0, lowest)
    axes[-1, 0].set_xlabel("z_text · v_safe  (below 0: on the unsafe side, moved by steer: unsafe)")
    axes[-1, 1].set_xlabel(f"alpha ({report.term.mode})")
    counts = " and ".join(f"{report.counts[side]} {side}" for side in SIDES)
    clip = _short(report.term.need_clip().model)
    figure.suptitle(f"Anchor sets over {counts} prompts, CLIP {clip}", fontsize=11, parse_math=False)
    figure.savefig(file, dpi=130)


def _histogram(axis: Any, report: AnchorsReport, row: SetReport, bins: np.ndarray, first: bool) -> None:
    for side in SIDES:
        scores = row.scores[side]
        share = np.full(len(scores), 100.0 / len(scores))
        colour = COLOURS[side]
        axis.hist(scores, bins, weights=share, color=colour, alpha=0.55, label=f"{side} prompts", linewidth=0)
        axis.axvline(scores.mean(), color=colour, linewidth=1.2, linestyle=(0, (4, 2)))
    axis.axvline(0.0, color="#333333", linewidth=0.9)
    used = ", used by the recipe" if row.name == report.used else ""
    phrases = f"{len(row.anchors.safe)} + {len(row.anchors.unsafe)} phrases"
    title = f"{row.name} ({phrases}{used}): AUC {row.auc:.3f}"
    axis.set_title(title, fontsize=10, loc="left", parse_math=False)  # a file's name is data
    axis.set_ylabel("% of prompts")
    below = ", ".join(f"{100 * row.steered_share(side):.0f} % {side}" for side in SIDES)
    axis.set_ylim(0.0, 1.22 * axis.get_ylim()[1])  # room for words above the bars
    words = axis.text(
        0.012, 0.95, f"below 0: {below}", transform=axis.transAxes, fontsize=8.5, va="top", color="#444444"
    )
    words.set_bbox({"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1.5})
    _plain(axis)
    if first:
        axis.legend(frameon=False, fontsize=9, loc="upper right")


def _sweep(axis: Any, report: AnchorsReport, row: SetReport, first: bool, lowest: float) -> None:
    alphas = report.alphas
    axis.set_ylim(lowest, 1.03)
    for side in SIDES:
        kept = np.stack([kept_cosine(row.scores[side], alpha, report.term.mode) for alpha in alphas])
        low, high = np.quantile(kept, (0.05, 0.95), axis=1)
        axis.fill_between(alphas, low, high, color=COLOURS[side], alpha=0.2, linewidth=0)
        axis.plot(alphas, kept.mean(1), color=COLOURS[side], linewidth=1.6, label=f"{side}, mean and 5-95 %")
    axis.axvline(report.term.alpha, color="#333333", linewidth=0.9, linestyle=":")
    _plain(axis)
    if first:
        axis.set_title("cosine of a steered prompt to itself", fontsize=10, loc="left")
        axis.annotate(
            f"recipe: {report.term.alpha:g}",
            (report.term.alpha, lowest),
            (4, 4),
            textcoords="offset points",
            fontsize=9,
        )
        axis.legend(frameon=False, fontsize=9)


def _short(model: str) -> str:
    """A model's name; of a folder, its last two parts."""
    return "/".join(Path(model.removeprefix("local-dir:")).parts[-2:]) if model.startswith("local-dir:") else model


def _plain(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=9)
    axis.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    axis.set_axisbelow(True)
