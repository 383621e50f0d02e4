"""The dense products of the layers, in the precision that the settings ask for."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from . import gemm, settings


def linear(
    x: Float[Tensor, "*batch d_in"], weight: Float[Tensor, "d_out d_in"], bias: Float[Tensor, " d_out"] | None = None
) -> Float[Tensor, "*batch d_out"]:
    """x @ weightᵀ + bias, differentiable, in `settings.current().precision`."""
    return gemm.linear(x, weight, bias, settings.current().product(x.device))
