"""Gather-and-sum of table rows: the sparse side of every decoder.

`naive.py` is the specification, `eager.py` runs anywhere, `triton.py` on GPUs.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from ..backend import takes_triton
from ..transpose import Plan
from . import eager

__all__ = ["expert_mix"]


def expert_mix(
    values: Float[Tensor, "token k"],
    indices: Int[Tensor, "token k"],
    table: Float[Tensor, "n_units d_out"],
    plan: Plan | None = None,
) -> Float[Tensor, "token d_out"]:
    """sum_k values[t, k] * table[indices[t, k]]: MxD's Cᵀa, and a transcoder's or SAE's whole decoder.

    Gradients reach `values` and `table`; nothing of size tokens x k x d or tokens x n_units is made where few units are active. `plan`
    shares the sorted index with `topk_gate`.

    Raises:
        ConfigError: the settings ask for Triton, which is not installed.
    """
    if takes_triton(table.device):
        from . import triton

        return triton.expert_mix(values, indices, table, plan)
    return eager.expert_mix(values, indices, table, plan)
