"""What samplers and reward workers have in common as members of a cluster: how many there are, and where they go."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field, model_validator


class MembersConfig(BaseModel, frozen=True, extra="forbid"):
    """How many members a role has, what each may use, and on which nodes it may run.

    ``count`` members, or from ``min`` to ``max`` of them: a run begins with ``min``, grows to ``max`` as nodes join,
    and goes on with fewer than ``min`` for at most ``start_timeout_s``. ``labels`` and ``resources`` say which nodes
    may be used: Ray's node labels ({"zone": "a"}; "!a", "in(a, b)" and "!in(a, b)" work too; all must match) and custom
    resources ({"sampler": 1}, taken for each member). ``max_restarts`` counts replacements of one member that died by
    itself; a lost node does not count.
    """

    count: int = Field(default=1, ge=1)
    min: int | None = Field(default=None, ge=1)
    max: int | None = Field(default=None, ge=1)
    num_cpus: float = Field(default=0.5, ge=0.0)
    num_gpus: float = Field(default=0.0, ge=0.0)
    resources: dict[str, float] = Field(default_factory=dict)
    labels: dict[str, str] = Field(default_factory=dict)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_restarts: int = Field(default=3, ge=0)
    start_timeout_s: float = Field(default=600.0, gt=0.0)

    @property
    def fewest(self) -> int:
        """Members a run needs."""
        return self.count if self.min is None else self.min

    @property
    def most(self) -> int:
        """Members a run can use."""
        return max(self.fewest, self.count) if self.max is None else self.max

    @model_validator(mode="after")
    def _a_range(self) -> MembersConfig:
        if self.most < self.fewest:
            raise ValueError(f"max ({self.most}) is below the least number of members ({self.fewest}): raise it")
        return self
