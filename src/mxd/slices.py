"""A step's tokens in slices, where the whole would not fit into memory: the losses are means over tokens, so that gradients add up.

The one thing that depends on the company of a token is which y are as good as 0 (`objectives.norm_weighted`): 1e-7 of the slice's largest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .layers import Code


class ActivationBatch(Protocol):
    """What the loop needs of a batch: the named pair (x, y) and which tokens are first in their sequence."""

    @property
    def x(self) -> Tensor: ...
    @property
    def y(self) -> Tensor: ...
    @property
    def first(self) -> Tensor: ...


class Slice(NamedTuple):
    """Some of a batch's tokens."""

    x: Tensor
    """[token, d_in]"""
    y: Tensor
    """[token, d_out]"""
    first: Tensor
    """[token], bool: first of their sequence."""


def slices(batch: ActivationBatch, number: int) -> Iterator[Slice]:
    """The batch in `number` slices whose lengths differ by 1 at most; fewer where it has fewer tokens."""
    for rows in torch.arange(len(batch.y)).tensor_split(max(1, min(number, len(batch.y)))):
        span = slice(int(rows[0]), int(rows[-1]) + 1) if len(rows) else slice(0, 0)
        yield Slice(batch.x[span], batch.y[span], batch.first[span])


def joined(codes: Sequence[Code]) -> Code:
    """The codes of consecutive slices as one; without hidden vectors."""
    if len(codes) == 1:
        return codes[0]
    return Code(torch.cat([code.values for code in codes]), torch.cat([code.indices for code in codes]), None)
