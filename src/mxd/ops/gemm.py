"""The dense products: by the fastest float32 GEMM that this CPU has, or in a lower precision where asked.

PyTorch multiplies float32 matrices on x86 with MKL, which on AMD processors reaches less than half of what oneDNN's kernel
reaches (``mxd bench gemm`` measures it). Both are
compiled into PyTorch and both are true float32. The choice is by processor vendor, never by timing, so that a run repeats
bit for bit on its machine. ``MXD_GEMM=mkl`` or ``MXD_GEMM=onednn`` overrides it.

Precisions: ``fp32``; ``tf32`` (CUDA only, elsewhere fp32); ``bf16``: operands rounded to bfloat16, summed in float32. Results are
float32 on every path; on a CPU a bf16 product comes rounded to bfloat16 first, since its kernels store no wider.
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


@functools.cache
def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX-512 BF16 or AMX); without, it is several times slower than float32."""
    return _has_onednn() and "avx512_bf16" in _cpu_flags()


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _vendor() -> str:
    """The processor's vendor string, empty where it cannot be told."""
    # Windows and macOS have no /proc: the identifier of Windows ends in the vendor's name; Macs have no AMD processors.
    return _cpu_info("vendor_id") or ("AuthenticAMD" if "AuthenticAMD" in platform.processor() else "")


def _cpu_flags() -> list[str]:
    return _cpu_info("flags").split()


def _cpu_info(field: str) -> str:
    """A field of the first processor in /proc/cpuinfo, empty where there is none."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            return next((line.split(":", 1)[1].strip() for line in info if line.startswith(field)), "")
    except OSError:
        return ""


def _apt(*tensors: Tensor) -> bool:
    return all(t.device.type == "cpu" and t.dtype == torch.float32 and t.numel() > 0 for t in tensors) and uses_onednn()


def mm(a: Float[Tensor, "m k"], b: Float[Tensor, "k n"], precision: str = "fp32") -> Float[Tensor, "m n"]:
    """a @ b without autograd; strides are free."""
    if precision == "bf16" and a.dtype == b.dtype == torch.float32:
        a16, b16 = a.bfloat16(), b.bfloat16()
        return torch.mm(a16, b16, out_dtype=torch.float32) if a.is_cuda else (a16 @ b16).float()
    if a.is_cuda and a.dtype == torch.float32:
        return _cuda_mm(a, b, precision)
    if _apt(a, b):
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return a @ b


def _cuda_mm(a: Tensor, b: Tensor, precision: str) -> Tensor:
    """In TF32 or true float32, whatever the process's own setting is."""
    backend = torch.backends.cuda.matmul
    before = backend.fp32_precision
    backend.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        return a @ b
    finally:
        backend.fp32_precision = before


def linear(
    x: Float[Tensor, "*batch d_in"],
    weight: Float[Tensor, "d_out d_in"],
    bias: Float[Tensor, " d_out"] | None = None,
    precision: str = "fp32",
) -> Float[Tensor, "*batch d_out"]:
    """x @ weightᵀ + bias, differentiable: `torch.nn.functional.linear` by the product asked for."""
    if torch.compiler.is_compiling() or not (x.is_cuda or precision == "bf16" or _apt(x, weight)):
        return F.linear(x, weight, bias)
    flat = x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        out = _Linear.apply(flat, weight, bias, precision)
        assert isinstance(out, Tensor)
    else:
        out = forward(flat, weight, bias, precision)
    return out.view(*x.shape[:-1], weight.shape[0])


def forward(x: Float[Tensor, "token d_in"], weight: Float[Tensor, "d_out d_in"], bias: Tensor | None, precision: str) -> Tensor:
    """`linear` without autograd."""
    if precision == "fp32" and _apt(x, weight):
        if len(x) == 1 and not weight.is_contiguous():
            return F.linear(x, weight, bias)  # one token by a transposed weight, as in generation: here MKL is a little faster
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    out = mm(x, weight.t(), precision)
    return out if bias is None else out.add_(bias)


class _Linear(torch.autograd.Function):
    """`linear`, with the three products of its backward pass in the same precision."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, precision: str) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias, ctx.precision = bias is not None, precision
        return forward(x, weight, bias, precision)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (grad,) = grads
        grad_x = mm(grad, weight, ctx.precision) if ctx.needs_input_grad[0] else None
        grad_weight = mm(grad.t(), x, ctx.precision) if ctx.needs_input_grad[1] else None
        grad_bias = grad.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, None
