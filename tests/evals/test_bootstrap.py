"""Intervals with known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mxd.evals import bootstrap
from mxd.evals.bootstrap import interval_of_sums, mean_interval, ratio_interval


def test_values_that_are_all_equal_have_no_width() -> None:
    assert mean_interval(np.full(50, 0.25), resamples=200, seed=0) == (0.25, 0.25, 0.25)
    assert mean_interval(np.zeros(7), resamples=50, seed=0) == (0.0, 0.0, 0.0)


def test_interval_of_a_mean_is_that_of_the_normal_law() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 500)
    found = mean_interval(values, resamples=4000, seed=1)
    error = values.std() / math.sqrt(len(values))
    assert found.value == pytest.approx(values.mean(), rel=1e-12)
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


def test_two_values_resample_to_the_binomial_law() -> None:
    # Means of two draws from {0, 1}: 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4; both tails exceed 2.5 %.
    assert mean_interval(np.array([0.0, 1.0]), resamples=1000, seed=0) == (0.5, 0.0, 1.0)


def test_pairing_removes_what_both_share() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(0, 10, 300)
    paired = mean_interval((base + 0.5) - base, resamples=500, seed=0)
    assert paired.low == pytest.approx(0.5, abs=1e-12) and paired.high == pytest.approx(0.5, abs=1e-12)


def test_a_constant_ratio_has_no_width_however_large_the_clusters() -> None:
    below = np.array([1.0, 10.0, 100.0])
    assert ratio_interval(3 * below, below, resamples=300, seed=0) == pytest.approx((3.0, 3.0, 3.0), abs=1e-12)


def test_ratio_is_of_the_sums_not_the_mean_of_ratios() -> None:
    found = ratio_interval(np.array([1.0, 1.0]), np.array([1.0, 3.0]), resamples=2000, seed=0)
    assert found == pytest.approx((0.5, 1 / 3, 1.0), abs=1e-12)


def test_clusters_are_resampled_whole() -> None:
    # Nine copies of each value in one cluster are no more evidence than one.
    values = np.random.default_rng(3).normal(size=100)
    one = interval_of_sums(np.stack([values, np.ones(100)], 1), lambda s: s[..., 0] / s[..., 1], resamples=500, seed=0)
    nine = interval_of_sums(np.stack([9 * values, np.full(100, 9.0)], 1), lambda s: s[..., 0] / s[..., 1], resamples=500, seed=0)
    assert nine == pytest.approx(one, rel=1e-12)


def test_seed_decides_and_blocks_of_resamples_cover_all(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=40)
    first, other = (mean_interval(values, resamples=300, seed=seed) for seed in (0, 1))
    assert first == mean_interval(values, resamples=300, seed=0)
    assert first != other
    monkeypatch.setattr(bootstrap, "_COUNTS_AT_ONCE", 40 * 7)
    blocks = [len(block) for block in bootstrap._resampling_counts(40, 300, 0)]
    assert sum(blocks) == 300 and max(blocks) == 7


def test_what_is_undefined_is_nan_and_nothing_to_resample_is_an_error() -> None:
    found = ratio_interval(np.array([1.0, 2.0]), np.zeros(2), resamples=10, seed=0)
    assert all(math.isnan(v) for v in found)
    with pytest.raises(ValueError, match="at least one cluster"):
        interval_of_sums(np.zeros((0, 2)), lambda s: s[..., 0], resamples=10, seed=0)
