"""How faithful a student is: the host's predictions with its MLP swapped, and the student's error on the MLP's output.

Protocol: docs/method.md. Cross-entropy and KL are in nats per predicted token; every position but the last of a sequence
predicts one (its target), the first position included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..devices import layer_device
from ..layers import SparseLayer
from .bootstrap import ratio_interval

if TYPE_CHECKING:
    from ..host import Host

LOGIT_BYTES = 2**27
"""Size limit of one tensor of logits; three of that size live at once."""
TOKENS_AT_ONCE = 4096
"""Tokens that a layer is evaluated on at once."""
HISTOGRAM_EDGES = [round(-5 + 0.25 * i, 2) for i in range(21)]
"""Edges of the histogram of log10 firing frequency: -5 to 0 in quarters of a decade."""


class Constant(nn.Module):
    """Returns one vector [d_out] at every position: zero ablation with zeros, mean ablation with the mean of y."""

    def __init__(self, value: Float[Tensor, " d_out"]) -> None:
        super().__init__()
        self.value = nn.Parameter(value.clone(), requires_grad=False)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        return self.value.expand(*x.shape[:-1], -1)


class Swap(NamedTuple):
    """One condition: what stands at which hookpoint."""

    hookpoint: str
    module: nn.Module


class Losses(NamedTuple):
    """Per sequence, float64 [sequence] on the CPU, each the mean over the sequence's predicted tokens."""

    ce: Tensor
    """Next-token cross-entropy, nats."""
    kl: Tensor
    """KL(host ‖ this condition) of the next-token distributions, nats."""
    top1: Tensor
    """Share of positions at which the most probable next token is the host's."""


