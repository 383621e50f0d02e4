"""Inner products of every token with the rows of its own units."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def dots(rows: Float[Tensor, "token d"], table: Float[Tensor, "n_units d"], indices: Int[Tensor, "token k"]) -> Float[Tensor, "token k"]:
    """rows[t] · table[indices[t, k]] for every pair, without autograd and without a tokens x k x d buffer.

    The operator is the one autograd itself calls behind `embedding_bag`; it reads each row where it lies.
    """
    tokens, k = indices.shape
    if indices.numel() == 0:
        return rows.new_zeros(tokens, k)
    start = torch.arange(0, tokens * k, k, device=indices.device)
    bag = torch.arange(tokens, device=indices.device).repeat_interleave(k)
    out = torch.ops.aten._embedding_bag_per_sample_weights_backward(rows, table, indices.flatten(), start, bag, 0)
    return out.view(tokens, k)
