"""`expert_mix` in plain PyTorch for any device: gather-and-sum forward and backward, no tokens x k x d buffer."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from ..rows import crowded
from ..rows.eager import dots
from ..transpose import Plan, sum_by_unit


def expert_mix(
    values: Float[Tensor, "token k"],
    indices: Int[Tensor, "token k"],
    table: Float[Tensor, "n_units d_out"],
    plan: Plan | None = None,
) -> Float[Tensor, "token d_out"]:
    """See `mxd.ops.expert_mix`."""
    if not (torch.is_grad_enabled() and (values.requires_grad or table.requires_grad)):
        return mix(values, indices, table)
    out = _ExpertMix.apply(values, indices, table, plan or Plan())
    assert isinstance(out, Tensor)
    return out


def mix(values: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """The forward pass, without autograd."""
    if crowded.is_crowded(values.shape[1], table.shape[0]):
        return crowded.mix(values, indices, table)
    return F.embedding_bag(indices, table, mode="sum", per_sample_weights=values)


class _ExpertMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, table: Tensor, plan: Plan) -> Tensor:
        ctx.save_for_backward(values, indices, table)
        ctx.plan = plan
        return mix(values, indices, table)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values, indices, table = ctx.saved_tensors
        grad = grads[0].contiguous()
        few = crowded.is_crowded(values.shape[1], table.shape[0])
        grad_values = grad_table = None
        if ctx.needs_input_grad[0]:
            grad_values = crowded.dots(grad, table, indices) if few else dots(grad, table, indices)
        if ctx.needs_input_grad[2] and few:
            grad_table = crowded.sum_by_unit(grad, values, indices, table.shape[0])
        elif ctx.needs_input_grad[2]:
            grad_table = sum_by_unit(grad, values, ctx.plan.by_unit(indices, table.shape[0]))
        return grad_values, None, grad_table, None
