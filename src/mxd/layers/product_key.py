"""MxD with a product-key gate: N experts addressed by two lists of √N keys each (Lample et al. 2019, arXiv 1907.05242).

The gate of an ordinary MxD multiplies the input with N rows; this one with 2√N. A score is the sum of two of its numbers, so the K
largest of all N are found exactly without computing them. What it gives up: N scores with 2√N degrees of freedom per input, where
the experts (i, 1), (i, 2), .. share a key.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import LayerError
from ..ops import expert_mix, linear
from ..ops.transpose import Plan
from .base import Code, SparseLayer, check_sizes
from .encoder import DenseEncoder, dense_path, uniform, zeros
from .mxd import MxDConfig


class MxDProductKey(SparseLayer):
    """u = G_1 x + b_1;  v = G_2 x + b_2;  a_(i,j) = TopK_K(ReLU(u_i + v_j));  y = (Cᵀa) * (Dᵀz) + b with MxD's z.

    Expert (i, j) has number i √N + j. Parameters: G_1, G_2 [√N, d_in], b_1, b_2 [√N], C [N, d_out], and E, D, b as in `MxD`, starting
    as published there. `n_units` is a square number.
    """

    kind = "mxd-pk"
    unit = "expert"

    def __init__(self, config: MxDConfig, *, generator: torch.Generator | None = None, device: str | torch.device | None = None) -> None:
        super().__init__()
        check_sizes(self.kind, config.n_units, config.k, d_in=config.d_in, d_out=config.d_out, d_hidden=config.d_hidden)
        self.keys = math.isqrt(config.n_units)
        if self.keys**2 != config.n_units:
            near = f"{self.keys**2} or {(self.keys + 1) ** 2}"
            raise LayerError("mxd-pk: the number of experts must be a square", expected=near, got=str(config.n_units))
        self.config = config
        self.d_in, self.d_out, self.n_units, self.k = config.d_in, config.d_out, config.n_units, config.k
        self.encoder = DenseEncoder(config.d_in, config.d_hidden, config.activation, config.glu, generator, device)
        self.G_1 = uniform((self.keys, config.d_in), config.d_in, generator, device)
        self.G_2 = uniform((self.keys, config.d_in), config.d_in, generator, device)
        self.b_1 = zeros(self.keys, device=device)
        self.b_2 = zeros(self.keys, device=device)
        self.C = uniform((config.n_units, config.d_out), config.n_units, generator, device)
        self.D = zeros(config.d_hidden, config.d_out, device=device)
        self.b = zeros(config.d_out, device=device)

    def _select(self, x: Tensor, k: int, plan: Plan) -> tuple[Tensor, Tensor]:
        values, indices = largest_sums(linear(x, self.G_1, self.b_1), linear(x, self.G_2, self.b_2), k)
        return values.relu(), indices

    def _dense(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def _decode(self, code: Code, x: Tensor | None, plan: Plan) -> Tensor:
        return torch.addcmul(self.b, expert_mix(code.values, code.indices, self.C, plan), self.unit_scale(code, x))

    def gates(self) -> list[tuple[Tensor, Tensor]]:
        return [(self.G_1, self.b_1), (self.G_2, self.b_2)]

    def unit_scale(self, code: Code, x: Tensor | None = None) -> Tensor:
        return dense_path(self.encoder, self.D, code.hidden, x)

    @torch.no_grad()
    def expert(self, n: int) -> Float[Tensor, "d_hidden d_out"]:
        """W_n = D diag(c_n): what expert n adds to the output is a_n W_nᵀ z.

        Raises:
            LayerError: there is no expert n.
        """
        return self.D * self.C[self._check_unit(n)]


def largest_sums(
    u: Float[Tensor, "token n"], v: Float[Tensor, "token n"], k: int
) -> tuple[Float[Tensor, "token k"], Int[Tensor, "token k"]]:
    """The k largest of all u_i + v_j and their numbers i n + j; differentiable; exact.

    With both sides in descending order, the pair at ranks (p, q) is no larger than any of the (p + 1)(q + 1) pairs at ranks up to
    them: it can be among the k largest only if (p + 1)(q + 1) <= k. That leaves about k ln k pairs of n².
    """
    n = u.shape[1]
    left, right = (side.topk(min(k, n), dim=1) for side in (u, v))
    # torch.compile traces through the cache with a warning: it makes the ranks a constant of its graph anyway
    ranks = _ranks.__wrapped__ if torch.compiler.is_compiling() else _ranks
    p, q = ranks(k, left.indices.shape[1], u.device)
    values, where = (left.values[:, p] + right.values[:, q]).topk(k, dim=1, sorted=False)
    return values, left.indices.gather(1, p[where]) * n + right.indices.gather(1, q[where])


@lru_cache(maxsize=64)
def _ranks(k: int, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """All ranks (p, q) below n with (p + 1)(q + 1) <= k."""
    pairs = [(p, q) for p in range(n) for q in range(min(n, k // (p + 1)))]
    p, q = torch.tensor(pairs, device=device).T
    return p, q
