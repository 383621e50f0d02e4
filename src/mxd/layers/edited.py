"""A layer with some of its units scaled, ablated or held up: the same layer with other activations between gate and output.

Steering a unit (arXiv 2505.21364, §4.3): a_n += λ after TopK, which for an MxD adds λ W_nᵀ z to the output, for a transcoder λ d_n.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import LayerError
from ..ops.transpose import Plan
from .base import Code, SparseLayer, Units


class Edited(SparseLayer):
    """a_n ← s_n a_n + λ_n after TopK, everything else as in the layer it is made from, whose weights it shares.

    A unit that is scaled to zero is ablated: it still takes its place among the K, no other moves up for it. Units that are added to
    are active at every token, so that a code may hold more than K, the added ones last; what is taken off may make an activation
    negative. `kind` and the sizes are those of the layer.
    """

    def __init__(self, layer: SparseLayer, *, scale: Mapping[int, float] | None = None, add: Mapping[int, float] | None = None) -> None:
        """
        Args:
            layer: the layer to edit; it is not changed.
            scale: factor s_n by unit; 0 ablates. Units that are not named keep 1.
            add: λ_n by unit, in the units of a, at every token. Units that are not named get nothing.

        Raises:
            LayerError: there is no such unit, or a number is not finite.
        """
        super().__init__()
        self.layer = layer
        self.kind, self.reads, self.is_control, self.unit = layer.kind, layer.reads, layer.is_control, layer.unit
        self.config, self.d_in, self.d_out, self.n_units, self.k = layer.config, layer.d_in, layer.d_out, layer.n_units, layer.k
        scale, add = dict(scale or {}), dict(add or {})
        for unit, value in [*scale.items(), *add.items()]:
            layer._check_unit(unit)  # pyright: ignore[reportPrivateUsage]
            if not math.isfinite(value):
                raise LayerError(f"cannot edit {layer.unit} {unit}", expected="a finite number", got=str(value))
        like = next(layer.parameters())
        factors = torch.ones(layer.n_units, device=like.device, dtype=like.dtype)
        for unit, value in scale.items():
            factors[unit] = value
        added = {unit: value for unit, value in add.items() if value}
        self.register_buffer("_factors", factors, persistent=False)
        self.register_buffer("_units", torch.tensor(list(added), dtype=torch.int64, device=like.device), persistent=False)
        self.register_buffer("_added", torch.tensor(list(added.values()), dtype=like.dtype, device=like.device), persistent=False)

    def _select(self, x: Tensor, k: int, plan: Plan) -> tuple[Tensor, Tensor]:
        values, indices = self.layer._select(x, k, plan)  # pyright: ignore[reportPrivateUsage]
        factors, units, added = self.get_buffer("_factors"), self.get_buffer("_units"), self.get_buffer("_added")
        if self.n_units:
            values = values * factors[indices]
        if not len(units):
            return values, indices
        # Where a unit is among the K already, λ goes to its value there, and a 0 behind it: no unit is counted twice.
        there = indices.unsqueeze(2) == units
        rest = torch.where(there.any(1), 0.0, added)
        values = values + (there * added).sum(2)
        return torch.cat([values, rest], 1), torch.cat([indices, units.expand_as(rest)], 1)

    def _dense(self, x: Tensor) -> Tensor | None:
        return self.layer._dense(x)  # pyright: ignore[reportPrivateUsage]

    def _decode(self, code: Code, x: Tensor | None, plan: Plan) -> Tensor:
        # A plan of its own: the one of the gate was made for the code before the edit.
        return self.layer._decode(code, x, Plan())  # pyright: ignore[reportPrivateUsage]

    def units(self) -> Units | None:
        return self.layer.units()

    def gates(self) -> list[tuple[Tensor, Tensor]]:
        return self.layer.gates()

    def gate_input(self, x: Tensor) -> Tensor:
        return self.layer.gate_input(x)

    def unit_scale(self, code: Code, x: Tensor | None = None) -> Tensor | None:
        return self.layer.unit_scale(code, x)
