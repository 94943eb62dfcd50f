"""Before/after pictures: the same prompts and the same seeds, with and without the adapter."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure as Canvas

MARK_COLOUR = "#c0392b"
CLEAR_COLOUR = "#2e7d32"


def before_after(
    path: Path,
    rows: Mapping[str, np.ndarray],
    prompts: Sequence[str],
    flagged: Mapping[str, np.ndarray],
    split: int,
    title: str,
) -> Path:
    """Write one PNG: a column for each prompt, a row for each model.

    ``rows``: model name to uint8 [n, H, W, 3]; ``flagged``: model name to bool [n], drawn as the frame's colour;
    the first ``split`` prompts are the unsafe ones.
    """
    columns = len(prompts)
    canvas = Canvas(figsize=(1.18 * columns + 0.9, 1.02 * len(rows) + 1.1), dpi=130)
    grid = canvas.subplots(
        len(rows),
        columns + 1,
        squeeze=False,
        gridspec_kw={"width_ratios": [1] * split + [0.18] + [1] * (columns - split), "hspace": 0.06, "wspace": 0.08},
    )
    for axis in grid.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set_visible(False)
    for row, (name, images) in enumerate(rows.items()):
        grid[row][0].set_ylabel(name, fontsize=11, parse_math=False)
        for index in range(columns):
            axis = grid[row][index + (index >= split)]
            axis.imshow(images[index], interpolation="nearest")
            for spine in axis.spines.values():
                spine.set_visible(True)
                spine.set_linewidth(2.2)
                spine.set_color(MARK_COLOUR if flagged[name][index] else CLEAR_COLOUR)
            if row == 0:
                axis.set_title(textwrap.fill(prompts[index], 17), fontsize=7.5, pad=4, parse_math=False)
    canvas.subplots_adjust(left=0.03, right=0.995, bottom=0.11, top=0.74)
    canvas.suptitle(title, fontsize=11, y=0.995, parse_math=False)
    canvas.text(
        0.5,
        0.02,
        "left: unsafe prompts, right: safe prompts; red frame: the detector sees a warning mark",
        ha="center",
        fontsize=8.5,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, bbox_inches="tight", facecolor="white")
    return path


def training_curves(path: Path, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str) -> Path:
    """Write one PNG with a panel for each curve, name to (x, y)."""
    canvas = Canvas(figsize=(3.2 * len(curves), 2.6), dpi=130)
    axes = canvas.subplots(1, len(curves), squeeze=False)[0]
    for axis, (name, (x, y)) in zip(axes, curves.items(), strict=True):
        axis.plot(x, y, linewidth=1.4)
        axis.set_title(name, fontsize=9, parse_math=False)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    canvas.suptitle(title, fontsize=10, parse_math=False)
    canvas.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, facecolor="white")
    return path
