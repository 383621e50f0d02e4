"""`topk_gate` on the GPU: scores from cuBLAS a slice of tokens at a time, read once by the selection; gradients over active pairs only."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import gemm
from ..largest.triton import top
from ..rows.triton import gather_sum, scalars_by_unit, sum_by_unit
from ..settings import current
from ..transpose import Plan
from . import screen


def topk_gate(
    x: Float[Tensor, "token d_in"],
    weight: Float[Tensor, "n_units d_in"],
    bias: Float[Tensor, " n_units"],
    k: int,
    plan: Plan | None = None,
) -> tuple[Float[Tensor, "token k"], Int[Tensor, "token k"]]:
    """Values and indices of the k largest ReLU(weight x + bias) per token, as `mxd.ops.topk_gate.eager` gives them.

    float32 or bfloat16 (float64 for tests), on CUDA or under Triton's interpreter. Values have the type of `x`, indices are int64 in
    ascending order; of equal scores the lowest units are taken; a NaN score is taken first and stays NaN.
    """
    if not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad)):
        return select(x, weight, bias, k)
    values, indices = _TopKGate.apply(x, weight, bias, k, plan or Plan())  # pyright: ignore[reportGeneralTypeIssues]
    return values, indices


def select(
    x: Float[Tensor, "token d_in"], weight: Float[Tensor, "n_units d_in"], bias: Float[Tensor, " n_units"], k: int
) -> tuple[Float[Tensor, "token k"], Int[Tensor, "token k"]]:
    """The forward pass, without autograd."""
    settings = current()
    one_slice = settings.tokens_at_once(weight.shape[0], x.device)
    if settings.gate == "screened" and x.dtype == torch.float32 and len(x):
        values, indices = screen.topk(x, weight, bias, k, one_slice)
        return values.relu_(), indices
    values = torch.empty(len(x), k, dtype=x.dtype, device=x.device)
    indices = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    precision = settings.product(x.device)
    if precision == "bf16" and x.dtype == weight.dtype == torch.float32:
        x, weight = x.bfloat16(), weight.bfloat16()  # once, not in every slice
    bias = bias.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    for start in range(0, len(x), one_slice):
        part = slice(start, start + one_slice)
        top(_scores(x[part], weight, precision), k, bias, values[part], indices[part])
    return values, indices


def _scores(x: Tensor, weight: Tensor, precision: str) -> Tensor:
    """weight x without the bias, which the selection adds: float32, also of bfloat16 operands; float64 of float64 ones."""
    if x.dtype == torch.bfloat16:
        # Products of bfloat16 numbers are exact in float32: under the interpreter the scores are those of a GPU but for the order of sums.
        return torch.mm(x, weight.t(), out_dtype=torch.float32) if x.is_cuda else x.float() @ weight.float().t()
    return gemm.mm(x, weight.t(), precision)


class _TopKGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, k: int, plan: Plan) -> tuple[Tensor, Tensor]:
        values, indices = select(x, weight, bias, k)
        ctx.save_for_backward(x, weight, values, indices)
        ctx.plan, ctx.deterministic, ctx.bias_type = plan, current().deterministic, bias.dtype
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
            grad_x = gather_sum(grad, indices, weight, x.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = sum_by_unit(x, grad, ctx.plan.by_unit(indices, weight.shape[0]), weight.dtype, ctx.deterministic)
        if ctx.needs_input_grad[2]:
            grad_bias = scalars_by_unit(grad, ctx.plan.by_unit(indices, weight.shape[0]), ctx.bias_type)
        return grad_x, grad_weight, grad_bias, None, None
