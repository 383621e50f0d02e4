"""The K largest of every row, reading the scores once.

torch.topk makes several passes over tokens x units. Here, with blocks of B consecutive units: **the K largest of a row lie in
the K blocks with the largest maxima**. (Else a block left out would hold one of the K largest, and each of the K blocks
preferred to it holds something at least as large.) So:

1. one pass over the scores leaves the maximum of each block, N/B numbers a row;
2. the K largest of these name K blocks (by the same method again where N/B is still large);
3. the K largest of the K·B scores of these blocks, fetched anew, are the answer.

With B near sqrt(N/K) the last two are a few thousand numbers a row, which one program holds in registers. Scores are compared as
integers of the same order, so the result is exact; among equals the lowest unit wins, in each step, which keeps the lemma true.
NaN counts as the largest of all, as in torch.topk.
"""

# Triton's language is untyped, and its kernels read as Python only to Triton.
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false, reportAttributeAccessIssue=false
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from ..launch import launch, power_of_two

WIDEST = 16384
"""Numbers that one program ranks at most: 16 a thread at 32 warps. Below 2^15, since two counts of them share an int32."""
PER_WARP = 256
"""Numbers that a warp ranks, 8 a thread: more would take so many registers that few programs run at once."""
NARROW = 2048
"""Up to here a row is ranked whole: a second level would cost more than it saves."""
TILE = 4096
"""Scores that one program of the first pass reads."""

LOWEST = tl.constexpr(-2147483648)
"""Below every score, -inf included: the key of what is not there."""
HIGHEST = tl.constexpr(2147483647)
"""The key of NaN, above +inf."""


@triton.jit
def _keys(x, valid, ARE_KEYS: tl.constexpr):
    """int32 in the order of the float32 numbers `x`: the bits as they are, those below the sign flipped where it is set."""
    if ARE_KEYS:
        key = x
    else:
        bits = x.to(tl.int32, bitcast=True)
        key = tl.where(x != x, HIGHEST, bits ^ ((bits >> 31) & HIGHEST))
    return tl.where(valid, key, LOWEST)


