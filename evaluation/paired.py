"""Two models at the same prompts and seeds: the difference with its interval, and whether chance explains it.

The test flips signs (Fisher 1935): if two models are alike, each prompt's difference could as well have been its
negative. Where all differences have one size, as with images that are either safe or not, that is McNemar's exact test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.bootstrap import stratified_mean

BOOTSTRAP_SAMPLES = 2000
FLIPS = 10_000
NOBODY_DIFFERS = "no prompt differs"
_ENUMERATED = 12
_CHUNK = 2**22  # signs at a time


@dataclass(frozen=True)
class Paired:
    """Second minus first, over the prompts that count in both.

    Attributes:
        value: mean of the differences; with strata the mean of the strata's means.
        low, high: its 95 % interval, percentile bootstrap over prompts inside each stratum.
        p: two-sided, not corrected.
        pairs: prompts that count in both.
        test: which distribution `p` is from.
    """

    value: float
    low: float
    high: float
    p: float
    pairs: int
    test: str


def paired(
    first: Sequence[float | None],
    second: Sequence[float | None],
    strata: Sequence[str] | None = None,
    samples: int = BOOTSTRAP_SAMPLES,
    seed: int = 0,
) -> Paired | None:
    """Compare two samples of the same prompts; None where no prompt counts in both.

    Args:
        first, second: one value for each prompt, None where it does not count.
        strata: one label for each prompt; the figure is then the mean of the strata's means.
        samples: of the bootstrap.
        seed: of bootstrap and sign flips; equal arguments give equal results.

    Raises ValueError if the lengths differ.
    """
    labels = strata if strata is not None else [""] * len(first)
    both = [
        (b - a, label) for a, b, label in zip(first, second, labels, strict=True) if a is not None and b is not None
    ]
    if not both:
        return None
    change = np.array([difference for difference, _ in both], float)
    names = np.array([label for _, label in both], dtype=object)
    members = [names == name for name in dict.fromkeys(names)]
    figure = stratified_mean([change[chosen] for chosen in members], samples, seed)
    weights = np.empty(len(change))
    for chosen in members:
        weights[chosen] = 1.0 / (len(members) * chosen.sum())
    p, test = sign_flip(weights * change, seed)
    return Paired(figure.value, figure.low, figure.high, p, len(both), test)


def sign_flip(terms: np.ndarray, seed: int = 0) -> tuple[float, str]:
    """Two-sided p-value of a sum whose terms, float [n], could each have had the other sign; and the name of the test.

    Exact where all terms that are not zero have one size, or are few. Otherwise `FLIPS` random flips, the observed one
    counted among them, so that p is never zero (Phipson & Smyth 2010).
    """
    terms = terms[terms != 0.0]  # a zero has no sign: it changes no sum
    if not len(terms):
        return 1.0, NOBODY_DIFFERS
    size = np.abs(terms)
    if np.allclose(size, size[0], rtol=1e-9, atol=0.0):
        return _binomial(int((terms > 0).sum()), len(terms)), "McNemar, exact"
    # Sums in another order differ by rounding; equal ones must count as equal.
    observed = abs(float(terms.sum())) - 1e-12 * float(size.sum())
    if len(terms) <= _ENUMERATED:
        bits = np.arange(2 ** len(terms))[:, None] >> np.arange(len(terms)) & 1
        return float((np.abs((1 - 2 * bits) @ terms) >= observed).mean()), "sign flips, exact"
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // len(terms))
    extreme = 0
    for start in range(0, FLIPS, rows):
        signs = 1 - 2 * rng.integers(0, 2, (min(rows, FLIPS - start), len(terms)), np.int8)
        extreme += int((np.abs(signs @ terms) >= observed).sum())
    return (extreme + 1) / (FLIPS + 1), f"sign flips, {FLIPS} random"


def _binomial(wins: int, trials: int) -> float:
    """Two-sided exact p of `wins` heads in `trials` throws of a fair coin, in whole numbers until the end."""
    tail, ways = 0, 1
    for k in range(min(wins, trials - wins) + 1):
        tail += ways
        ways = ways * (trials - k) // (k + 1)
    return min(1.0, 2 * tail / 2**trials)


def holm(p_values: Sequence[float]) -> list[float]:
    """Corrected for being several (Holm 1979), in the order given: at most a share `alpha` of families of true
    hypotheses has one corrected p below `alpha`."""
    corrected = [1.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected
