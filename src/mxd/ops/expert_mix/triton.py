"""`expert_mix` on the GPU: gather-and-sum forward, and a segment sum over the sorted pairs for the table's gradient."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..rows.triton import dots, gather_sum, sum_by_unit
from ..settings import current
from ..transpose import Plan


def expert_mix(
    values: Float[Tensor, "token k"],
    indices: Int[Tensor, "token k"],
    table: Float[Tensor, "n_units d_out"],
    plan: Plan | None = None,
) -> Float[Tensor, "token d_out"]:
    """sum_k values[t, k] * table[indices[t, k]], as `mxd.ops.expert_mix.eager` gives it.

    float32 or bfloat16 (float64 for tests), on CUDA or under Triton's interpreter; summed in float32. Values and table may differ in
    type: the result has the wider one, each gradient that of its tensor.
    """
    if not (torch.is_grad_enabled() and (values.requires_grad or table.requires_grad)):
        return _forward(values, indices, table)
    out = _ExpertMix.apply(values, indices, table, plan or Plan())
    assert isinstance(out, Tensor)
    return out


def _forward(values: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    return gather_sum(values, indices, table, torch.promote_types(values.dtype, table.dtype))


class _ExpertMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, table: Tensor, plan: Plan) -> Tensor:
        ctx.save_for_backward(values, indices, table)
        ctx.plan, ctx.deterministic = plan, current().deterministic
        return _forward(values, indices, table)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values, indices, table = ctx.saved_tensors
        (grad,) = grads
        grad_values = dots(grad, indices, table, values.dtype) if ctx.needs_input_grad[0] else None
        grad_table = None
        if ctx.needs_input_grad[2]:
            grad_table = sum_by_unit(grad, values, ctx.plan.by_unit(indices, table.shape[0]), table.dtype, ctx.deterministic)
        return grad_values, None, grad_table, None
