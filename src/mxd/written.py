"""What each active unit of a layer adds to its output, for every kind: ŷ = rest + Σ_n u_n, each u_n linear in its activation a_n.

For an MxD u_n = a_n c_n * (Dᵀz) and the rest is b; for a transcoder u_n = a_n d_n and the rest is the bias, with the skip if it has one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .devices import layer_device
from .layers import Code, Edited, MixtureOfDecoders, SparseLayer
from .ops.transpose import Plan

TOKENS_AT_ONCE = 1024
"""Tokens encoded at once."""
NUMBERS_AT_ONCE = 2**23
"""Numbers in one tensor of contributions [token, k, d_out]: 32 MiB."""
UNITS_AT_ONCE = 64
"""Units whose mean activations are decoded at once where a kind has no table that can be read."""
CHECKED_TOKENS = 8


class Chunk(NamedTuple):
    """A few tokens, on the layer's device."""

    rows: slice
    """Which of the tokens these are."""
    code: Code
    """What the layer made of them; tensors are [token, ..]."""
    x: Float[Tensor, "token d_in"]
    """What the layer read: the MLP's input, or its output for a SAE."""
    y: Float[Tensor, "token d_out"]
    """The MLP's output."""
    rest: Float[Tensor, "token d_out"]
    """The layer's output with every activation at 0."""


def bare(layer: SparseLayer) -> SparseLayer:
    """The layer itself, without edits of its activations."""
    while isinstance(layer, Edited):
        layer = layer.layer
    return layer


def table_of(layer: SparseLayer) -> Float[Tensor, "n_units d_table"] | None:
    """The units' rows, whether or not each has a row of the gate too; None for kinds without a table."""
    units = layer.units()
    return units.table if units is not None else layer.C if isinstance(layer, MixtureOfDecoders) else None


class Written:
    """Reads off what the units of one layer write.

    Attributes:
        layer: the layer, on its device.
        maps: whether its units are maps of a dense code (MxD and its variants), so that they can all do the same thing.
        table: [n_units, d_out] where u_n is a_n times the unit's row, times `SparseLayer.unit_scale`; None where that does not hold:
            contributions are then decoded one unit at a time.
    """

    def __init__(self, layer: SparseLayer, sample: Float[Tensor, "token d_in"]) -> None:
        """
        Args:
            layer: a layer with units.
            sample: a few inputs of it, on which the form of its output is tried; on any device.
        """
        inner = bare(layer)
        self.layer = layer
        self.maps = hasattr(inner, "expert")
        table = table_of(inner)
        self.table = table if table is not None and table.shape[1] == layer.d_out else None
        if self.table is not None and not self._fits(sample[:CHECKED_TOKENS].to(layer_device(layer))):
            self.table = None

    @torch.no_grad()
    def chunks(self, x: Float[Tensor, "token d_in"], y: Float[Tensor, "token d_out"]) -> Iterator[Chunk]:
        """The tokens a few at a time, encoded; `x` and `y` are the MLP's input and output, on any device."""
        device = layer_device(self.layer)
        for begin in range(0, len(x), TOKENS_AT_ONCE):
            target = y[begin : begin + TOKENS_AT_ONCE].to(device)
            source = target if self.layer.reads == "output" else x[begin : begin + TOKENS_AT_ONCE].to(device)
            code = self.layer.encode(source)
            # How many units of a token are active at most is known only now for gates without TopK.
            step = max(1, NUMBERS_AT_ONCE // (code.values.shape[1] * self.layer.d_out))
            for start in range(0, len(source), step):
                at = slice(start, start + step)
                some = Code(code.values[at], code.indices[at], None if code.hidden is None else code.hidden[at])
                rows = slice(begin + start, begin + min(start + step, len(source)))
                yield Chunk(rows, some, source[at], target[at], self.rest(some, source[at]))

    @torch.no_grad()
    def rest(self, code: Code, x: Tensor) -> Float[Tensor, "token d_out"]:
        """The layer's output with every activation at 0."""
        return self._decode(Code(code.values[:, :1] * 0, code.indices[:, :1], code.hidden), x)

    @torch.no_grad()
    def units(self, chunk: Chunk, indices: Int[Tensor, "token k"] | None = None) -> Float[Tensor, "token k d_out"]:
        """u_n of each active unit; with `indices`, what those units would have written with the same activations."""
        values, hidden = chunk.code.values, chunk.code.hidden
        indices = chunk.code.indices if indices is None else indices
        if self.table is None:
            k = values.shape[1]
            code = Code(values.reshape(-1, 1), indices.reshape(-1, 1), _repeat(hidden, k))
            made = self._decode(code, chunk.x.repeat_interleave(k, 0))
            return made.view(*values.shape, -1) - chunk.rest[:, None]
        made = self.table[indices].mul_(values[..., None])
        scale = self.layer.unit_scale(chunk.code, chunk.x)
        return made if scale is None else made.mul_(scale[:, None])

    @torch.no_grad()
    def all_at(self, chunk: Chunk, activation: Float[Tensor, " n_units"]) -> Float[Tensor, "token d_out"]:
        """Σ_n u_n if every unit had this activation at every token."""
        if self.table is not None:
            total = (activation @ self.table).expand_as(chunk.rest)
            scale = self.layer.unit_scale(chunk.code, chunk.x)
            return total.clone() if scale is None else total * scale
        total = torch.zeros_like(chunk.rest)
        for some in activation.nonzero().squeeze(1).split(UNITS_AT_ONCE):
            shape = (len(chunk.x), len(some))
            code = Code(activation[some].expand(shape), some.expand(shape), chunk.code.hidden)
            total += self._decode(code, chunk.x) - chunk.rest
        return total

    def _decode(self, code: Code, x: Tensor) -> Tensor:
        return self.layer._decode(code, x, Plan())  # pyright: ignore[reportPrivateUsage]

    @torch.no_grad()
    def _fits(self, x: Tensor) -> bool:
        code = self.layer.encode(x)
        rest = self.rest(code, x)
        whole = self._decode(code, x)
        made = rest + self.units(Chunk(slice(0, len(x)), code, x, whole, rest)).sum(1)
        return bool((made - whole).norm() <= 1e-4 * whole.norm() + 1e-30)


def _repeat(hidden: Tensor | None, k: int) -> Tensor | None:
    return None if hidden is None else hidden.repeat_interleave(k, 0)


@torch.no_grad()
def mean_activations(written: Written, x: Tensor, y: Tensor) -> tuple[Float[Tensor, " n_units"], Float[Tensor, " n_units"]]:
    """Mean activation ā and firing frequency of every unit on these tokens, on the layer's device."""
    layer = written.layer
    total = torch.zeros(layer.n_units, device=layer_device(layer))
    fired = torch.zeros_like(total)
    for chunk in written.chunks(x, y):
        values, indices = chunk.code.values.flatten(), chunk.code.indices.flatten()
        total.index_add_(0, indices, values)
        fired.index_add_(0, indices, (values > 0).to(values))
    return total / max(len(x), 1), fired / max(len(x), 1)
