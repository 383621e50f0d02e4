"""The dense product, by the fastest float32 GEMM that this CPU has.

PyTorch multiplies float32 matrices on x86 with MKL, which on AMD processors reaches less than half of what oneDNN's kernel
reaches (``benchmarks/gemm.py`` measures it). Both are
compiled into PyTorch and both are true float32. The choice is by processor vendor, never by timing, so that a run repeats
bit for bit on its machine. ``MXD_GEMM=mkl`` or ``MXD_GEMM=onednn`` overrides it.
"""

from __future__ import annotations

import functools
import os
import platform
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError


@functools.cache
def uses_onednn() -> bool:
    """Whether float32 CPU products go through oneDNN: on x86 processors by AMD, or as ``MXD_GEMM`` says.

    Raises:
        ConfigError: ``MXD_GEMM`` is neither ``mkl``, ``onednn`` nor ``auto``.
    """
    wish = os.environ.get("MXD_GEMM", "auto")
    if wish not in ("auto", "mkl", "onednn"):
        raise ConfigError("MXD_GEMM is not a known product", expected="auto, mkl or onednn", got=wish, next="unset MXD_GEMM")
    if wish == "mkl" or not _has_onednn():
        return False
    return wish == "onednn" or _vendor() == "AuthenticAMD"


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _vendor() -> str:
    """The processor's vendor string, empty where it cannot be told."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            return next((line.split(":")[1].strip() for line in info if line.startswith("vendor_id")), "")
    except OSError:
        # Windows and macOS: the identifier of Windows ends in the vendor's name; Macs have no AMD processors.
        return "AuthenticAMD" if "AuthenticAMD" in platform.processor() else ""


def _apt(*tensors: Tensor) -> bool:
    return all(t.device.type == "cpu" and t.dtype == torch.float32 and t.numel() > 0 for t in tensors) and uses_onednn()


def mm(a: Float[Tensor, "m k"], b: Float[Tensor, "k n"]) -> Float[Tensor, "m n"]:
    """a @ b without autograd; strides are free."""
    if _apt(a, b):
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return a @ b


def linear(
    x: Float[Tensor, "*batch d_in"], weight: Float[Tensor, "d_out d_in"], bias: Float[Tensor, "d_out"] | None = None
) -> Float[Tensor, "*batch d_out"]:
    """x @ weightᵀ + bias, differentiable: `torch.nn.functional.linear` by the faster product."""
    if not _apt(x, weight):
        return F.linear(x, weight, bias)
    flat = x.reshape(-1, x.shape[-1])
    out = _Linear.apply(flat, weight, bias) if torch.is_grad_enabled() else _forward(flat, weight, bias)
    assert isinstance(out, Tensor)
    return out.view(*x.shape[:-1], weight.shape[0])


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    """`linear` on oneDNN, with its three products in the backward pass on oneDNN too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (grad,) = grads
        grad_x = mm(grad, weight) if ctx.needs_input_grad[0] else None
        grad_weight = mm(grad.t(), x) if ctx.needs_input_grad[1] else None
        grad_bias = grad.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias
