"""Which units fire together, by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from mxd.explore.partners import Fired, matches, partners


def fired(rows: list[list[float]]) -> Fired:
    values = np.array(rows, dtype=np.float32)
    return Fired(sparse.csr_matrix((values > 0).astype(np.float32)), sparse.csr_matrix(values), (values > 0).sum(1), values.shape[1])


ONE = fired([[1, 2, 0, 0, 0, 0, 0, 0], [3, 1, 1, 0, 0, 0, 0, 0], [0] * 8, [1] * 8, [0, 0, 0, 0, 0, 0, 1, 1]])


def test_partners() -> None:
    shared = np.array([False, False, False, True, False])
    found = list(partners(ONE, shared))
    assert found[0]["unit"].tolist() == [1], "not itself, not the shared one"
    assert found[0]["jaccard"][0] == pytest.approx(2 / 3)
    assert found[0]["lift"][0] == pytest.approx(2 * 8 / (2 * 3))
    assert len(found[2]) == 0 and len(found[4]) == 0


def test_matches() -> None:
    other = fired([[0] * 8, [2, 4, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]])
    found = matches(ONE, other)
    rows = list(zip(*(column.tolist() for column in found[:4]), strict=True))
    assert (0, 0, 1, 1.0) in rows, "fires on the same tokens"
    assert (0, 1, 2, 0.5) in rows
    assert not [row for row in rows if row[0] in (2, 4)]
    r = {(u, o): c for u, o, c in zip(found.units.tolist(), found.others.tolist(), found.corr.tolist(), strict=True)}
    assert r[0, 1] == pytest.approx(1.0), "twice the activation everywhere"
    a, b = np.array([3, 1, 1, 0, 0, 0, 0, 0]), np.array([2, 4, 0, 0, 0, 0, 0, 0])
    assert r[1, 1] == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert np.isnan(r[3, 1]), "one that always fires alike does not vary"
