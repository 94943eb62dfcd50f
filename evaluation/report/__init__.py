"""The report: one static HTML page of one or several metric cards, which opens from disk and asks the network nothing.

Everything is inside the file: style, script, charts (SVG) and images (data URIs). A Content-Security-Policy forbids the
rest: no request, and no script but the page's own, whatever a prompt or a label holds.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.card import Card


def write(
    sources: Sequence[tuple[Path, Card]], file: Path, title: str, training: Sequence[Mapping[str, Any]] = ()
) -> Path:
    """Write the page of an evaluation (one card) or of a comparison (several); an existing file is replaced atomically.

    Args:
        sources: each card with its folder, which the files of its gallery are relative to. The first card of a suite is
            what its others are compared with; cards of several suites with the same label are one model.
        file: of the page; folders are created if needed.
        title: of the page.
        training: rows of a run's `evaluations.jsonl`; those with the two figures of the safety-utility chart are drawn
            in it as a path over the steps.

    Returns:
        `file`.

    Raises:
        ValueError: there is no card.
        OSError: the disk refuses. An image that cannot be read is no error but a labelled gap on the page.
    """
    from evaluation.report.page import render  # jinja2 and Pillow, which reading a recipe does without

    page = render(sources, title, training)
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        beside.write_bytes(page.encode())
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)
    return file
