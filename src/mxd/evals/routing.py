"""Do the experts of an MxD matter? Measures of routing that decorative experts cannot pass together.

With z the dense hidden vector, h = Dᵀz, m = Cᵀa, ŷ = m * h + b and FVU(f) = Σ‖y − f‖² / Σ‖y − ȳ‖² on held-out tokens:

- **Necessity** N_r = 1 − FVU(ŷ) / FVU_null, FVU_null that of the best routing-free readout of the same z (ridge regression).
- **Gain over a dense student** G_r = 1 − FVU(ŷ) / FVU_dense, the dense control trained beside it.
- **Identity** ID = mean over permutations π of FVU(g * (Cᵀπ(a)) * h + b') − FVU(ŷ), with a gain g and bias b' per output
  refitted to each: about 0 when it does not matter *which* expert fired.
- **Best constant** R_c = FVU of the best constant modulation (m per output, with a bias) − FVU(ŷ).

Experts matter where N_r, G_r and ID all exceed 0 with their intervals; each alone can be met by junk. All functions are pure,
and the first position of each sequence is expected to be left out by the caller. Fits see the fit and validation tokens only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from ..devices import layer_device
from ..layers import MixtureOfDecoders, SparseLayer
from ..ops import expert_mix, gemm
from .bootstrap import Interval, interval_of_sums
from .fidelity import TOKENS_AT_ONCE, HeldOut, squared_norms, sum_by, token_errors, variation

RIDGE_GRID = (1e-7, 1e-5, 1e-3, 1e-1)
"""Ridge penalties tried, as multiples of the mean variance of z's components."""
STRATA = 4
"""Strata per axis (firing frequency, mean activation) within which experts are permuted."""


class Pairs(NamedTuple):
    """Inputs and outputs of an MLP on some tokens."""

    x: Float[Tensor, "token d_in"]
    y: Float[Tensor, "token d_out"]


class Parts(NamedTuple):
    """What an MxD computes on some tokens, before the product."""

    values: Float[Tensor, "token k"]
    indices: Int[Tensor, "token k"]
    h: Float[Tensor, "token d_out"]
    """Dᵀz."""


