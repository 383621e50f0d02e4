"""What units write, seen through the host's unembedding, and how steadily they write it.

A latent writes one direction. An expert of an MxD is a map: what it writes depends on the text, so its contributions are averaged over
where it fires, and `steadiness`, the length of the mean of their unit vectors, says how much that average stands for: 1 is a fixed
direction. Only the direct path is seen: contribution → final norm → unembedding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from ..host import Host
from ..ops.largest.eager import largest
from ..ops.linear import linear
from . import schema
from .bands import Text
from .codes import Codes
from .ordering import order_by

FIRINGS = 64
"""Firings of a unit, at most, that its contributions are averaged over."""
TOKENS = 20
"""Promoted tokens kept, and suppressed ones."""
UNITS_AT_ONCE = 64


class Unembedding(NamedTuple):
    """The host's last steps, made linear: logits ≈ `weight` · (gain ∘ centred direction) / size."""

    weight: Float[Tensor, "vocab d_model"]
    gain: Float[Tensor, " d_model"]
    """Weight of the final norm."""
    centred: bool
    """Whether the final norm subtracts the mean (LayerNorm)."""
    size: float
    """What the final norm divides by: root mean square of the residual stream there, mean over a sample of text."""

    def logits(self, directions: Float[Tensor, "n d_model"]) -> Float[Tensor, "n vocab"]:
        """What adding each direction to the residual stream adds to the logits, to first order at that size."""
        return linear(self.prepared(directions), self.weight)

    def prepared(self, directions: Tensor) -> Tensor:
        """Directions as the unembedding multiplies them."""
        if self.centred:
            directions = directions - directions.mean(-1, keepdim=True)
        return directions * (self.gain / self.size)


@torch.no_grad()
def unembedding(host: Host, ids: Tensor) -> Unembedding:
    """Read off a host.

    Args:
        ids: a few sequences [sequence, position], on which the size of the residual stream is measured; first positions left out.
    """
    head: Any = host.model.get_output_embeddings()
    norm = _final_norm(host)
    weight = head.weight.detach().float()
    if norm is None:
        return Unembedding(weight, torch.ones(host.d_model, device=weight.device), False, 1.0)
    sizes: list[Tensor] = []
    centred = isinstance(norm, nn.LayerNorm)

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inside = args[0][:, 1:].float()
        sizes.append((inside - inside.mean(-1, keepdim=True) if centred else inside).pow(2).mean(-1).sqrt().flatten())

    handle = norm.register_forward_pre_hook(hook)
    try:
        host.logits(ids)
    finally:
        handle.remove()
    gain = norm.weight.detach().float()
    if "Gemma" in type(norm).__name__:  # Gemma's norms multiply by 1 + weight
        gain = 1 + gain
    return Unembedding(weight, gain, centred, float(torch.cat(sizes).mean()))


def _final_norm(host: Host) -> Any:
    """The norm behind the last block: the last module outside of the blocks with a weight of the residual stream's width."""
    inside = tuple(f"{name}." for name, module in host.model.base_model.named_modules() if isinstance(module, nn.ModuleList))
    found: Any = None
    for name, module in host.model.base_model.named_modules():
        weight = getattr(module, "weight", None)
        if not name.startswith(inside) and isinstance(weight, Tensor) and weight.shape == (host.d_model,):
            found = module
    return found


class Written(NamedTuple):
    """What every unit writes."""

    steadiness: NDArray[np.float64]
    """[unit] in [0, 1]; NaN where unknown."""
    promoted: list[NDArray[Any]]
    """By unit, `schema.WRITTEN`, the most promoted first; empty where unknown."""
    suppressed: list[NDArray[Any]]


def sample(codes: Codes, text: Text) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]:
    """Tokens and activations of at most `FIRINGS` firings of every unit, drawn by hash, and where each unit's begin."""
    reach = codes.tokens if codes.scales is None else len(codes.scales)
    tokens, units, values = codes.of_tokens(reach)
    order = order_by(units, text.draw[tokens])
    starts = np.searchsorted(units[order], np.arange(codes.n_units + 1))
    kept = np.arange(len(order)) - starts[:-1][units[order]] < FIRINGS
    order = order[kept]
    return tokens[order], values[order], np.searchsorted(units[order], np.arange(codes.n_units + 1))


