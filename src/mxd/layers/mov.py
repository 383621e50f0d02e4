"""The mode-2 variant of the Mixture of Decoders (arXiv 2505.21364, appendix): experts scale the hidden vector instead of the output.

W_n = diag(c_n) D with C [N, H], where an MxD has W_n = D diag(c_n) with C [N, O]. H is about four times O in a plain MLP, so one
parameter budget pays for far fewer experts.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ..ops import expert_mix
from ..ops.transpose import Plan
from .active import active
from .base import Code, SparseLayer, check_sizes
from .encoder import DenseEncoder, dense_path, uniform, zeros
from .mxd import MxDConfig


class MoV(SparseLayer):
    """z and a as in `MxD`;  y = Dᵀ((Cᵀa) * z) + b.

    Parameters: E, b_E, G, b_G, D, b as in `MxD`, C [N, H]. Starts as an MxD does: D = 0, C ~ U(±1/√N). A unit writes Dᵀ(c_n * z), which
    is no row of a table, so there is no auxiliary loss for dead experts.
    """

    kind = "mov"
    unit = "expert"

    def __init__(self, config: MxDConfig, *, generator: torch.Generator | None = None, device: str | torch.device | None = None) -> None:
        super().__init__()
        check_sizes(self.kind, config.n_units, config.k, d_in=config.d_in, d_out=config.d_out, d_hidden=config.d_hidden)
        self.config = config
        self.d_in, self.d_out, self.n_units, self.k = config.d_in, config.d_out, config.n_units, config.k
        self.encoder = DenseEncoder(config.d_in, config.d_hidden, config.activation, config.glu, generator, device)
        self.G = uniform((config.n_units, config.d_in), config.d_in, generator, device)
        self.b_G = zeros(config.n_units, device=device)
        self.C = uniform((config.n_units, config.d_hidden), config.n_units, generator, device)
        self.D = zeros(config.d_hidden, config.d_out, device=device)
        self.b = zeros(config.d_out, device=device)

    def _select(self, x: Tensor, k: int, plan: Plan) -> tuple[Tensor, Tensor]:
        return active(x, self.G, self.b_G, k, plan)

    def _dense(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def _decode(self, code: Code, x: Tensor | None, plan: Plan) -> Tensor:
        modulation = expert_mix(code.values, code.indices, self.C, plan)
        return dense_path(self.encoder, self.D, code.hidden, x, self.b, gain=modulation)

    def gates(self) -> list[tuple[Tensor, Tensor]]:
        return [(self.G, self.b_G)]

    @torch.no_grad()
    def expert(self, n: int) -> Float[Tensor, "d_hidden d_out"]:
        """W_n = diag(c_n) D: what expert n adds to the output is a_n W_nᵀ z.

        Raises:
            LayerError: there is no expert n.
        """
        return self.C[self._check_unit(n), :, None] * self.D
