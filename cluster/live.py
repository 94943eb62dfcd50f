"""The live display in a terminal: four lines that stay below whatever else is printed.

    learning   ━━━━━━━━━━━━━━━━━━━━╸━━━━━━━━━━━━━━━━━━━  31/60  1 min 45 s  about 1 min 38 s left
    reward 0.213 ▁▂▃▃▅▆█  inappropriate 0.41  alignment 0.22  lag 1  images/s 12.3
    samplers 2/2 (1 waiting)  reward workers 1/1  learner ranks 1
    groups 3 drawing  2 scoring  4 ready  124 learned  1 dropped

In a run in rounds the first line begins with the round. Every line is cut at the terminal's edge, never wrapped. All
text is put in as `Text`, so that nothing is markup.
"""

from __future__ import annotations

import sys
import time
from collections import Counter, deque
from collections.abc import Collection, Mapping
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cluster.progress import COLUMNS, phase_of, readable_figure, readable_seconds

TREND_STEPS = 24
BARS = "▁▂▃▄▅▆▇█"
FEWEST_BARS = 4  # of a trend worth showing
NARROW = 72  # columns; below it times are left out, so that the bar keeps some room
STYLES = {"learning": "green", "saving": "green", "failing": "bold red", "stopping": "yellow"}


def can_move_the_cursor(stream: TextIO) -> bool:
    """Whether this terminal can redraw lines (TERM=dumb cannot)."""
    console = Console(file=stream)
    return console.is_terminal and not console.is_dumb_terminal


class LiveDisplay:
    """Draws itself a few times a second. Args: stream, a terminal; steps of the run, and those done before it; title,
    which part of the run this is.

    `console`: for tests, where to draw.
    """

    def __init__(self, stream: TextIO, steps: int, first: int, console: Console | None = None, title: str = "") -> None:
        self.console = console or Console(file=stream)
        self.steps, self.done, self.title = steps, first, title
        self.started = time.monotonic()
        self._left_until: float | None = None
        self._figures: Mapping[str, Any] = {}
        self._rewards: deque[float] = deque(maxlen=TREND_STEPS)
        self._snapshot: Mapping[str, Any] | None = None
        # What others print goes above the display, unless it goes to a file.
        self._live = Live(self, console=self.console, refresh_per_second=4, redirect_stdout=sys.stdout.isatty())

    def open(self) -> None:
        self._live.start()

    def close(self) -> None:
        self._live.stop()

    def line(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)

    def step(self, figures: Mapping[str, Any], done: int, left_s: float | None) -> None:
        self.done, self._figures = done, figures
        self._left_until = None if left_s is None else time.monotonic() + left_s
        if "reward/mean" in figures:
            self._rewards.append(figures["reward/mean"])

    def snapshot(self, snapshot: Mapping[str, Any]) -> None:
        self._snapshot = snapshot

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._progress_line(options.max_width)
        yield _cut(self._figures_line(0 if options.ascii_only else options.max_width))
        if self._snapshot is not None:
            yield _cut(_members_line(self._snapshot))
            yield _cut(_groups_line(self._snapshot))

    def _progress_line(self, width: int) -> Table:
        phase = "starting" if self._snapshot is None else phase_of(self._snapshot)
        name = Text(f"{phase:<9}", STYLES.get(phase, "cyan"))
        if self.title and width >= NARROW:
            name = Text(f"{self.title.removesuffix(f', {phase}')}: ", "dim").append(name)
        cells: list[Any] = [name, None, Text(f"{self.done}/{self.steps}")]
        if width >= NARROW:
            now = time.monotonic()
            cells.append(Text(readable_seconds(now - self.started), "dim"))
            if self._left_until is not None and self.done < self.steps:
                cells.append(Text(f"about {readable_seconds(self._left_until - now)} left"))
        cells[1] = ProgressBar(self.steps, self.done, width=None)
        line = Table.grid(padding=(0, 2), expand=True)
        for index, _ in enumerate(cells):
            line.add_column(no_wrap=True, ratio=1 if index == 1 else None, overflow="ellipsis")
        line.add_row(*cells)
        return line

    def _figures_line(self, width: int) -> Text:
        if not self._figures:
            return Text("no step is finished yet", "dim")
        shown = [(label, readable_figure(self._figures[key])) for key, label in COLUMNS if key in self._figures]
        room = width - sum(len(label) + len(value) + 3 for label, value in shown)
        parts = [Text.assemble((f"{label} ", "dim"), value) for label, value in shown]
        if len(self._rewards) > 1 and room >= FEWEST_BARS:
            parts[0].append(f" {trend(list(self._rewards)[-room:])}", "green")
        return Text("  ").join(parts)


def _members_line(snapshot: Mapping[str, Any]) -> Text:
    started = snapshot.get("members", {})
    if snapshot.get("dataset"):
        return Text.assemble(("learner ranks ", "dim"), str(len(snapshot["learners"])))
    waiting = sum(sampler["waiting"] for sampler in snapshot["samplers"].values())
    line = Text.assemble(("samplers ", "dim"), _there(len(snapshot["samplers"]), started.get("sampler")))
    if waiting:
        line.append(f" ({waiting} waiting)")
    line.append("  reward workers ", "dim").append(
        _there(len(snapshot["reward_workers"]), started.get("reward_worker"))
    )
    return line.append("  learner ranks ", "dim").append(str(len(snapshot["learners"])))


def _groups_line(snapshot: Mapping[str, Any]) -> Text:
    ledger, states = snapshot["ledger"], Counter(state for state, _ in snapshot["open"].values())
    counts = {
        "drawing": states["sampling"],
        "scoring": states["scoring"],
        "ready": ledger["ready"],
        "learned": ledger["delivered"] + ledger["committed"],
    }
    if snapshot.get("dataset"):
        counts = {"learned": counts["learned"]}
    line = Text.assemble(("groups ", "dim"), "  ".join(f"{count} {name}" for name, count in counts.items()))
    dropped, how = sum(ledger["dropped"].values()), "left out" if snapshot.get("dataset") else "dropped"
    return line.append(f"  {dropped} {how}", "yellow") if dropped else line


def trend(values: Collection[float]) -> str:
    """The values as bars between their own least and largest."""
    low, high = min(values), max(values)
    if high == low:
        return BARS[len(BARS) // 2] * len(values)
    return "".join(BARS[round((value - low) / (high - low) * (len(BARS) - 1))] for value in values)


def _there(working: int, started: int | None) -> str:
    return str(working) if started is None else f"{working}/{started}"


def _cut(text: Text) -> Text:
    text.no_wrap, text.overflow = True, "ellipsis"
    return text
