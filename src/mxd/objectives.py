"""Training losses: plain functions of (y_hat, y), all with one signature."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import ConfigError, nearest


def norm_weighted(y_hat: Float[Tensor, "token d_out"], y: Float[Tensor, "token d_out"]) -> Float[Tensor, ""]:
    """Mean over tokens of |y - y_hat|² / |y| (the norm, not its square): the paper's loss (arXiv 2505.21364, appendix).

    A token with y = 0 would divide by zero; its norm is taken as the smallest normal number of the dtype's square root.
    """
    tiny = torch.finfo(y.dtype).tiny ** 0.5
    return ((y - y_hat).square().sum(-1) / y.norm(dim=-1).clamp_min(tiny)).mean()


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
