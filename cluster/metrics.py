"""The figures of a run as metrics of Ray, for Prometheus and Grafana: what they are called, and who sends them.

One process sends them all: the driver, from the snapshots that its supervising loop asks the buffer for anyway. It
sees every role, it outlives each of them, and nothing that samplers or the learner wait for does any more work for it.
Ray's agent on the driver's node serves them, with `ray_` before the name and the run's name as label `run`. A gauge
that is not set anew for two report intervals (10 s each by default) disappears: members that are gone take theirs
along.

Counters start at 0 in every driver process, except drops, which a checkpoint remembers.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

PROMETHEUS_PREFIX = "ray_"  # Ray puts it before every name

Labels = tuple[str, ...]


@dataclass(frozen=True)
class Metric:
    """One name, with its unit in it.

    Attributes:
        meaning: one sentence, shown by Prometheus and in docs/observability.md.
        labels: besides `run`.
        of_step: the figures of a step (keys of metrics.jsonl and MLflow) that this metric shows, with their labels.
        elsewhere: where else the same figure is in metrics.jsonl and MLflow, in words of keys, for all other metrics.
    """

    name: str
    kind: Literal["gauge", "counter"]
    meaning: str
    labels: Labels = ()
    of_step: Mapping[str, Labels] = field(default_factory=dict)
    elsewhere: Labels = ()

    @property
    def exported(self) -> str:
        """Its name in Prometheus."""
        return PROMETHEUS_PREFIX + self.name


VERSION = Metric("raysteer_version", "gauge", "Adapter version: steps that are trained.", elsewhere=("step",))
STEPS = Metric("raysteer_steps", "gauge", "Steps the run is to have.")
STEP_AGE = Metric("raysteer_step_age_seconds", "gauge", "Seconds since the last step was finished, or the start.")
GROUPS = Metric(
    "raysteer_groups_total",
    "counter",
    "Groups sampled, scored and trained by this driver's run; done again counts again.",
    ("stage",),
    elsewhere=(
        "throughput/sampled_groups_per_s",
        "throughput/scored_groups_per_s",
        "throughput/groups_per_s",
    ),
)
IMAGES = Metric(
    "raysteer_images_total",
    "counter",
    "The same, counted in images.",
    ("stage",),
    elsewhere=(
        "throughput/sampled_images_per_s",
        "throughput/scored_images_per_s",
        "throughput/images_per_s",
    ),
)
QUEUE = Metric(
    "raysteer_queue_groups",
    "gauge",
    "Groups that are in a state: returned (to be drawn again), sampling, scoring, ready, delivered (not in a checkpoint"
    " yet).",
    ("state",),
    elsewhere=("ledger/returned", "ledger/in_flight", "ledger/ready", "ledger/delivered"),
)
OLDEST_LEASE = Metric(
    "raysteer_oldest_lease_seconds",
    "gauge",
    "Age of the oldest group that is being drawn; at buffer.lease_ttl_s it goes to another sampler.",
    elsewhere=("ledger/oldest_lease_s",),
)
MEMBERS = Metric("raysteer_members", "gauge", "Members that have reported for work and live.", ("role",))
SILENCE = Metric("raysteer_sampler_silent_seconds", "gauge", "Seconds since a sampler last asked or gave.", ("member",))
GROUP_SECONDS = Metric(
    "raysteer_group_seconds", "gauge", "Seconds this member took for its last group.", ("role", "member")
)
DROPPED = Metric(
    "raysteer_dropped_groups_total",
    "counter",
    "Groups dropped for good, by reason.",
    ("reason",),
    elsewhere=("dropped/<reason>", "ledger/dropped"),
)
LEDGER_EVENTS = Metric(
    "raysteer_ledger_events_total",
    "counter",
    "What went wrong on the way of a group and was made good: score_retried, lease_expired, sampler_lost and others.",
    ("event",),
    elsewhere=("ledger/<event>",),
)
LOST = Metric(
    "raysteer_lost_members_total",
    "counter",
    "Members that died; for the learner, how often it went back to a checkpoint.",
    ("role",),
    elsewhere=("lost/sampler", "lost/reward_worker", "ledger/rewinds"),
)
REWARD = Metric(
    "raysteer_reward",
    "gauge",
    "Mean of the reward and of each of its parts over the last batch, by prompt class.",
    ("part", "prompt_class"),
    elsewhere=("<part>/mean", "<part>/safe_prompts", "<part>/unsafe_prompts"),
)
OF_STEP = (
    Metric(
        "raysteer_lag_versions",
        "gauge",
        "Adapter versions between drawing and learning, in the last batch.",
        ("over_groups",),
        {"staleness/mean": ("mean",), "staleness/max": ("max",)},
    ),
    Metric(
        "raysteer_learner_seconds",
        "gauge",
        "Seconds of rank 0 in each part of its last step; checkpoint: of the last one.",
        ("part",),
        {f"stage/{part}_s": (part,) for part in ("wait", "fetch", "learn", "publish", "checkpoint")},
    ),
    Metric(
        "raysteer_stage_seconds",
        "gauge",
        "Mean seconds of a group: sample, put (into the object store), score, score_latency (from put to scored).",
        ("stage",),
        {f"stage/{stage}_s": (stage,) for stage in ("sample", "put", "score", "score_latency")},
    ),
    Metric(
        "raysteer_adapter_latency_seconds",
        "gauge",
        "Mean seconds from publishing an adapter until a sampler has it on.",
        of_step={"stage/adapter_latency_s": ()},
    ),
    Metric(
        "raysteer_step_seconds",
        "gauge",
        "Seconds between the last two batches.",
        of_step={"stage/wall_s": ()},
    ),
    Metric(
        "raysteer_reward_hidden_ratio",
        "gauge",
        "Share of the seconds of scoring during which samplers drew or the learner learned.",
        of_step={"overlap/reward_hidden": ()},
    ),
    Metric(
        "raysteer_reward_busy_seconds",
        "gauge",
        "Seconds of the last step in which something was scored: all, and exposed (nobody else worked).",
        ("share",),
        {"overlap/reward_s": ("all",), "overlap/reward_exposed_s": ("exposed",)},
    ),
    Metric(
        "raysteer_sampling_while_learning_ratio",
        "gauge",
        "Share of the learner's working seconds during which samplers drew.",
        of_step={"overlap/sampling_while_learning": ()},
    ),
    Metric(
        "raysteer_idle_ratio",
        "gauge",
        "Share of its time a role had nothing to do in the last step.",
        ("role",),
        {"idle/samplers": ("sampler",), "idle/reward_workers": ("reward_worker",), "idle/learner": ("learner",)},
    ),
    Metric(
        "raysteer_reward_spread",
        "gauge",
        "Mean standard deviation of the rewards inside a group: without it nothing is learned.",
        of_step={"reward/spread_in_group": ()},
    ),
    Metric(
        "raysteer_kl",
        "gauge",
        "Mean KL estimates of the last step: to the policy that drew (behaviour), to the base model (base).",
        ("to",),
        {"objective/approx_kl": ("behaviour",), "objective/kl_ref": ("base",)},
    ),
    Metric("raysteer_clip_ratio", "gauge", "Share of clipped ratios.", of_step={"objective/clip_fraction": ()}),
    Metric("raysteer_grad_norm", "gauge", "Norm of the gradient before clipping.", of_step={"optimizer/grad_norm": ()}),
)
METRICS = (
    VERSION,
    STEPS,
    STEP_AGE,
    GROUPS,
    IMAGES,
    QUEUE,
    OLDEST_LEASE,
    MEMBERS,
    SILENCE,
    GROUP_SECONDS,
    DROPPED,
    LEDGER_EVENTS,
    LOST,
    REWARD,
    *OF_STEP,
)

Reading = tuple[Metric, Labels, float]


def of_snapshot(snapshot: Mapping[str, Any]) -> Iterator[Reading]:
    """What a snapshot of the buffer says by itself; counters as totals."""
    ledger, states = snapshot["ledger"], Counter(state for state, _ in snapshot["open"].values())
    yield VERSION, (), snapshot["version"]
    yield STEPS, (), snapshot["steps"]
    yield OLDEST_LEASE, (), snapshot["oldest_lease_s"]
    for state in ("returned", "sampling", "scoring", "ready", "delivered"):
        yield QUEUE, (state,), states[state]
    for stage, groups in snapshot["groups"].items():
        yield GROUPS, (stage,), groups
        yield IMAGES, (stage,), groups * snapshot["group_size"]
    for role, there in (("sampler", "samplers"), ("reward_worker", "reward_workers"), ("learner", "learners")):
        yield MEMBERS, (role,), len(snapshot[there])
    for member, sampler in snapshot["samplers"].items():
        yield SILENCE, (member,), sampler["silent_s"]
    for role, members in snapshot["group_seconds"].items():
        for member, seconds in members.items():
            yield GROUP_SECONDS, (role, member), seconds
    for reason, groups in ledger["dropped"].items():
        yield DROPPED, (reason,), groups
    for event, count in ledger["events"].items():
        yield LEDGER_EVENTS, (event,), count
    for role, count in (snapshot["lost"] | {"learner": ledger["events"].get("rewinds", 0)}).items():
        yield LOST, (role,), count


def of_step(figures: Mapping[str, float]) -> Iterator[Reading]:
    """What the figures of a step (a report of the learner) say."""
    for metric in OF_STEP:
        for key, labels in metric.of_step.items():
            if key in figures:
                yield metric, labels, figures[key]
    for key, value in figures.items():
        part, _, over = key.rpartition("/")
        if over.endswith("_prompts"):
            yield REWARD, (part, over.removesuffix("_prompts")), value
        elif over == "mean" and part != "staleness":
            yield REWARD, (part, "all"), value


class RunMetrics:
    """Sends a run's metrics to Ray: an observer of `cluster.train.train`, called with every snapshot.

    Args: run_name, the label `run`; clock for tests, monotonic seconds.
    """

    def __init__(self, run_name: str, clock: Callable[[], float] = time.monotonic) -> None:
        from ray.util.metrics import Counter, Gauge

        kinds = {"gauge": Gauge, "counter": Counter}
        self._run = {"run": run_name}
        self._instruments = {
            metric.name: kinds[metric.kind](metric.name, metric.meaning, ("run", *metric.labels)) for metric in METRICS
        }
        self._clock = clock
        self._stepped = clock()
        self._figures: dict[str, float] = {}
        self._counted: dict[tuple[str, Labels], float] = {}

    def __call__(self, snapshot: Mapping[str, Any]) -> None:
        for reading in self.readings(snapshot):
            self._send(*reading)

    def readings(self, snapshot: Mapping[str, Any]) -> Iterator[Reading]:
        """All there is to send now: of this snapshot, and of the last step, whose figures hold until the next one."""
        for figures in snapshot["reports"]:
            self._stepped = self._clock()
            self._figures |= figures  # a step without a checkpoint keeps the seconds of the last one
        yield STEP_AGE, (), self._clock() - self._stepped
        yield from of_snapshot(snapshot)
        yield from of_step(self._figures)

    def _send(self, metric: Metric, labels: Labels, value: float) -> None:
        tags = self._run | dict(zip(metric.labels, labels, strict=True))
        if metric.kind == "gauge":
            self._instruments[metric.name].set(value, tags)
            return
        grown = value - self._counted.get((metric.name, labels), 0.0)
        if grown > 0:  # Ray's counters refuse 0
            self._counted[metric.name, labels] = value
            self._instruments[metric.name].inc(grown, tags)
