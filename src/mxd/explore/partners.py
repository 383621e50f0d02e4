"""Units that fire on the same tokens: within a student (partners) and across students (matches)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from . import schema
from .codes import Codes

TOKENS = 262_144
"""Tokens, at most, on which firings are compared."""
PARTNERS = 10
MATCHES = 3
UNITS_AT_ONCE = 1024


class Fired(NamedTuple):
    """Where the units of one student fired."""

    matrix: Any
    """Sparse [unit, token], 1 where it fired."""
    values: Any
    """The same with activations."""
    counts: NDArray[np.int64]
    """[unit] firings."""
    tokens: int
    """Tokens that were compared, first positions left out."""


def fired(codes: Codes) -> Fired:
    """The firings of a student on the first tokens."""
    reach = min(codes.tokens, max(1, TOKENS // codes.tokens_per_sequence) * codes.tokens_per_sequence)
    tokens, units, values = codes.of_tokens(reach)
    shape = (codes.n_units, reach)
    matrix = sparse.csr_matrix((np.ones(len(units), np.float32), (units, tokens)), shape)
    counts = np.bincount(units, minlength=codes.n_units)
    return Fired(matrix, sparse.csr_matrix((values, (units, tokens)), shape), counts, reach - reach // codes.tokens_per_sequence)


def partners(one: Fired, shared: NDArray[np.bool_]) -> Iterator[NDArray[Any]]:
    """By unit, those that fire with it more often than by chance, `schema.PARTNERS`, by Jaccard index; shared units are left out.

    lift = P(both) / (P(one) P(other)); Jaccard = tokens with both / tokens with either.
    """
    others = one.matrix.T.tocsr()
    for unit, columns, both in _together(one.matrix, others):
        keep = (columns != unit) & ~shared[columns]
        columns, both = columns[keep], both[keep]
        lift = both * one.tokens / (one.counts[unit] * one.counts[columns])
        jaccard = both / (one.counts[unit] + one.counts[columns] - both)
        order = np.lexsort((columns, -jaccard))
        order = order[lift[order] > 1][:PARTNERS]
        row = np.empty(len(order), schema.PARTNERS)
        row["unit"], row["lift"], row["jaccard"] = columns[order], lift[order], jaccard[order]
        yield row


class Match(NamedTuple):
    """Pairs of a unit and one of the closest units of another student."""

    units: NDArray[np.int64]
    ranks: NDArray[np.int64]
    """0 the closest."""
    others: NDArray[np.int64]
    jaccard: NDArray[np.float64]
    corr: NDArray[np.float64]
    """Pearson's r of the two activations over all tokens compared, silence counting as 0; NaN where one does not vary."""


def matches(one: Fired, other: Fired) -> Match:
    """The `MATCHES` units of another student that fire most on the same tokens, for every unit that shares a token with any."""
    found: list[tuple[int, int, int, float]] = []
    for unit, columns, both in _together(one.matrix, other.matrix.T.tocsr()):
        jaccard = both / (one.counts[unit] + other.counts[columns] - both)
        best = np.lexsort((columns, -jaccard))[:MATCHES]
        found += [(unit, rank, int(columns[place]), float(jaccard[place])) for rank, place in enumerate(best)]
    rows = np.array(found, dtype=np.float64).reshape(-1, 4)
    units, ranks, others = (rows[:, column].astype(np.int64) for column in range(3))
    return Match(units, ranks, others, rows[:, 3], _correlations(one, units, other, others))


def _correlations(one: Fired, units: NDArray[np.int64], other: Fired, others: NDArray[np.int64]) -> NDArray[np.float64]:
    n = one.tokens
    product = np.asarray(one.values[units].multiply(other.values[others]).sum(axis=1), dtype=np.float64).ravel()
    sums, variances = zip(*(_moments(fired.values, n) for fired in (one, other)), strict=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = np.sqrt(variances[0][units] * variances[1][others])
        return np.where(scale > 0, (product - sums[0][units] * sums[1][others] / n) / scale, np.nan)


def _moments(values: Any, n: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum and n times the variance of every row."""
    total = np.asarray(values.sum(axis=1), dtype=np.float64).ravel()
    squares = np.asarray(values.multiply(values).sum(axis=1), dtype=np.float64).ravel()
    return total, np.maximum(squares - total**2 / n, 0)


def _together(one: Any, others: Any) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.float64]]]:
    """By unit of `one` [unit, token]: the units of `others` [token, unit] that fire on the same tokens, and on how many."""
    for first in range(0, one.shape[0], UNITS_AT_ONCE):
        block = (one[first : first + UNITS_AT_ONCE] @ others).tocsr()
        for row in range(block.shape[0]):
            span = slice(block.indptr[row], block.indptr[row + 1])
            yield first + row, block.indices[span].astype(np.int64), block.data[span].astype(np.float64)
