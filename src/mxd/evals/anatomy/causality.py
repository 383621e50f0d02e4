"""Does it matter that *this* unit fired? Every unit taken out, and replaced by another of like frequency, wherever it fired.

On the tokens where unit n fired, with errors in FVU (of these tokens' own variation):

- removal   ρ_n = FVU(without n) − FVU(ŷ);
- identity  κ_n = FVU(n replaced) − FVU(ŷ), another unit writing with n's activation: 0 if the two are alike;
- difference δ_n = FVU(without n) − FVU(n replaced) = ρ_n − κ_n. Positive: any unit is better than none there (decoration gives that);
  negative: a wrong unit is worse than none. Alone it does not say whether identity matters; κ_n does.

Each is tested by a t test of its sums over documents, with Benjamini and Hochberg's correction (1995) over the units. Through the host:
the rise of KL(host ‖ student) when every unit writes what another of like frequency and strength would have written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor, nn

from ...devices import layer_device
from ...layers import Code, SparseLayer
from ...ops.transpose import Plan
from ...written import Written
from ..bootstrap import Array, interval_of_sums, ratio_interval
from ..fidelity import Swap, squared_norms, sum_by, swapped_losses, variation
from ..routing import Parts, expert_permutations, fit_affine
from .shares import Tokens, as_dict

if TYPE_CHECKING:
    from ...host import Host

GROUP = 16
"""Units of nearest frequency among which replacements are drawn."""
REPLACEMENTS = 2
"""Replacements of each unit; errors are averaged over them."""
MIN_DOCUMENTS = 8
"""Documents in which a unit must have fired to be tested."""
FALSE_DISCOVERY_RATE = 0.05
EXAMPLES = 5


def replacements(frequency: Float[Tensor, " n_units"], *, count: int, seed: int) -> list[Int[Tensor, " n_units"]]:
    """Permutations that send every live unit to another of like frequency; units that never fire stay.

    Live units are cut, in order of frequency, into groups of about `GROUP`; within each all move along one random cycle.
    """
    fired = frequency.detach().cpu().double()
    live = fired.nonzero().squeeze(1)
    ordered = live[fired[live].argsort(stable=True)]
    generator = torch.Generator().manual_seed(seed)
    made: list[Tensor] = []
    for _ in range(count):
        permutation = torch.arange(len(fired))
        for group in ordered.tensor_split(max(1, len(ordered) // GROUP)):
            cycle = group[torch.randperm(len(group), generator=generator)]
            permutation[cycle] = cycle.roll(1)
        made.append(permutation.to(frequency.device))
    return made


class Effects(NamedTuple):
    """Sums over the tokens of each document where a unit fired, float64 on the CPU."""

    removal: Float[Tensor, "document n_units"]
    """‖error without it‖² − ‖error‖²."""
    identity: Float[Tensor, "document n_units"]
    """‖error with another in its place‖² − ‖error‖², mean over replacements."""
    power: Float[Tensor, "document n_units"]
    """‖y − ȳ‖², ȳ over all of the tokens."""
    fired: Float[Tensor, "document n_units"]
    """Tokens."""


@torch.no_grad()
def effects(written: Written, tokens: Tokens, frequency: Float[Tensor, " n_units"], *, seed: int) -> Effects:
    """Every active unit of every token, taken out and replaced; `frequency` on validation tokens decides by whom."""
    n_documents, width = int(tokens.documents.max()) + 1, written.layer.n_units
    others = replacements(frequency, count=REPLACEMENTS, seed=seed)
    spread = variation(tokens.y)
    sums = torch.zeros(4, n_documents * width, dtype=torch.float64)
    for chunk in written.chunks(tokens.x, tokens.y):
        active = chunk.code.values > 0
        parts = written.units(chunk)
        error = chunk.y - chunk.rest - parts.sum(1)
        removal = _rise(error, parts)
        identity = torch.zeros_like(removal)
        for other in others:
            identity += _rise(error, parts - written.units(chunk, other[chunk.code.indices])) / len(others)
        documents = tokens.documents[chunk.rows].cpu()
        at = (documents[:, None] * width + chunk.code.indices.cpu())[active.cpu()]
        power = spread[chunk.rows][:, None].expand(active.shape)
        for row, column in enumerate((removal, identity, power, active)):
            sums[row].index_add_(0, at, column[active.to(column.device)].cpu().double())
    return Effects(*sums.view(4, n_documents, width))


def _rise(error: Tensor, change: Tensor) -> Tensor:
    """‖error + change‖² − ‖error‖² of every unit [token, k], without cancellation."""
    return torch.einsum("tko,tko->tk", 2 * error[:, None] + change, change)


def p_values(sums: Array) -> Array:
    """Two-sided p [unit] of a t test that the sums [document, unit] have mean 0; NaN sums are documents without the unit.

    A unit whose sums are all the same has p = 1 if they are 0 and p = 0 otherwise.
    """
    there = np.isfinite(sums)
    n = there.sum(0)
    known = np.where(there, sums, 0)
    mean = known.sum(0) / np.maximum(n, 1)
    variance = (np.where(there, sums - mean, 0) ** 2).sum(0) / np.maximum(n - 1, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(variance > 0, mean / np.sqrt(variance / np.maximum(n, 1)), np.where(mean == 0, 0.0, np.inf))
    return 2 * np.asarray(stats.t.sf(np.abs(t), np.maximum(n - 1, 1)), dtype=np.float64)


def discoveries(p: Array, rate: float = FALSE_DISCOVERY_RATE) -> Array:
    """Which of the hypotheses Benjamini and Hochberg's procedure rejects at this false discovery rate: bool, the shape of p."""
    order = np.argsort(p, kind="stable")
    below = np.flatnonzero(p[order] <= rate * np.arange(1, len(p) + 1) / max(len(p), 1))
    rejected = np.zeros(len(p), dtype=bool)
    if len(below):
        rejected[order[: below[-1] + 1]] = True
    return rejected


