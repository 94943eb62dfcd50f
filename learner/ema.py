"""Exponential moving average of the adapter: what is exported and evaluated, while samplers draw with the raw one.

Invariants
1. It begins as the adapter itself and has no warm-up: with decay 0 it is the adapter, with decay 1 it never moves.
2. It lives on rank 0 alone. Parameters are the same on every rank after every update, so every rank would hold the same
   average; rank 0 writes the checkpoints, and whoever is rank 0 after a restart reads it from there.
3. The two factors of a LoRA layer are averaged separately, as is usual: the average of a product is
   close to the product of averages only while the adapter moves little within 1 / (1 - decay) updates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn


class AdapterEMA:
    """ema <- decay ema + (1 - decay) parameter, once per optimiser update; float32, on the parameters' device.

    Args: parameters (name, float32 parameter); decay in [0, 1].
    """

    def __init__(self, parameters: Sequence[tuple[str, nn.Parameter]], decay: float) -> None:
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay is {decay}, not in [0, 1]")
        self.decay = decay
        self.parameters = dict(parameters)
        self.average = {name: parameter.detach().clone() for name, parameter in parameters}

    @torch.no_grad()
    def update(self) -> None:
        """Take the present parameters in."""
        for name, parameter in self.parameters.items():
            self.average[name].lerp_(parameter, 1.0 - self.decay)  # exact at both ends

    def state(self) -> dict[str, np.ndarray]:
        """The average by parameter name."""
        return {name: average.cpu().numpy().copy() for name, average in self.average.items()}

    @torch.no_grad()
    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Restore what `state` returned; other names are passed over. Raises KeyError when a parameter is missing."""
        for name, average in self.average.items():
            average.copy_(torch.from_numpy(np.array(arrays[name], np.float32)))
