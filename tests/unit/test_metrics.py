"""The names of the figures are a contract: code, dashboard and documentation agree on them."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import pytest

from cluster import dashboard
from cluster.metrics import METRICS, Metric, RunMetrics, of_snapshot, of_step
from tests.snapshots import fresh_buffer, fresh_snapshot, ledger

DOCUMENT = Path(__file__).parents[2] / "docs" / "observability.md"


def documented(metric: Metric) -> str:
    """The row that docs/observability.md has to have."""
    labels = ", ".join(f"`{label}`" for label in metric.labels) or "–"
    keys = ", ".join(f"`{key}`" for key in (*metric.of_step, *metric.elsewhere)) or "–"
    return f"| `{metric.exported}` | {labels} | {metric.meaning} | {keys} |"


def test_the_table_of_metrics_in_the_documentation_is_the_one_of_the_code() -> None:
    rows = [line for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if line.startswith("| `ray_")]
    assert rows == [documented(metric) for metric in METRICS]


def test_names_are_unique_and_say_their_unit() -> None:
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    for metric in METRICS:
        assert re.fullmatch(r"raysteer_[a-z_]+", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert "run" not in metric.labels, "it is there for all"


def test_the_dashboard_in_the_tree_is_the_one_of_the_code() -> None:
    assert dashboard.FILE.read_text(encoding="utf-8") == dashboard.text(), "run python -m cluster.dashboard"


def test_the_dashboard_asks_only_for_metrics_and_labels_there_are_and_shows_them_all() -> None:
    board = json.loads(dashboard.FILE.read_text(encoding="utf-8"))
    known = {metric.exported: {"run", *metric.labels} for metric in METRICS}
    shown = set()
    for target in (target for panel in board["panels"] for target in panel.get("targets", ())):
        (name,) = re.findall(r"\bray_raysteer_\w+", target["expr"])
        shown.add(name)
        kept = set(re.findall(r"max by \(([^)]*)\)", target["expr"])[0].split(", "))
        matched = set(re.findall(r"(\w+)(?:=~|!=|=)\"", target["expr"]))
        assert kept | matched | set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= known[name]
        assert target["datasource"]["uid"] == "${datasource}"
    assert shown == set(known)


def test_the_dashboards_panels_do_not_overlap_and_have_ids_of_their_own() -> None:
    panels = dashboard.dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for place in (panel["gridPos"] for panel in panels):
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= dashboard.COLUMNS
        assert not cells & taken
        taken |= cells


def readings_of_a_busy_snapshot() -> dict[tuple[str, ...], float]:
    snapshot = fresh_snapshot(
        open={1: ("sampling", "a"), 2: ("scoring", "a"), 3: ("scoring", "b")},
        groups={"sampled": 5, "scored": 4},
        group_seconds={"sampler": {"a": 1.5}, "reward_worker": {}},
        samplers={"a": {"silent_s": 2.0}},
        learners={0: 1, 1: 2},
        ledger=ledger(dropped={"reward_timeout": 2}, events={"rewinds": 1, "score_retried": 3}),
    )
    return {(metric.name, *labels): value for metric, labels, value in of_snapshot(snapshot)}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (("raysteer_version",), 0),
        (("raysteer_steps",), 3),
        (("raysteer_queue_groups", "sampling"), 1),
        (("raysteer_queue_groups", "scoring"), 2),
        (("raysteer_queue_groups", "ready"), 0),
        (("raysteer_groups_total", "sampled"), 5),
        (("raysteer_images_total", "scored"), 4 * 4),
        (("raysteer_members", "learner"), 2),
        (("raysteer_members", "reward_worker"), 0),
        (("raysteer_sampler_silent_seconds", "a"), 2.0),
        (("raysteer_group_seconds", "sampler", "a"), 1.5),
        (("raysteer_dropped_groups_total", "reward_timeout"), 2),
        (("raysteer_ledger_events_total", "score_retried"), 3),
        (("raysteer_lost_members_total", "learner"), 1),
        (("raysteer_lost_members_total", "sampler"), 0),
        (("raysteer_oldest_lease_seconds",), 0.0),
    ],
)
def test_a_snapshot_gives_each_metric_its_value(name: tuple[str, ...], value: float) -> None:
    assert readings_of_a_busy_snapshot()[name] == value


def test_a_snapshot_says_how_old_the_oldest_lease_is_who_is_silent_for_how_long_and_who_died() -> None:
    now = [100.0]

    async def story() -> None:
        buffer = fresh_buffer(lambda: now[0])
        await buffer.rewind(0, {0: 1})
        await buffer.set_adapter(0, ["reference"], "v0")
        assert (await buffer.snapshot())["oldest_lease_s"] == 0.0
        for sampler in ("sampler-0", "sampler-1"):
            await buffer.lease(sampler, 1, 0.0)
            now[0] += 5.0
        snapshot = await buffer.snapshot()
        assert snapshot["oldest_lease_s"] == 10.0
        assert {name: s["silent_s"] for name, s in snapshot["samplers"].items()} == {
            "sampler-0": 10.0,
            "sampler-1": 5.0,
        }
        await buffer.sampler_lost("sampler-0")
        snapshot = await buffer.snapshot()
        assert snapshot["oldest_lease_s"] == 5.0
        assert snapshot["lost"] == {"sampler": 1, "reward_worker": 0}

    asyncio.run(story())


def test_a_member_that_is_gone_takes_its_seconds_along() -> None:
    async def story() -> None:
        buffer = fresh_buffer()
        await buffer.rewind(0, {0: 1})
        await buffer.set_adapter(0, ["reference"], "v0")
        for sampler in ("sampler-0", "sampler-1"):
            await buffer.lease(sampler, 1, 0.0)
            buffer.meter.drawn(sampler, "v0", {"started": 0.0, "sampled": 1.5, "adapter_applied": 0.0})
        assert (await buffer.snapshot())["group_seconds"]["sampler"] == {"sampler-0": 1.5, "sampler-1": 1.5}
        await buffer.sampler_lost("sampler-0")
        assert (await buffer.snapshot())["group_seconds"]["sampler"] == {"sampler-1": 1.5}

    asyncio.run(story())


def test_a_snapshot_says_what_the_learner_does() -> None:
    async def story() -> None:
        buffer = fresh_buffer()
        await buffer.rewind(0, {0: 1})
        await buffer.set_adapter(0, ["reference"], "v0")
        states = [(await buffer.snapshot())["learner"]]
        waiting = asyncio.create_task(buffer.next_batch(0, 60.0))
        await asyncio.sleep(0)
        states.append((await buffer.snapshot())["learner"])
        await buffer.request_stop("test")
        await waiting
        for call in (buffer.ledger_state, buffer.commit, buffer.rewind):
            await call(0)
            states.append((await buffer.snapshot())["learner"])
        assert states == ["starting", "waiting", "saving", "learning", "starting"]

    asyncio.run(story())


def test_the_figures_of_a_step_hold_until_the_next_one_and_its_age_grows() -> None:
    now = [0.0]
    metrics = RunMetrics("night", clock=lambda: now[0])

    def readings(*reports: dict[str, float]) -> dict[tuple[str, ...], float]:
        now[0] += 5.0
        found = metrics.readings(fresh_snapshot(reports=list(reports)))
        return {(metric.name, *labels): value for metric, labels, value in found}

    checkpoint, learn = ("raysteer_learner_seconds", "checkpoint"), ("raysteer_learner_seconds", "learn")
    assert readings()["raysteer_step_age_seconds",] == 5.0
    assert checkpoint not in readings()
    first = readings({"stage/checkpoint_s": 2.0, "stage/learn_s": 1.0})
    assert (first["raysteer_step_age_seconds",], first[checkpoint], first[learn]) == (0.0, 2.0, 1.0)
    assert readings()[learn] == 1.0
    second = readings({"stage/learn_s": 3.0})
    assert (second[checkpoint], second[learn]) == (2.0, 3.0), "the last checkpoint's seconds stay"
    assert readings()["raysteer_step_age_seconds",] == 5.0


def test_rewards_are_given_by_part_and_prompt_class_whatever_the_parts_are_called() -> None:
    figures = {
        "reward/mean": 0.5,
        "reward/safe_prompts": 0.6,
        "costs/q16/unsafe_prompts": 0.1,
        "staleness/mean": 1.0,
        "stage/publish_s": 0.2,
    }
    found = {(metric.name, *labels): value for metric, labels, value in of_step(figures)}
    assert found == {
        ("raysteer_reward", "reward", "all"): 0.5,
        ("raysteer_reward", "reward", "safe"): 0.6,
        ("raysteer_reward", "costs/q16", "unsafe"): 0.1,
        ("raysteer_lag_versions", "mean"): 1.0,
        ("raysteer_learner_seconds", "publish"): 0.2,
    }
