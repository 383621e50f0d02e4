"""The Mixture of Decoders (Oldfield et al., NeurIPS 2025, arXiv 2505.21364).

The paper's letters: x [I] the MLP's input · E [I, H] encoder · z [H] dense hidden vector · G [N, I] gate · a [N] sparse
expert weights · C [N, O] and D [H, O] the two factors of the decoders · b [O] output bias · N experts, K of them active.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..ops import expert_mix
from ..ops.transpose import Plan
from .active import active
from .base import Code, SparseLayer, Units, check_sizes
from .encoder import DenseEncoder, dense_path, uniform, zeros


@dataclass(frozen=True)
class MxDConfig:
    """Sizes of an MxD layer."""

    d_in: int
    """Width of the MLP's input, I."""
    d_out: int
    """Width of the MLP's output, O."""
    n_units: int
    """Number of experts, N."""
    k: int
    """Experts active per token, K; n_units: all whose score is positive (no TopK)."""
    d_hidden: int
    """Width of the dense hidden vector, H; the paper takes the host MLP's own width."""
    activation: str = "gelu"
    """φ, by the names of `mxd.layers.encoder.ACTIVATIONS`."""
    glu: bool = False
    """Whether the encoder is gated, as in Llama's MLPs."""


class MxD(SparseLayer):
    """z = φ(Eᵀx + b_E);  a = TopK_K(ReLU(G x + b_G));  y = (Cᵀa) * (Dᵀz) + b.

    Expert n is the full-rank linear map W_n = D diag(c_n) [H, O] (Lemma 1), and y = Σ_n a_n W_nᵀ z + b (Lemma 2), computed
    without any W_n. Starts as published: D = 0, C ~ U(±1/√N), E and G as linear layers, biases 0.
    """

    kind = "mxd"
    unit = "expert"

    def __init__(self, config: MxDConfig, *, generator: torch.Generator | None = None, device: str | torch.device | None = None) -> None:
        super().__init__()
        check_sizes(self.kind, config.n_units, config.k, d_in=config.d_in, d_out=config.d_out, d_hidden=config.d_hidden)
        self.config = config
        self.d_in, self.d_out, self.n_units, self.k = config.d_in, config.d_out, config.n_units, config.k
        self.encoder = DenseEncoder(config.d_in, config.d_hidden, config.activation, config.glu, generator, device)
        self.G = uniform((config.n_units, config.d_in), config.d_in, generator, device)
        self.b_G = zeros(config.n_units, device=device)
        self.C = uniform((config.n_units, config.d_out), config.n_units, generator, device)
        self.D = zeros(config.d_hidden, config.d_out, device=device)
        self.b = zeros(config.d_out, device=device)

    def _select(self, x: Tensor, k: int, plan: Plan) -> tuple[Tensor, Tensor]:
        return active(x, self.G, self.b_G, k, plan)

    def _dense(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def _decode(self, code: Code, x: Tensor | None, plan: Plan) -> Tensor:
        modulation = expert_mix(code.values, code.indices, self.C, plan)
        return torch.addcmul(self.b, modulation, self.unit_scale(code, x))

    def units(self) -> Units:
        return Units(self.G, self.b_G, self.C)

    def unit_scale(self, code: Code, x: Tensor | None = None) -> Tensor:
        return dense_path(self.encoder, self.D, code.hidden, x)

    @torch.no_grad()
    def expert(self, n: int) -> Float[Tensor, "d_hidden d_out"]:
        """W_n = D diag(c_n): what expert n adds to the output is a_n W_nᵀ z.

        Raises:
            LayerError: there is no expert n.
        """
        return self.D * self.C[self._check_unit(n)]
