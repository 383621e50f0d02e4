"""CP-μMoE with a sparse gate: the mixture of decoders of any rank (Oldfield et al. 2024, arXiv 2402.12550; 2025, arXiv 2505.21364).

The decoders of all experts are one tensor W(n, h, o) = Σ_r C(n, r) D(h, r) W(o, r), a CP decomposition of rank R. An MxD is the case
R = O, W = I: its experts have full rank, those of a CP-μMoE at most R.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..ops import expert_mix, linear
from ..ops.transpose import Plan
from .active import active
from .base import Code, SparseLayer, check_sizes
from .encoder import DenseEncoder, dense_path, uniform, zeros


@dataclass(frozen=True)
class CPMuMoEConfig:
    """Sizes of a CP-μMoE."""

    d_in: int
    """Width of the MLP's input, I."""
    d_out: int
    """Width of the MLP's output, O."""
    n_units: int
    """Number of experts, N."""
    k: int
    """Experts active per token, K; n_units: all whose score is positive (no TopK)."""
    d_hidden: int
    """Width of the dense hidden vector, H."""
    rank: int
    """Rank of the decomposition, R: no expert's map has a higher one."""
    activation: str = "gelu"
    """φ, by the names of `mxd.layers.encoder.ACTIVATIONS`."""
    glu: bool = False
    """Whether the encoder is gated."""


class CPMuMoE(SparseLayer):
    """z and a as in `MxD`;  y = W ((Cᵀa) * (Dᵀz)) + b, that is y_o = Σ_r (Cᵀa)_r (Dᵀz)_r W(o, r) + b_o.

    Parameters: E, b_E, G, b_G, b as in `MxD`, C [N, R], D [H, R], W [O, R]. Starts as an MxD does: D = 0, C ~ U(±1/√N), W as a linear
    layer. A unit writes W (c_n * Dᵀz), which is no row of a table, so there is no auxiliary loss for dead experts.
    """

    kind = "cp-mumoe"
    unit = "expert"

    def __init__(
        self, config: CPMuMoEConfig, *, generator: torch.Generator | None = None, device: str | torch.device | None = None
    ) -> None:
        super().__init__()
        widths = {"d_in": config.d_in, "d_out": config.d_out, "d_hidden": config.d_hidden, "rank": config.rank}
        check_sizes(self.kind, config.n_units, config.k, **widths)
        self.config = config
        self.d_in, self.d_out, self.n_units, self.k = config.d_in, config.d_out, config.n_units, config.k
        self.encoder = DenseEncoder(config.d_in, config.d_hidden, config.activation, config.glu, generator, device)
        self.G = uniform((config.n_units, config.d_in), config.d_in, generator, device)
        self.b_G = zeros(config.n_units, device=device)
        self.C = uniform((config.n_units, config.rank), config.n_units, generator, device)
        self.D = zeros(config.d_hidden, config.rank, device=device)
        self.W = uniform((config.d_out, config.rank), config.rank, generator, device)
        self.b = zeros(config.d_out, device=device)

    def _select(self, x: Tensor, k: int, plan: Plan) -> tuple[Tensor, Tensor]:
        return active(x, self.G, self.b_G, k, plan)

    def _dense(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def _decode(self, code: Code, x: Tensor | None, plan: Plan) -> Tensor:
        modulation = expert_mix(code.values, code.indices, self.C, plan)
        return linear(modulation * dense_path(self.encoder, self.D, code.hidden, x), self.W, self.b)

    def gates(self) -> list[tuple[Tensor, Tensor]]:
        return [(self.G, self.b_G)]

    @torch.no_grad()
    def expert(self, n: int) -> Float[Tensor, "d_hidden d_out"]:
        """W_n = D diag(c_n) Wᵀ: what expert n adds to the output is a_n W_nᵀ z.

        Raises:
            LayerError: there is no expert n.
        """
        return (self.D * self.C[self._check_unit(n)]) @ self.W.t()
