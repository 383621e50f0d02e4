"""Sorting by several columns gives what NumPy's own lexsort gives."""

from __future__ import annotations

import numpy as np
import pytest

from mxd.explore.ordering import falling, numbered, order_by


@pytest.mark.parametrize("bits", [(3, 2, 4), (14, 32, 18), (30, 30, 30), (0, 0, 1), (64, 0, 0)])
def test_the_order_is_that_of_lexsort(bits: tuple[int, ...]) -> None:
    """Within 64 bits all together and beyond, ties in their order."""
    rng = np.random.default_rng(sum(bits))
    columns = [rng.integers(0, 2**width, 4000, dtype=np.uint64, endpoint=False) if width < 64 else HUGE for width in bits]
    np.testing.assert_array_equal(order_by(*columns), np.lexsort(columns[::-1]))


HUGE = np.random.default_rng(0).integers(0, 2**64, 4000, dtype=np.uint64)


def test_no_rows() -> None:
    assert order_by(np.zeros(0, np.int64), np.zeros(0, np.int64)).tolist() == []


def test_small_numbers_in_the_place_of_large_ones() -> None:
    assert numbered(np.array([2**63, 5, 7, 5], np.uint64)).tolist() == [2, 0, 1, 0]


def test_activations_from_the_largest() -> None:
    values = np.array([0.0, 1e-42, 3.5, 3.4999998, 1e30, np.inf], np.float32)
    assert np.argsort(falling(values)).tolist() == [5, 4, 2, 3, 1, 0]
    rng = np.random.default_rng(0)
    many = rng.exponential(size=1000).astype(np.float32)
    np.testing.assert_array_equal(np.argsort(falling(many), kind="stable"), np.argsort(-many, kind="stable"))
