"""Right for the right reason? The Jacobian of a stand-in beside that of the MLP it stands in for, token by token, exact by autograd.

Correlation: cosine of the two flattened Jacobians dy/dx [d_out, d_in] ("Sparse mixtures of linear transforms", 2025). Which units are
active counts as fixed, as it is almost everywhere. For a SAE, x → MLP(x) → SAE is differentiated.

The stand-in's Jacobian is the sum of two: through its dense code (and skip), with the activations held: diag(m) Dᵀ ∂z/∂x of an MxD; and
through the activations a, with everything else held: diag(h) Cᵀ 1[a > 0] G. With decorative experts the first alone does as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...devices import layer_device
from ...layers import Code, SparseLayer
from ...ops.transpose import Plan
from ..bootstrap import interval_of_sums
from .shares import as_dict

if TYPE_CHECKING:
    from ...host import Host

NUMBERS_AT_ONCE = 2**25
"""Numbers in the Jacobians [token, d_out, d_in] of the tokens that are differentiated together: 128 MiB."""


def jacobian(y: Float[Tensor, "token d_out"], x: Float[Tensor, "token d_in"]) -> Float[Tensor, "token d_out d_in"]:
    """dy/dx of every token, one backward pass per output, where row t of y depends on row t of x alone; 0 if y does not depend on x."""
    found = x.new_zeros(len(x), y.shape[1], x.shape[1])
    if not y.requires_grad:
        return found
    for o in range(y.shape[1]):
        (row,) = torch.autograd.grad(y[:, o].sum(), x, retain_graph=o + 1 < y.shape[1], allow_unused=True)
        found[:, o] = 0 if row is None else row  # pyright: ignore[reportUnnecessaryComparison]
    return found


class Split(NamedTuple):
    """The two parts that a stand-in's Jacobian is the sum of."""

    dense: Float[Tensor, "token d_out d_in"]
    """Through the dense code and the skip, activations held."""
    routing: Float[Tensor, "token d_out d_in"]
    """Through the activations, everything else held."""


Source = Callable[[Float[Tensor, "token d_in"]], Float[Tensor, "token d_in"]]
"""The host's own MLP."""


def split(layer: SparseLayer, mlp: Source, x: Float[Tensor, "token d_in"]) -> Split:
    """Both parts at these inputs of the MLP. Selecting the K largest is locally constant."""
    with torch.enable_grad():
        x = x.detach().clone().requires_grad_(True)
        read = mlp(x) if layer.reads == "output" else x
        values, indices, hidden = layer.encode(read)
        held = Code(values.detach(), indices, hidden)
        free = Code(values, indices, None if hidden is None else hidden.detach())
        dense = layer._decode(held, read, Plan())  # pyright: ignore[reportPrivateUsage]
        routing = layer._decode(free, read.detach(), Plan())  # pyright: ignore[reportPrivateUsage]
        return Split(jacobian(dense, x), jacobian(routing, x))


def of_mlp(mlp: Source, x: Float[Tensor, "token d_in"]) -> Float[Tensor, "token d_out d_in"]:
    """The host MLP's own Jacobian."""
    with torch.enable_grad():
        x = x.detach().clone().requires_grad_(True)
        return jacobian(mlp(x), x)


def mlp_of(host: Host, hookpoint: str) -> Source:
    """The host's MLP as a map of float32 tensors [token, d_in]; it computes in the host's own dtype."""
    module = host.mlp(hookpoint)
    return lambda x: module(x.to(host.dtype)).float()


class Products(NamedTuple):
    """Inner products of the flattened Jacobians of each token: J, the host's J*, J's two parts, J − J*; float64 [token] on the CPU."""

    whole_host: Tensor
    dense_host: Tensor
    whole_whole: Tensor
    dense_dense: Tensor
    routing_routing: Tensor
    host_host: Tensor
    error_error: Tensor


def products(layer: SparseLayer, host: Host, hookpoint: str, x: Float[Tensor, "token d_in"], say: Callable[[float], None]) -> Products:
    """What every figure is made of. `say` is told the fraction done."""
    mlp, device = mlp_of(host, hookpoint), layer_device(layer)
    step = max(1, NUMBERS_AT_ONCE // (layer.d_out * x.shape[1]))
    rows: list[Tensor] = []
    for start in range(0, len(x), step):
        some = x[start : start + step].to(device)
        own = of_mlp(mlp, some)
        dense, routing = split(layer, mlp, some)
        whole = dense + routing
        pairs = ((whole, own), (dense, own), (whole, whole), (dense, dense), (routing, routing), (own, own), (whole - own,) * 2)
        rows.append(torch.stack([torch.einsum("toi,toi->t", a, b) for a, b in pairs], 1).cpu().double())
        say(min(1.0, (start + step) / len(x)))
    return Products(*torch.cat(rows).unbind(1))


def summary(found: Products, documents: Int[Tensor, " token"], *, resamples: int, seed: int) -> dict[str, Any]:
    """Means over tokens with 95 % intervals over documents.

    Returns:
        ``cosine`` of J and J*, ``cosine_dense`` of the dense part and J* (0 for a Jacobian that is 0), ``relative_error`` ‖J − J*‖ / ‖J*‖,
        ``routing_norm`` ‖J_routing‖ / ‖J‖ (Frobenius), each {value, ci95}; ``tokens``, ``documents``.
    """
    whole, dense, host = (part.sqrt() for part in (found.whole_whole, found.dense_dense, found.host_host))
    columns = {
        "cosine": _over(found.whole_host, whole * host),
        "cosine_dense": _over(found.dense_host, dense * host),
        "relative_error": _over(found.error_error.sqrt(), host),
        "routing_norm": _over(found.routing_routing.sqrt(), whole),
    }
    numbers = torch.unique(documents.cpu(), return_inverse=True)[1].numpy()
    sums = np.zeros((int(numbers.max()) + 1, len(columns) + 1))
    np.add.at(sums, numbers, np.stack([*(column.numpy() for column in columns.values()), np.ones(len(numbers))], 1))

    def mean(column: int) -> dict[str, Any]:
        return as_dict(interval_of_sums(sums, lambda s: s[..., column] / s[..., -1], resamples=resamples, seed=seed))

    return {**{name: mean(i) for i, name in enumerate(columns)}, "tokens": len(documents), "documents": len(sums)}


def _over(above: Tensor, below: Tensor) -> Tensor:
    """The quotient, 0 where the denominator is."""
    return torch.where(below > 0, above / below.clamp_min(1e-300), 0.0)
