"""What a person sees while a run goes on: a live display in a terminal, plain lines elsewhere.

Both show the same: a line for each finished step, a line for whatever went wrong, and in a terminal below them what is
going on now (see `cluster.live`). Text from outside (prompts, messages) is data: never markup, never a second line.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Protocol, TextIO

from raysteer.text import one_line

# The figures of a step worth a column; everything else is in MLflow and metrics.jsonl.
COLUMNS = (
    ("reward/mean", "reward"),
    ("inappropriate/unsafe_prompts", "inappropriate"),
    ("alignment/mean", "alignment"),
    ("staleness/max", "lag"),
    ("throughput/images_per_s", "images/s"),
)
PACE_STEPS = 20  # the remaining time is estimated from so many last steps
# Counters of the ledger whose growth a person wants to hear of; deaths are logged by the supervisor.
EVENTS = {
    "lease_expired": "lease expired: the group goes to another sampler",
    "data_lost": "drawn group lost with its owner: it is drawn again",
    "sampler_lost": "group lost with its sampler: it is drawn again",
    "score_retried": "score failed: it is asked for again",
    "rewinds": "learner restart: it goes on from its checkpoint",
}


class View(Protocol):
    """How the display looks: plain lines, or a live one."""

    def open(self) -> None: ...
    def close(self) -> None: ...
    def line(self, text: str) -> None: ...
    def step(self, figures: Mapping[str, Any], done: int, left_s: float | None) -> None: ...
    def snapshot(self, snapshot: Mapping[str, Any]) -> None: ...


class Progress:
    """Consumes what the supervising loop sees. A context manager: inside it, the display is there.

    Args:
        steps: steps of the whole run.
        first: steps already done (a resumed run).
        title: which part of the run this is, "" when it is the whole.
        stream: where to write, stderr if None; a terminal gets the live display.
        clock: monotonic seconds, for tests.
    """

    def __init__(
        self,
        steps: int,
        first: int = 0,
        title: str = "",
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.steps, self.done = steps, first
        self._pace: deque[tuple[int, float]] = deque(maxlen=PACE_STEPS + 1)
        self._clock = clock
        self._counts: dict[str, int] = {}
        self._view = _view(stream or sys.stderr, steps, first, title)

    def __enter__(self) -> Progress:
        self._view.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._view.close()

    def on_step(self, figures: Mapping[str, Any]) -> None:
        """Show the figures of one step; `figures["step"]` counts completed steps."""
        self.done = int(figures["step"])
        if self._pace and self.done <= self._pace[-1][0]:
            self._pace.clear()  # the learner went back to a checkpoint
        self._pace.append((self.done, self._clock()))
        self._view.step(figures, self.done, self._left_s())

    def on_snapshot(self, snapshot: Mapping[str, Any]) -> None:
        """Show how things stand (`RolloutBuffer.snapshot`), and say what has gone wrong since the last one."""
        for text in self._news(snapshot["ledger"]):
            self._view.line(text)
        self._view.snapshot(snapshot)

    def message(self, text: str) -> None:
        """Show a line above the display."""
        self._view.line(one_line(text))

    def _news(self, ledger: Mapping[str, Any]) -> list[str]:
        """Lines about the counters that have grown. The first snapshot of a resumed run brings old drops: no news."""
        counts = {f"dropped: {one_line(reason)}": count for reason, count in ledger["dropped"].items()}
        counts |= {text: ledger["events"].get(event, 0) for event, text in EVENTS.items()}
        before, self._counts = self._counts, counts
        if not before:
            return []
        grown = {text: count - before.get(text, 0) for text, count in counts.items()}
        return [f"{text} (x{more})" if more > 1 else text for text, more in grown.items() if more > 0]

    def _left_s(self) -> float | None:
        """Seconds the remaining steps take at the pace of the last ones; None before two are done."""
        if len(self._pace) < 2:
            return None
        (first_step, first_time), (last_step, last_time) = self._pace[0], self._pace[-1]
        return (last_time - first_time) / (last_step - first_step) * (self.steps - self.done)


class PlainLines:
    """One line a step with columns that stay where they are, for files, pipes and logs of jobs."""

    def __init__(self, stream: TextIO, steps: int, title: str = "") -> None:
        self.stream, self.steps, self.title = stream, steps, title
        self._phase = ""

    def open(self) -> None:
        if self.title:
            self.line(self.title)

    def close(self) -> None:
        pass

    def line(self, text: str) -> None:
        print(text, file=self.stream, flush=True)

    def step(self, figures: Mapping[str, Any], done: int, left_s: float | None) -> None:
        width = len(str(self.steps))
        cells = [f"{label} {readable_figure(figures.get(key)):>8}" for key, label in COLUMNS]
        left = "-" if left_s is None else readable_seconds(left_s)
        self.line("  ".join([f"step {done:>{width}}/{self.steps}", *cells, f"left {left}"]))

    def snapshot(self, snapshot: Mapping[str, Any]) -> None:
        """Says when everybody has started, and when the run is to end: between them the steps tell enough."""
        phase = phase_of(snapshot)
        phase = "running" if phase in ("drawing", "scoring", "learning", "saving") else phase
        if phase != self._phase:
            self._phase = phase
            self.line(phase)


def phase_of(snapshot: Mapping[str, Any]) -> str:
    """What the run is doing, in a word or two."""
    if snapshot["failure"] is not None:
        return "failing"
    if snapshot["stop"] is not None:
        return "stopping"
    needed = ("learners",) if snapshot.get("dataset") else ("learners", "samplers", "reward_workers")
    missing = [name for name in needed if not snapshot[name]]
    if missing:
        return "starting " + ", ".join(name.replace("_", " ") for name in missing)
    if snapshot["learner"] in ("learning", "saving"):
        return str(snapshot["learner"])
    if snapshot.get("dataset"):
        return "starting"
    states = [state for state, _ in snapshot["open"].values()]
    return "drawing" if "sampling" in states or "scoring" not in states else "scoring"


def readable_figure(value: float | None) -> str:
    """``0.21349`` -> ``0.213``; a dash for what is not there."""
    return "-" if value is None else f"{value:.3g}"


def readable_seconds(seconds: float) -> str:
    """``75`` -> ``1 min 15 s``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _view(stream: TextIO, steps: int, first: int, title: str) -> View:
    if stream.isatty():
        from cluster.live import LiveDisplay, can_move_the_cursor

        if can_move_the_cursor(stream):
            return LiveDisplay(stream, steps, first, title=title)
    return PlainLines(stream, steps, title)