@torch.no_grad()
def written(codes: Codes, text: Text, table: Tensor, unembed: Unembedding) -> Written:
    """Promoted and suppressed tokens of every unit: the mean of its contributions less the mean over all firings of the student.

    Args:
        table: [n_units, d_out], the units' rows; what a unit adds is its activation times its row, times `codes.scales` if there are any.
    """
    tokens, values, starts = sample(codes, text)
    device = unembed.weight.device
    rows = table.to(device)
    contributions = _Contributions(rows, codes.scales, tokens, values, starts)
    means, steadiness = torch.zeros(codes.n_units, rows.shape[1], device=device), np.full(codes.n_units, np.nan)
    for first in range(0, codes.n_units, UNITS_AT_ONCE):
        made, there = contributions.of(first, first + UNITS_AT_ONCE)
        n = there.sum(1).clamp(min=1)
        means[first : first + UNITS_AT_ONCE] = made.sum(1) / n[:, None]
        lengths = made.norm(dim=2, keepdim=True)
        mean = (made / lengths.clamp(min=1e-30)).sum(1) / n[:, None]
        known = (there.sum(1) > 0).cpu().numpy()
        steadiness[first : first + UNITS_AT_ONCE][known] = mean.norm(dim=1).cpu().numpy()[known]
    fires = torch.from_numpy(np.diff(starts)).to(device, torch.float32)
    common = (fires @ means) / fires.sum().clamp(min=1)
    promoted: list[NDArray[Any]] = []
    suppressed: list[NDArray[Any]] = []
    for first in range(0, codes.n_units, UNITS_AT_ONCE):
        made, there = contributions.of(first, first + UNITS_AT_ONCE)
        logits = unembed.logits(means[first : first + UNITS_AT_ONCE] - common)
        for sign, into in ((1, promoted), (-1, suppressed)):
            into.extend(_top(sign * logits, sign, made - common * there[..., None], there, unembed))
    return Written(steadiness, promoted, suppressed)


def _top(logits: Tensor, sign: int, made: Tensor, there: Tensor, unembed: Unembedding) -> list[NDArray[Any]]:
    """The tokens with the largest of `logits` [unit, vocab], with mean and standard deviation over the unit's firings."""
    values, indices = largest(logits, min(TOKENS, logits.shape[1]))
    best, order = values.sort(dim=1, descending=True)
    ids = indices.gather(1, order)
    each = torch.einsum("ufd,utd->uft", unembed.prepared(made), unembed.weight[ids]) * there[..., None]
    n = there.sum(1)
    mean = each.sum(1) / n.clamp(min=1)[:, None]
    spread = (((each - mean[:, None]) * there[..., None]) ** 2).sum(1) / (n - 1).clamp(min=1)[:, None]
    sd = torch.where(n[:, None] > 1, spread.sqrt(), torch.nan)
    found: list[NDArray[Any]] = []
    for unit in range(len(logits)):
        row = np.empty(ids.shape[1] if n[unit] else 0, schema.WRITTEN)
        if len(row):
            row["token"], row["mean"], row["sd"] = ids[unit].cpu(), (sign * best[unit]).cpu(), sd[unit].cpu()
        found.append(row)
    return found


class _Contributions:
    """The sampled contributions of a few units at a time."""

    def __init__(
        self,
        table: Tensor,
        scales: NDArray[np.float16] | None,
        tokens: NDArray[np.int64],
        values: NDArray[np.float32],
        starts: NDArray[np.int64],
    ) -> None:
        self._table, self._scales, self._tokens, self._values, self._starts = table, scales, tokens, values, starts

    def of(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """[unit, firing, d_out], and which of them there are [unit, firing]."""
        starts = self._starts[first : last + 1]
        counts = np.diff(starts)
        width = max(1, int(counts.max(initial=0)))
        there = np.arange(width) < counts[:, None]
        pairs = np.minimum(starts[:-1, None] + np.arange(width), max(0, len(self._tokens) - 1))
        device = self._table.device
        values = torch.from_numpy(np.where(there, self._values[pairs], 0) if len(self._values) else np.zeros(there.shape, np.float32))
        made = values.to(device, torch.float32)[..., None] * self._table[first:last, None]
        if self._scales is not None and len(self._tokens):
            scale = np.zeros((*there.shape, self._table.shape[1]), np.float32)
            scale[there] = self._scales[self._tokens[pairs[there]]]
            made = made * torch.from_numpy(scale).to(device)
        return made, torch.from_numpy(there).to(device)
