"""RewardWorker: scores groups as they come, up to `batch_groups` of them in one call of the reward.

An asyncio shell around one reward: requests queue on the event loop, one thread computes. Stateless, so that another
worker can score the same images again. Whatever goes wrong is an `Outcome` with a reason, never a number.

A reward that hangs takes its thread with it: the worker then says which groups it was at, hands back the others, and
ends with the reason, so that the supervisor replaces it.
"""

from __future__ import annotations

import asyncio
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from pydantic import Field

from actors.leases import Outcome
from actors.members import MembersConfig
from raysteer.calls import ask
from raysteer.errors import DeadlineExceeded

if TYPE_CHECKING:
    from rewards.base import Reward
    from rewards.config import RewardConfig

_Request: TypeAlias = "tuple[np.ndarray, str, asyncio.Future[Outcome]]"


class RewardWorkersConfig(MembersConfig, frozen=True, extra="forbid"):
    """How many reward workers, what each may use, where, and how patient to be.

    With `batch_groups` above 1 the rounding of a score may depend on what arrived together; a recipe with
    buffer.max_staleness 0, which promises equal bits, must leave it at 1. `timeout_s` bounds one call of the reward;
    a worker whose reward takes longer is replaced.
    """

    batch_groups: int = Field(default=1, ge=1)
    max_attempts: int = Field(default=3, ge=1)
    timeout_s: float = Field(default=120.0, gt=0.0)


class RewardWorker:
    """Actor around one reward. Args: worker_id for the log, the reward's config, device, groups per reward call."""

    def __init__(self, worker_id: str, reward: RewardConfig, device: str = "auto", batch_groups: int = 1) -> None:
        from actors.devices import prepare_device
        from rewards.base import build_reward

        self.worker_id = worker_id
        self.batch_groups = batch_groups
        device = prepare_device(device)
        self.reward: Reward = build_reward(reward, device)
        self._thread = ThreadPoolExecutor(max_workers=1, initializer=prepare_device, initargs=(device,))
        self._queue: asyncio.Queue[_Request] = asyncio.Queue()
        self._batcher: asyncio.Task[None] | None = None
        self._ended: asyncio.Future[str] | None = None
        self._hung: DeadlineExceeded | None = None
        self.timeout_s: float | None = None  # of one call of the reward; the buffer says, see `run`

    async def score(self, images: np.ndarray, prompt: str) -> Outcome:
        """Outcome for one group: images uint8 [G, H, W, 3] of one prompt."""
        if self._hung is not None:
            return self._untried()
        if self._batcher is None:
            self._batcher = asyncio.create_task(self._serve())
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((images, prompt, future))
        return await future

    async def run(self, buffer: Any) -> str:
        """Report for work, now that the models are loaded, and stay until `stop` is called.

        Fails when the process dies or the reward hangs: the supervisor's way to notice.
        """
        import ray

        self._ended = asyncio.get_running_loop().create_future()
        myself = ray.get_runtime_context().current_actor
        self.timeout_s = await asyncio.to_thread(ask, buffer.add_reward_worker, self.worker_id, myself)
        return await self._ended

    async def stop(self) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(self.worker_id)

    async def pid(self) -> int:
        return os.getpid()

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._queue.get()]
            while len(batch) < self.batch_groups and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            jobs = [(images, prompt) for images, prompt, _ in batch]
            started = time.time()
            try:
                scoring = loop.run_in_executor(self._thread, self._score, jobs)
                outcomes = await asyncio.wait_for(scoring, self.timeout_s)
            except TimeoutError:
                return self._give_up(batch, started)
            for (_, _, future), outcome in zip(batch, outcomes, strict=True):
                if not future.done():
                    future.set_result(outcome)

    def _give_up(self, batch: list[_Request], started: float) -> None:
        """The reward hangs: name the groups it was at, hand back those behind them, and end."""
        assert self.timeout_s is not None
        self._hung = DeadlineExceeded(
            "the reward to score", self.timeout_s, "it hangs, or reward_workers.timeout_s is too short for it"
        )
        detail = f"{self.worker_id}: the reward gave no score within {self.timeout_s:g} s"
        for _, _, future in batch:
            future.set_result(self._failed("retryable", "reward_timeout", detail, started))
        while not self._queue.empty():
            self._queue.get_nowait()[2].set_result(self._untried())
        if self._ended is not None and not self._ended.done():
            self._ended.set_exception(self._hung)

    def _score(self, jobs: list[tuple[np.ndarray, str]]) -> list[Outcome]:
        """Score groups together; if that fails, each alone, so that one bad group does not spoil its neighbours."""
        started = time.time()
        images = np.concatenate([group for group, _ in jobs]) if len(jobs) > 1 else jobs[0][0]
        prompts = [prompt for group, prompt in jobs for _ in range(len(group))]
        try:
            scores = self.reward.score(images, prompts)
        except Exception as error:  # a reward is somebody else's code: whatever it raises becomes a named outcome
            if len(jobs) > 1:
                return [self._score([job])[0] for job in jobs]
            detail = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            return [self._failed("retryable", f"reward_failed:{type(error).__name__}", detail, started)]
        outcomes, first = [], 0
        for group, _ in jobs:
            last = first + len(group)
            reward = np.asarray(scores.total[first:last], np.float32)
            parts = {name: np.asarray(part[first:last], np.float32) for name, part in scores.parts.items()}
            first = last
            # parts first: the component at fault says more than the total it spoils
            bad = [name for name, values in {**parts, "total": reward}.items() if not np.isfinite(values).all()]
            if bad:
                detail = f"{bad[0]} holds a value that is not a finite number"
                outcomes.append(self._failed("poisoned", f"reward_not_finite:{bad[0]}", detail, started))
            else:
                outcomes.append(Outcome("scored", reward, parts, "", "", started, time.time(), self.worker_id))
        return outcomes

    def _untried(self) -> Outcome:
        return Outcome("untried", reason="reward_worker_ended", worker_id=self.worker_id)

    def _failed(self, kind: Any, reason: str, detail: str, started: float) -> Outcome:
        return Outcome(kind, None, {}, reason, detail, started, time.time(), self.worker_id)
