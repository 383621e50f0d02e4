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

    Found by halving an interval, each candidate counted on the object itself.

    Raises:
        LayerError: the budget does not pay for one unit, or for k of them.
    """
    if kind == "dense":
        return sizes

    def count(step: int) -> int:
        return candidate(kind, sizes._replace(n_units=_units(kind, step), k=1)).budget()

    if budget < count(1):
        raise LayerError(
            f"the budget is too small for one unit of a {kind}",
            expected=f"at least {count(1):,} parameters",
            got=f"{budget:,}",
            next="raise --budget",
        )
    fits, too_many = 1, 2
    while count(too_many) <= budget:
        fits, too_many = too_many, 2 * too_many
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if count(middle) <= budget else (fits, middle)
    matched = sizes._replace(n_units=_units(kind, fits))
    candidate(kind, matched)
    return matched


def _units(kind: str, step: int) -> int:
    """The numbers of units that a kind can have, in order: all, or with product keys the squares."""
    return step**2 if kind == "mxd-pk" else step


def candidate(kind: str, sizes: Sizes) -> SparseLayer:
    """The layer of these sizes on the meta device: all shapes, no memory."""
    return build(kind, sizes, device=torch.device("meta"))
