"""How often the units of a layer fire, which fire together, and how many of them a kind of token uses: counted over a window of tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from ...devices import layer_device
from ...layers import SparseLayer
from ..fidelity import HISTOGRAM_EDGES, TOKENS_AT_ONCE

MOST_PER_TOKEN = 256
"""Active units that are kept of one token, the strongest: all of them for any usual K."""
MOST_UNITS = 3072
"""Units, the most frequent ones, among which co-activation is counted: a table of pairs of 36 MiB."""
MIN_FIRED = 20
"""Tokens on which a unit must have fired to be counted in co-activation."""
MIN_EXPECTED = 1.0
"""Joint firings that chance must let expect for a pair's deviation from chance to be looked at."""
Z = 6.0
"""Standard deviations above chance from which a pair counts as firing together; how many do so by chance is measured beside it."""
OCCURRENCES = 20
"""Occurrences of a token type whose units are compared: types of any frequency on the same footing."""
EXAMPLES = 10


class Window(NamedTuple):
    """What fired on a window of tokens, on the CPU."""

    indices: Int[Tensor, "token k"]
    """The active units, int64; `n_units` where there is none."""
    counts: Int[Tensor, " n_units"]
    """Tokens on which each unit fired."""
    strength: Float[Tensor, " n_units"]
    """Mean activation of each unit over the tokens on which it fired, float64; 0 for dead ones."""
    truncated: bool
    """Whether some token has more active units than `indices` holds."""


@torch.no_grad()
def look(layer: SparseLayer, read: Float[Tensor, "token d_in"]) -> Window:
    """Encode what the layer reads, a piece at a time."""
    device = layer_device(layer)
    counts = torch.zeros(layer.n_units, dtype=torch.int64)
    total = torch.zeros(layer.n_units, dtype=torch.float64)
    kept: list[Tensor] = []
    truncated = False
    for part in read.split(TOKENS_AT_ONCE):
        values, indices, _ = layer.encode(part.to(device))
        active = values > 0
        counts += torch.bincount(indices[active].cpu(), minlength=layer.n_units)
        total.index_add_(0, indices[active].cpu(), values[active].cpu().double())
        if values.shape[1] > MOST_PER_TOKEN:
            truncated = truncated or bool((active.sum(1) > MOST_PER_TOKEN).any())
            values, order = values.topk(MOST_PER_TOKEN)
            indices = indices.gather(1, order)
        kept.append(indices.where(values > 0, layer.n_units).cpu())
    # A gate without TopK gives every piece as many columns as its busiest token needs.
    width = max(part.shape[1] for part in kept)
    kept = [part if part.shape[1] == width else F.pad(part, (0, width - part.shape[1]), value=layer.n_units) for part in kept]
    return Window(torch.cat(kept), counts, total / counts.clamp_min(1), truncated)


def firing(window: Window) -> dict[str, Any]:
    """Frequencies of the units over the window.

    Returns:
        ``tokens``; ``dead_fraction``, share of units that fire on none of them; ``l0``; ``max_frequency``; ``median_frequency`` of the live
        ones; ``n_above_half`` units that fire on more than half of the tokens, and ``above_half``: {unit, frequency, strength} of each,
        most frequent first (at most 10); ``histogram``: units by log10 frequency in `fidelity.HISTOGRAM_EDGES`, dead ones left out.
    """
    n = len(window.indices)
    frequency = window.counts.double() / n
    live = frequency[window.counts > 0]
    inner = torch.tensor(HISTOGRAM_EDGES[1:-1], dtype=torch.float64)
    bins = torch.bucketize(live.log10(), inner, right=True).bincount(minlength=len(HISTOGRAM_EDGES) - 1)
    often = [int(u) for u in frequency.argsort(descending=True, stable=True)[:EXAMPLES] if frequency[u] > 0.5]
    return {
        "tokens": n,
        "dead_fraction": float((window.counts == 0).double().mean()),
        "l0": float(window.counts.sum()) / n,
        "max_frequency": float(frequency.max()),
        "median_frequency": float(live.median()) if len(live) else None,
        "n_above_half": int((frequency > 0.5).sum()),
        "above_half": [{"unit": u, "frequency": float(frequency[u]), "strength": float(window.strength[u])} for u in often],
        "histogram": {"log10_edges": HISTOGRAM_EDGES, "units": bins.tolist()},
    }


def together(indices: Int[Tensor, "token k"], shifted: Int[Tensor, "token k"], n: int) -> Float[Tensor, "n n"]:
    """On how many tokens unit i is in `indices` and unit j in `shifted`; numbers from n on are left out. float32, exact below 2²⁴."""
    table = torch.zeros((n + 1) * (n + 1))
    one = torch.ones(1)
    for left, right in zip(indices.split(TOKENS_AT_ONCE), shifted.split(TOKENS_AT_ONCE), strict=True):
        for column in range(left.shape[1]):
            at = (left[:, column : column + 1] * (n + 1) + right).flatten()
            table.index_add_(0, at, one.expand(len(at)))
    return table.view(n + 1, n + 1)[:n, :n]


