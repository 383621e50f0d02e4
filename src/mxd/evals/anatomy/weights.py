"""What the weights say of an MxD's experts: their rank, and how far the shared expert and D are from the host's own decoder.

Expert n is W_n = D diag(c_n) [H, O]. Its rank is that of D when c_n has no zero (arXiv 2505.21364, Lemma 1): high rank follows from D
and says nothing of what the experts are used for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...layers import MixtureOfDecoders, SparseLayer
from ...written import bare

EXPERTS_AT_ONCE = 16


@torch.no_grad()
def grams(layer: SparseLayer, units: Sequence[int]) -> Iterator[Float[Tensor, "expert side side"]]:
    """W_nᵀ W_n of some experts, or W_n W_nᵀ where that is smaller, float64, a few at a time."""
    exact = torch.device("cpu") if next(layer.parameters()).device.type == "mps" else next(layer.parameters()).device
    shared = layer.D.to(exact).double() if isinstance(layer, MixtureOfDecoders) else None
    shared = None if shared is None else shared.T @ shared
    for start in range(0, len(units), EXPERTS_AT_ONCE):
        some = list(units[start : start + EXPERTS_AT_ONCE])
        if shared is not None and isinstance(layer, MixtureOfDecoders):
            c = layer.C[torch.tensor(some, device=layer.C.device)].to(exact).double()
            yield shared * c[:, :, None] * c[:, None, :]
        else:
            maps = torch.stack([layer.expert(n).to(exact).double() for n in some])  # pyright: ignore[reportCallIssue]
            yield maps.mT @ maps if maps.shape[1] >= maps.shape[2] else maps @ maps.mT


def spectrum(gram: Float[Tensor, "expert side side"]) -> Float[Tensor, "expert side"]:
    """Singular values, descending, from Gram matrices in float64: good to about 1e-8 of the largest."""
    return torch.linalg.eigvalsh(gram).flip(-1).clamp_min(0).sqrt()


def ranks(values: Float[Tensor, "expert side"], shape: tuple[int, int]) -> dict[str, Tensor]:
    """Ranks of matrices of this shape with these singular values, each [expert].

    ``rank``: values above max(shape) ε σ_1, ε that of float32 (the usual tolerance). ``effective``: exp of the entropy of σ / Σσ
    (Roy and Vetterli 2007). ``stable``: ‖W‖_F² / σ_1². All 0 for a matrix of zeros.
    """
    top = values[:, :1]
    share = values / values.sum(1, keepdim=True).clamp_min(1e-300)
    entropy = -(share * share.clamp_min(1e-300).log()).sum(1)
    some = top[:, 0] > 0
    return {
        "rank": (values > max(shape) * torch.finfo(torch.float32).eps * top).sum(1),
        "effective": entropy.exp().where(some, 0),
        "stable": (values.square().sum(1) / top[:, 0].square().clamp_min(1e-300)).where(some, 0),
    }


def expert_ranks(layer: SparseLayer, units: Sequence[int], say: Callable[[float], None]) -> dict[str, Any] | None:
    """Ranks of some experts over min(H, O), or None for kinds whose units are not maps.

    Returns:
        ``experts``; ``full``, that minimum; ``rank``, ``effective``, ``stable``: {mean, median, low, high} as shares of it (low and high
        the extremes); ``rank_D`` likewise a share, ``zeros_in_c`` experts whose c_n has a zero (both null for kinds without D and C);
        ``histogram``: experts by rank share, in twenty bins from 0 to 1.
    """
    inner = bare(layer)
    if not hasattr(inner, "expert") or not len(units):
        return None
    shape: tuple[int, ...] = tuple(inner.expert(int(units[0])).shape)  # pyright: ignore[reportCallIssue]
    full = min(shape)
    found: list[dict[str, Tensor]] = []
    for gram in grams(inner, units):
        found.append(ranks(spectrum(gram).cpu(), (shape[0], shape[1])))
        say(min(1.0, len(found) * EXPERTS_AT_ONCE / len(units)))
    columns = {name: torch.cat([f[name] for f in found]).double() / full for name in found[0]}
    rank_d, zeros = None, None
    if isinstance(inner, MixtureOfDecoders):
        d = inner.D.double()
        rank_d = int(ranks(spectrum((d.T @ d)[None]).cpu(), (shape[0], shape[1]))["rank"]) / full
        zeros = int((inner.C[torch.tensor(list(units), device=inner.C.device)] == 0).any(1).sum())
    bins = (columns["rank"] * 20).long().clamp_max(19).bincount(minlength=20)
    return {
        "experts": len(units),
        "full": full,
        **{name: _spread(column) for name, column in columns.items()},
        "rank_D": rank_d,
        "zeros_in_c": zeros,
        "histogram": bins.tolist(),
    }


def _spread(column: Tensor) -> dict[str, float]:
    return {"mean": float(column.mean()), "median": float(column.median()), "low": float(column.min()), "high": float(column.max())}


@torch.no_grad()
def distances(layer: SparseLayer, host_decoder: Float[Tensor, "d_hidden d_out"], unit: int, activation: float) -> dict[str, Any] | None:
    """How far expert `unit` and D are from the host's decoder D*, in the Frobenius norm; None where their shapes differ.

    Returns:
        ``expert`` ‖W_n − D*‖ and ``D`` ‖D − D*‖ as published; ``host`` ‖D*‖; ``expert_scaled`` and ``D_scaled``, the least over multiples
        of W_n and of D; ``expert_as_used`` ‖ā W_n − D*‖ with ā = `activation`. A scaled distance of ‖D*‖ means: nothing in common.
    """
    inner = bare(layer)
    if not isinstance(inner, MixtureOfDecoders) or inner.D.shape != host_decoder.shape:
        return None
    target = host_decoder.to(inner.D.device).double()
    own, d = inner.expert(unit).double(), inner.D.double()
    return {
        "expert": float((own - target).norm()),
        "D": float((d - target).norm()),
        "host": float(target.norm()),
        "expert_scaled": _scaled(own, target),
        "D_scaled": _scaled(d, target),
        "expert_as_used": float((activation * own - target).norm()),
    }


def _scaled(matrix: Tensor, target: Tensor) -> float:
    """min over t of ‖t matrix − target‖."""
    power = float(matrix.square().sum())
    return float((matrix * (float((matrix * target).sum()) / power) - target).norm()) if power > 0 else float(target.norm())
