"""Transcoders: sparse stand-ins for an MLP, with a linear skip or without.

TopK transcoder after Dunefsky et al. 2024 (arXiv 2406.11944) and Gao et al. 2024 (arXiv 2406.04093); skip transcoder after
Paulo et al. 2025 (arXiv 2501.18823).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import LayerError
from ..ops import expert_mix, linear
from ..ops.transpose import Plan
from .active import active
from .base import Code, SparseLayer, Units, check_sizes
from .encoder import uniform, zeros


@dataclass(frozen=True)
class TranscoderConfig:
    """Sizes of a transcoder, with a skip or without."""

    d_in: int
    """Width of the MLP's input."""
    d_out: int
    """Width of the MLP's output."""
    n_units: int
    """Number of latents."""
    k: int
    """Latents active per token; n_units: all whose score is positive (no TopK)."""


class Transcoder(SparseLayer):
    """a = TopK_K(ReLU(W_enc x + b_enc));  y = W_decᵀ a + b_dec.

    Parameters: W_enc [n_units, d_in], b_enc [n_units], W_dec [n_units, d_out], b_dec [d_out]. Starts as published: the
    matrices as linear layers, biases 0.
    """

    kind = "transcoder"

    def __init__(
        self, config: TranscoderConfig, *, generator: torch.Generator | None = None, device: str | torch.device | None = None
    ) -> None:
        super().__init__()
        check_sizes(self.kind, config.n_units, config.k, d_in=config.d_in, d_out=config.d_out)
        self.config = config
        self.d_in, self.d_out, self.n_units, self.k = config.d_in, config.d_out, config.n_units, config.k
        self.W_enc = uniform((config.n_units, config.d_in), config.d_in, generator, device)
        self.b_enc = zeros(config.n_units, device=device)
        self.W_dec = uniform((config.n_units, config.d_out), config.n_units, generator, device)
        self.b_dec = zeros(config.d_out, device=device)

    def _select(self, x: Tensor, k: int, plan: Plan) -> tuple[Tensor, Tensor]:
        return active(x, self.W_enc, self.b_enc, k, plan)

    def _decode(self, code: Code, x: Tensor | None, plan: Plan) -> Tensor:
        return expert_mix(code.values, code.indices, self.W_dec, plan) + self.b_dec

    def units(self) -> Units:
        return Units(self.W_enc, self.b_enc, self.W_dec)

    @torch.no_grad()
    def latent(self, n: int) -> Float[Tensor, " d_out"]:
        """The direction latent n writes: what it adds to the output is a_n times it.

        Raises:
            LayerError: there is no latent n.
        """
        return self.W_dec[self._check_unit(n)].clone()


class SkipTranscoder(SparseLayer):
    """a = TopK_K(ReLU(W_enc x + b_enc));  y = W_decᵀ a + W_skip x + b_dec.

    Parameters: W_enc [n_units, d_in], b_enc [n_units], W_dec [n_units, d_out], W_skip [d_out, d_in], b_dec [d_out]. Starts
    as published: W_dec = 0, W_skip = 0, W_enc as a linear layer, biases 0.
    """

    kind = "skip-transcoder"

    def __init__(
        self, config: TranscoderConfig, *, generator: torch.Generator | None = None, device: str | torch.device | None = None
    ) -> None:
        super().__init__()
        check_sizes(self.kind, config.n_units, config.k, d_in=config.d_in, d_out=config.d_out)
        self.config = config
        self.d_in, self.d_out, self.n_units, self.k = config.d_in, config.d_out, config.n_units, config.k
        self.W_enc = uniform((config.n_units, config.d_in), config.d_in, generator, device)
        self.b_enc = zeros(config.n_units, device=device)
        self.W_dec = zeros(config.n_units, config.d_out, device=device)
        self.W_skip = zeros(config.d_out, config.d_in, device=device)
        self.b_dec = zeros(config.d_out, device=device)

    def _select(self, x: Tensor, k: int, plan: Plan) -> tuple[Tensor, Tensor]:
        return active(x, self.W_enc, self.b_enc, k, plan)

    def _decode(self, code: Code, x: Tensor | None, plan: Plan) -> Tensor:
        if x is None:
            raise LayerError("a skip transcoder decodes with its input", expected="decode(code, x)", got="decode(code)")
        return expert_mix(code.values, code.indices, self.W_dec, plan) + linear(x, self.W_skip, self.b_dec)

    def units(self) -> Units:
        return Units(self.W_enc, self.b_enc, self.W_dec)

    @torch.no_grad()
    def latent(self, n: int) -> Float[Tensor, " d_out"]:
        """The direction latent n writes: what it adds to the output is a_n times it.

        Raises:
            LayerError: there is no latent n.
        """
        return self.W_dec[self._check_unit(n)].clone()
