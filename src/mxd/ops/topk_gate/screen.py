"""The exact K largest scores at the price of bfloat16 ones: screen, score again, prove.

1. An upper bound of every score, as one bfloat16 product. With x̃, w̃ the operands rounded to bfloat16,
   ``x·w = x̃·w̃ + (x − x̃)·w + x̃·(w − w̃) ≤ x̃·w̃ + |x − x̃| |w| + |x̃| |w − w̃|`` (Cauchy-Schwarz); the two last terms, and the gate's
   bias, are four more columns of the product, rounded upwards.
2. The 2K largest bounds are the candidates; their scores are computed again in float32.
3. A token is settled if the smallest candidate's bound, and with it the bound of every unit left out, lies below its K-th score.
   For the others, rarely any, every score is computed in float32.

The K units are those of a float32 gate, up to the order in which float32 sums are added.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import gemm
from ..largest.eager import largest
from ..rows.eager import dots

UNIT = 2.0**-8
"""Largest relative error of rounding to bfloat16 (8 significant bits)."""


ROWS = 512
"""Rows of the gate rounded at once."""


def topk(x: Tensor, weight: Tensor, bias: Tensor, k: int, one_slice: int) -> tuple[Tensor, Tensor]:
    """Values (before ReLU) and indices of the k largest weight x + bias per token, `one_slice` tokens at a time."""
    n_units = weight.shape[0]
    wanted = min(n_units, 2 * k)
    bounding = _bounding_weights(weight, bias)
    parts = [_slice(part, weight, bias, bounding, k, wanted) for part in x.split(one_slice)]
    values, indices = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return values, indices


def _slice(x: Tensor, weight: Tensor, bias: Tensor, bounding: Tensor, k: int, wanted: int) -> tuple[Tensor, Tensor]:
    bounds, units = largest(_bounding_inputs(x, bounding.shape[1]) @ bounding.t(), wanted)
    scores = dots(x, weight, units) + bias[units]
    values, where = scores.topk(k, dim=1, sorted=False)
    indices = units.gather(1, where)
    if wanted < weight.shape[0]:
        # What was left out is bounded by the smallest bound kept; the product itself was rounded to bfloat16 once more.
        ceiling = bounds.float().amin(1)
        ceiling = ceiling + 2 * UNIT * ceiling.abs()
        open_rows = (values.amin(1) < ceiling).nonzero().flatten()
        if len(open_rows):
            values[open_rows], indices[open_rows] = largest(gemm.forward(x[open_rows], weight, bias, "fp32"), k)
    return values, indices


def _bounding_inputs(x: Tensor, width: int) -> Tensor:
    """x̃ and the columns that meet those of `_bounding_weights`, bfloat16 [token, width]."""
    d = x.shape[1]
    found = x.new_zeros(len(x), width, dtype=torch.bfloat16)
    rounded = found[:, :d].copy_(x)
    found[:, d] = _up(torch.linalg.vector_norm(x - rounded, dim=1))
    found[:, d + 1] = _up(torch.linalg.vector_norm(rounded, dim=1, dtype=torch.float32))
    found[:, d + 2 : d + 4] = 1
    return found


def _bounding_weights(weight: Tensor, bias: Tensor) -> Tensor:
    """w̃, |w|, |w − w̃| and the bias in two halves, then zeros: bfloat16 [n_units, d_in + 4, filled up to a multiple of 32]."""
    n_units, d = weight.shape
    found = weight.new_zeros(n_units, -(-(d + 4) // 32) * 32, dtype=torch.bfloat16)
    size, error = weight.new_empty(n_units), weight.new_empty(n_units)
    for start in range(0, n_units, ROWS):  # a piece at a time, which stays in the processor's cache
        rows = slice(start, start + ROWS)
        rounded = found[rows, :d].copy_(weight[rows])
        torch.linalg.vector_norm(weight[rows], dim=1, out=size[rows])
        torch.linalg.vector_norm(weight[rows] - rounded, dim=1, out=error[rows])
    found[:, d] = _up(size)
    # float32 sums of d products are themselves off by up to d 2^-24 |x| |w|, in the bound and in the score it is to bound
    found[:, d + 1] = _up(error + d * 2.0**-22 * size)
    found[:, d + 2] = bias
    found[:, d + 3] = _up(bias - found[:, d + 2])
    return found


def _up(value: Tensor) -> Tensor:
    """`value`, raised so that rounding it to bfloat16 never makes it smaller than it was."""
    return value + value.abs() * 2 * UNIT