def swapped_losses(
    host: Host,
    ids: Int[Tensor, "sequence position"],
    swaps: Mapping[str, Swap],
    progress: Callable[[int], None] | None = None,
) -> tuple[Losses, dict[str, Losses]]:
    """The losses of the host itself, and of the host under every swap, on the same sequences.

    Works through a few sequences at a time: the host's logits, and its blocks below the swaps, are computed once per chunk, and no
    logits are kept.

    Args:
        host: the host model; left as it was found.
        ids: token ids, int64, at least two positions.
        swaps: condition by name.
        progress: called with the number of sequences done.
    """
    vocabulary = host.logits(ids[:1, :1]).shape[-1]
    chunk = max(1, LOGIT_BYTES // (4 * ids.shape[1] * vocabulary))
    own: list[Losses] = []
    swapped: dict[str, list[Losses]] = {name: [] for name in swaps}
    for start in range(0, len(ids), chunk):
        part = ids[start : start + chunk]
        with host.remember({swap.hookpoint for swap in swaps.values()}) as memory:
            log_probabilities = host.logits(part).log_softmax(-1)
        reference = _Reference(log_probabilities, log_probabilities.exp(), log_probabilities.argmax(-1))
        own.append(_losses(log_probabilities.clone(), reference, part))
        for name, swap in swaps.items():
            with host.resume(memory, swap.hookpoint), host.replace({swap.hookpoint: swap.module}):
                log_probabilities = host.logits(part).log_softmax(-1)
            swapped[name].append(_losses(log_probabilities, reference, part))
        if progress is not None:
            progress(start + len(part))
    return _join(own), {name: _join(parts) for name, parts in swapped.items()}


class _Reference(NamedTuple):
    """The host's prediction on a chunk of sequences, [sequence, position, vocab] and [sequence, position]."""

    log_probabilities: Tensor
    probabilities: Tensor
    top: Tensor


@torch.no_grad()
def _losses(log_q: Float[Tensor, "sequence position vocab"], host: _Reference, ids: Int[Tensor, "sequence position"]) -> Losses:
    """From log-probabilities, which are overwritten.

    A chunk is worked on whole: its temporaries are then so large that the allocator maps each by itself and gives it back.
    Sequence by sequence they stay in the heap and leave holes (seen: 6 GiB instead of 2.6).
    """
    target = log_q[:, :-1].gather(-1, ids[:, 1:, None].to(log_q.device)).squeeze(-1)
    same = (log_q.argmax(-1) == host.top)[:, :-1]
    # Σ p (log p − log q) term by term: exactly 0 when they are equal, and no cancellation when they are close.
    kl = torch.sub(host.log_probabilities, log_q, out=log_q).mul_(host.probabilities).sum(-1).clamp_min(0)[:, :-1]
    return Losses(*(row.double().mean(1).cpu() for row in (-target, kl, same)))


def _join(parts: list[Losses]) -> Losses:
    ce, kl, top1 = (torch.cat(column) for column in zip(*parts, strict=True))
    return Losses(ce, kl, top1)


def recovered(ce: float, base: float, zero: float) -> float:
    """CE recovered, (CE_zero − CE) / (CE_zero − CE_host): 1 as good as the host, 0 as bad as zero ablation; NaN if these are equal."""
    return (zero - ce) / (zero - base) if zero != base else math.nan


class HeldOut(NamedTuple):
    """Activations of one hookpoint on held-out text, in text order."""

    x: Float[Tensor, "token d_in"]
    """What the MLP received, float32."""
    y: Float[Tensor, "token d_out"]
    """What it returned, float32."""
    first: Bool[Tensor, " token"]
    """True at the first position of a sequence."""
    documents: Int[Tensor, " token"]
    """Number of the document (0, 1, ..) that the token's sequence starts in: the unit of the bootstrap."""

    def without_first(self) -> HeldOut:
        """The tokens that are not first in their sequence."""
        keep = ~self.first
        return HeldOut(self.x[keep], self.y[keep], self.first[keep], self.documents[keep])


class Errors(NamedTuple):
    """Per token, float64 [token] on the CPU."""

    error: Tensor
    """‖y − ŷ‖²."""
    power: Tensor
    """‖y‖²."""


def squared_norms(values: Float[Tensor, "token d"]) -> Tensor:
    """‖·‖² of every row, float64 [token] on the CPU."""
    return torch.cat([part.float().square().sum(-1).cpu().double() for part in values.split(TOKENS_AT_ONCE)])


def variation(y: Float[Tensor, "token d_out"]) -> Tensor:
    """‖y − ȳ‖² of every token, ȳ the mean over these tokens; float64 [token] on the CPU."""
    mean = (torch.stack([part.sum(0).cpu().double() for part in y.split(TOKENS_AT_ONCE)]).sum(0) / len(y)).to(y)
    return torch.cat([squared_norms(part - mean) for part in y.split(TOKENS_AT_ONCE)])


def sum_by(documents: Int[Tensor, " token"], *columns: Tensor) -> Tensor:
    """Sums of per-token columns over each document: float64 [document, column]."""
    stacked = torch.stack(columns, 1)
    total = stacked.new_zeros(int(documents.max()) + 1, len(columns))
    return total.index_add_(0, documents.cpu(), stacked)


@torch.no_grad()
def token_errors(layer: SparseLayer, x: Float[Tensor, "token d_in"], y: Float[Tensor, "token d_out"]) -> tuple[Errors, Tensor, Tensor]:
    """Errors per token, and what fired.

    Returns:
        the errors; l0 [token], the number of values > 0; counts [n_units], on how many tokens each unit fired (int64). A layer
        that reads the MLP's output (SAE) is given y.
    """
    device = layer_device(layer)
    counts = torch.zeros(layer.n_units, dtype=torch.int64)
    errors: list[Tensor] = []
    fired: list[Tensor] = []
    for x_part, y_part in zip(x.split(TOKENS_AT_ONCE), y.split(TOKENS_AT_ONCE), strict=True):
        target = y_part.to(device)
        output = layer(target if layer.reads == "output" else x_part.to(device))
        errors.append(squared_norms(target - output.y))
        active = output.code.values > 0
        fired.append(active.sum(-1).cpu())
        counts += torch.bincount(output.code.indices[active].cpu(), minlength=layer.n_units)
    return Errors(torch.cat(errors), squared_norms(y)), torch.cat(fired), counts


def activation_statistics(layer: SparseLayer, held_out: HeldOut, *, resamples: int, seed: int) -> dict[str, Any]:
    """Error on the MLP's output and firing figures of one layer on held-out tokens.

    Returns a dict with

    - ``fvu`` = Σ‖y − ŷ‖² / Σ‖y − ȳ‖² and ``fvu_ci95`` (bootstrap over documents; ȳ is held fixed),
    - ``nmse`` = Σ‖y − ŷ‖² / Σ‖y‖², the normalised error,
    - ``norm_weighted_error`` = mean of ‖y − ŷ‖² / ‖y‖, the paper's training loss,

    all three **without** the first position of each sequence, whose norm is tens of times the others'; ``fvu_all`` and
    ``nmse_all`` with it. Over all tokens, for layers with units (null for the dense control): ``l0`` mean number of values
    > 0, ``dead_fraction`` share of units that fire on none of the `held_out` tokens, ``max_firing_frequency`` (fraction of
    tokens), ``n_units_above_half`` units that fire on more than half of the tokens, and ``firing_histogram`` (units per bin of
    log10 frequency; dead units in none).
    """
    errors, fired, counts = token_errors(layer, held_out.x, held_out.y)
    keep = (~held_out.first).cpu()
    spread = variation(held_out.y[~held_out.first])
    error, power = errors.error[keep], errors.power[keep]
    sums = sum_by(held_out.documents[~held_out.first], error, spread).numpy()
    # Documents of which only first positions were seen add nothing and would only dilute the resampling.
    sums = sums[sums[:, 1] > 0] if (sums[:, 1] > 0).any() else sums
    fvu = ratio_interval(sums[:, 0], sums[:, 1], resamples=resamples, seed=seed)
    return {
        "fvu": fvu.value,
        "fvu_ci95": [fvu.low, fvu.high],
        "nmse": _ratio(error, power),
        "norm_weighted_error": float((error / power.sqrt().clamp_min(1e-12)).mean()),
        "fvu_all": _ratio(errors.error, variation(held_out.y)),
        "nmse_all": _ratio(errors.error, errors.power),
        **_firing(fired, counts),
    }


def _firing(fired: Int[Tensor, " token"], counts: Int[Tensor, " n_units"]) -> dict[str, Any]:
    names = ("l0", "dead_fraction", "max_firing_frequency", "n_units_above_half", "firing_histogram")
    if not len(counts):
        return dict.fromkeys(names)
    frequency = counts.double() / len(fired)
    logs = frequency[counts > 0].log10()
    inner = torch.tensor(HISTOGRAM_EDGES[1:-1], dtype=torch.float64)
    bins = torch.bucketize(logs, inner, right=True).bincount(minlength=len(HISTOGRAM_EDGES) - 1)
    return {
        "l0": float(fired.double().mean()),
        "dead_fraction": float((counts == 0).double().mean()),
        "max_firing_frequency": float(frequency.max()),
        "n_units_above_half": int((frequency > 0.5).sum()),
        "firing_histogram": {"log10_edges": HISTOGRAM_EDGES, "units": bins.tolist()},
    }


def _ratio(numerator: Tensor, denominator: Tensor) -> float:
    below = float(denominator.sum())
    return float(numerator.sum()) / below if below > 0 else math.nan