def summary(found: Effects, *, resamples: int, seed: int) -> dict[str, Any]:
    """Shares of units with an effect, and the mean effects with 95 % intervals over documents.

    Returns:
        ``tested`` units that fired in at least `MIN_DOCUMENTS` documents, ``untested`` others that fired; for ``removal``, ``identity``
        and ``difference`` a dict with ``mean`` {value, ci95}: the rise of FVU per active unit, over all firings; ``median`` over the
        tested units; ``share_positive`` and ``share_negative`` of them after correction; ``strongest``: units with the largest κ_n.
    """
    removal, identity, power, fired = (part.numpy() for part in found)
    documents = (fired > 0).sum(0)
    tested = np.flatnonzero(documents >= MIN_DOCUMENTS)
    columns = {"removal": removal, "identity": identity, "difference": removal - identity}
    out: dict[str, Any] = {
        "tested": len(tested),
        "untested": int(((documents > 0) & (documents < MIN_DOCUMENTS)).sum()),
        "min_documents": MIN_DOCUMENTS,
        "false_discovery_rate": FALSE_DISCOVERY_RATE,
    }
    for name, column in columns.items():
        mean = ratio_interval(column.sum(1), power.sum(1), resamples=resamples, seed=seed)
        out[name] = {"mean": as_dict(mean), "median": None, "share_positive": None, "share_negative": None}
        if len(tested):
            own = column[:, tested]
            effect = own.sum(0) / np.maximum(power[:, tested].sum(0), 1e-300)
            real = discoveries(p_values(np.where(fired[:, tested] > 0, own, np.nan)))
            out[name] |= {
                "median": float(np.median(effect)),
                "share_positive": float((real & (effect > 0)).mean()),
                "share_negative": float((real & (effect < 0)).mean()),
            }
    kappa = identity.sum(0) / np.maximum(power.sum(0), 1e-300)
    strongest = sorted((int(n) for n in tested), key=lambda n: -kappa[n])[:EXAMPLES]
    out["strongest"] = [{"unit": n, "identity": float(kappa[n]), "tokens": int(fired[:, n].sum())} for n in strongest]
    return out


