"""Figures with their uncertainty: percentile bootstrap over prompts (Efron 1979), vectorised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class Figure:
    """A value, its 95 % percentile interval, its bootstrap standard error and the number of samples behind it."""

    value: float
    low: float
    high: float
    standard_error: float
    n: int

    def as_dict(self) -> dict[str, float | int]:
        return {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(self).items()}

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def stratified_mean(strata: Sequence[np.ndarray], samples: int = 2000, seed: int = 0) -> Figure:
    """Mean of the strata's means, resampled inside each stratum.

    ``strata``: one float array [n_i, ...] per stratum, prompts along axis 0 (other axes are averaged first). With one
    stratum this is the plain bootstrap of a mean. Raises ValueError on an empty stratum.
    """
    if not len(strata) or any(len(s) == 0 for s in strata):
        raise ValueError("a stratum of the bootstrap is empty; evaluate at least one prompt of each")
    columns = [np.asarray(s, float).reshape(len(s), -1).mean(axis=1) for s in strata]
    rng = np.random.default_rng(seed)
    draws = np.mean([c[rng.integers(0, len(c), size=(samples, len(c)))].mean(axis=1) for c in columns], axis=0)
    low, high = np.percentile(draws, [2.5, 97.5])
    value = float(np.mean([c.mean() for c in columns]))
    return Figure(value, float(low), float(high), float(draws.std(ddof=1)), sum(len(c) for c in columns))


def mean(values: np.ndarray, samples: int = 2000, seed: int = 0) -> Figure:
    """Mean of one sample, float [n]."""
    return stratified_mean([values], samples, seed)
