"""Where a rank's batches come from: the buffer of a live run, or a dataset of groups scored before.

Every rank gets the whole batch (rewards of all groups, so that whatever is decided on them is decided alike) and the
trajectories of its own share.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import BaseModel, Field, model_validator

from learner.batches import Batch, Group, StopTraining, fetch_trajectories, share
from learner.order import GroupOrder
from learner.ranks import Ranks
from raysteer.calls import ask
from raysteer.errors import DeadlineExceeded, UserError

if TYPE_CHECKING:
    from diffusion.sampling import Trajectory

CALL_TIMEOUT_S = 120.0
FETCH_TIMEOUT_S = 60.0
AHEAD = 2  # batches of a dataset that are read before they are asked for

Received = tuple[Batch, "dict[int, Trajectory]"]


class Source(Protocol):
    """Batches by step. All ranks ask for the same steps, in order.

    `seconds` is what the last answer took: "wait_s" until the batch was there, "fetch_s" until its data was here.
    """

    seconds: dict[str, float]

    def begin(self, step: int) -> None:
        """The next batch asked for is that of `step`."""

    def receive(self, step: int) -> Received | None:
        """The batch of `step` and this rank's trajectories by ticket; None when the run is to end."""


class LiveSource:
    """What samplers draw now, from the buffer. Args: buffer actor; timeout_s, the longest wait for one batch."""

    def __init__(self, buffer: Any, ranks: Ranks, timeout_s: float) -> None:
        self.buffer, self.ranks, self.timeout_s = buffer, ranks, timeout_s
        self.seconds: dict[str, float] = {}

    def begin(self, step: int) -> None:
        pass

    def receive(self, step: int) -> Received | None:
        import ray

        while True:
            started = time.monotonic()
            request = self.buffer.next_batch.remote(step, self.timeout_s)
            batch: Batch | StopTraining = ray.get(request, timeout=self.timeout_s + CALL_TIMEOUT_S)
            if isinstance(batch, StopTraining):
                return None
            arrived = time.monotonic()
            mine = batch.groups[share(batch.groups, self.ranks.rank, self.ranks.size)]
            trajectories, lost = fetch_trajectories(mine, FETCH_TIMEOUT_S)
            self.seconds = {"wait_s": arrived - started, "fetch_s": time.monotonic() - arrived}
            if lost:
                ask(self.buffer.report_lost, step, lost)
            if not self.ranks.worst(float(len(lost))):
                return batch, trajectories


class OfflineConfig(BaseModel, frozen=True, extra="forbid"):
    """Learn from groups that were scored before, instead of from a live stream.

    ``data`` is the folder of a dataset: the journal of a run, or what ``raysteer generate`` left. Without it the run
    makes its own (section ``generate``), ``rounds`` times: each round draws with the adapter of the rounds before, and
    learns ``run.steps`` / ``rounds`` steps from what it drew. ``window``: files whose groups are shuffled together, and
    which a reader holds at once.
    """

    data: str | None = Field(default=None, min_length=1)
    rounds: int = Field(default=1, ge=1)
    window: int = Field(default=4, ge=1)

    @model_validator(mode="after")
    def _one_or_the_other(self) -> OfflineConfig:
        if self.data is not None and self.rounds > 1:
            raise ValueError(f"rounds ({self.rounds}) generate their own groups: leave data out, or rounds")
        return self


@dataclass(frozen=True)
class OfflineSettings:
    """A dataset to learn from, and when.

    `folder`: of the dataset; `window`: files whose groups are shuffled together; `begins_at` and `ends_at`: the learner
    steps that its batches are for; `seed`: of the order.
    """

    folder: str
    window: int
    groups_per_step: int
    begins_at: int
    ends_at: int
    seed: int


class DatasetSource:
    """What was drawn and scored before. Args: desk actor (see cluster.desk), which knows whether to go on."""

    def __init__(self, settings: OfflineSettings, desk: Any, ranks: Ranks, timeout_s: float) -> None:
        from learner.dataset import GroupDataset

        self.settings, self.desk, self.ranks, self.timeout_s = settings, desk, ranks, timeout_s
        self.dataset = GroupDataset.open(settings.folder)
        self.order = GroupOrder([row.part for row in self.dataset.rows], settings.seed, settings.window)
        self.seconds: dict[str, float] = {}
        self._stream: Any = None
        self._last = time.monotonic()

    def begin(self, step: int) -> None:
        from learner.stream import GroupStream

        settings = self.settings
        positions = [
            position for later in range(step, settings.ends_at) for position in self._positions(later)[self._share()]
        ]
        ahead = AHEAD * len(range(settings.groups_per_step)[self._share()])
        self._stream = GroupStream(self.dataset, self.order.runs(positions), ahead)

    def receive(self, step: int) -> Received | None:
        from diffusion.sampling import Trajectory

        started = time.monotonic()
        going = int(ask(self.desk.may_go_on, step)) if self.ranks.rank == 0 else 0
        if not self.ranks.from_rank_0(going):
            return None
        asked, failed, groups = time.monotonic(), 0.0, []
        try:
            groups = self._stream.take(len(range(self.settings.groups_per_step)[self._share()]), self.timeout_s)
        except (UserError, DeadlineExceeded) as error:
            ask(self.desk.fail, error)
            failed = 1.0
        self.seconds = {"wait_s": asked - started, "fetch_s": time.monotonic() - asked}
        if self.ranks.worst(failed):
            return None
        trajectories = {group.ticket: Trajectory.of_latents(group.prompt, group.final_latents) for group in groups}
        rows = self.order.rows(self._positions(step).start, self._positions(step).stop)
        wall_s, self._last = time.monotonic() - self._last, time.monotonic()
        batch = Batch(step, tuple(map(self._as_group, rows)), {"stage/wall_s": wall_s}, offline=True)
        return batch, trajectories

    def _positions(self, step: int) -> range:
        """Positions in the order that the batch of `step` takes."""
        size = self.settings.groups_per_step
        first = (step - self.settings.begins_at) * size
        return range(first, first + size)

    def _share(self) -> slice:
        return share(range(self.settings.groups_per_step), self.ranks.rank, self.ranks.size)

    def _as_group(self, row: int) -> Group:
        ref = self.dataset.rows[row]
        return Group(ref.ticket, "", ref.prompt_class, 0, "", "", self.dataset.rewards[row], {}, [], {})
