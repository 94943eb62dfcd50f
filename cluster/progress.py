"""What a person sees while a run goes on: a live bar in a terminal, one plain line a step elsewhere."""

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, TextIO

# Shown first, in this order, when a step reports them; everything else is in MLflow and metrics.jsonl.
_SHOWN = (
    ("reward/mean", "reward"),
    ("inappropriate/unsafe_prompts", "inappropriate"),
    ("alignment/mean", "alignment"),
    ("staleness/max", "lag"),
    ("throughput/images_per_s", "images/s"),
)


class Progress:
    """Consumes the metric dict of each step.

    Args:
        steps: steps of the whole run.
        first: steps already done (a resumed run).
        stream: where to write; a terminal gets a live bar.
    """

    def __init__(self, steps: int, first: int = 0, stream: TextIO | None = None) -> None:
        self.steps, self.done = steps, first
        self.stream = stream or sys.stderr
        self.started = time.monotonic()
        self.first = first
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> "Progress":
        if self.stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("step"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
            )
            self._bar = Bar(*columns, console=Console(file=self.stream))
            self._task = self._bar.add_task("starting", total=self.steps, completed=self.first)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def on_step(self, metrics: Mapping[str, Any]) -> None:
        """Show one step; ``metrics["step"]`` counts completed steps, otherwise each call is one more."""
        self.done = int(metrics.get("step", self.done + 1))
        text = summary(metrics)
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, description=text)
        else:
            print(f"step {self.done}/{self.steps}  {text}{self._remaining()}", file=self.stream, flush=True)

    def message(self, text: str) -> None:
        """Show a line above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        else:
            print(text, file=self.stream, flush=True)

    def _remaining(self) -> str:
        finished = self.done - self.first
        if finished <= 0 or self.done >= self.steps:
            return ""
        seconds = (time.monotonic() - self.started) / finished * (self.steps - self.done)
        return f"  about {readable_seconds(seconds)} left"


def summary(metrics: Mapping[str, Any]) -> str:
    """The few figures worth a line, for example ``reward 0.213  lag 1``."""
    return "  ".join(f"{label} {metrics[key]:.3g}" for key, label in _SHOWN if key in metrics)


def readable_seconds(seconds: float) -> str:
    """``75`` -> ``1 min 15 s``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
