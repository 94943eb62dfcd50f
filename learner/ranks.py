"""The ranks of a learner, and what they work out together. Every method is a collective: all ranks call it, in order.

With a single rank nothing is sent.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist


class Ranks:
    """This rank among the others. `device`: where tensors that travel live."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.rank = dist.get_rank() if self.distributed else 0
        self.size = dist.get_world_size() if self.distributed else 1

    def worst(self, value: float) -> float:
        """The largest value of any rank."""
        return float(self._reduced(torch.tensor([value], device=self.device), dist.ReduceOp.MAX))

    def barrier(self) -> None:
        self.worst(0.0)

    def from_rank_0(self, value: int) -> int:
        if not self.distributed:
            return value
        tensor = torch.tensor([value], device=self.device)
        dist.broadcast(tensor, 0)
        return int(tensor)

    def gather(self, value: int) -> list[int]:
        """Everybody's value, by rank."""
        values = torch.zeros(self.size, dtype=torch.int64, device=self.device)
        values[self.rank] = value
        return [int(value) for value in self._reduced(values, dist.ReduceOp.SUM)]

    def figures(self, tally: Tally) -> dict[str, float]:
        """The figures of all ranks: "objective/NAME" to a mean, or to a maximum for names with "max"."""
        sums, maxima = sorted(tally.sums), sorted(tally.maxima)
        total = torch.tensor([float(tally.count), *(tally.sums[name] for name in sums)], device=self.device)
        highest = torch.tensor([0.0, *(tally.maxima[name] for name in maxima)], device=self.device)
        self._reduced(total, dist.ReduceOp.SUM)
        self._reduced(highest, dist.ReduceOp.MAX)
        means = {name: float(total[1 + i] / total[0]) for i, name in enumerate(sums)}
        found = means | {name: float(highest[1 + i]) for i, name in enumerate(maxima)}
        return {f"objective/{name}": value for name, value in found.items()}

    def _reduced(self, tensor: torch.Tensor, how: dist.ReduceOp.RedOpType) -> torch.Tensor:
        if self.distributed:
            dist.all_reduce(tensor, how)
        return tensor


class Tally:
    """Figures of the objective over the (group, position) pairs of one rank."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: dict[str, float] = {}
        self.maxima: dict[str, float] = {}

    def add(self, loss: float, figures: Mapping[str, float]) -> None:
        self.count += 1
        for name, value in {**figures, "loss": loss}.items():
            if "max" in name:
                self.maxima[name] = max(self.maxima.get(name, value), value)
            else:
                self.sums[name] = self.sums.get(name, 0.0) + value
