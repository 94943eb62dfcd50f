"""What a denoiser is told besides latents and timestep: text embeddings, pooled embeddings, token ids, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Conditioning:
    """Named tensors, each [n, ...] with the same n. What the names mean is between a family and its denoiser."""

    parts: Mapping[str, torch.Tensor]

    def __post_init__(self) -> None:
        if len({len(part) for part in self.parts.values()}) != 1:
            sizes = {name: tuple(part.shape) for name, part in self.parts.items()}
            raise ValueError(f"every part needs the same first dimension: {sizes}")

    def __len__(self) -> int:
        return len(next(iter(self.parts.values())))

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.parts[name]

    def expand(self, n: int) -> Conditioning:
        """The one prompt of this conditioning for a batch of ``n``: views, no copies."""
        return Conditioning({name: part.expand(n, *part.shape[1:]) for name, part in self.parts.items()})

    def to(self, dtype: torch.dtype) -> Conditioning:
        """Floating parts in ``dtype``; ids and masks stay as they are."""
        return Conditioning(
            {name: part.to(dtype) if part.is_floating_point() else part for name, part in self.parts.items()}
        )

    @staticmethod
    def cat(items: Sequence[Conditioning]) -> Conditioning:
        """One batch of several, in their order."""
        return Conditioning({name: torch.cat([item[name] for item in items]) for name in items[0].parts})
