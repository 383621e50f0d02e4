"""Gather-and-sum when many of few units are active: then a small dense product beats reading rows one by one.

That is the case of the auxiliary loss, where hundreds of a few thousand dead units are active per token.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from .. import gemm

RATIO = 16
"""A dense product is taken where fewer than this many units are there for each active one; a row read costs a core as much as
multiplying this many."""


def is_crowded(k: int, n_units: int) -> bool:
    """Whether the dense product is the faster way."""
    return n_units < RATIO * k


def spread(values: Float[Tensor, "token k"], indices: Int[Tensor, "token k"], n_units: int) -> Float[Tensor, "token n_units"]:
    """The code as a dense matrix: at most `RATIO` times as large as `values`. A unit that stands twice counts twice."""
    return values.new_zeros(len(values), n_units).scatter_add_(1, indices, values)


def mix(values: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """sum_k values[t, k] * table[indices[t, k]]."""
    return gemm.mm(spread(values, indices, table.shape[0]), table)


def sum_by_unit(rows: Tensor, values: Tensor, indices: Tensor, n_units: int) -> Tensor:
    """For each unit the weighted sum of the rows of the tokens it is active on."""
    return gemm.mm(spread(values, indices, n_units).t(), rows)


def dots(rows: Tensor, table: Tensor, indices: Tensor) -> Tensor:
    """rows[t] · table[indices[t, k]]."""
    return gemm.mm(rows, table.t()).gather(1, indices)
