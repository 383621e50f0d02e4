"""`expert_mix` in plain PyTorch for any device: gather-and-sum forward and backward, no tokens x k x d buffer."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from ..transpose import Plan, sum_by_unit


def expert_mix(
    values: Float[Tensor, "token k"],
    indices: Int[Tensor, "token k"],
    table: Float[Tensor, "n_units d_out"],
    plan: Plan | None = None,
) -> Float[Tensor, "token d_out"]:
    """sum_k values[t, k] * table[indices[t, k]]: MxD's Cᵀa, and a transcoder's or SAE's whole decoder."""
    out = _ExpertMix.apply(values, indices, table, plan or Plan())
    assert isinstance(out, Tensor)
    return out


class _ExpertMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, table: Tensor, plan: Plan) -> Tensor:
        ctx.save_for_backward(values, indices, table)
        ctx.plan = plan
        return F.embedding_bag(indices, table, mode="sum", per_sample_weights=values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values, indices, table = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_values = _dots(grad, table, indices) if ctx.needs_input_grad[0] else None
        grad_table = None
        if ctx.needs_input_grad[2]:
            grad_table = sum_by_unit(grad, values, ctx.plan.by_unit(indices, table.shape[0]))
        return grad_values, None, grad_table, None


def _dots(grad: Tensor, table: Tensor, indices: Tensor) -> Tensor:
    """grad[t] · table[indices[t, k]] for every active pair.

    The operator is the one autograd itself calls behind `embedding_bag`; it reads each row where it lies. Calling it here
    rather than through autograd spares that path's dense gradient of the table.
    """
    tokens, k = indices.shape
    if indices.numel() == 0:
        return grad.new_zeros(tokens, k)
    start = torch.arange(0, tokens * k, k, device=indices.device)
    bag = torch.arange(tokens, device=indices.device).repeat_interleave(k)
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(grad, table, indices.flatten(), start, bag, 0)
    return dots.view(tokens, k)
