"""Widths matched to a parameter budget, by building the candidate on the meta device and counting."""

from __future__ import annotations

import re

import torch

from ..errors import ConfigError, LayerError
from .base import SparseLayer
from .build import Sizes, build


def parse_budget(budget: str, *, d_in: int, d_out: int) -> int:
    """Parameters meant by `budget`: ``16x`` is a transcoder with 16 x d_in latents, a plain number is a count.

    Raises:
        ConfigError: neither of the two, or not positive.
    """
    text = budget.replace("_", "").replace(",", "").strip().lower()
    if re.fullmatch(r"\d+(\.\d+)?x", text) and float(text[:-1]) > 0:
        latents = max(1, round(float(text[:-1]) * d_in))
        sizes = Sizes(d_in=d_in, d_out=d_out, n_units=latents, k=1, d_hidden=1)
        return build("transcoder", sizes, device="meta").budget()
    if text.isdigit() and int(text) > 0:
        return int(text)
    raise ConfigError("--budget is not understood", expected="a multiple such as 16x, or a number of parameters", got=budget)


def match_budget(kind: str, sizes: Sizes, budget: int) -> Sizes:
    """`sizes` with the largest n_units whose layer has at most `budget` parameters (unchanged for a kind without units).

    The count is linear in n_units, so two candidates give the slope; the answer is then counted on the object itself.

    Raises:
        LayerError: the budget does not pay for one unit, or for k of them.
    """
    if kind == "dense":
        return sizes
    one, two = (_count(kind, sizes._replace(n_units=n, k=1)) for n in (1, 2))
    if budget < one:
        raise LayerError(
            f"the budget is too small for one unit of a {kind}",
            expected=f"at least {one:,} parameters",
            got=f"{budget:,}",
            next="raise --budget",
        )
    n_units = 1 + (budget - one) // (two - one)
    matched = sizes._replace(n_units=n_units)
    counted = candidate(kind, matched).budget()
    if not counted <= budget < counted + (two - one):
        raise AssertionError(f"{kind}: the number of parameters is not linear in n_units ({counted} for {n_units}, budget {budget})")
    return matched


def candidate(kind: str, sizes: Sizes) -> SparseLayer:
    """The layer of these sizes on the meta device: all shapes, no memory."""
    return build(kind, sizes, device=torch.device("meta"))


def _count(kind: str, sizes: Sizes) -> int:
    return candidate(kind, sizes).budget()
