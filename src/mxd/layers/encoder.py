"""The dense encoder z = φ(Eᵀx + b_E), or its gated form (GLU), shared by MxD and the two controls.

φ is the host's own activation; a GLU host gets a GLU encoder: z = φ(E_gateᵀx + b_gate) * (Eᵀx + b_E) (arXiv 2505.21364, §3.2).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..errors import LayerError, nearest
from ..ops import current, linear, using

PIECE_TOKENS = 512
"""Tokens whose hidden vectors are held at once where they are made again in the backward pass."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda u: F.gelu(u, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "quick_gelu": lambda u: u * torch.sigmoid(1.702 * u),
    "relu2": lambda u: F.relu(u).square(),
    "identity": lambda u: u,
}
"""φ by name; the host says which one its MLPs use."""


def check_activation(name: str) -> None:
    """Raise `LayerError` unless `name` is one of `ACTIVATIONS`."""
    if name not in ACTIVATIONS:
        raise LayerError("unknown activation", expected=nearest(name, ACTIVATIONS), got=name)


def uniform(shape: tuple[int, ...], fan_in: int, generator: torch.Generator | None, device: str | torch.device | None) -> nn.Parameter:
    """A float32 parameter ~ U(±1/√fan_in): how PyTorch's linear layers start."""
    bound = fan_in**-0.5
    values = torch.empty(shape, device=device)
    return nn.Parameter(values.uniform_(-bound, bound, generator=generator))


def zeros(*shape: int, device: str | torch.device | None) -> nn.Parameter:
    """A float32 parameter of zeros."""
    return nn.Parameter(torch.zeros(shape, device=device))


class DenseEncoder(nn.Module):
    """z = φ(Eᵀx + b_E), or φ(E_gateᵀx + b_gate) * (Eᵀx + b_E) with `glu`.

    Parameters: E [d_in, d_hidden], b_E [d_hidden], and with `glu` E_gate, b_gate of the same shapes.
    """

    def __init__(
        self,
        d_in: int,
        d_hidden: int,
        activation: str,
        glu: bool,
        generator: torch.Generator | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        super().__init__()
        check_activation(activation)
        self.phi = ACTIVATIONS[activation]
        self.E = uniform((d_in, d_hidden), d_in, generator, device)
        self.b_E = zeros(d_hidden, device=device)
        self.E_gate = uniform((d_in, d_hidden), d_in, generator, device) if glu else None
        self.b_gate = zeros(d_hidden, device=device) if glu else None

    def forward(self, x: Float[Tensor, "token d_in"]) -> Float[Tensor, "token d_hidden"]:
        up = linear(x, self.E.t(), self.b_E)
        if self.E_gate is None:
            return self.phi(up)
        return self.phi(linear(x, self.E_gate.t(), self.b_gate)) * up


def dense_path(
    encoder: DenseEncoder,
    D: Float[Tensor, "d_hidden d_out"],
    hidden: Float[Tensor, "token d_hidden"] | None,
    x: Float[Tensor, "token d_in"] | None,
    bias: Float[Tensor, " d_out"] | None = None,
    gain: Float[Tensor, "token d_hidden"] | None = None,
) -> Float[Tensor, "token d_out"]:
    """Dᵀ(gain * z) + bias of a given z, or of the z of x, which is then made a piece at a time and made again in the backward pass.

    Without `gain`, Dᵀz + bias.

    Raises:
        LayerError: neither is given.
    """
    if hidden is not None:
        return linear(hidden if gain is None else hidden * gain, D.t(), bias)
    if x is None:
        raise LayerError("this code has no hidden vector", expected="the code of encode(x), or decode(code, x)", got="hidden = None")
    settings = dataclasses.asdict(current())

    def piece(part: Tensor, matrix: Tensor, gain: Tensor | None) -> Tensor:
        with using(**settings):  # those of the forward pass: it may be over when this runs again
            z = encoder(part)
            return linear(z if gain is None else z * gain, matrix.t(), bias)

    pieces = x.split(PIECE_TOKENS)
    gains = [None] * len(pieces) if gain is None else gain.split(PIECE_TOKENS)
    parts = [
        checkpoint(piece, part, D, own, use_reentrant=False, preserve_rng_state=False) for part, own in zip(pieces, gains, strict=True)
    ]
    return torch.cat([part for part in parts if isinstance(part, Tensor)])
