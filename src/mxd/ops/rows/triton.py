"""Weighted sums and dot products of gathered rows, on the GPU.

Four loops serve every sparse op, forward and backward: a token's weighted sum of table rows (`gather_sum`), the dot products of a
token's row with table rows (`dots`), and the transposed sums, for each unit over the tokens it fired on (`sum_by_unit`,
`scalars_by_unit`).
Products and sums are float32 (float64 where an operand is), whatever the operands' types.
"""

# Triton's language is untyped, and its kernels read as Python only to Triton.
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false, reportAttributeAccessIssue=false
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from ..launch import launch, power_of_two
from ..transpose import ByUnit

ROWS = 8
"""Rows in flight at once in one program: enough independent loads to hide their latency."""
COLUMNS = 256
"""Columns of a row that one program takes at most."""
WINDOW = 128
"""Pairs of one unit that one program sums at most: a unit that fires on every token must not keep the rest waiting."""
SCALARS = 128
"""Scalars that a program of `scalars_by_unit` reads at once."""


@triton.jit
def _gather_sum(values, indices, table, out, k, d, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SUM: tl.constexpr):
    """out[t, :] = sum_k values[t, k] table[indices[t, k], :]. One program takes COLUMNS columns of one token."""
    # Tokens run fastest, so that programs at work at the same time share the same columns of the table in the cache.
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < d
    total = tl.zeros((ROWS, COLUMNS), SUM)
    for first in range(0, k, ROWS):
        pair = first + tl.arange(0, ROWS)
        live = pair < k
        unit = tl.load(indices + token * k + pair, mask=live, other=0).to(tl.int64)
        value = tl.load(values + token * k + pair, mask=live, other=0).to(SUM)
        row = tl.load(table + unit[:, None] * d + column[None, :], mask=live[:, None] & inside[None, :], other=0).to(SUM)
        total += value[:, None] * row
    tl.store(out + token * d + column, tl.sum(total, 0), mask=inside)


