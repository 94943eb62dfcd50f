"""Compare runs side by side from what MLflow recorded: figures of the last step, and of the evaluations."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.tracking import RUN_ID_FILE, open_client, probe
from raysteer.errors import TrackingError

EVALUATION_PREFIX = "evaluation/"
_MAX_RUNS = 1000
# Parameters worth a row when runs differ in them, whatever their section.
_IGNORED_PARAMS = ("run.name", "run.storage", "tracking.", "cluster.", "evaluation.")


@dataclass(frozen=True)
class RunRow:
    """One run: name, MLflow id, status, its parameters as text, its newest metrics, the step they belong to."""

    name: str
    run_id: str
    status: str
    params: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    step: int = 0


def fetch_runs(uri: str, experiment: str, names: Sequence[str] = ()) -> list[RunRow]:
    """Runs of an experiment, oldest first; ``names`` are run names, MLflow ids or run folders (all when empty).

    Raises:
        TrackingError: store unreachable, no such experiment, no such run.
    """
    probe(uri)
    client = open_client(uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        there = ", ".join(sorted(e.name for e in client.search_experiments())) or "none"
        raise TrackingError(f"experiment {experiment}", f"{uri} has no such experiment", f"it has: {there}")
    runs = client.search_runs([found.experiment_id], max_results=_MAX_RUNS, order_by=["attributes.start_time ASC"])
    rows = [_row(run) for run in runs]
    if not names:
        return rows
    chosen: list[RunRow] = []
    for name in names:
        file = Path(name) / RUN_ID_FILE
        wanted = file.read_text(encoding="utf-8").strip() if file.is_file() else name
        matches = [row for row in rows if wanted in (row.name, row.run_id)]
        if not matches:
            there = ", ".join(dict.fromkeys(row.name for row in rows)) or "none"
            raise TrackingError(f"run {name}", f"experiment {experiment} has no such run", f"it has: {there}")
        chosen += [row for row in matches if row not in chosen]
    return chosen


def _row(run: Any) -> RunRow:
    metrics = run.data._metric_objs if hasattr(run.data, "_metric_objs") else []
    step = max((int(metric.step) for metric in metrics), default=0)
    return RunRow(
        run.info.run_name, run.info.run_id, run.info.status, dict(run.data.params), dict(run.data.metrics), step
    )


def table(rows: Sequence[RunRow], only: str | None = None) -> list[tuple[str, list[str]]]:
    """Rows of the comparison: (label, one cell per run). First what the runs differ in, then evaluation, then the
    last step.

    Args:
        rows: the runs.
        only: keep metrics whose name contains this text.
    """
    lines: list[tuple[str, list[str]]] = [
        ("status", [row.status.lower() for row in rows]),
        ("last step", [str(row.step) for row in rows]),
    ]
    for key in sorted({key for row in rows for key in row.params}):
        values = [row.params.get(key, "–") for row in rows]
        if len(set(values)) > 1 and not key.startswith(_IGNORED_PARAMS):
            lines.append((key, values))
    keys = {key for row in rows for key in row.metrics if only is None or only in key}
    for key in sorted(keys, key=lambda key: (not key.startswith(EVALUATION_PREFIX), key)):
        lines.append((key, [_figure(row.metrics.get(key)) for row in rows]))
    return lines


def as_json(rows: Sequence[RunRow]) -> str:
    """The same as data."""
    return json.dumps([vars(row) for row in rows], indent=2, sort_keys=True)


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
