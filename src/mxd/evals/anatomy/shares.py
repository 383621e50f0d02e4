"""Who earns a layer's accuracy: benefit shares by exact Shapley values for squared error, and the share that amplitude alone would earn.

With ŷ = rest + Σ_n u_n (`mxd.written`), the value of a set S of contributions is how much of E‖y − b‖² they remove,
v(S) = E‖y − b‖² − E‖y − b − Σ_{i∈S} u_i‖². It is quadratic, so Shapley's average over all orders has the closed form

    φ_i = E⟨u_i, 2(y − b) − p⟩,   p = Σ_i u_i,   Σ_i φ_i = E‖y − b‖² − E‖y − ŷ‖².

For MxD and its variants what all experts have in common is a player of its own, u_0 = s (c̄ * h) with s = Σ_n a_n and
c̄ = Σ ā_n c_n / Σ ā_n, and expert n keeps u_n = a_n ((c_n − c̄) * h): decorative experts, all alike, earn nothing.
For other kinds u_n = a_n d_n. In u_0 is also what is not constant in the rest: a skip, or the additive control's dense path.

Amplitude share A = [FVU(ā) − FVU(s ā / E s)] / [FVU(ā) − FVU(ŷ)]: how far one comes from a constant code to the layer's own by knowing
only *how much* fired in all, not *which*. Near 1: a gain control.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...written import Chunk, Written
from ..bootstrap import Array, Interval, interval_of_sums
from ..fidelity import squared_norms, sum_by, variation


class Tokens(NamedTuple):
    """Inputs and outputs of an MLP, first positions left out, with the number of each token's document (0, 1, ..)."""

    x: Float[Tensor, "token d_in"]
    y: Float[Tensor, "token d_out"]
    documents: Int[Tensor, " token"]


class Players(NamedTuple):
    """What the players are measured against; all fitted on validation tokens."""

    base: Float[Tensor, " d_out"]
    """b: the mean of the rest (for most kinds the output bias itself)."""
    mean: Float[Tensor, " n_units"]
    """ā."""


@torch.no_grad()
def players(written: Written, tokens: Tokens, mean: Float[Tensor, " n_units"]) -> Players:
    """The baseline, from these tokens, with a mean activation that is known already."""
    total = torch.zeros(written.layer.d_out, dtype=torch.float64)
    for chunk in written.chunks(tokens.x, tokens.y):
        total += chunk.rest.sum(0).cpu().double()
    return Players((total / len(tokens.x)).to(mean), mean)


class Benefits(NamedTuple):
    """Shapley values summed over the tokens of each document, float64 on the CPU."""

    phi: Float[Tensor, "document player"]
    """Column 0 is u_0, column 1 + n unit n."""
    before: Float[Tensor, " document"]
    """‖y − b‖²."""
    after: Float[Tensor, " document"]
    """‖y − ŷ‖²."""


@torch.no_grad()
def benefits(written: Written, tokens: Tokens, known: Players) -> Benefits:
    """φ of every player."""
    n_documents, width = int(tokens.documents.max()) + 1, written.layer.n_units + 1
    phi = torch.zeros(n_documents * width, dtype=torch.float64)
    sums = torch.zeros(n_documents, 2, dtype=torch.float64)
    weight = float(known.mean.sum())
    for chunk in written.chunks(tokens.x, tokens.y):
        documents = tokens.documents[chunk.rows].cpu()
        rest, parts = chunk.rest - known.base, written.units(chunk)
        target = chunk.y - known.base
        gap = 2 * target - rest - parts.sum(1)
        own = torch.einsum("tko,to->tk", parts, gap)
        common = (rest * gap).sum(1)
        if written.maps and weight > 0:
            # ⟨c̄ * h, gap⟩: what one unit of activation of the mean expert earns
            alike = (written.all_at(chunk, known.mean) * gap).sum(1) / weight
            own = own - chunk.code.values * alike[:, None]
            common = common + chunk.code.values.sum(1) * alike
        at = documents[:, None] * width + 1 + chunk.code.indices.cpu()
        phi.index_add_(0, at.flatten(), own.flatten().cpu().double())
        phi.index_add_(0, documents * width, common.cpu().double())
        sums.index_add_(0, documents, torch.stack([squared_norms(target), squared_norms(target - rest - parts.sum(1))], 1))
    return Benefits(phi.view(n_documents, width), sums[:, 0], sums[:, 1])


def effective_number(phi: Array) -> Array:
    """exp(entropy) of the positive ones of φ [.., unit], as shares of their sum; NaN if there are none."""
    positive = np.maximum(phi, 0)
    total = positive.sum(-1)
    share = positive / np.where(total > 0, total, 1)[..., None]
    entropy = -(share * np.log(np.where(share > 0, share, 1))).sum(-1)
    return np.where(total > 0, np.exp(entropy), math.nan)