@torch.no_grad()
def parts_of(layer: MixtureOfDecoders, x: Float[Tensor, "token d_in"]) -> Parts:
    """Gate and dense path of the layer, on its device."""
    device = layer_device(layer)
    found = [_parts(layer, part.to(device)) for part in x.split(TOKENS_AT_ONCE)]
    return Parts(*(_stacked(column) for column in zip(*found, strict=True)))


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """`parts` below each other; those with fewer columns, as a gate without TopK makes them, are filled up with zeros."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([part if part.shape[1] == width else F.pad(part, (0, width - part.shape[1])) for part in parts])


def _parts(layer: MixtureOfDecoders, x: Tensor) -> Parts:
    code = layer.encode(x)
    assert code.hidden is not None
    return Parts(code.values, code.indices, gemm.linear(code.hidden, layer.D.t()))


@torch.no_grad()
def modulation(layer: MixtureOfDecoders, parts: Parts, permutation: Int[Tensor, " n_units"] | None = None) -> Float[Tensor, "token d_out"]:
    """m = Cᵀa; with a permutation, unit n uses row permutation[n] of C."""
    indices = parts.indices if permutation is None else permutation[parts.indices]
    return expert_mix(parts.values, indices, layer.C)


def fit_affine(u: Float[Tensor, "token d_out"], y: Float[Tensor, "token d_out"]) -> tuple[Tensor, Tensor]:
    """Gain g and bias b [d_out] minimising ‖y − g * u − b‖², each output by itself; g = 0 where u does not vary."""
    mean_u, mean_y = u.mean(0), y.mean(0)
    centred = u - mean_u
    # Sums in float64: tokens are many, and outputs can be nearly constant.
    power = centred.square().sum(0, dtype=torch.float64) if u.device.type != "mps" else centred.square().sum(0)
    cross = (centred * (y - mean_y)).sum(0, dtype=power.dtype)
    gain = torch.where(power > 1e-12 * u.square().sum(0).clamp_min(1e-30), cross / power.clamp_min(1e-30), 0.0).to(u)
    return gain, mean_y - gain * mean_u


class Ridge(NamedTuple):
    """The best routing-free readout of z found: weight [d_hidden, d_out], bias [d_out], the penalty chosen."""

    weight: Tensor
    bias: Tensor
    penalty: float


@torch.no_grad()
def fit_ridge(layer: MixtureOfDecoders, fit: Pairs, validation: Pairs) -> Ridge:
    """Ridge regression of y on z by normal equations in float64 on the fit tokens; penalty chosen on the validation tokens.

    The bias is not penalised. Penalties are `RIDGE_GRID` times the mean variance of z's components.
    """
    device = layer_device(layer)
    # Apple's GPUs have no float64.
    exact = torch.device("cpu") if device.type == "mps" else device
    mean_y = fit.y.to(exact).mean(0, dtype=torch.float64)
    width = layer.D.shape[0]
    gram, cross = mean_y.new_zeros(width, width), mean_y.new_zeros(width, layer.d_out)
    total_z = mean_y.new_zeros(width)
    for part, y in zip(_hidden(layer, fit.x), fit.y.split(TOKENS_AT_ONCE), strict=True):
        z = part.to(exact).double()
        total_z += z.sum(0)
        gram.addmm_(z.t(), z)
        cross.addmm_(z.t(), y.to(exact).double() - mean_y)
    mean_z = total_z / len(fit.x)
    gram.sub_(torch.outer(total_z, mean_z))
    scale = float(gram.diagonal().mean())
    found = [
        Ridge(weight.float().to(device), (mean_y - mean_z @ weight).float().to(device), penalty)
        for penalty in RIDGE_GRID
        if (weight := _solve(gram, cross, penalty * scale)) is not None
    ]
    if not found:  # z does not vary at all
        return Ridge(cross.float().to(device) * 0, mean_y.float().to(device), math.inf)
    seen = list(_hidden(layer, validation.x))
    return min(found, key=lambda ridge: float(_readout_errors(ridge, seen, validation.y).sum()))


def _hidden(layer: MixtureOfDecoders, x: Tensor) -> Iterator[Tensor]:
    for part in x.split(TOKENS_AT_ONCE):
        yield layer.encoder(part.to(layer_device(layer)))


def _solve(gram: Tensor, cross: Tensor, penalty: float) -> Tensor | None:
    factor, failed = torch.linalg.cholesky_ex(gram + penalty * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    return None if int(failed) or penalty <= 0 else torch.cholesky_solve(cross, factor)


@torch.no_grad()
def ridge_errors(layer: MixtureOfDecoders, ridge: Ridge, tokens: Pairs) -> Tensor:
    """‖y − (Wᵀz + b)‖² per token, float64 [token] on the CPU."""
    return _readout_errors(ridge, _hidden(layer, tokens.x), tokens.y)


def _readout_errors(ridge: Ridge, hidden: Iterable[Tensor], y: Tensor) -> Tensor:
    weight = ridge.weight.t()
    parts = zip(hidden, y.split(TOKENS_AT_ONCE), strict=True)
    return torch.cat([squared_norms(part.to(z) - gemm.linear(z, weight, ridge.bias)) for z, part in parts])


def expert_permutations(parts: Parts, n_units: int, *, count: int, seed: int) -> list[Int[Tensor, " n_units"]]:
    """Permutations of the experts that fire on these tokens, within strata of firing frequency x mean activation.

    Experts are cut into `STRATA` equal groups by frequency, each of these into as many by mean activation (of the tokens on
    which they fire); fewer where there are few live experts, so that a stratum holds at least four. Within a stratum all
    move along one random cycle: none keeps its own row of C. Experts that never fire stay.
    """
    active = parts.values > 0
    fired = torch.bincount(parts.indices[active].cpu(), minlength=n_units).double()
    total = torch.zeros(n_units, dtype=torch.float64)
    total.index_add_(0, parts.indices[active].cpu(), parts.values[active].cpu().double())
    live = fired.nonzero().squeeze(1)
    axis = max(1, min(STRATA, math.isqrt(len(live) // 4)))
    strata: list[Tensor] = []
    for group in live[fired[live].argsort(stable=True)].tensor_split(axis):
        mean = total[group] / fired[group]
        strata += group[mean.argsort(stable=True)].tensor_split(axis)
    generator = torch.Generator().manual_seed(seed)
    made: list[Tensor] = []
    for _ in range(count):
        permutation = torch.arange(n_units)
        for stratum in strata:
            cycle = stratum[torch.randperm(len(stratum), generator=generator)]
            permutation[cycle] = cycle.roll(1)
        made.append(permutation.to(parts.indices.device))
    return made


def permuted_errors(
    layer: MixtureOfDecoders, validation: tuple[Parts, Tensor], held_out: tuple[Parts, Tensor], *, permutations: int, seed: int
) -> Tensor:
    """‖y − ŷ_π‖² per held-out token, mean over permutations; gain and bias per output refitted on the validation tokens.

    Both tuples are (parts, y). float64 [token] on the CPU.
    """
    total = torch.zeros(len(held_out[1]), dtype=torch.float64)
    for permutation in expert_permutations(validation[0], layer.n_units, count=permutations, seed=seed):
        u = modulation(layer, validation[0], permutation).mul_(validation[0].h)
        gain, bias = fit_affine(u, validation[1])
        u = modulation(layer, held_out[0], permutation).mul_(held_out[0].h)
        total += squared_norms(held_out[1] - u.mul_(gain).add_(bias))
    return total / max(permutations, 1)


def mean_activation(parts: Parts, n_units: int) -> Float[Tensor, " n_units"]:
    """ā, the mean of a over these tokens."""
    total = parts.values.new_zeros(n_units)
    return total.index_add_(0, parts.indices.flatten(), parts.values.flatten()) / max(len(parts.values), 1)


def modulation_cv(m: Float[Tensor, "token d_out"]) -> float:
    """Coefficient of variation of m = Cᵀa over tokens, pooled over outputs: √(Σ_o var m_o / Σ_o (E m_o)²); NaN if all means are 0."""
    mean = m.mean(0)
    power = float(mean.square().sum(dtype=torch.float32))
    spread = float((m - mean).square().mean(0).sum())
    return math.sqrt(spread / power) if power > 0 else math.nan


class _Columns(NamedTuple):
    """Squared errors per held-out token, float64 [token] on the CPU."""

    own: Tensor
    mean_a: Tensor
    best_constant: Tensor
    permuted: Tensor


@torch.no_grad()
def _columns(
    layer: MixtureOfDecoders, validation: Pairs, held_out: Pairs, *, permutations: int, seed: int
) -> tuple[_Columns, float, Parts]:
    """The errors that need no ridge and no control, the modulation's variation, and the parts on the validation tokens."""
    device = layer_device(layer)
    fitted, seen = parts_of(layer, validation.x), parts_of(layer, held_out.x)
    y_fit, y = validation.y.to(device), held_out.y.to(device)
    m = modulation(layer, seen)
    mean_m = mean_activation(fitted, layer.n_units) @ layer.C
    gain, bias = fit_affine(fitted.h, y_fit)
    columns = _Columns(
        own=squared_norms(y - torch.addcmul(layer.b, m, seen.h)),
        mean_a=squared_norms(y - torch.addcmul(layer.b, mean_m, seen.h)),
        best_constant=squared_norms(y - torch.addcmul(bias, gain, seen.h)),
        permuted=permuted_errors(layer, (fitted, y_fit), (seen, y), permutations=permutations, seed=seed),
    )
    return columns, modulation_cv(m), fitted


