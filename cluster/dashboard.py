"""The Grafana dashboard, made from code so that it can only ask for metrics there are.

``python -m cluster.dashboard`` writes ``cluster/grafana/raysteer.json``, which Grafana imports. Rows are in the order
in which somebody woken at night asks: is it moving, who is slow, what is dropped or lost, is it learning.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.metrics import METRICS, VERSION, Metric

FILE = Path(__file__).parent / "grafana" / "raysteer.json"
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLUMNS = 24  # of Grafana's grid
HEIGHT = 8

_BY_NAME = {metric.name: metric for metric in METRICS}


@dataclass(frozen=True)
class Query:
    """PromQL over one metric. `by`: labels to keep besides `run`; `rate`: growth per second; `where`: more matchers.

    A run that was resumed has two series for some minutes, of the old driver and of the new one: the larger is shown.
    """

    metric: Metric
    by: Sequence[str] = ()
    rate: bool = False
    where: str = ""

    @property
    def expression(self) -> str:
        selected = f'{self.metric.exported}{{run=~"$run"{self.where}}}'
        if self.rate:
            selected = f"rate({selected}[$__rate_interval])"
        return f"max by ({', '.join(('run', *self.by))}) ({selected})"

    @property
    def legend(self) -> str:
        return " ".join("{{" + label + "}}" for label in (*self.by, "run"))


@dataclass(frozen=True)
class Panel:
    """One graph. `unit` as Grafana calls it: s, percentunit, short. `kind`: timeseries or stat."""

    title: str
    queries: Sequence[Query]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    why: str = ""
    stacked: bool = False


def _of(name: str, *by: str, rate: bool = False, where: str = "") -> Query:
    return Query(_BY_NAME[f"raysteer_{name}"], by, rate, where)


ROWS: dict[str, Sequence[Panel]] = {
    "Is it moving?": (
        Panel("Version", [_of("version")], kind="stat", width=4, why="Steps that are trained."),
        Panel("Of steps", [_of("steps")], kind="stat", width=4),
        Panel(
            "Since the last step",
            [_of("step_age_seconds")],
            "s",
            "stat",
            4,
            "Much more than the step time: the run is stuck. No data: the driver is gone; the same command continues"
            " the run.",
        ),
        Panel("Step time", [_of("step_seconds")], "s", "stat", 4),
        Panel("Members at work", [_of("members", "role")], kind="stat", width=8),
        Panel("Images per second", [_of("images_total", "stage", rate=True)], width=12),
        Panel("Groups per second", [_of("groups_total", "stage", rate=True)], width=12),
    ),
    "Who is slow?": (
        Panel(
            "Idle share",
            [_of("idle_ratio", "role")],
            "percentunit",
            why="Who idles waits for somebody else: learner idle means too few samplers or reward workers.",
        ),
        Panel(
            "Groups on their way",
            [_of("queue_groups", "state")],
            stacked=True,
            why="A state that grows is where the run piles up.",
        ),
        Panel(
            "Oldest group being drawn",
            [_of("oldest_lease_seconds")],
            "s",
            why="At buffer.lease_ttl_s its ticket goes to another sampler.",
        ),
        Panel(
            "Last group of each member",
            [_of("group_seconds", "role", "member")],
            "s",
            why="One line above its siblings: a slow machine.",
        ),
        Panel("Silence of samplers", [_of("sampler_silent_seconds", "member")], "s"),
        Panel("A group's stages", [_of("stage_seconds", "stage")], "s"),
        Panel("Parts of a learner step", [_of("learner_seconds", "part")], "s", stacked=True),
        Panel("From publishing to the sampler", [_of("adapter_latency_seconds")], "s"),
        Panel(
            "Hidden reward time, sampling beside learning",
            [_of("reward_hidden_ratio"), _of("sampling_while_learning_ratio")],
            "percentunit",
            why="Near 1: scoring costs no time, and samplers draw while the learner learns.",
        ),
        Panel("Seconds of scoring in a step", [_of("reward_busy_seconds", "share")], "s"),
        Panel("Lag of trained groups", [_of("lag_versions", "over_groups")], why="At most buffer.max_staleness."),
    ),
    "What is dropped or lost?": (
        Panel(
            "Dropped groups",
            [_of("dropped_groups_total", "reason")],
            why="Gone for good. More than half of the last ones: the run stops and says why.",
        ),
        Panel(
            "Mishaps made good",
            [_of("ledger_events_total", "event")],
            why="Drawn, scored or delivered again: lost time, no lost groups.",
        ),
        Panel("Members lost", [_of("lost_members_total", "role")]),
    ),
    "Is it learning?": (
        Panel("Reward", [_of("reward", "prompt_class", where=', part="reward"')], width=12),
        Panel("Parts of the reward", [_of("reward", "part", "prompt_class", where=', part!="reward"')], width=12),
        Panel(
            "Reward spread inside a group",
            [_of("reward_spread")],
            width=6,
            why="At 0 all images of a group are worth the same and nothing is learned.",
        ),
        Panel("KL", [_of("kl", "to")], width=6),
        Panel("Clipped ratios", [_of("clip_ratio")], "percentunit", width=6),
        Panel("Gradient norm", [_of("grad_norm")], width=6),
    ),
}


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana's JSON."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        panels.append({"id": len(panels) + 1, "type": "row", "title": title, "collapsed": False, "panels": []})
        panels[-1]["gridPos"] = {"x": 0, "y": y, "w": COLUMNS, "h": 1}
        x, y, height = 0, y + 1, 0
        for panel in row:
            if x + panel.width > COLUMNS:
                x, y = 0, y + height
            height = HEIGHT // 2 if panel.kind == "stat" else HEIGHT
            place = {"x": x, "y": y, "w": panel.width, "h": height}
            panels.append({"id": len(panels) + 1, "gridPos": place} | _panel(panel))
            x += panel.width
        y += height
    return {
        "title": "raysteer",
        "uid": "raysteer",
        "description": "Runs of raysteer: is it moving, who is slow, what is dropped, is it learning.",
        "tags": ["raysteer", "ray"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-3h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": _variables()},
        "annotations": {"list": []},
        "links": [],
        "panels": panels,
    }


def _panel(panel: Panel) -> dict[str, Any]:
    targets = [
        {
            "refId": chr(ord("A") + i),
            "datasource": DATASOURCE,
            "expr": query.expression,
            "legendFormat": _legend(panel, i),
        }
        for i, query in enumerate(panel.queries)
    ]
    defaults: dict[str, Any] = {"unit": panel.unit}
    if panel.kind == "stat":
        options: dict[str, Any] = {
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "colorMode": "value",
            "graphMode": "none",
            "textMode": "auto",
        }
    else:
        stacking = {"mode": "normal" if panel.stacked else "none", "group": "A"}
        filled = 30 if panel.stacked else 0
        defaults |= {"min": 0} if panel.unit == "percentunit" or panel.stacked else {}
        defaults["custom"] = {"drawStyle": "line", "lineWidth": 1, "fillOpacity": filled, "stacking": stacking}
        options = {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.why,
        "datasource": DATASOURCE,
        "targets": targets,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
    }


def _legend(panel: Panel, index: int) -> str:
    """What tells lines apart: labels, and the metric where a panel shows several."""
    query = panel.queries[index]
    return query.legend if len(panel.queries) == 1 else f"{query.metric.name.removeprefix('raysteer_')} {query.legend}"


def _variables() -> list[dict[str, Any]]:
    runs = f"label_values({VERSION.exported}, run)"
    return [
        {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"},
        {
            "name": "run",
            "label": "Run",
            "type": "query",
            "datasource": DATASOURCE,
            "query": {"query": runs, "refId": "runs"},
            "definition": runs,
            "refresh": 2,  # whenever the time range changes
            "sort": 1,
            "multi": True,
            "includeAll": True,
        },
    ]


def text() -> str:
    """The file's content."""
    return json.dumps(dashboard(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
    print(FILE)