class Exchanged(nn.Module):
    """A layer whose units write what others would have written: g * layer's output of the permuted code + b.

    Attributes:
        reads: what it is to be given in the host: that of the layer.
    """

    def __init__(self, layer: SparseLayer, permutation: Int[Tensor, " n_units"]) -> None:
        super().__init__()
        self.layer, self.reads = layer, layer.reads
        device = layer_device(layer)
        self.register_buffer("_permutation", permutation.to(device), persistent=False)
        self.register_buffer("_gain", torch.ones(layer.d_out, device=device), persistent=False)
        self.register_buffer("_bias", torch.zeros(layer.d_out, device=device), persistent=False)

    @torch.no_grad()
    def refit(self, source: Float[Tensor, "token d_in"], y: Float[Tensor, "token d_out"]) -> None:
        """Give every output the gain and bias that bring it nearest to y, from what the layer reads on these tokens."""
        gain, bias = fit_affine(self._plain(source), y)
        self.get_buffer("_gain").copy_(gain)
        self.get_buffer("_bias").copy_(bias)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        made = self._plain(x.reshape(-1, x.shape[-1]))
        return (made * self.get_buffer("_gain") + self.get_buffer("_bias")).view(*x.shape[:-1], -1)

    def _plain(self, x: Tensor) -> Tensor:
        values, indices, hidden = self.layer.encode(x)
        code = Code(values, self.get_buffer("_permutation")[indices], hidden)
        return self.layer._decode(code, x, Plan())  # pyright: ignore[reportPrivateUsage]


@torch.no_grad()
def exchanged(layer: SparseLayer, validation: Tokens, *, seed: int) -> Exchanged:
    """The layer under one of the permutations of ID (`routing.expert_permutations`), refitted, all on validation tokens."""
    device = layer_device(layer)
    source, y = (validation.y if layer.reads == "output" else validation.x).to(device), validation.y.to(device)
    parts = [layer.encode(part) for part in source.split(4096)]
    # As lists of what is active: the permutation asks only how often and how strongly each unit fires.
    values = torch.cat([code.values[code.values > 0] for code in parts])[:, None]
    indices = torch.cat([code.indices[code.values > 0] for code in parts])[:, None]
    permutation = expert_permutations(Parts(values, indices, values), layer.n_units, count=1, seed=seed)[0]
    made = Exchanged(layer, permutation).eval()
    made.refit(source, y)
    return made


@torch.no_grad()
def identity_fvu(module: Exchanged, tokens: Tokens, *, resamples: int, seed: int) -> dict[str, Any]:
    """FVU(exchanged) − FVU(ŷ) on these tokens with its 95 % interval over documents: ID for any kind, of one permutation."""
    columns: list[Tensor] = []
    device = layer_device(module.layer)
    for x, y in zip(tokens.x.split(4096), tokens.y.split(4096), strict=True):
        target = y.to(device)
        source = target if module.reads == "output" else x.to(device)
        columns.append(torch.stack([squared_norms(target - module(source)), squared_norms(target - module.layer(source).y)], 1))
    sums = sum_by(tokens.documents, *torch.cat(columns).unbind(1), variation(tokens.y)).numpy()
    found = interval_of_sums(sums, lambda s: (s[..., 0] - s[..., 1]) / s[..., 2], resamples=resamples, seed=seed)
    return as_dict(found)


def identity_nats(
    host: Host,
    hookpoint: str,
    module: Exchanged,
    ids: Int[Tensor, "sequence position"],
    documents: Int[Tensor, " sequence"],
    *,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """KL(host ‖ exchanged) − KL(host ‖ student), nats per token, with its 95 % interval over documents.

    Returns:
        ``value``, ``ci95``, ``kl`` of the student itself on these sequences, ``sequences``.
    """
    swaps = {"own": Swap(hookpoint, module.layer), "exchanged": Swap(hookpoint, module)}
    _, losses = swapped_losses(host, ids, swaps)
    rise = losses["exchanged"].kl - losses["own"].kl
    numbers = torch.unique(documents, return_inverse=True)[1]
    sums = cast("Array", sum_by(numbers, rise, torch.ones_like(rise)).numpy())
    found = ratio_interval(sums[:, 0], sums[:, 1], resamples=resamples, seed=seed)
    return {**as_dict(found), "kl": float(losses["own"].kl.mean()), "sequences": len(ids)}