def probe(layer: SparseLayer, x: Tensor, y: Tensor, *, permutations: int = 3, seed: int = 0) -> dict[str, float | None]:
    """Cheap figures of one layer for the middle of training: fits on the first half of the tokens, measures on the second.

    Returns:
        ``fvu``; for an MxD also ``fvu_mean_a`` (a at its mean), ``fvu_best_constant``, ``id`` and ``modulation_cv``. What is
        undefined is None.
    """
    half = len(x) // 2
    seen = Pairs(x[half:], y[half:])
    spread = float(variation(seen.y).sum())
    if not isinstance(layer, MixtureOfDecoders):
        errors, _, _ = token_errors(layer, seen.x, seen.y)
        return {"fvu": _number(float(errors.error.sum()), spread)}
    columns, cv, _ = _columns(layer, Pairs(x[:half], y[:half]), seen, permutations=permutations, seed=seed)
    return {
        "fvu": _number(float(columns.own.sum()), spread),
        "fvu_mean_a": _number(float(columns.mean_a.sum()), spread),
        "fvu_best_constant": _number(float(columns.best_constant.sum()), spread),
        "id": _number(float((columns.permuted - columns.own).sum()), spread),
        "modulation_cv": cv if math.isfinite(cv) else None,
    }


def _number(numerator: float, denominator: float) -> float | None:
    value = numerator / denominator if denominator > 0 else math.nan
    return value if math.isfinite(value) else None


