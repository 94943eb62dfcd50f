"""Distances between two sets of feature vectors, Fréchet and kernel, with their uncertainty over prompts.

The bootstrap of `evaluation.bootstrap` is for means. A resample of prompts repeats images, so it holds fewer different
ones, and the Fréchet distance, which grows as images get fewer, would come out too large in every resample: the
percentile interval can miss the very value it is of. The delete-a-group jackknife leaves a twentieth of the prompts
out at a time instead: the sets stay nearly as large, no image is repeated, and what the bias adds is in all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from evaluation.bootstrap import Figure

GROUPS = 20
_NORMAL_95 = 1.959963984540054
_ROWS = 1024  # of a kernel matrix at a time


def frechet(features: np.ndarray, mean: np.ndarray, root: np.ndarray) -> float:
    """Fréchet distance between the Gaussian of a sample and a given one (Dowson & Landau 1982).

    It is the FID of Heusel et al. 2017. With m and S the mean and covariance of the sample:

    d^2 = |m - mu|^2 + tr S + tr C - 2 tr (C^1/2 S C^1/2)^1/2

    Args:
        features: float [n, d], n >= 2.
        mean: mu, float [d].
        root: C^1/2, float [d, d], see `symmetric_root`.
    """
    centre = features.mean(axis=0, dtype=np.float64)
    rows = (features - centre) / math.sqrt(len(features) - 1)  # their Gram matrix is S
    seen = rows @ root
    # Both Gram matrices have the eigenvalues of C^1/2 S C^1/2 that are not zero; the small one has fewer noisy zeros.
    gram = seen @ seen.T if len(seen) <= seen.shape[1] else seen.T @ seen
    shared = np.sqrt(np.linalg.eigvalsh(gram).clip(min=0.0)).sum()
    return float(((centre - mean) ** 2).sum() + (rows**2).sum() + (root**2).sum() - 2.0 * shared)


def symmetric_root(covariance: np.ndarray) -> np.ndarray:
    """The symmetric square root of a covariance matrix, float64 [d, d]; negative eigenvalues are rounding, and cut."""
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    root: np.ndarray = (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T
    return root


def frechet_figure(features: np.ndarray, prompt: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> Figure:
    """`frechet` with its interval; `prompt` is the number of each row's prompt, int [n]."""
    root, wide = symmetric_root(covariance.astype(np.float64)), features.astype(np.float64)
    return _jackknife(lambda kept: frechet(wide[kept], mean, root), prompt)


def kernel_figure(features: np.ndarray, prompt: np.ndarray, reference: np.ndarray, scale: float = 1.0) -> Figure:
    """Squared maximum mean discrepancy with the kernel (x.y / d + 1)^3, times `scale` (KID, Binkowski et al. 2018).

    It is unbiased, so it can come out below zero. All pairs are used: that is what the usual mean over random subsets
    estimates.

    Args:
        features: float [n, d], n >= 2.
        prompt: the number of each row's prompt, int [n].
        reference: float [m, d], m >= 2.
    """
    x, y = features.astype(np.float64), reference.astype(np.float64)
    group = prompt % GROUPS
    member = np.eye(GROUPS)[group]
    within, across = np.zeros((GROUPS, GROUPS)), np.zeros(GROUPS)  # sums over pairs, by group: each left out is cheap
    for start in range(0, len(x), _ROWS):
        rows, own = x[start : start + _ROWS], member[start : start + _ROWS]
        within += own.T @ (_kernel(rows, x) @ member) - np.diag(own.T @ _kernel_diagonal(rows))
        across += own.T @ _kernel(rows, y).sum(axis=1)
    m, size = len(y), member.sum(axis=0)
    real = sum(_kernel(y[start : start + _ROWS], y).sum() for start in range(0, m, _ROWS)) - _kernel_diagonal(y).sum()

    def estimate(kept: np.ndarray) -> float:
        groups = np.unique(group[kept])
        n = size[groups].sum()
        generated = within[np.ix_(groups, groups)].sum() / (n * (n - 1))
        return scale * float(generated + real / (m * (m - 1)) - 2.0 * across[groups].sum() / (n * m))

    return _jackknife(estimate, prompt)


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    values: np.ndarray = (a @ b.T / a.shape[1] + 1.0) ** 3
    return values


def _kernel_diagonal(a: np.ndarray) -> np.ndarray:
    values: np.ndarray = ((a * a).sum(axis=1) / a.shape[1] + 1.0) ** 3
    return values


def _jackknife(estimate: Callable[[np.ndarray], float], prompt: np.ndarray) -> Figure:
    """An estimate from kept rows, bool [n], with the interval of a delete-a-group jackknife over prompts (Kott 2001).

    Raises ValueError with fewer prompts than groups.
    """
    if len(np.unique(prompt)) < GROUPS:
        raise ValueError(f"{len(np.unique(prompt))} prompts are too few for {GROUPS} groups")
    value = estimate(np.ones(len(prompt), bool))
    left_out = np.array([estimate(prompt % GROUPS != group) for group in range(GROUPS)])
    error = math.sqrt((GROUPS - 1) / GROUPS * ((left_out - left_out.mean()) ** 2).sum())
    return Figure(value, value - _NORMAL_95 * error, value + _NORMAL_95 * error, error, len(prompt))
