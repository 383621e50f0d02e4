"""The active pairs of a batch seen from the units: which tokens did each unit fire on.

Codes travel token by token as ``indices [token, k]``. The gradients of a unit's own row (the gate's and the table's) need
the same pairs sorted by unit; sorting once serves both.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


class ByUnit(NamedTuple):
    """The transposed index of a batch's active pairs."""

    pair: Int[Tensor, " pairs"]
    """Positions in the flattened ``[token, k]`` index, ordered by unit; within a unit by token (stable, so repeatable)."""
    token: Int[Tensor, " pairs"]
    """The token of each pair, in the same order."""
    start: Int[Tensor, " n_units"]
    """Where each unit's pairs begin."""
    end: Int[Tensor, " n_units"]
    """Where they end: one past the last, so `start` where the unit never fired."""
    unit: Int[Tensor, " pairs"]
    """The unit of each pair, in the same order."""


def by_unit(indices: Int[Tensor, "token k"], n_units: int) -> ByUnit:
    """Sort the active pairs by unit: O(pairs log pairs), nothing of size tokens x units, and no wait for the device."""
    flat = indices.flatten()
    unit, pair = torch.sort(flat.to(torch.int32), stable=True)  # half the bits, about half the time
    # Not torch.bincount, which makes the CPU wait for a GPU. Whole numbers: the order of the additions does not matter.
    counts = torch.zeros(n_units, dtype=torch.int64, device=flat.device)
    counts.index_add_(0, flat, counts.new_ones(1).expand(flat.shape))
    end = torch.cumsum(counts, 0)
    return ByUnit(pair, pair // max(indices.shape[1], 1), end - counts, end, unit)


class Plan:
    """Holds the transposed index of one forward pass, made when the first backward asks and shared by all that follow."""

    def __init__(self) -> None:
        self._made: ByUnit | None = None

    def by_unit(self, indices: Int[Tensor, "token k"], n_units: int) -> ByUnit:
        if self._made is None:
            self._made = by_unit(indices, n_units)
        return self._made


def sum_by_unit(rows: Float[Tensor, "token d"], weights: Float[Tensor, "token k"], plan: ByUnit) -> Float[Tensor, "n_units d"]:
    """For each unit the weighted sum of the rows of the tokens it fired on, without a tokens x k x d buffer."""
    if plan.pair.numel() == 0:
        return rows.new_zeros(plan.start.shape[0], rows.shape[1])
    return F.embedding_bag(plan.token, rows, plan.start, mode="sum", per_sample_weights=weights.flatten()[plan.pair])
