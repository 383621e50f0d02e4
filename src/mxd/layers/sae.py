"""TopK sparse autoencoder (Gao et al. 2024, arXiv 2406.04093) on the MLP's output."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..ops import expert_mix
from ..ops.transpose import Plan
from .active import active
from .base import Code, SparseLayer, Units, check_sizes
from .encoder import uniform, zeros


@dataclass(frozen=True)
class TopKSAEConfig:
    """Sizes of a TopK SAE: it reads and returns the MLP's output."""

    d_out: int
    """Width of the MLP's output, which the SAE both reads and returns."""
    n_units: int
    """Number of latents."""
    k: int
    """Latents active per token; n_units: all whose score is positive (no TopK)."""


class TopKSAE(SparseLayer):
    """a = TopK_K(ReLU(W_enc (y − b_dec) + b_enc));  ŷ = W_decᵀ a + b_dec, where y is the MLP's output.

    In place of an MLP it acts as SAE(MLP(x)): the host still computes its own MLP. Parameters: W_enc [n_units, d_out],
    b_enc [n_units], W_dec [n_units, d_out], b_dec [d_out].
    """

    kind = "topk-sae"
    reads = "output"

    def __init__(
        self, config: TopKSAEConfig, *, generator: torch.Generator | None = None, device: str | torch.device | None = None
    ) -> None:
        super().__init__()
        check_sizes(self.kind, config.n_units, config.k, d_out=config.d_out)
        self.config = config
        self.d_in, self.d_out, self.n_units, self.k = config.d_out, config.d_out, config.n_units, config.k
        self.W_enc = uniform((config.n_units, config.d_out), config.d_out, generator, device)
        self.b_enc = zeros(config.n_units, device=device)
        self.W_dec = uniform((config.n_units, config.d_out), config.n_units, generator, device)
        self.b_dec = zeros(config.d_out, device=device)

    def _select(self, x: Tensor, k: int, plan: Plan) -> tuple[Tensor, Tensor]:
        return active(self.gate_input(x), self.W_enc, self.b_enc, k, plan)

    def _decode(self, code: Code, x: Tensor | None, plan: Plan) -> Tensor:
        return expert_mix(code.values, code.indices, self.W_dec, plan) + self.b_dec

    def units(self) -> Units:
        return Units(self.W_enc, self.b_enc, self.W_dec)

    def gate_input(self, x: Tensor) -> Tensor:
        return x - self.b_dec

    @torch.no_grad()
    def latent(self, n: int) -> Float[Tensor, " d_out"]:
        """The direction latent n writes: what it adds to the output is a_n times it.

        Raises:
            LayerError: there is no latent n.
        """
        return self.W_dec[self._check_unit(n)].clone()
