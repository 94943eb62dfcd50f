"""An asynchronous run and what it shows of itself: its lag and drops, Ray's metrics page, the figures of its steps, the
log lines of its actors.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cluster.metrics import METRICS, OF_STEP, REWARD, RunMetrics, of_snapshot, of_step
from tests.ray.conftest import World

pytestmark = pytest.mark.timeout(500)

RUN, LABEL = "seen", "seen-by-a-test"  # two senders under one label would count everything twice
SCRAPE_S = 60.0  # Ray exports every 10 s
Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


@dataclass
class Watched:
    """A finished run with one dropped group: who sent its metrics, its last snapshot, its figures by step, its
    result.
    """

    metrics: RunMetrics
    snapshot: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, float]] = field(default_factory=list)
    result: Any = None


@pytest.fixture(scope="module")
def watched(ray_cluster: Any, world: World) -> Watched:
    from cluster.train import train
    from learner.records import read_rows

    world.plan_faults(nan_at=[3], raise_at=[6])
    seen = Watched(RunMetrics(LABEL))

    def observe(snapshot: dict[str, Any]) -> None:
        seen.metrics(snapshot)
        seen.snapshot = snapshot

    decoupled = {"objective__anchor": "interpolated", "objective__updates_per_batch": 2}
    overlapped = {"run__steps": 5, "buffer__max_staleness": 1, "samplers__count": 2}
    seen.result = train(world.recipe(RUN, **overlapped, **decoupled), observe=observe)
    seen.rows = read_rows(seen.result.run_dir / "metrics.jsonl")
    return seen


def test_an_asynchronous_run_keeps_its_lag_bound_and_names_what_it_drops(watched: Watched) -> None:
    result, rows = watched.result, watched.rows
    assert result.status == "finished"
    assert result.ledger["dropped"] == {"reward_not_finite:inappropriate": 1}
    assert result.ledger["events"]["score_retried"] == 1
    assert result.ledger["committed"] == 20
    lags = [row["staleness/max"] for row in rows]
    assert max(lags) == 1.0, "samplers run ahead by one version and no further"
    weighted = [row["objective/weight_mean"] != 1.0 for row in rows]
    assert weighted == [lag > 0.0 for lag in lags], "stale groups, and no others, begin away from their own policy"
    assert max(row["overlap/sampling_while_learning"] for row in rows) > 0.0


def wait_for(what: str, found: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + SCRAPE_S
    while time.monotonic() < deadline:
        if result := found():
            return result
        time.sleep(0.5)
    pytest.fail(f"waited {SCRAPE_S:g} s for {what}")


def scraped(ray: Any, run: str) -> Series:
    """The page Prometheus would fetch from this node: the series of a run, without the labels Ray adds."""
    (node,) = (node for node in ray.nodes() if node["Alive"])
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    page = urllib.request.urlopen(url, timeout=30).read().decode()
    ours = {"run", *(label for metric in METRICS for label in metric.labels)}
    series: Series = {}
    for name, labels, value in re.findall(r"^(ray_raysteer_\w+)\{(.*)\} (\S+)$", page, re.MULTILINE):
        tags = frozenset((key, text) for key, text in re.findall(r'(\w+)="([^"]*)"', labels) if key in ours)
        if ("run", run) in tags:
            series[name, tags] = float(value)
    return series


def test_ray_serves_every_figure_of_a_run_with_its_value(ray_cluster: Any, watched: Watched) -> None:
    figures: dict[str, float] = {}
    for row in watched.rows:
        figures |= row
    watched.metrics(watched.snapshot | {"reports": watched.rows})
    expected: Series = {}
    for metric, labels, value in (*of_snapshot(watched.snapshot), *of_step(figures)):
        if metric.kind == "gauge" or value > 0:
            expected[metric.exported, frozenset({("run", LABEL), *zip(metric.labels, labels, strict=True)})] = value
    assert {name for name, _ in expected} >= {"ray_raysteer_dropped_groups_total", "ray_raysteer_groups_total"}

    def page() -> Series | None:
        watched.metrics(watched.snapshot | {"reports": []})  # gauges that nobody sets disappear
        found = scraped(ray_cluster, LABEL)
        return found if expected.keys() <= found.keys() and found[version] == expected[version] else None

    version = ("ray_raysteer_version", frozenset({("run", LABEL)}))
    found = wait_for("all series on the metrics page", page)
    assert {key: found[key] for key in expected} == pytest.approx(expected)


def test_the_figures_of_a_step_hold_what_the_metrics_promise_to_be_in_mlflow(watched: Watched) -> None:
    reported = set().union(*watched.rows)
    wanted = {key for metric in OF_STEP for key in metric.of_step}
    wanted |= {key for metric in METRICS for key in metric.elsewhere if "<" not in key} - {"ledger/rewinds"}
    assert wanted - reported == set()
    assert "dropped/reward_not_finite:inappropriate" in reported
    assert {labels[1] for metric, labels, _ in of_step(watched.rows[0]) if metric is REWARD} == {
        "all",
        "safe",
        "unsafe",
    }


def test_counts_of_work_add_up(watched: Watched) -> None:
    groups = watched.snapshot["groups"]
    assert groups["sampled"] >= groups["scored"] >= groups["trained"]
    assert watched.snapshot["lost"] == {"sampler": 0, "reward_worker": 0}
    assert watched.rows[0]["throughput/sampled_images_per_s"] > 0


class Talker:
    """An actor that writes one line to its log."""

    def say(self, text: str) -> None:
        from raysteer.logs import log_as, log_version

        log_as(RUN, "sampler", "sampler-0")
        log_version(7)
        logging.getLogger("tests").warning("prompt %s", text)


def test_an_actors_log_line_is_one_json_object_that_says_who_wrote_it(ray_cluster: Any) -> None:
    text = "a cat\nERROR driver of seen: forged"
    talker = ray_cluster.remote(num_cpus=0, runtime_env={"env_vars": {"RAYSTEER_LOG": "json"}})(Talker).remote()
    ray_cluster.get(talker.say.remote(text), timeout=120)
    logs = Path(os.environ["RAY_TMPDIR"]) / "ray" / "session_latest" / "logs"

    def lines() -> list[str]:
        return [line for file in logs.glob("worker-*.err") for line in file.read_text().splitlines() if "cat" in line]

    (line,) = wait_for("the line in the worker's log", lines)
    record = json.loads(line)
    assert record["message"] == f"prompt {text}"
    assert (record["run"], record["role"], record["member"], record["version"]) == (RUN, "sampler", "sampler-0", 7)
    ray_cluster.kill(talker)


def test_a_training_sends_its_metrics_by_itself(ray_cluster: Any, watched: Watched) -> None:
    trained = ("ray_raysteer_groups_total", frozenset({("run", RUN), ("stage", "trained")}))
    found = wait_for("the counters of the run", lambda: scraped(ray_cluster, RUN).get(trained))
    assert found == 20.0
