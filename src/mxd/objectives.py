"""Training losses: plain functions of (y_hat, y), all with one signature."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import ConfigError, nearest


def norm_weighted(y_hat: Float[Tensor, "token d_out"], y: Float[Tensor, "token d_out"]) -> Float[Tensor, ""]:
    """Mean over tokens of |y - y_hat|² / |y| (the norm, not its square): the paper's loss (arXiv 2505.21364, appendix).

    A token with y = 0 would divide by zero, and one that is as good as 0 would outweigh all others: where |y| is below the dtype's
    resolution at the batch's largest |y|, the token weighs nothing.
    """
    number, norms = torch.finfo(y.dtype), y.norm(dim=-1)
    each = (y - y_hat).square().sum(-1) / norms.clamp_min(number.tiny**0.5)
    # In this order, and not where the largest norm is infinite: what is not a finite number has to show.
    idle = (norms <= number.eps * norms.max()) & norms.max().isfinite()
    return torch.where(idle, 0.0, each).mean()


def squared(y_hat: Float[Tensor, "token d_out"], y: Float[Tensor, "token d_out"]) -> Float[Tensor, ""]:
    """Mean over tokens of |y - y_hat|²."""
    return (y - y_hat).square().sum(-1).mean()


OBJECTIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"norm-weighted": norm_weighted, "squared": squared}
"""Losses by the name `--loss` takes."""


def objective(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of that name.

    Raises:
        ConfigError: no such loss.
    """
    if name not in OBJECTIVES:
        raise ConfigError("unknown --loss", expected=nearest(name, OBJECTIVES), got=name)
    return OBJECTIVES[name]
