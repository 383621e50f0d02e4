"""The dense reference: the same functions in plain PyTorch with autograd, TopK scattered into tokens x N and full products.

What the published code computes. Parameters are those of our own layers, so that both sides start from the same weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import MxD, MxDConfig, SparseLayer
from ..layers.encoder import ACTIVATIONS
from ..objectives import norm_weighted
from ..ops.settings import using
from ..optim import AdamInBackward
from .timing import relative_error

Forward = Callable[[Tensor], Tensor]


def topk(scores: Float[Tensor, "token n_units"], k: int) -> Float[Tensor, "token n_units"]:
    """The k largest of each row kept, as a dense matrix; in the form that needs the least memory of the usual ones."""
    top = scores.topk(k, dim=1)
    return torch.zeros_like(scores).scatter_(1, top.indices, top.values)


def mxd(layer: MxD, x: Float[Tensor, "token d_in"]) -> Float[Tensor, "token d_out"]:
    """What `layer` computes, by full products."""
    z = ACTIVATIONS[layer.config.activation](x @ layer.encoder.E + layer.encoder.b_E)
    a = topk(F.relu(x @ layer.G.T + layer.b_G), layer.k)
    return (a @ layer.C) * (z @ layer.D) + layer.b


def make(device: torch.device, *, d: int, h: int, n: int, k: int) -> MxD:
    """An MxD of these sizes, the same at every call. D is not 0, as at its start, where most gradients vanish and prove nothing."""
    generator = torch.Generator().manual_seed(0)
    layer = MxD(MxDConfig(d, d, n, k, h), generator=generator)
    with torch.no_grad():
        layer.D.uniform_(-0.02, 0.02, generator=generator)
    return layer.to(device)


def batch(device: torch.device, *, d: int, tokens: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """A pair (x, y) of random activations [tokens, d], float32."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(tokens, d, generator=generator).to(device) for _ in range(2))
    return x, y


def worst_gradient(ours: Forward, theirs: Forward, layer: SparseLayer, x: Tensor, y: Tensor, **settings: Any) -> float:
    """Largest relative error of any parameter's gradient of the training loss, both through the parameters of `layer`."""
    with using(**settings):
        norm_weighted(ours(x), y).backward()
    mine = [p.grad for p in layer.parameters()]
    layer.zero_grad(set_to_none=True)
    norm_weighted(theirs(x), y).backward()
    worst = 0.0
    for found, parameter in zip(mine, layer.parameters(), strict=True):
        if found is None or parameter.grad is None:
            return float("nan")
        worst = max(worst, relative_error(found, parameter.grad))
    layer.zero_grad(set_to_none=True)
    return worst


def step(
    layer: SparseLayer, forward: Forward, x: Tensor, y: Tensor, *, ours: bool, autocast: bool = False, **settings: Any
) -> Callable[[], None]:
    """One training step as a call: forward, loss, backward, fused Adam: `ours` within the backward pass as our trainer does, else after
    it. `autocast` runs the forward pass in bfloat16 autocast."""
    take = optimised(layer, ours=ours)

    def call() -> None:
        with using(**settings), torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            output = forward(x)
        take(norm_weighted(output.float(), y))

    return call


def optimised(module: nn.Module, *, ours: bool) -> Callable[[Tensor], None]:
    """Backward pass of a loss and fused Adam: in one as our trainer does, or one after the other."""
    if ours:
        own = AdamInBackward(module.parameters(), learning_rate=1e-4)
        return lambda loss, _adam=own: loss.backward()
    adam = torch.optim.Adam(module.parameters(), lr=1e-4, fused=True)

    def take(loss: Tensor) -> None:
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()

    return take
