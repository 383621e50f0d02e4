"""Percentile bootstrap intervals (Efron 1979) of means and of ratios of sums, resampling sequences or documents.

Every statistic here is a function of sums over clusters, so one resample is one vector of counts times the matrix of the
clusters' sums: nothing is looped over, and statistics of the same clusters and seed share their resamples (paired).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_COUNTS_AT_ONCE = 2**23
"""Numbers in one block of resampling counts: 64 MiB."""


class Interval(NamedTuple):
    """A statistic and its 95 % interval; NaN where it is undefined (a zero denominator)."""

    value: float
    """The statistic of the sample itself."""
    low: float
    """2.5th percentile over resamples."""
    high: float
    """97.5th percentile over resamples."""


def interval_of_sums(sums: Array, statistic: Callable[[Array], Array], *, resamples: int, seed: int) -> Interval:
    """Interval of a function of sums, resampling clusters with replacement.

    Args:
        sums: [cluster, quantity], what each cluster adds to each sum.
        statistic: maps total sums [.., quantity] to the statistic [..].
        resamples: number of bootstrap resamples.
        seed: seed of the resampling; the same seed and number of clusters give the same resamples.

    Raises:
        ValueError: no clusters.
    """
    sums = np.asarray(sums, dtype=np.float64)
    if sums.ndim != 2 or not len(sums):
        raise ValueError(f"sums must be [cluster, quantity] with at least one cluster, got {sums.shape}")
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(statistic(sums.sum(0)))
        drawn = np.concatenate([statistic(counts @ sums) for counts in _resampling_counts(len(sums), resamples, seed)])
    drawn = drawn[np.isfinite(drawn)]
    if not np.isfinite(value) or not len(drawn):
        return Interval(value if np.isfinite(value) else float("nan"), float("nan"), float("nan"))
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Interval(value, float(low), float(high))


def resampled_sums(sums: Array, *, resamples: int, seed: int) -> Array:
    """The total sums [resample, quantity] of every resample of the clusters of `sums` [cluster, quantity]: for many statistics at once."""
    return np.concatenate([counts @ sums for counts in _resampling_counts(len(sums), resamples, seed)])


def mean_interval(values: Array, *, resamples: int, seed: int) -> Interval:
    """Interval of the mean of `values` [cluster]. For a paired comparison give the differences, cluster by cluster."""
    values = np.asarray(values, dtype=np.float64)
    return interval_of_sums(values[:, None], lambda s: s[..., 0] / len(values), resamples=resamples, seed=seed)


def ratio_interval(numerator: Array, denominator: Array, *, resamples: int, seed: int) -> Interval:
    """Interval of sum(numerator) / sum(denominator), both [cluster] and resampled together."""
    return interval_of_sums(np.stack([numerator, denominator], axis=1), lambda s: s[..., 0] / s[..., 1], resamples=resamples, seed=seed)


def _resampling_counts(n: int, resamples: int, seed: int) -> Iterator[Array]:
    """How often each of n clusters is drawn, [some resamples, n] at a time."""
    rng = np.random.default_rng(seed)
    step = max(1, _COUNTS_AT_ONCE // n)
    for start in range(0, resamples, step):
        yield rng.multinomial(n, np.full(n, 1 / n), size=min(step, resamples - start)).astype(np.float64)
