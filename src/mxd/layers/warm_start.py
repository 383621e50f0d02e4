"""How a student starts from data: output bias, centred gate, scale of C, and a closed-form fit of its output matrices.

All of it looks only at a sample of the first shuffle buffer. What a recipe leaves out stays as the layer was built.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from .base import SparseLayer
from .controls import Additive, Dense
from .cp import CPMuMoE
from .encoder import DenseEncoder
from .mov import MoV
from .mxd import MxD
from .product_key import MxDProductKey
from .sae import TopKSAE
from .transcoder import SkipTranscoder, Transcoder

MODULATED = (MxD, MxDProductKey, CPMuMoE, MoV)
"""Layers in which Cᵀa multiplies something dense."""
_WITH_D = (*MODULATED, Dense, Additive)
ROUNDING = 1e-5
"""Activations this small beside the bias that centred their scores are rounding."""


def output_bias(layer: SparseLayer) -> Tensor:
    """The parameter added last: ``b``, or ``b_dec`` of transcoders and SAEs."""
    return layer.get_parameter("b" if isinstance(layer, _WITH_D) else "b_dec")


def dense_matrices(layer: SparseLayer) -> list[Tensor]:
    """The matrices every token uses whole: encoder and D, or the skip. The others are used row by row."""
    found: list[Tensor] = []
    encoder = getattr(layer, "encoder", None)
    if isinstance(encoder, DenseEncoder):
        found += [encoder.E] + ([encoder.E_gate] if encoder.E_gate is not None else [])
    if isinstance(layer, _WITH_D):
        found.append(layer.D)
    if isinstance(layer, CPMuMoE):
        found.append(layer.W)
    if isinstance(layer, SkipTranscoder):
        found.append(layer.W_skip)
    return found


def unit_tables(layer: SparseLayer) -> list[Tensor]:
    """The matrix with one row for each unit behind the gate: C, or W_dec of transcoders and SAEs; none for the dense control."""
    return [parameter for name, parameter in layer.named_parameters() if name in ("C", "W_dec")]


@torch.no_grad()
def start_output_bias(layer: SparseLayer, y: Float[Tensor, "token d_out"]) -> None:
    """b = mean of y (as published)."""
    output_bias(layer).copy_(y.mean(0))


@torch.no_grad()
def centre_gate(layer: SparseLayer, inputs: Float[Tensor, "token d_in"]) -> None:
    """Gate bias = −W mean(input), so that every unit's scores start with mean 0 (arXiv 2605.31518: an uncentred input kills units)."""
    mean = layer.gate_input(inputs.mean(0))
    for weight, bias in layer.gates():
        bias.copy_(-(weight @ mean))


@torch.no_grad()
def positive_modulation(
    layer: MxD | MxDProductKey | CPMuMoE | MoV, inputs: Float[Tensor, "token d_in"], generator: torch.Generator | None
) -> None:
    """C = (1 + e)/S1 with e ~ N(0, 1) and S1 = E Σ_k a_k: the modulation Cᵀa starts near 1 with spread about 1/√K.

    Where inputs are all alike, what a centred gate leaves of them is rounding: dividing by it would make C enormous, and C stays as it is.
    """
    total = layer.encode(inputs).values.sum(-1).mean()
    if float(total) <= ROUNDING * max(float(bias.abs().mean()) for _, bias in layer.gates()):
        return
    # Drawn on the CPU, where the generator is, whatever the device.
    layer.C.copy_((1 + torch.randn(layer.C.shape, generator=generator).to(layer.C.device)) / total)


@torch.no_grad()
def copy_host_encoder(layer: SparseLayer, E: Tensor, b_E: Tensor | None, E_gate: Tensor | None, b_gate: Tensor | None) -> None:
    """Start the dense encoder from the host MLP's own: E [d_in, d_hidden] and, for GLU hosts, E_gate."""
    encoder = layer.get_submodule("encoder")
    assert isinstance(encoder, DenseEncoder)
    encoder.E.copy_(E)
    encoder.b_E.zero_() if b_E is None else encoder.b_E.copy_(b_E)
    if encoder.E_gate is not None and encoder.b_gate is not None and E_gate is not None:
        encoder.E_gate.copy_(E_gate)
        encoder.b_gate.zero_() if b_gate is None else encoder.b_gate.copy_(b_gate)


def fit_output(layer: SparseLayer, inputs: Float[Tensor, "token d_in"], y: Float[Tensor, "token d_out"], *, steps: int) -> list[float]:
    """Fit the matrices that the output is linear in, the code held fixed, by `steps` of conjugate gradients (CGLS).

    They are D (the kinds of MxD, dense), W_dec (transcoder, SAE), W_dec and W_skip (skip transcoder), C and D (additive). Tokens weigh
    1/|y| as in the training loss. Few steps from the starting point act as the regulariser. Returns the weighted residual
    sum of squares before each step and after the last: it never rises.
    """
    with torch.no_grad():
        code = layer.encode(inputs)
    norms = y.norm(dim=-1, keepdim=True)
    weights = torch.where(norms <= torch.finfo(y.dtype).eps * norms.max(), 0.0, norms.clamp_min(1e-6).rsqrt())
    theta = _output_parameters(layer)

    def output(values: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            for parameter, value in zip(theta, values, strict=True):
                parameter.copy_(value)
        return weights * layer.decode(code, inputs).y

    def adjoint(residual: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            return list(torch.autograd.grad((weights * layer.decode(code, inputs).y * residual).sum(), theta))

    start = [p.detach().clone() for p in theta]
    zero = [torch.zeros_like(p) for p in theta]
    with torch.no_grad():
        residual = weights * y - output(start)
        offset = output(zero)
    found, history = start, [float(residual.square().sum())]
    gradient = adjoint(residual)
    direction, power = gradient, _dot(gradient, gradient)
    for _ in range(steps):
        with torch.no_grad():
            image = output(direction) - offset
            length = float(image.square().sum())
            if length <= 0 or power <= 0:
                break
            alpha = power / length
            found = [f + alpha * d for f, d in zip(found, direction, strict=True)]
            residual = residual - alpha * image
        history.append(float(residual.square().sum()))
        gradient = adjoint(residual)
        previous, power = power, _dot(gradient, gradient)
        direction = [g + power / previous * d for g, d in zip(gradient, direction, strict=True)]
    with torch.no_grad():
        for parameter, value in zip(theta, found, strict=True):
            parameter.copy_(value)
    return history


def _output_parameters(layer: SparseLayer) -> list[torch.nn.Parameter]:
    if isinstance(layer, (*MODULATED, Dense)):
        return [layer.D]
    if isinstance(layer, Additive):
        return [layer.C, layer.D]
    if isinstance(layer, SkipTranscoder):
        return [layer.W_dec, layer.W_skip]
    assert isinstance(layer, (Transcoder, TopKSAE))
    return [layer.W_dec]


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return float(sum((u * v).sum() for u, v in zip(a, b, strict=True)))
