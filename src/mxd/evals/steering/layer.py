"""Steering many units at once: a stand-in that adds to another unit in every row, which units to steer, and how hard.

Steering unit n by λ (arXiv 2505.21364, §4.3): a_n += λ after TopK at every position, hence y + λ W_nᵀ z for an MxD and y + λ d_n for a
transcoder. It is `layers.Edited` with ``add={n: λ}``, one unit a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...errors import ConfigError
from ...harvest import Batch
from ...layers import SparseLayer
from ...layers.base import Code

if TYPE_CHECKING:
    from ...host import Host

TOKENS_AT_ONCE = 4096
"""Tokens that a layer encodes at once."""
LEAST_FIRINGS = 4
"""Firings on the validation text that a unit needs for its typical activation to be known."""
PUSH_TOKENS = 256
"""Tokens on which the size of each push is measured."""


class Steered(nn.Module):
    """Row r of what it reads [row, position, d] is steered by λ_r on unit n_r; everything else is the layer's own.

    With directions, row r gets λ_r's push only in size: at every position a random direction of its own, as long as what the unit would
    have added there. That is the control: a push of the same size that means nothing to the layer.
    """

    def __init__(
        self,
        layer: SparseLayer,
        units: Int[Tensor, " row"],
        added: Float[Tensor, " row"],
        directions: Float[Tensor, "row d_out"] | None = None,
    ) -> None:
        """
        Args:
            layer: the layer that is steered; it stays as it is.
            units, added: n_r and λ_r; rows with λ_r = 0 are not steered.
            directions: vectors of length 1, for the control.
        """
        super().__init__()
        self.layer, self.reads = layer, layer.reads
        like = next(layer.parameters())
        self.register_buffer("units", units.to(like.device), persistent=False)
        self.register_buffer("added", added.to(like), persistent=False)
        self.register_buffer("directions", None if directions is None else directions.to(like), persistent=False)

    def forward(self, x: Float[Tensor, "row position d_in"]) -> Float[Tensor, "row position d_out"]:
        code = self.layer.encode(x)
        more = _with(code, self.get_buffer("units")[:, None], self.get_buffer("added")[:, None])
        if self._buffers["directions"] is None:
            return self.layer.decode(more, x).y
        y = self.layer.decode(code, x).y
        size = (self.layer.decode(more, x).y - y).norm(dim=-1, keepdim=True)
        return y + size * self.get_buffer("directions")[:, None]


def _with(code: Code, units: Tensor, added: Tensor) -> Code:
    """`code` with one more active unit at each token; `units` and `added` are of a shape that expands to [*batch]."""
    lead = code.values.shape[:-1]
    values = torch.cat([code.values, added.to(code.values).expand(lead)[..., None]], -1)
    indices = torch.cat([code.indices, units.to(code.indices).expand(lead)[..., None]], -1)
    return Code(values, indices, code.hidden)


def random_directions(rows: int, width: int, seeds: Sequence[int]) -> Float[Tensor, "row width"]:
    """Vectors of length 1 in uniformly random directions; row r depends on seed r only."""
    made = [torch.randn(width, generator=torch.Generator().manual_seed(seed)) for seed in seeds[:rows]]
    return nn.functional.normalize(torch.stack(made), dim=-1)


class Firing(NamedTuple):
    """How the units of a layer fire on some text."""

    times: Int[Tensor, " unit"]
    """Tokens at which each fires."""
    typical: Float[Tensor, " unit"]
    """Its mean activation at those; 0 for units that never fire. float64, on the CPU."""
    tokens: int
    """Tokens of the text."""


@torch.no_grad()
def firing(layer: SparseLayer, batch: Batch) -> Firing:
    """How units fire on the activations of a text, without the first position of each sequence, which is unlike all others."""
    source = (batch.y if layer.reads == "output" else batch.x)[~batch.first]
    times = torch.zeros(layer.n_units, dtype=torch.int64)
    sums = torch.zeros(layer.n_units, dtype=torch.float64)
    for part in source.split(TOKENS_AT_ONCE):
        code = layer.encode(part)
        values, indices = code.values.double().cpu().flatten(), code.indices.cpu().flatten()
        times += torch.bincount(indices[values > 0], minlength=layer.n_units)
        sums.index_add_(0, indices, values)
    return Firing(times, sums / times.clamp(min=1), len(source))


def choose(found: Firing, units: int, how: Literal["stratified", "first"], seed: int) -> list[int]:
    """The units to steer, in ascending order.

    ``first``: units 0, 1, … as published, firing or not. ``stratified``: units with `LEAST_FIRINGS` or more, sorted by how often they
    fire and cut into `units` groups of equal size; one of each is drawn. All of them if there are fewer.

    Raises:
        ConfigError: fewer than two units to steer.
    """
    if how == "first":
        chosen = list(range(min(units, len(found.times))))
    else:
        live = torch.nonzero(found.times >= LEAST_FIRINGS).flatten()
        ordered = live[found.times[live].argsort(stable=True)].numpy()
        rng = np.random.default_rng(seed)
        chosen = sorted(int(rng.choice(group)) for group in np.array_split(ordered, min(units, len(ordered)) or 1) if len(group))
    if len(chosen) < 2:
        raise ConfigError(
            "too few units to steer",
            expected="at least 2" + ("" if how == "first" else f" that fire {LEAST_FIRINGS} times or more in {found.tokens:,} tokens"),
            got=str(len(chosen)),
            next="raise --steer-units" if units < 2 else "train the layer for longer",
        )
    return chosen


@torch.no_grad()
def push_sizes(layer: SparseLayer, batch: Batch, units: Sequence[int], added: Sequence[float]) -> Float[Tensor, " unit"]:
    """Mean over tokens of ‖what steering adds‖ / ‖y‖, y being the host MLP's output, for each unit; float64 on the CPU."""
    kept = torch.nonzero(~batch.first).flatten()[:PUSH_TOKENS]
    source, size = (batch.y if layer.reads == "output" else batch.x)[kept], batch.y[kept].norm(dim=-1)
    code = layer.encode(source)
    y = layer.decode(code, source).y
    found: list[Tensor] = []
    for unit, value in zip(units, added, strict=True):
        more = _with(code, torch.tensor(unit, device=source.device), torch.tensor(value, device=source.device))
        found.append(((layer.decode(more, source).y - y).norm(dim=-1) / size).double().mean().cpu())
    return torch.stack(found)


@torch.no_grad()
def divergence(
    host: Host, hookpoint: str, layer: SparseLayer, ids: Int[Tensor, " position"], start: int, units: Sequence[int], added: Sequence[float]
) -> Float[Tensor, " unit"]:
    """KL(replaced host ‖ the same with unit n steered) of the next token, nats, mean over positions from `start` − 1 on; float64.

    All units read the same tokens `ids`, an unsteered continuation: a measure of the effect without any sampling.
    """
    with host.replace({hookpoint: layer}):
        plain = host.logits(ids[None])[:, start - 1 : -1].double().log_softmax(-1)
    found: list[Tensor] = []
    step = max(1, 2**25 // max(1, plain.numel()))
    for at in range(0, len(units), step):
        chosen, values = torch.tensor(units[at : at + step]), torch.tensor(added[at : at + step])
        with host.replace({hookpoint: Steered(layer, chosen, values)}):
            steered = host.logits(ids.expand(len(chosen), -1))[:, start - 1 : -1].double().log_softmax(-1)
        found.append((plain.exp() * (plain - steered)).sum(-1).mean(-1).clamp(min=0).cpu())
    return torch.cat(found)
