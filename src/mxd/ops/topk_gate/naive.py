"""The specification of `topk_gate`, in dense form: every score, ReLU, then the K largest kept."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def topk_gate_dense(
    x: Float[Tensor, "token d_in"], G: Float[Tensor, "n_units d_in"], b: Float[Tensor, " n_units"], k: int
) -> Float[Tensor, "token n_units"]:
    """a = TopK_K(ReLU(G x + b)) as a dense matrix with at most k non-zeros a row (arXiv 2505.21364, eq. 4)."""
    scores = torch.relu(x @ G.T + b)
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept.scatter_(1, scores.topk(k, dim=1).indices, True)
    return torch.where(kept, scores, torch.zeros_like(scores))