def measure(
    layer: MixtureOfDecoders,
    fit: Pairs,
    validation: Pairs,
    held_out: HeldOut,
    *,
    dense: SparseLayer | None,
    rivals: Mapping[str, SparseLayer] | None = None,
    permutations: int,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """N_r, G_r, ID and their companions on held-out tokens, with 95 % bootstrap intervals over documents.

    Args:
        layer: the MxD.
        fit: training tokens on which the routing-free readout is fitted.
        validation: tokens on which its penalty is chosen and gains and biases are fitted.
        held_out: the tokens measured on, without first positions.
        dense: the dense control of the same run and hookpoint, None if there is none.
        rivals: every dense student of the run at this hookpoint, whatever its recipe, by name.
        permutations: permutations behind ID.
        resamples: bootstrap resamples. Intervals cover the choice of documents, not the fits, the permutations or the seed.
        seed: of permutations and resamples.

    Returns:
        ``n_r``, ``g_r``, ``id``, ``r_c``, each {value, ci95} (and ``reason`` where there is no value); ``fvu``, ``fvu_null``,
        ``g_r_best`` (where there are rivals) the same with ``student``, the one of lowest validation error, and its ``fvu``;
        ``fvu_dense``, ``fvu_mean_a``, ``fvu_best_constant``, ``modulation_cv``, ``live_experts``, ``ridge_penalty``,
        ``experts_matter`` (True, False, or None where one of the three is missing), ``notes``.
    """
    pairs = Pairs(held_out.x, held_out.y)
    columns, cv, fitted = _columns(layer, validation, pairs, permutations=permutations, seed=seed)
    ridge = fit_ridge(layer, fit, validation)
    table: dict[str, Tensor] = {
        **columns._asdict(),
        "null": ridge_errors(layer, ridge, pairs),
        "spread": variation(held_out.y),
    }
    if dense is not None:
        table["dense"] = token_errors(dense, held_out.x, held_out.y)[0].error
    best = _best(rivals or {}, validation)
    if best is not None:
        table["best"] = token_errors(best[1], held_out.x, held_out.y)[0].error
    sums = sum_by(held_out.documents, *table.values()).numpy()
    at = {name: i for i, name in enumerate(table)}
    sums = sums[sums[:, at["spread"]] > 0] if (sums[:, at["spread"]] > 0).any() else sums

    def interval(above: str, below: str, minus: str | None = None, *, gain: bool = False) -> Interval:
        def statistic(s: Any) -> Any:
            share = (s[..., at[above]] - (s[..., at[minus]] if minus else 0)) / s[..., at[below]]
            return 1 - share if gain else share

        return interval_of_sums(sums, statistic, resamples=resamples, seed=seed)

    measures = {
        "n_r": interval("own", "null", gain=True),
        "g_r": interval("own", "dense", gain=True) if dense is not None else Interval(math.nan, math.nan, math.nan),
        "id": interval("permuted", "spread", "own"),
        "r_c": interval("best_constant", "spread", "own"),
    }
    fvu = {name: _number(float(table[name].sum()), float(table["spread"].sum())) for name in table if name != "spread"}
    found: dict[str, Any] = {name: _shown(i) for name, i in measures.items()}
    if best is not None:
        found["g_r_best"] = _shown(interval("own", "best", gain=True)) | {"student": best[0], "fvu": fvu["best"]}
    if dense is None:
        found["g_r"]["reason"] = "the run has no dense control at this hookpoint under this recipe: train with --kinds ... dense"
    return {
        **found,
        "fvu": fvu["own"],
        "fvu_null": fvu["null"],
        "fvu_dense": fvu.get("dense"),
        "fvu_mean_a": fvu["mean_a"],
        "fvu_best_constant": fvu["best_constant"],
        "modulation_cv": _finite(cv),
        "live_experts": int((torch.bincount(fitted.indices[fitted.values > 0].cpu(), minlength=layer.n_units) > 0).sum()),
        "ridge_penalty": _finite(ridge.penalty),
        "experts_matter": _matter([measures[name].low for name in ("n_r", "g_r", "id")]),
        "notes": _notes(fvu),
    }


def _shown(interval: Interval) -> dict[str, Any]:
    return {"value": _finite(interval.value), "ci95": _ends(interval)}


def _matter(lows: Sequence[float]) -> bool | None:
    return None if any(math.isnan(low) for low in lows) else all(low > 0 for low in lows)


def _best(rivals: Mapping[str, SparseLayer], validation: Pairs) -> tuple[str, SparseLayer] | None:
    """The layer of least squared error on these tokens."""
    error = {name: float(token_errors(layer, *validation)[0].error.sum()) for name, layer in rivals.items()}
    name = min(error, key=lambda n: error[n], default=None)
    return None if name is None else (name, rivals[name])


def _notes(fvu: Mapping[str, float | None]) -> list[str]:
    own, null = fvu["own"], fvu["null"]
    if own is not None and null is not None and null < 0.1 * own:
        return [
            "z carries y almost linearly (as it does when the encoder is the host's own): the routing-free readout is nearly exact, "
            "so N_r is negative by construction"
        ]
    return []


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _ends(interval: Interval) -> list[float | None]:
    return [_finite(interval.low), _finite(interval.high)]
