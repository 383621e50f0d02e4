"""`topk_gate` in plain PyTorch for any device: scores a slice of tokens at a time forward, sparse gradients backward."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from .. import gemm
from ..expert_mix.eager import mix
from ..largest.eager import largest
from ..rows import crowded
from ..settings import Settings, current
from ..transpose import Plan, sum_by_unit
from . import screen


def topk_gate(
    x: Float[Tensor, "token d_in"],
    weight: Float[Tensor, "n_units d_in"],
    bias: Float[Tensor, " n_units"],
    k: int,
    plan: Plan | None = None,
) -> tuple[Float[Tensor, "token k"], Int[Tensor, "token k"]]:
    """See `mxd.ops.topk_gate`."""
    if not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad)):
        return select(x, weight, bias, k)
    values, indices = _TopKGate.apply(x, weight, bias, k, plan or Plan())  # pyright: ignore[reportGeneralTypeIssues]
    return values, indices


def select(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The forward pass, without autograd."""
    if torch.compiler.is_compiling():
        values, indices = F.linear(x, weight, bias).topk(k, dim=1, sorted=False)
        return values.relu(), indices
    settings = current()
    one_slice = settings.tokens_at_once(weight.shape[0], x.device)
    if settings.gate == "screened" and x.dtype == torch.float32 and len(x):
        values, indices = screen.topk(x, weight, bias, k, one_slice)
    elif len(x) <= one_slice:
        values, indices = _exact(x, weight, bias, k, settings)
    else:
        parts = [_exact(part, weight, bias, k, settings) for part in x.split(one_slice)]
        values, indices = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return values.relu_(), indices  # the same as TopK after ReLU, on k numbers a token instead of n_units


def _exact(x: Tensor, weight: Tensor, bias: Tensor, k: int, settings: Settings) -> tuple[Tensor, Tensor]:
    return largest(gemm.forward(x, weight, bias, settings.product(x.device)), k)


class _TopKGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, k: int, plan: Plan) -> tuple[Tensor, Tensor]:
        values, indices = select(x, weight, bias, k)
        ctx.save_for_backward(x, weight, values, indices)
        ctx.plan, ctx.deterministic = plan, x.is_cuda and current().deterministic
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
        n_units = weight.shape[0]
        few = crowded.is_crowded(grad.shape[1], n_units)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = mix(grad, indices, weight)
        if ctx.needs_input_grad[1] and few:
            grad_weight = crowded.sum_by_unit(x, grad, indices, n_units)
        elif ctx.needs_input_grad[1]:
            grad_weight = sum_by_unit(x, grad, ctx.plan.by_unit(indices, n_units))
        if ctx.needs_input_grad[2]:
            grad_bias = _sum_scalars(grad, indices, n_units, ctx.plan if ctx.deterministic else None)
        return grad_x, grad_weight, grad_bias, None, None


def _sum_scalars(grad: Tensor, indices: Tensor, n_units: int, plan: Plan | None) -> Tensor:
    """For each unit the sum of its pairs' gradients; with a plan in a fixed order, which adding up on a GPU has not."""
    if plan is None:
        return grad.new_zeros(n_units).index_add_(0, indices.flatten(), grad.flatten())
    return sum_by_unit(torch.ones_like(grad[:, :1]), grad, plan.by_unit(indices, n_units)).flatten()