@triton.jit
def _block_max(
    scores, bias, maxima, n, n_blocks, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, ARE_KEYS: tl.constexpr, HAS_BIAS: tl.constexpr
):
    """maxima[t, j] = the largest key of row t in its block j. One program reads BLOCKS blocks of one row."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    unit = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    valid = unit < n
    x = tl.load(scores + row * n + unit, mask=valid, other=0)
    if HAS_BIAS:
        x += tl.load(bias + unit, mask=valid, other=0)
    tl.store(maxima + row * n_blocks + block, tl.max(_keys(x, valid, ARE_KEYS), 1), mask=block < n_blocks)


@triton.jit
def _kth_largest(key, valid, k):
    """A threshold t with: fewer than k keys above t, at least k at or above it. By bisection, left as soon as exactly k are at or above.

    The bounds are int64, since the distance of two int32 may not fit one.
    """
    low = tl.min(tl.where(valid, key, HIGHEST), 0).to(tl.int64)
    high = tl.max(key, 0).to(tl.int64)
    while low < high:
        middle = (low + high + 1) >> 1
        count = tl.sum((key >= middle.to(tl.int32)).to(tl.int32), 0)
        low = tl.where(count >= k, middle, low)
        high = tl.where(count == k, middle, tl.where(count > k, high, middle - 1))
    return low.to(tl.int32)


@triton.jit
def _select(
    scores,
    bias,
    blocks,
    values,
    indices,
    n,
    k,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    ARE_KEYS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_BLOCKS: tl.constexpr,
    HAS_VALUES: tl.constexpr,
):
    """The k largest of row t, among all n or among those of the k blocks of size BLOCK that `blocks` names. One program a row.

    Writes their units in ascending order and, where asked, their scores after ReLU.
    """
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, SIZE)
    if HAS_BLOCKS:
        listed = lane < k * BLOCK
        block = tl.load(blocks + row * k + lane // BLOCK, mask=listed, other=0)
        unit = block * BLOCK + lane % BLOCK
        valid = listed & (unit < n)
    else:
        unit = lane
        valid = lane < n
    x = tl.load(scores + row * n + unit, mask=valid, other=0)
    if HAS_BIAS:
        x += tl.load(bias + unit, mask=valid, other=0)
    key = _keys(x, valid, ARE_KEYS)
    threshold = _kth_largest(key, valid, k)
    # One scan for both counts: how many above the threshold, and (in the high half) how many on it, up to and including each lane.
    above = (key > threshold).to(tl.int32)
    on = (key == threshold).to(tl.int32)
    ranks = tl.cumsum(above + (on << 16), 0)
    room = k - tl.sum(above, 0)
    on_rank = ranks >> 16
    place = (ranks & 0xFFFF) + tl.minimum(on_rank, room) - 1
    won = (above == 1) | ((on == 1) & (on_rank <= room))
    tl.store(indices + row * k + place, unit, mask=won)
    if HAS_VALUES:
        # A key from 0 up is the bits of its score, HIGHEST those of a NaN: a broken score must not look like an inactive unit.
        tl.store(values + row * k + place, tl.maximum(key, 0).to(tl.float32, bitcast=True), mask=won)


def block_size(n: int, k: int) -> int | None:
    """Units in a block for rows of `n` and the `k` largest: a power of two near sqrt(n / k); None where one level is better or must do."""
    block = min(max(1 << round(math.log2(max(n / k, 1)) / 2), 16), 256)
    while k * block > WIDEST:
        block //= 2
    one_level = n <= NARROW or (n <= WIDEST and k * block + n // block > n // 2)
    return None if one_level or block < 8 else block


def top(
    scores: Float[Tensor, "token n_units"],
    k: int,
    bias: Float[Tensor, " n_units"] | None = None,
    values: Float[Tensor, "token k"] | None = None,
    indices: Int[Tensor, "token k"] | None = None,
) -> tuple[Float[Tensor, "token k"], Int[Tensor, "token k"]]:
    """ReLU of the `k` largest of scores + bias in every row, and their units, in ascending order of the unit.

    Exact; of equal scores the lowest units are taken; NaN is the largest and stays NaN. Adding the bias here spares a pass over the scores.
    Rows too wide for one program while k is above about 2,000, and float64, go to `torch.topk` (any of equal scores, any order).

    Args:
        scores: float32 (float64 for tests).
        k: at least 1, at most n_units.
        bias: added to every row before.
        values, indices: where to write, contiguous; a floating type, and int64. New ones (float32, int64) where not given.
    """
    tokens, n = scores.shape
    values = torch.empty(tokens, k, dtype=scores.dtype, device=scores.device) if values is None else values
    indices = torch.empty(tokens, k, dtype=torch.int64, device=scores.device) if indices is None else indices
    if scores.dtype != torch.float32 or (n > WIDEST and block_size(n, k) is None):
        found = torch.topk(scores if bias is None else scores + bias, k, dim=1, sorted=False)
        return values.copy_(found.values.relu_()), indices.copy_(found.indices)
    _rank(scores.contiguous(), None if bias is None else bias.contiguous(), k, values, indices)
    return values, indices


def _rank(rows: Tensor, bias: Tensor | None, k: int, values: Tensor | None, indices: Tensor) -> None:
    """One level of the method: int32 keys or float32 scores in, units out (int32 or int64, as `indices` is), values where asked."""
    tokens, n = rows.shape
    block, blocks = block_size(n, k), None
    flags = {"ARE_KEYS": rows.dtype == torch.int32, "HAS_BIAS": bias is not None}
    # Arguments that a flag switches off must still be tensors; any will do.
    stand_in = rows if bias is None else bias
    if block is not None:
        n_blocks, at_once = -(-n // block), TILE // block
        maxima = torch.empty(tokens, n_blocks, dtype=torch.int32, device=rows.device)
        blocks = torch.empty(tokens, k, dtype=torch.int32, device=rows.device)
        grid = (tokens, -(-n_blocks // at_once))
        launch(_block_max, grid, rows, stand_in, maxima, n, n_blocks, num_warps=4, BLOCK=block, BLOCKS=at_once, **flags)
        _rank(maxima, None, k, None, blocks)
    size = max(power_of_two(n if block is None else k * block), 32)
    launch(
        _select,
        (tokens,),
        rows,
        stand_in,
        indices if blocks is None else blocks,
        rows if values is None else values,
        indices,
        n,
        k,
        num_warps=min(max(size // PER_WARP, 1), 32),
        BLOCK=block or 1,
        SIZE=size,
        HAS_BLOCKS=blocks is not None,
        HAS_VALUES=values is not None,
        **flags,
    )