def summary(chosen: Benefits, found: Benefits, *, resamples: int, seed: int) -> dict[str, Any]:
    """Shares with 95 % intervals over documents. Units are put in order by `chosen` (validation), their benefits are those of `found`.

    Returns:
        ``explained`` = Σφ / E‖y − b‖²; ``shared_share`` = φ_0 / Σφ, ``top1_share`` = the best unit's φ / Σφ, each {value, ci95} (null
        where Σφ is not positive, with ``reason``); ``top1_unit``; ``effective_units`` = exp(entropy of the positive φ_n) {value}, without
        an interval: noise in φ moves it, a resample is noisier than the sample, and so a bootstrap's interval need not hold the value;
        ``harmful_units``, share of the units that fired whose φ_n < 0; ``curve``: [[m, share of Σ_n φ_n that the first m units
        earn], ..]. All of them null, and no curve, where nothing is finite (a layer with NaN in it).
    """
    phi = found.phi.numpy()
    kept = (found.before > 0).numpy()
    phi, before = phi[kept], found.before.numpy()[kept]
    if not len(phi) or not np.isfinite(phi).all():
        return _nothing()
    order = (-chosen.phi.sum(0)[1:]).argsort(stable=True)
    top = int(order[0])
    columns = np.stack([phi[:, 0], phi[:, 1 + top], phi.sum(1), before], 1)
    all_units = phi[:, 1:].sum(0)
    earned = float(phi.sum())

    def share(column: int, below: int = 2) -> dict[str, Any]:
        if earned <= 0 and below == 2:
            return {"value": None, "ci95": [None, None], "reason": "the layer removes nothing of the squared error"}
        return as_dict(interval_of_sums(columns, lambda s: s[..., column] / s[..., below], resamples=resamples, seed=seed))

    return {
        "explained": share(2, 3),
        "shared_share": share(0),
        "top1_share": share(1),
        "top1_unit": top,
        "effective_units": {"value": _number(effective_number(all_units))},
        "harmful_units": _number((all_units < 0).sum() / (all_units != 0).sum()) if (all_units != 0).any() else None,
        "curve": _curve(all_units[order.numpy()]),
    }


def _nothing() -> dict[str, Any]:
    """`summary` where there is nothing finite to sum up."""
    gone: dict[str, Any] = {"value": None, "ci95": [None, None], "reason": "no finite benefits"}
    shares = {name: dict(gone) for name in ("explained", "shared_share", "top1_share")}
    return {**shares, "top1_unit": None, "effective_units": {"value": None}, "harmful_units": None, "curve": []}


def _curve(ordered: Array) -> list[list[float]]:
    total = float(ordered.sum())
    if total <= 0:
        return []
    running = np.cumsum(ordered)
    steps = [m * 10**e for e in range(7) for m in (1, 2, 5)]
    points = [m for m in steps if m < len(ordered)] + [len(ordered)]
    return [[m, float(running[m - 1]) / total] for m in points]


@torch.no_grad()
def amplitude(written: Written, tokens: Tokens, mean: Float[Tensor, " n_units"], *, resamples: int, seed: int) -> dict[str, Any]:
    """The amplitude share A with its 95 % interval over documents, and the FVUs that it is made of.

    Args:
        written: the layer.
        tokens: what it is measured on.
        mean: ā on validation tokens.

    Returns:
        ``value``, ``ci95`` (null with a ``reason`` where a constant code is no worse than the layer's own), ``fvu``, ``fvu_mean`` (every
        unit at ā), ``fvu_amplitude`` (at s ā / E s), each of the last three a number or null.
    """
    scale = float(mean.sum())
    columns: list[Tensor] = []
    for chunk in written.chunks(tokens.x, tokens.y):
        constant = written.all_at(chunk, mean)
        strength = chunk.code.values.sum(1, keepdim=True) / scale if scale > 0 else torch.ones_like(chunk.y[:, :1])
        outputs = (_own(written, chunk), constant, strength * constant)
        columns.append(torch.stack([squared_norms(chunk.y - chunk.rest - made) for made in outputs], 1))
    sums = sum_by(tokens.documents, *torch.cat(columns).unbind(1), variation(tokens.y)).numpy()
    sums = sums[sums[:, 3] > 0]
    own, at_mean, at_strength = (float(v) for v in sums[:, :3].sum(0))
    spread = float(sums[:, 3].sum())
    fvus = {"fvu": _ratio(own, spread), "fvu_mean": _ratio(at_mean, spread), "fvu_amplitude": _ratio(at_strength, spread)}
    if not at_mean > own:
        finite = math.isfinite(at_mean) and math.isfinite(own)
        why = "a constant code is as good as the layer's own" if finite else "the layer's outputs are not finite"
        return {"value": None, "ci95": [None, None], "reason": why, **fvus}
    found = interval_of_sums(sums, lambda s: (s[..., 1] - s[..., 2]) / (s[..., 1] - s[..., 0]), resamples=resamples, seed=seed)
    return {**as_dict(found), **fvus}


def _own(written: Written, chunk: Chunk) -> Tensor:
    return written.units(chunk).sum(1)


def _ratio(above: float, below: float) -> float | None:
    return above / below if below > 0 else None


def _number(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def as_dict(interval: Interval) -> dict[str, Any]:
    """{value, ci95}, null for what is not finite."""
    return {"value": _number(interval.value), "ci95": [_number(interval.low), _number(interval.high)]}
