"""AuxK: units that have stopped firing learn to reconstruct what the layer still gets wrong (Gao et al. 2024, arXiv 2406.04093, §2.4)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..ops import expert_mix, topk_gate
from ..ops.transpose import Plan
from .base import Code, SparseLayer


def aux_output(
    layer: SparseLayer, x: Float[Tensor, "token d_in"], code: Code, dead: Int[Tensor, " n_dead"], k: int
) -> Float[Tensor, "token d_out"]:
    """What the `k` strongest dead units of each token would add to the output: ê of the auxiliary loss |y − ŷ − ê|².

    The same sparse operations as the layer's own, on the rows of the dead units alone. Its gradient reaches those rows of the gate
    *and* of the table. What all units share (b_dec of an SAE, z and D of MxD, whose dead experts write (Cᵀa) * (Dᵀz)) is
    held constant: the auxiliary loss revives units, it does not train the rest.

    Args:
        layer: one that has units.
        x: what the layer reads.
        code: of x, from the layer's own forward pass; only its dense hidden vector is used.
        dead: numbers of the dead units, at least one.
        k: dead units per token; no more than there are.
    """
    units = layer.units()
    assert units is not None
    plan = Plan()
    with torch.no_grad():
        gate_input = layer.gate_input(x)
    rows = (units.weight[dead], units.bias[dead], units.table[dead])
    values, indices = topk_gate(gate_input, rows[0], rows[1], min(k, len(dead)), plan)
    mix = expert_mix(values, indices, rows[2], plan)
    with torch.no_grad():
        scale = layer.unit_scale(code, x)
    return mix if scale is None else mix * scale