@triton.jit
def _dots(rows, indices, table, out, k, d, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SUM: tl.constexpr):
    """out[t, k] = rows[t, :] . table[indices[t, k], :]. One program takes ROWS of a token's pairs."""
    token = tl.program_id(0).to(tl.int64)
    pair = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    live = pair < k
    unit = tl.load(indices + token * k + pair, mask=live, other=0).to(tl.int64)
    total = tl.zeros((ROWS, COLUMNS), SUM)
    for first in range(0, d, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = column < d
        row = tl.load(rows + token * d + column, mask=inside, other=0).to(SUM)
        theirs = tl.load(table + unit[:, None] * d + column[None, :], mask=live[:, None] & inside[None, :], other=0).to(SUM)
        total += row[None, :] * theirs
    tl.store(out + token * k + pair, tl.sum(total, 1), mask=live)


@triton.jit
def _sum_pairs(rows, weights, pairs, tokens, begin, end, d, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SUM: tl.constexpr):
    """The weighted sum of the rows of the sorted pairs begin to end, in their order."""
    total = tl.zeros((ROWS, COLUMNS), SUM)
    for first in range(begin, end, ROWS):
        at = first + tl.arange(0, ROWS)
        live = at < end
        weight = tl.load(weights + tl.load(pairs + at, mask=live, other=0), mask=live, other=0).to(SUM)
        token = tl.load(tokens + at, mask=live, other=0)
        row = tl.load(rows + token[:, None] * d + column[None, :], mask=live[:, None] & (column < d)[None, :], other=0).to(SUM)
        total += weight[:, None] * row
    return tl.sum(total, 0)


@triton.jit
def _by_unit(
    rows,
    weights,
    pairs,
    tokens,
    starts,
    ends,
    parts,
    out,
    d,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WINDOW: tl.constexpr,
    SUM: tl.constexpr,
    FROM_PARTS: tl.constexpr,
):
    """out[u, :] for COLUMNS columns of one unit: zeros if it never fired, its pairs' sum if they are at most WINDOW.

    Of more pairs `_windows` makes the sums of each window: they are added here (FROM_PARTS), or by it to the zeros left here.
    """
    unit = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    begin = tl.load(starts + unit)
    end = tl.load(ends + unit)
    if end - begin <= WINDOW:
        total = _sum_pairs(rows, weights, pairs, tokens, begin, end, d, column, ROWS, COLUMNS, SUM)
    else:
        total = tl.zeros((COLUMNS,), SUM)
        if FROM_PARTS:
            for window in range(begin // WINDOW, (end + WINDOW - 1) // WINDOW):
                part = 2 * window + (begin > window * WINDOW).to(tl.int64)
                total += tl.load(parts + part * d + column, mask=column < d, other=0)
    tl.store(out + unit * d + column, total, mask=column < d)


@triton.jit
def _windows(
    rows,
    weights,
    pairs,
    tokens,
    units,
    starts,
    ends,
    parts,
    n_pairs,
    d,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WINDOW: tl.constexpr,
    SUM: tl.constexpr,
    ATOMIC: tl.constexpr,
):
    """Sums of the pairs of units that have more than WINDOW of them, over window w of the sorted pairs.

    At most two such units meet a window: the one at its first pair (part 2w) and another at its last (part 2w + 1). ATOMIC adds to
    the unit's row of `parts` instead.
    """
    window = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first = window * WINDOW
    last = tl.minimum(first + WINDOW, n_pairs)
    for side in tl.static_range(2):  # pyright: ignore[reportGeneralTypeIssues]
        unit = tl.load(units + (first if side == 0 else last - 1)).to(tl.int64)
        begin = tl.load(starts + unit)
        end = tl.load(ends + unit)
        # The unit at the last pair is another one if it begins after the first.
        if (end - begin > WINDOW) & ((begin > first) == (side == 1)):
            total = _sum_pairs(rows, weights, pairs, tokens, tl.maximum(begin, first), tl.minimum(end, last), d, column, ROWS, COLUMNS, SUM)
            if ATOMIC:
                tl.atomic_add(parts + unit * d + column, total, mask=column < d, sem="relaxed")
            else:
                tl.store(parts + (2 * window + side) * d + column, total, mask=column < d)


@triton.jit
def _scalars_by_unit(weights, pairs, starts, ends, out, SCALARS: tl.constexpr, SUM: tl.constexpr):
    """out[u] = the sum of the unit's weights. One program a unit."""
    unit = tl.program_id(0).to(tl.int64)
    begin = tl.load(starts + unit)
    end = tl.load(ends + unit)
    total = tl.zeros((SCALARS,), SUM)
    for first in range(begin, end, SCALARS):
        at = first + tl.arange(0, SCALARS)
        total += tl.load(weights + tl.load(pairs + at, mask=at < end, other=0), mask=at < end, other=0).to(SUM)
    tl.store(out + unit, tl.sum(total, 0))


def _shape(d: int) -> dict[str, Any]:
    return {"ROWS": ROWS, "COLUMNS": min(max(power_of_two(d), 16), COLUMNS)}


def _sum_type(*operands: Tensor) -> dict[str, Any]:
    return {"SUM": tl.float64 if torch.float64 in [t.dtype for t in operands] else tl.float32}


def gather_sum(
    values: Float[Tensor, "token k"], indices: Int[Tensor, "token k"], table: Float[Tensor, "n_units d"], dtype: torch.dtype
) -> Float[Tensor, "token d"]:
    """sum_k values[t, k] * table[indices[t, k]] in `dtype`, read row by row: nothing of size token x k x d."""
    tokens, k, d = *indices.shape, table.shape[1]
    out = torch.empty(tokens, d, dtype=dtype, device=table.device)
    shape, args = _shape(d), (values.contiguous(), indices.contiguous(), table.contiguous(), out, k, d)
    launch(_gather_sum, (tokens, -(-d // shape["COLUMNS"])), *args, num_warps=4, **shape, **_sum_type(values, table))
    return out


def dots(
    rows: Float[Tensor, "token d"], indices: Int[Tensor, "token k"], table: Float[Tensor, "n_units d"], dtype: torch.dtype
) -> Float[Tensor, "token k"]:
    """rows[t] . table[indices[t, k]] in `dtype`."""
    tokens, k, d = *indices.shape, table.shape[1]
    out = torch.empty(tokens, k, dtype=dtype, device=table.device)
    args = (rows.contiguous(), indices.contiguous(), table.contiguous(), out, k, d)
    launch(_dots, (tokens, -(-k // ROWS)), *args, num_warps=4, **_shape(d), **_sum_type(rows, table))
    return out


def sum_by_unit(
    rows: Float[Tensor, "token d"], weights: Float[Tensor, "token k"], plan: ByUnit, dtype: torch.dtype, deterministic: bool
) -> Float[Tensor, "n_units d"]:
    """For each unit the weighted sum of the rows of the tokens it fired on, in `dtype`; exact zeros where it never did.

    Args:
        deterministic: sum a busy unit's windows in their order, through a buffer of 2 / WINDOW rows a pair; otherwise by atomic
            additions, in any order, to float32 rows.
    """
    (n_units,), (n_pairs,), d = plan.start.shape, plan.pair.shape, rows.shape[1]
    windows, shape, sums = -(-n_pairs // WINDOW), _shape(d), _sum_type(rows, weights)
    across = -(-d // shape["COLUMNS"])
    exact = torch.float64 if sums["SUM"] == tl.float64 else torch.float32
    out = torch.empty(n_units, d, dtype=dtype if deterministic else exact, device=rows.device)
    parts = torch.empty(2 * windows, d, dtype=exact, device=rows.device) if deterministic else out
    pairs = (rows.contiguous(), weights.contiguous(), plan.pair, plan.token)
    options = {"num_warps": 4, "WINDOW": WINDOW, **shape, **sums}

    def whole() -> None:
        launch(_by_unit, (n_units, across), *pairs, plan.start, plan.end, parts, out, d, FROM_PARTS=deterministic, **options)

    def windowed() -> None:
        launch(_windows, (windows, across), *pairs, plan.unit, plan.start, plan.end, parts, n_pairs, d, ATOMIC=not deterministic, **options)

    # Parts must be there before they are added; zeros must be there before they are added to.
    for step in (windowed, whole) if deterministic else (whole, windowed):
        step()
    return out.to(dtype)


def scalars_by_unit(weights: Float[Tensor, "token k"], plan: ByUnit, dtype: torch.dtype) -> Float[Tensor, " n_units"]:
    """For each unit the sum of its weights, in `dtype`; always in the same order."""
    out = torch.empty(plan.start.shape[0], dtype=dtype, device=weights.device)
    args = (weights.contiguous(), plan.pair, plan.start, plan.end, out)
    launch(_scalars_by_unit, (out.shape[0],), *args, num_warps=1, SCALARS=SCALARS, **_sum_type(weights))
    return out
