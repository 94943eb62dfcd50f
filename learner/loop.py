"""The learner: what every rank runs under Ray Train.

The whole loop is `train_loop`; `Learner` is what it needs on one rank. Ray Train restarts all ranks when one dies:
the loop then begins anew at the newest valid checkpoint of our own (a checkpoint reported to Ray Train but not yet
polled would be lost), tells the buffer to go back there, and goes on. Everything a rank decides on alone would leave
the others waiting in a collective call, so decisions are either functions of the batch, which all ranks share, or
taken together (see `learner.ranks`). What rank 0 does alone for the others (publishing, checkpoints, figures) must not
kill it half-way: when it fails, the run is failed by name, and all ranks end in order at their next batch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field, model_validator

from learner.batches import Batch, batch_metrics, batch_rewards, share
from learner.checkpoint import Checkpoint, checkpoint_path, latest_checkpoint, read_checkpoint, save_checkpoint
from learner.ema import AdapterEMA
from learner.objective import build_objective, group_seed
from learner.optim import AdapterOptimizer, OptimizerConfig
from learner.ranks import Ranks, Tally
from learner.records import append_row, keep_rows_until
from learner.sources import DatasetSource, LiveSource, OfflineSettings, Received, Source
from raysteer.calls import AGAIN, ask
from raysteer.errors import DeadlineExceeded, ParityError, StorageError, UserError
from raysteer.logs import log_as, log_version

if TYPE_CHECKING:
    from diffusion.policy import ModelConfig
    from diffusion.sampling import SamplingConfig, Trajectory

CALL_TIMEOUT_S = 120.0  # of the last figures
RNG_KEY = "rng/torch"


class LearnerConfig(BaseModel, frozen=True, extra="forbid"):
    """Learner ranks, where they go, and their patience.

    `workers` ranks; with `min_workers` fewer are enough, down to that, and Ray Train changes their number as nodes come
    and go. `labels` and `resources` choose nodes as those of samplers do (see MembersConfig). `max_failures`: how often
    Ray Train may restart the ranks, whether they died or their node; `batch_timeout_s`: longest wait for one batch;
    `start_timeout_s`: longest time without room for the ranks.
    """

    workers: int = Field(default=1, ge=1)
    min_workers: int | None = Field(default=None, ge=1)
    num_cpus: float = Field(default=0.5, ge=0.0)
    num_gpus: float = Field(default=0.0, ge=0.0)
    resources: dict[str, float] = Field(default_factory=dict)
    labels: dict[str, str] = Field(default_factory=dict)
    max_failures: int = Field(default=2, ge=0)
    batch_timeout_s: float = Field(default=600.0, gt=0.0)
    start_timeout_s: float = Field(default=600.0, gt=0.0)
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @property
    def fewest(self) -> int:
        """Ranks a run needs."""
        return self.workers if self.min_workers is None else self.min_workers

    @model_validator(mode="after")
    def _a_range(self) -> LearnerConfig:
        if self.fewest > self.workers:
            raise ValueError(f"min_workers ({self.min_workers}) is above workers ({self.workers}): lower it")
        return self


@dataclass(frozen=True)
class LoopSettings:
    """What the loop needs of a recipe. `checkpoints` and `metrics_file` are paths all ranks can reach.

    `mixture`: weights by part of the reward when parts are normalised before they are added, else None. `offline`: the
    dataset to learn from; None is the live stream of the buffer.
    """

    run: str
    model: ModelConfig
    sampling: SamplingConfig
    objective: Any
    optimizer: OptimizerConfig
    learner: LearnerConfig
    seed: int
    steps: int
    checkpoint_every: int
    keep_checkpoints: int
    checkpoints: str
    metrics_file: str
    fingerprint: str
    mixture: Mapping[str, float] | None = None
    offline: OfflineSettings | None = None


@dataclass(frozen=True)
class Services:
    """Actor handles. Learning from a dataset, `buffer` is a desk, and there are no `weights` and no `journal`."""

    buffer: Any
    weights: Any = None
    journal: Any = None
    tracker: Any = None


def train_loop(config: dict[str, Any]) -> None:
    """One rank's life. Args: config = {"settings": LoopSettings, "services": Services}."""
    learner = Learner(config["settings"], config["services"])
    step = learner.restore()
    while step < learner.settings.steps:
        received = learner.receive(step)
        if received is None or not learner.in_parity(*received):
            break
        batch, trajectories = received
        figures = learner.learn(batch, trajectories)
        if figures is None:
            break
        step += 1
        learner.publish(step)
        # Figures before the checkpoint that covers them: going back cuts them off, but nothing would write them again.
        learner.report(step, figures, [group.ticket_id for group in batch.groups])
        if step % learner.settings.checkpoint_every == 0 or step == learner.settings.steps:
            learner.save(step)
    learner.save(step)
    learner.finish()


