"""Who was busy while: an exact account of overlap, kept by whoever sees every transition. Pure, no clock of its own.

Time is cut at each transition; every slice is added to the totals of what was going on during it. Reward time is
*hidden* in a slice when samplers draw or the learner learns meanwhile, and *exposed* when scoring is all that happens.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from typing import Literal

from actors.leases import Outcome

LearnerState = Literal["starting", "waiting", "learning", "saving"]


class ActivityClock:
    """Totals since the last `take`. Args: now, in monotonic seconds."""

    def __init__(self, now: float) -> None:
        self.sampling = 0  # groups being drawn
        self.scoring = 0  # groups whose score is awaited
        self.waiting_samplers = 0  # samplers asking for a lease in vain
        self.samplers = 0
        self.learning = False
        self.learner_waiting = False
        self._now = self._since = now
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def tick(self, now: float) -> None:
        """Account for the time up to now, before the state changes."""
        elapsed = max(0.0, now - self._now)
        self._now = now
        flags = {
            "sampling": self.sampling > 0,
            "scoring": self.scoring > 0,
            "learning": self.learning,
            "learner_waiting": self.learner_waiting,
            "scoring_exposed": self.scoring > 0 and not self.sampling and not self.learning,
            "sampling_while_learning": self.sampling > 0 and self.learning,
        }
        for name, on in flags.items():
            if on:
                self._seconds[name] += elapsed
        self._seconds["sampler_idle"] += elapsed * min(self.waiting_samplers, self.samplers)
        self._seconds["sampler"] += elapsed * self.samplers

    def take(self, now: float) -> dict[str, float]:
        """Shares and seconds since the last call, and start anew."""
        self.tick(now)
        seconds, wall = self._seconds, max(now - self._since, 1e-9)
        self._seconds, self._since = defaultdict(float), now

        def ratio(part: float, whole: float) -> float:
            return part / whole if whole > 0 else 0.0

        return {
            "overlap/reward_hidden": 1.0 - ratio(seconds["scoring_exposed"], seconds["scoring"]),
            "overlap/reward_s": seconds["scoring"],
            "overlap/reward_exposed_s": seconds["scoring_exposed"],
            "overlap/sampling_while_learning": ratio(seconds["sampling_while_learning"], seconds["learning"]),
            "idle/samplers": ratio(seconds["sampler_idle"], seconds["sampler"]),
            "idle/learner": ratio(seconds["learner_waiting"], wall),
            "stage/wall_s": wall,
        }


class Meter:
    """Everything the buffer measures for a step's metrics: activity, stage seconds, how fast adapters reach samplers.

    Args: clock, monotonic seconds; group_size, images of a group. Stage times within one process are exact; those
    between machines compare wall clocks.

    Attributes:
        groups: groups that were "sampled", "scored" and "trained" since the buffer began; one that is drawn or learned
            again counts again.
        group_seconds: what the last group took, by role ("sampler", "reward_worker") and member, dead ones included.
        learner_state: what the learner does.
    """

    def __init__(self, clock: Callable[[], float], group_size: int = 1) -> None:
        self.clock = clock
        self.group_size = group_size
        self.groups: Counter[str] = Counter()
        self.group_seconds: dict[str, dict[str, float]] = {"sampler": {}, "reward_worker": {}}
        self.learner_state: LearnerState = "starting"
        self.activity = ActivityClock(clock())
        self._stages: dict[str, list[float]] = {}
        self._truncated: list[float] = []
        self._published: dict[str, float] = {}
        self._applied: set[tuple[str, str]] = set()
        self._reward_workers = 1
        self._taken: Counter[str] = Counter()

    def now(self, sampling: int, scoring: int, waiting_samplers: int, samplers: int, reward_workers: int) -> None:
        """The numbers that hold from now on."""
        self.activity.tick(self.clock())
        self.activity.sampling, self.activity.scoring = sampling, scoring
        self.activity.waiting_samplers, self.activity.samplers = waiting_samplers, samplers
        self._reward_workers = max(1, reward_workers)

    def learner(self, state: LearnerState) -> None:
        """What the learner does from now on."""
        self.activity.tick(self.clock())
        self.learner_state = state
        self.activity.learner_waiting = state == "waiting"
        self.activity.learning = state in ("learning", "saving")

    def published(self, checksum: str) -> None:
        self._published = dict(list(self._published.items())[-8:]) | {checksum: time.time()}

    def drawn(self, sampler_id: str, checksum: str, timings: Mapping[str, float]) -> None:
        """A sampler has drawn a group with this adapter; the first time, note how long that took to get there."""
        self.groups["sampled"] += 1
        self.group_seconds["sampler"][sampler_id] = timings["sampled"] - timings["started"]
        if (sampler_id, checksum) not in self._applied and checksum in self._published:
            self._applied = {pair for pair in self._applied if pair[1] in self._published} | {(sampler_id, checksum)}
            self._note("adapter_latency_s", max(0.0, timings["adapter_applied"] - self._published[checksum]))

    def scored(self, timings: Mapping[str, float], outcome: Outcome) -> None:
        self.groups["scored"] += 1
        self.group_seconds["reward_worker"][outcome.worker_id] = outcome.ended - outcome.started
        self._note("sample_s", timings["sampled"] - timings["started"])
        self._note("put_s", timings["submitted"] - timings["sampled"])
        self._note("score_s", outcome.ended - outcome.started)
        self._note("score_latency_s", max(0.0, outcome.ended - timings["submitted"]))
        self._truncated.append(timings.get("truncated", 0.0))

    def take(self, delivered: int = 0) -> dict[str, float]:
        """Figures since the last call; stage seconds and the share of truncated prompts are means over groups.

        Args: delivered, groups that go to the learner now.
        """
        stages, self._stages = self._stages, {}
        truncated, self._truncated = self._truncated, []
        figures = {f"stage/{name}": sum(values) / len(values) for name, values in stages.items()}
        if truncated:
            figures["prompts/truncated"] = sum(truncated) / len(truncated)
        shares = self.activity.take(self.clock())
        for stage in ("sampled", "scored"):
            rate = (self.groups[stage] - self._taken[stage]) / shares["stage/wall_s"]
            figures[f"throughput/{stage}_groups_per_s"] = rate
            figures[f"throughput/{stage}_images_per_s"] = rate * self.group_size
        self._taken = Counter(self.groups)
        figures["throughput/groups_per_s"] = delivered / shares["stage/wall_s"]
        busy = sum(stages.get("score_s", ())) / (shares["stage/wall_s"] * self._reward_workers)
        return shares | figures | {"idle/reward_workers": max(0.0, 1.0 - busy)}

    def _note(self, name: str, seconds: float) -> None:
        self._stages.setdefault(name, []).append(seconds)
