"""The two controls that every table shows beside MxD: what its experts add, and what its product adds.

An MxD contains a dense MLP, so only what it has beyond `Dense` is owed to its experts, and only what it has beyond
`Additive` to the Hadamard product. Neither claims to be sparse.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import expert_mix
from ..ops.transpose import Plan
from .active import active
from .base import Code, SparseLayer, Units, check_sizes, no_units
from .encoder import DenseEncoder, dense_path, uniform, zeros
from .mxd import MxDConfig


@dataclass(frozen=True)
class DenseConfig:
    """Sizes of the dense control."""

    d_in: int
    """Width of the MLP's input."""
    d_out: int
    """Width of the MLP's output."""
    d_hidden: int
    """Width of the hidden vector z: MxD's own."""
    activation: str = "gelu"
    """φ, by the names of `mxd.layers.encoder.ACTIVATIONS`."""
    glu: bool = False
    """Whether the encoder is gated."""


class Dense(SparseLayer):
    """y = Dᵀz + b with MxD's own encoder: MxD's dense path alone, without experts. Starts with D = 0 as MxD does."""

    kind = "dense"
    is_control = True
    unit = "none"

    def __init__(self, config: DenseConfig, *, generator: torch.Generator | None = None, device: str | torch.device | None = None) -> None:
        super().__init__()
        check_sizes(self.kind, 1, 1, d_in=config.d_in, d_out=config.d_out, d_hidden=config.d_hidden)
        self.config = config
        self.d_in, self.d_out, self.n_units, self.k = config.d_in, config.d_out, 0, 0
        self.encoder = DenseEncoder(config.d_in, config.d_hidden, config.activation, config.glu, generator, device)
        self.D = zeros(config.d_hidden, config.d_out, device=device)
        self.b = zeros(config.d_out, device=device)

    def _active(self, k: int | None) -> int:
        return 0

    def _select(self, x: Tensor, k: int, plan: Plan) -> tuple[Tensor, Tensor]:
        return no_units(x)

    def _dense(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def _decode(self, code: Code, x: Tensor | None, plan: Plan) -> Tensor:
        return dense_path(self.encoder, self.D, code.hidden, x, self.b)


class Additive(SparseLayer):
    """y = Cᵀa + Dᵀz + b at MxD's sizes: the same parts, added instead of multiplied. Starts as MxD does."""

    kind = "additive"
    is_control = True
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
        return expert_mix(code.values, code.indices, self.C, plan) + dense_path(self.encoder, self.D, code.hidden, x, self.b)

    def units(self) -> Units:
        return Units(self.G, self.b_G, self.C)
