"""What the rollout buffer is told: the recipe's section, and everything else it needs of a recipe."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, Field

from cluster.tickets import TicketSource


class BufferConfig(BaseModel, frozen=True, extra="forbid"):
    """`max_staleness`: largest version lag of a consumed group; 0 is strictly on-policy and reproducible.
    `lease_ttl_s`: how long a sampler may take for one group before its ticket goes to another."""

    max_staleness: int = Field(default=1, ge=0)
    lease_ttl_s: float = Field(default=300.0, gt=0.0)


@dataclass(frozen=True)
class BufferSettings:
    """What the buffer needs of a recipe."""

    tickets: TicketSource
    groups_per_step: int
    max_staleness: int
    lease_ttl_s: float
    total_groups: int
    max_attempts: int
    score_timeout_s: float
    preview_every: int = 0
    preview_prompts: tuple[str, ...] = ()
    preview_seed: int = 0

    @property
    def steps(self) -> int:
        return self.total_groups // self.groups_per_step
