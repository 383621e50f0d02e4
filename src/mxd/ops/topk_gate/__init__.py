"""Scores -> ReLU -> the K largest, with gradients only where a unit is active.

`naive.py` is the specification, `eager.py` runs anywhere, `triton.py` on GPUs; `screen.py` finds the same units from bfloat16 bounds.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from ..backend import takes_triton
from ..transpose import Plan
from . import eager

__all__ = ["topk_gate"]


def topk_gate(
    x: Float[Tensor, "token d_in"],
    weight: Float[Tensor, "n_units d_in"],
    bias: Float[Tensor, " n_units"],
    k: int,
    plan: Plan | None = None,
) -> tuple[Float[Tensor, "token k"], Int[Tensor, "token k"]]:
    """Values and indices (int64, in no particular order) of the k largest ReLU(weight x + bias) per token.

    Only the k active rows per token carry a gradient, so backward costs k/n_units of the dense product and never holds a
    tokens x n_units gradient; forward holds at most `Settings.scores_mib` of scores. Where fewer than k scores are positive,
    the rest have value 0 and gradient 0. `plan` shares the sorted index with `expert_mix` on the same indices.

    Raises:
        ConfigError: the settings ask for Triton, which is not installed.
    """
    if takes_triton(x.device):
        from . import triton

        return triton.topk_gate(x, weight, bias, k, plan)
    return eager.topk_gate(x, weight, bias, k, plan)
