"""Sampler: draws whole groups under leases, and never waits for their rewards.

One turn of `run`: lease a ticket, put on the lease's adapter if it is another one (checksum verified), draw the
group, put images and trajectory into the object store, ask the reward worker for a score and hand its *future* to the
buffer. The buffer answers a submission when the score is in, so the number of unanswered ones is what bounds a
sampler that is faster than the rewards.

A full object store and an adapter whose bytes are not what was published are no fault of this sampler, and no
replacement could do better: they end the run by name.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.devices import prepare_device
from actors.leases import Lease, Preview, Stop, TicketLike
from actors.members import MembersConfig
from raysteer.calls import AGAIN, ask, put
from raysteer.errors import ClusterError, DeadlineExceeded
from raysteer.logs import log_version

if TYPE_CHECKING:
    from diffusion.policy import ModelConfig
    from diffusion.sampling import Rollout, SamplingConfig

LEASE_POLL_S = 10.0
ADAPTER_TIMEOUT_S = 120.0
END_TIMEOUT_S = 10.0
MAX_UNANSWERED = 4


class SamplersConfig(MembersConfig, frozen=True, extra="forbid"):
    """How many samplers, what each may use, and where."""


class Sampler:
    """Actor around one policy.

    Args:
        sampler_id: unique among all samplers there ever were in this run, so that a dead one's groups can be told
        apart. model, sampling: what to draw with and how.
        device: "auto", "cpu" or "cuda".
        answer_timeout_s: longest a submission may stay unanswered.
        deterministic: draw as the pipeline itself would; the groups have no trained steps.
    """

    def __init__(
        self,
        sampler_id: str,
        model: ModelConfig,
        sampling: SamplingConfig | None = None,
        device: str = "auto",
        answer_timeout_s: float = 600.0,
        deterministic: bool = False,
    ) -> None:
        from diffusion.policy import DiffusionPolicy

        self.sampler_id = sampler_id
        self.sampling = sampling
        self.answer_timeout_s = answer_timeout_s
        self.deterministic = deterministic
        self.policy = DiffusionPolicy.load(model, prepare_device(device))
        self.checksum = ""
        self.applied_at = 0.0

    def run(self, buffer: Any, tracker: Any = None, preview: tuple[int, float] = (10, 1.0)) -> dict[str, float]:
        """Draw groups until the buffer says stop. `preview`: (steps, guidance_scale) of preview images."""
        import ray

        unanswered: list[Any] = []
        drawn = 0
        while True:
            grant = ray.get(
                buffer.lease.remote(self.sampler_id, os.getpid(), LEASE_POLL_S),
                timeout=LEASE_POLL_S + ADAPTER_TIMEOUT_S,
            )
            if isinstance(grant, Stop):
                if unanswered:
                    ray.wait(unanswered, num_returns=len(unanswered), timeout=END_TIMEOUT_S)
                return {"groups": drawn}
            try:
                if isinstance(grant, Lease):
                    unanswered.append(self._draw(grant, buffer))
                    drawn += 1
                elif isinstance(grant, Preview):
                    unanswered += self._preview(grant, tracker, *preview)
            except ClusterError as error:
                ask(buffer.fail, error)
            unanswered = self._bounded(unanswered)

    def _draw(self, lease: Lease, buffer: Any) -> Any:
        started = time.time()
        log_version(lease.version)
        self._put_on(lease)
        ticket = lease.ticket
        rollout = self._rollout(ticket)
        sampled = time.time()
        images = put(rollout.images)
        trajectory = put(rollout.trajectory)
        refs = {"images": images, "trajectory": trajectory}  # in a container, so that Ray passes references on
        if lease.reward_worker is not None:
            refs["outcome"] = lease.reward_worker.score.remote(images, ticket.prompt)
        timings = {"started": started, "sampled": sampled, "submitted": time.time(), "adapter_applied": self.applied_at}
        timings["truncated"] = float(self.policy.truncated(ticket.prompt))
        return buffer.submit.remote(ticket.id, lease.lease_id, self.sampler_id, lease.checksum, refs, timings)

    def _rollout(self, ticket: TicketLike) -> Rollout:
        from diffusion.sampling import sample_deterministic, sample_rollout

        cfg = self.sampling
        assert cfg is not None, "a sampler for evaluation only draws no groups"
        if self.deterministic:
            return sample_deterministic(self.policy, ticket.prompt, ticket.seeds, cfg.steps, cfg.guidance_scale)
        return sample_rollout(self.policy, ticket.prompt, ticket.seeds, cfg, ticket.step_seed, ticket.step)

    def _bounded(self, unanswered: list[Any]) -> list[Any]:
        """Forget answered submissions; wait only while there are too many others."""
        import ray

        if not unanswered:
            return unanswered
        answered, pending = ray.wait(unanswered, num_returns=len(unanswered), timeout=0)
        if len(pending) >= MAX_UNANSWERED:
            started = time.monotonic()
            more, pending = ray.wait(pending, num_returns=1, timeout=self.answer_timeout_s)
            if not more:
                raise DeadlineExceeded(
                    f"the scores of {len(pending)} groups drawn by {self.sampler_id}",
                    time.monotonic() - started,
                    "the reward workers are stuck or too few: see reward_workers.count and reward_workers.timeout_s",
                )
            answered += more
        ray.get(answered)  # a submission that failed is a bug or a dead buffer: fail here, not silently
        return pending

    def _put_on(self, grant: Lease | Preview) -> None:
        """Make the adapter of `grant` the policy's, unless it is already.

        Raises ClusterError when its bytes are not those that were published.
        """
        import ray

        from diffusion.adapters import checksum as checksum_of

        if grant.checksum == self.checksum:
            return
        state = ray.get(grant.adapter[0], timeout=ADAPTER_TIMEOUT_S)
        found = checksum_of(state)
        if found != grant.checksum:
            raise ClusterError(
                f"adapter version {grant.version} in the object store of node {ray.util.get_node_ip_address()}",
                f"it has checksum {found[:12]} instead of {grant.checksum[:12]}: its bytes have changed",
                f"{AGAIN}; if this happens again, suspect the memory of that node",
            )
        if state:  # an empty one is the base model: a fresh sampler's own adapter changes nothing
            self.policy.load_adapter(state)
        self.checksum, self.applied_at = grant.checksum, time.time()

    def _preview(self, grant: Preview, tracker: Any, steps: int, guidance_scale: float) -> list[Any]:
        self._put_on(grant)
        images = self.generate(grant.prompts, grant.seeds, steps, guidance_scale)
        return [] if tracker is None else [tracker.log_images.remote(grant.version, images, list(grant.prompts))]

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: int,
        guidance_scale: float,
        adapter_state: dict[str, np.ndarray] | None = None,
        batch_size: int = 16,
    ) -> np.ndarray:
        """uint8 [n, H, W, 3], one image per prompt and seed, without noise between the steps.

        `adapter_state`: put on this adapter first; None keeps the present one (a fresh sampler: the base model).
        """
        from diffusion.adapters import checksum as checksum_of
        from diffusion.sampling import generate

        if adapter_state is not None:
            self.policy.load_adapter(adapter_state)
            self.checksum, self.applied_at = checksum_of(adapter_state), time.time()
        return generate(self.policy, list(prompts), list(seeds), steps, guidance_scale, batch_size)

    def pid(self) -> int:
        return os.getpid()