class Learner:
    """Policy, objective and optimiser of one rank, and its dealings with the other actors."""

    def __init__(self, settings: LoopSettings, services: Services) -> None:
        from diffusion.policy import DiffusionPolicy

        self.settings, self.services = settings, services
        device = _device(settings.learner.device)
        self.ranks = Ranks(device)
        self.rank = self.ranks.rank
        log_as(settings.run, "learner", f"rank-{self.rank}")
        self.policy = DiffusionPolicy.load(settings.model, device, adapter_seed=settings.seed)
        self.stepper = self.policy.stepper(settings.sampling)
        self.objective = build_objective(settings.objective)
        self.source = self._source()
        self.optimizer = AdapterOptimizer(self.policy.named_trainable_parameters(), settings.optimizer)
        decay = settings.optimizer.ema_decay
        self.ema: AdapterEMA | None = None
        if decay is not None and self.rank == 0:
            self.ema = AdapterEMA(self.policy.named_trainable_parameters(), decay)
        self.saved = -1
        self.gated = False
        self.seconds: dict[str, float] = {}
        self._reported: list[Any] = []

    def _source(self) -> Source:
        timeout_s = self.settings.learner.batch_timeout_s
        if self.settings.offline is None:
            return LiveSource(self.services.buffer, self.ranks, timeout_s)
        return DatasetSource(self.settings.offline, self.services.buffer, self.ranks, timeout_s)

    # -- begin ---------------------------------------------------------------------------------------------------------

    def restore(self) -> int:
        """Load the newest valid checkpoint, if any, and bring the buffer to its step. Returns the step."""
        settings = self.settings
        checkpoint = latest_checkpoint(settings.checkpoints, settings.fingerprint)
        step = self.ranks.from_rank_0(checkpoint.step if checkpoint is not None else 0)
        if step and (checkpoint is None or checkpoint.step != step):
            checkpoint = read_checkpoint(checkpoint_path(settings.checkpoints, step))
        if step and checkpoint is not None:
            self.policy.load_adapter(dict(checkpoint.adapter))
            self.optimizer.load_state(checkpoint.optimizer)
            if self.ema is not None and checkpoint.ema is not None:
                self.ema.load_state(checkpoint.ema)
            torch.set_rng_state(torch.from_numpy(np.array(checkpoint.optimizer[RNG_KEY], np.uint8)))
        else:
            torch.manual_seed(settings.seed)
        pids = self.ranks.gather(os.getpid())
        if self.rank == 0:
            ask(self.services.buffer.rewind, step, dict(enumerate(pids)))
            with self._failing_the_run():
                keep_rows_until(settings.metrics_file, step)
            self.publish(step)
        self.saved = step if step else -1
        self.source.begin(step)
        self.ranks.barrier()  # nobody may ask for a batch before the buffer is back at this step
        return step

    # -- one step ------------------------------------------------------------------------------------------------------

    def receive(self, step: int) -> Received | None:
        """The batch of `step` and this rank's trajectories; None when the run is to end."""
        received = self.source.receive(step)
        self.seconds |= self.source.seconds
        return received

    def in_parity(self, batch: Batch, trajectories: dict[int, Trajectory]) -> bool:
        """Before the first update: replaying groups this very adapter has drawn must give their log-probs again.

        On a mismatch the run is failed (ParityError) and False returned: training on wrong ratios is worse than
        stopping. An objective without ratios has no tolerance, and there is no gate.
        """
        tolerance = self.objective.parity_tolerance
        if self.gated or tolerance is None:
            return True
        guidance = self.settings.sampling.guidance_scale
        fresh = {group.ticket_id for group in batch.groups if group.version == batch.step and not batch.offline}
        if not fresh:
            return True
        mine = [trajectory for ticket_id, trajectory in trajectories.items() if ticket_id in fresh]
        deviations = [self.objective.parity(self.policy, self.stepper, group, guidance) for group in mine]
        worst = self.ranks.worst(max(deviations, default=0.0))
        self.gated = worst <= tolerance
        if not self.gated and self.rank == 0:
            message = (
                f"replaying fresh groups gives |ratio - 1| = {worst:.3g}, more than {tolerance:.3g}: sampler and"
                " learner compute different steps (other dtype, device, library version or guidance path)"
            )
            ask(self.services.buffer.fail, ParityError(message))
        self.ranks.barrier()
        return self.gated

    def learn(self, batch: Batch, trajectories: dict[int, Trajectory]) -> dict[str, float] | None:
        """All updates of one batch. Returns its figures; None when the gradient was not finite (the run is failed)."""
        started = time.monotonic()
        settings, tally = self.settings, Tally()
        rewards = batch_rewards(batch.groups, settings.mixture, settings.objective.std, settings.objective.std_floor)
        advantages = self.objective.advantages(rewards)
        mine = range(len(batch.groups))[share(batch.groups, self.rank, self.ranks.size)]
        guidance = settings.sampling.guidance_scale
        prepared = {
            ticket_id: self.objective.prepare(
                self.policy, self.stepper, trajectory, guidance, group_seed(settings.seed, batch.step, ticket_id)
            )
            for ticket_id, trajectory in trajectories.items()
        }
        norms = []
        for update in range(settings.objective.updates_per_batch):
            for index in mine:
                ticket_id, lag = batch.groups[index].ticket_id, batch.step - batch.groups[index].version
                trajectory = trajectories[ticket_id]
                count = self.objective.positions(trajectory)
                parts = np.array_split(np.arange(count), settings.objective.updates_per_batch)
                positions = [int(position) for position in parts[update]]
                proximal_at = lag / (lag + update / settings.objective.updates_per_batch) if lag else 0.0
                for position in positions:
                    loss, stats = self.objective.loss(
                        self.policy,
                        self.stepper,
                        trajectory,
                        advantages[index],
                        [position],
                        guidance,
                        prepared[ticket_id],
                        proximal_at,
                    )
                    (loss / (len(batch.groups) * len(positions))).backward()
                    tally.add(float(loss.detach()), stats)
            try:
                norms.append(self.optimizer.update())
            except FloatingPointError as error:
                if self.rank == 0:
                    failure = UserError(
                        "optimizer", str(error), "lower optimizer.lr or raise sampling.trained.min_sigma"
                    )
                    ask(self.services.buffer.fail, failure)
                self.ranks.barrier()
                return None
            if self.ema is not None:
                self.ema.update()
        self.seconds["learn_s"] = time.monotonic() - started
        figures = self.ranks.figures(tally)
        figures |= {"optimizer/grad_norm": float(np.mean(norms)), "optimizer/lr": self.optimizer.lr}
        return batch_metrics(batch) | figures | dict(batch.telemetry)

    # -- after a step --------------------------------------------------------------------------------------------------

    def publish(self, version: int) -> None:
        """Rank 0 hands the adapter to the weight store and waits until it is lent."""
        log_version(version)
        if self.rank != 0:
            return
        from diffusion.adapters import checksum

        started = time.monotonic()
        state = self.policy.adapter_state()
        with self._failing_the_run():
            if self.services.weights is None:
                ask(self.services.buffer.set_adapter, version, [], checksum(state))
            else:
                ask(self.services.weights.publish, version, state, checksum(state))
        self.seconds["publish_s"] = time.monotonic() - started

    def save(self, step: int) -> None:
        """Rank 0 writes a checkpoint unless this step has one, and commits what it covers. One attempt a step."""
        if self.rank == 0 and step > max(self.saved, 0):
            started = time.monotonic()
            with self._failing_the_run():
                ledger = ask(self.services.buffer.ledger_state, step)
                if self.services.journal is not None:
                    ask(self.services.journal.flush)
                optimizer = self.optimizer.state() | {RNG_KEY: torch.get_rng_state().numpy()}
                adapter = self.policy.adapter_state()
                ema = None if self.ema is None else adapter | self.ema.state()  # with the adapter's alpha
                checkpoint = Checkpoint(step, self.settings.fingerprint, adapter, optimizer, ledger, ema=ema)
                save_checkpoint(self.settings.checkpoints, checkpoint, self.settings.keep_checkpoints)
                ask(self.services.buffer.commit, step)
            self.seconds["checkpoint_s"] = time.monotonic() - started
        self.saved = max(self.saved, step)

    def report(self, step: int, figures: dict[str, float], tickets: Sequence[int] = ()) -> None:
        """Rank 0 records the figures of a finished step, without waiting for whoever keeps them; in the metrics file
        also the tickets it consumed.
        """
        import ray

        if self.rank != 0:
            return
        wall = figures.get("stage/wall_s", 0.0)
        images = self.settings.sampling.group_size * figures.pop("batch/groups")
        row = figures | {f"stage/{name}": seconds for name, seconds in self.seconds.items()}
        row["throughput/images_per_s"] = images / wall if wall else 0.0
        self.seconds = {}
        with self._failing_the_run():
            append_row(self.settings.metrics_file, {"step": step, "tickets": list(tickets)} | row)
        if self._reported:
            self._reported = ray.wait(self._reported, num_returns=len(self._reported), timeout=0)[1]
        self._reported.append(self.services.buffer.report.remote(step, row))
        if self.services.tracker is not None:
            self._reported.append(self.services.tracker.log_metrics.remote(step, row))

    def finish(self) -> None:
        """Wait until the last figures have arrived: calls still queued die with the process that made them."""
        import ray

        if self._reported:
            ray.wait(self._reported, num_returns=len(self._reported), timeout=CALL_TIMEOUT_S)

    @contextmanager
    def _failing_the_run(self) -> Iterator[None]:
        """A full disk, a dead service or an overdue answer ends the run by name, not this rank by a stack trace."""
        try:
            yield
        except OSError as error:
            file = error.filename or self.settings.checkpoints
            remedy = f"free some space or correct the folder; {AGAIN} from its last checkpoint"
            failure = StorageError(str(file), f"cannot be written ({error.strerror})", remedy)
            ask(self.services.buffer.fail, failure)
        except (UserError, DeadlineExceeded) as error:
            ask(self.services.buffer.fail, error)


def _device(wanted: str) -> torch.device:
    """The device Ray Train gave this rank, or the one that is wanted; one thread on a CPU (see actors.devices)."""
    from ray.train.torch import get_device

    device = get_device() if wanted == "auto" else torch.device(wanted)
    if device.type == "cpu":
        torch.set_num_threads(1)
    return device
