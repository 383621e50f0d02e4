"""The specification of the mixture of decoders: the weight tensor W[n, h, o] written out."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def decoder_tensor(C: Float[Tensor, "n_units d_out"], D: Float[Tensor, "d_hidden d_out"]) -> Float[Tensor, "n_units d_hidden d_out"]:
    """W(n, h, o) = C(n, o) D(h, o): expert n is W_n = D diag(c_n) (arXiv 2505.21364, eq. 5)."""
    return C[:, None, :] * D[None, :, :]


def mixture_of_decoders(
    a: Float[Tensor, "token n_units"],
    z: Float[Tensor, "token d_hidden"],
    C: Float[Tensor, "n_units d_out"],
    D: Float[Tensor, "d_hidden d_out"],
) -> Float[Tensor, "token d_out"]:
    """sum_n a_n W_nᵀ z, expert by expert. By the paper's Lemma 2 it equals (Cᵀa) * (Dᵀz)."""
    return torch.einsum("tn,th,nho->to", a, z, decoder_tensor(C, D))


def expert_mix_dense(a: Float[Tensor, "token n_units"], table: Float[Tensor, "n_units d_out"]) -> Float[Tensor, "token d_out"]:
    """Tableᵀ a for every token, as one dense product."""
    return a @ table