def coactivation(window: Window, keep: Bool[Tensor, " token"], tokens_per_sequence: int) -> dict[str, Any]:
    """Which units fire together more often than their frequencies let expect.

    For two units with n_i and n_j firings on T tokens, together on n_ij: lift = n_ij T / (n_i n_j), phi the correlation of the two
    indicators. A pair counts where n_ij is more than `Z` standard deviations (hypergeometric) above n_i n_j / T, itself at least
    `MIN_EXPECTED`. The same count with one side moved on by whole sequences is what chance gives: frequencies and the course within a
    sequence are the same, the text is another.

    Args:
        window: what fired.
        keep: the tokens to count (without first positions).
        tokens_per_sequence: length of the sequences that the window consists of.

    Returns:
        ``units`` counted, ``pairs`` looked at, ``share_above_chance`` and ``share_shifted`` of them; ``share_with_partner``: share of the
        units with a partner of phi ≥ .3; ``top``: the pairs of largest phi {units, phi, lift, tokens}; ``truncated``.
    """
    counts = torch.bincount(window.indices[keep].flatten(), minlength=len(window.counts) + 1)[:-1]
    chosen = counts.argsort(descending=True, stable=True)[:MOST_UNITS]
    chosen = chosen[counts[chosen] >= MIN_FIRED]
    m, n_tokens = len(chosen), int(keep.sum())
    nothing = dict.fromkeys(("share_above_chance", "share_shifted", "share_with_partner"))
    if m < 2:
        return {"units": m, "pairs": 0, **nothing, "top": [], "truncated": window.truncated}
    number = torch.full((len(window.counts) + 1,), m)
    number[chosen] = torch.arange(m)
    mapped = number[window.indices]
    own = together(mapped[keep], mapped[keep], m)
    by_sequence = mapped.view(-1, tokens_per_sequence, mapped.shape[1])
    moved = by_sequence.roll(max(1, len(by_sequence) // 2), 0).flatten(0, 1)
    chance = together(mapped[keep], moved[keep], m)
    fired = counts[chosen].float()
    expected = fired[:, None] * (fired / n_tokens)
    spread = expected * (1 - fired / n_tokens)[:, None] * (1 - fired / n_tokens)
    upper = torch.ones(m, m, dtype=torch.bool).triu(1)
    looked = upper & (expected >= MIN_EXPECTED)
    pairs = int(looked.sum())
    limit = expected + Z * spread.sqrt()
    phi = ((own - expected) / (spread * n_tokens).sqrt().clamp_min(1e-9)).where(upper, -2)  # below any correlation
    best = phi.flatten().topk(min(EXAMPLES, m * (m - 1) // 2))
    top = [
        {
            "units": [int(chosen[i]), int(chosen[j])],
            "phi": float(phi[i, j]),
            "lift": float(own[i, j] / expected[i, j]),
            "tokens": int(own[i, j]),
        }
        for i, j in (divmod(int(at), m) for at in best.indices)
    ]
    partner = (phi >= 0.3).any(0) | (phi >= 0.3).any(1)
    return {
        "units": m,
        "pairs": pairs,
        "share_above_chance": float((looked & (own > limit)).sum()) / pairs if pairs else None,
        # one side moved on: the pair (i, j) and the pair (j, i) are two draws of the same chance
        "share_shifted": float(((looked | looked.T) & (chance > limit)).sum()) / (2 * pairs) if pairs else None,
        "share_with_partner": float(partner.float().mean()),
        "top": top,
        "truncated": window.truncated,
    }


def token_types(window: Window, ids: Int[Tensor, " token"], keep: Bool[Tensor, " token"], *, seed: int) -> dict[str, Any]:
    """How many units the same token uses in different contexts: over `OCCURRENCES` occurrences of a type, drawn at random.

    Distinct units run from the L0 of one token (always the same units) to `OCCURRENCES` times that (never the same twice). As a
    comparison, the same number of tokens drawn regardless of type.

    Returns:
        ``types`` with enough occurrences; ``distinct`` and ``effective`` (exp of the entropy of which unit fires), each {median, low, high}
        over types (quartiles); ``any_distinct`` and ``any_effective``, the medians for tokens of any type; ``examples`` for the most
        frequent types {id, occurrences, distinct, effective}.
    """
    n_units = len(window.counts)
    places = keep.nonzero().squeeze(1)
    places = places[torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))]
    order = places[ids[places].argsort(stable=True)]
    types, occurrences = ids[order].unique_consecutive(return_counts=True)
    enough = occurrences >= OCCURRENCES
    starts = (occurrences.cumsum(0) - occurrences)[enough]
    types, occurrences = types[enough], occurrences[enough]
    rows = [order[s : s + OCCURRENCES] for s in starts.tolist()]
    found = [_variety(window.indices[row], n_units) for row in rows]
    whole = places[: len(places) // OCCURRENCES * OCCURRENCES].view(-1, OCCURRENCES)[: max(len(rows), 1)]
    anything = [_variety(window.indices[row], n_units) for row in whole] if rows else []
    often = occurrences.argsort(descending=True, stable=True)[:EXAMPLES].tolist()
    return {
        "types": len(rows),
        "occurrences": OCCURRENCES,
        "distinct": _quartiles([d for d, _ in found]),
        "effective": _quartiles([e for _, e in found]),
        "any_distinct": _quartiles([d for d, _ in anything])["median"],
        "any_effective": _quartiles([e for _, e in anything])["median"],
        "examples": [
            {"id": int(types[i]), "occurrences": int(occurrences[i]), "distinct": found[i][0], "effective": found[i][1]} for i in often
        ],
    }


def _variety(indices: Tensor, n_units: int) -> tuple[int, float]:
    """Distinct units, and exp of the entropy of which unit fires."""
    times = torch.unique(indices[indices < n_units], return_counts=True)[1].double()
    share = times / times.sum().clamp_min(1)
    return len(times), float((-(share * share.log()).sum()).exp()) if len(times) else 0.0


def _quartiles(values: list[Any]) -> dict[str, float | None]:
    if not values:
        return {"median": None, "low": None, "high": None}
    low, middle, high = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    return {"median": middle, "low": low, "high": high}
