"""`topk_gate` in plain PyTorch for any device: dense scores forward, sparse gradients backward."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from .. import gemm
from ..transpose import Plan, sum_by_unit


def topk_gate(
    x: Float[Tensor, "token d_in"],
    weight: Float[Tensor, "n_units d_in"],
    bias: Float[Tensor, "n_units"],
    k: int,
    plan: Plan | None = None,
) -> tuple[Float[Tensor, "token k"], Int[Tensor, "token k"]]:
    """Values and indices of the k largest ReLU(weight x + bias) per token.

    Only the k active rows per token carry a gradient, so backward costs k/n_units of the dense product and never holds a
    tokens x n_units gradient. Where fewer than k scores are positive, the rest have value 0 and gradient 0.
    """
    values, indices = _TopKGate.apply(x, weight, bias, k, plan or Plan())  # pyright: ignore[reportGeneralTypeIssues]
    return values, indices


class _TopKGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, k: int, plan: Plan) -> tuple[Tensor, Tensor]:
        scores = gemm.linear(x, weight, bias)
        values, indices = scores.topk(k, dim=1, sorted=False)
        values = values.relu_()  # the same as TopK after ReLU, on k numbers a token instead of n_units
        ctx.save_for_backward(x, weight, values, indices)
        ctx.plan = plan
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        return values, indices

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, values, indices = ctx.saved_tensors
        grad = grads[0]
        if grad is None:
            return None, None, None, None, None
        grad = torch.where(values > 0, grad, torch.zeros_like(grad))
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = F.embedding_bag(indices, weight, mode="sum", per_sample_weights=grad)
        if ctx.needs_input_grad[1]:
            grad_weight = sum_by_unit(x, grad, ctx.plan.by_unit(indices, weight.shape[0]))
        if ctx.needs_input_grad[2]:
            grad_bias = grad.new_zeros(weight.shape[0]).index_add_(0, indices.flatten(), grad.flatten())
        return grad_x, grad_weight, grad_bias, None, None
