"""Numbers about single units out of their firings: how often, how strongly, on which tokens, for how much of the output, to what effect."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import schema
from .bands import DOUBLE_DECILES, Text
from .codes import Firings

PEAK_TOKENS = 16
MEASURED = 8
"""Firings whose effect must be known for a unit's to be: of fewer the mean says little, and by effect the rarest would lead every list."""
SHARED = 0.5
"""A unit that fires on more than this share of the tokens counts as shared."""


class Statistics(NamedTuple):
    """Of the units of one chunk."""

    columns: dict[str, NDArray[Any]]
    """Columns of the table `unit`, NaN where unknown."""
    hist: NDArray[np.uint32]
    """[unit, bin] firings by activation; bin b holds (b, b + 1] / `schema.BINS` of the unit's largest."""
    edges: NDArray[np.float32]
    """[unit, 7] the largest activation, the smallest of the strongest shown, and of each double decile; NaN for the dead."""
    peak_tokens: list[NDArray[Any]]
    """By unit, the tokens it fires on most, `schema.PAIRS`."""


def measure(firings: Firings, rank: NDArray[np.int64], text: Text, tokens: int, n: int) -> Statistics:
    """
    Args:
        rank: of each firing among its unit's own.
        tokens: how many were read, first positions left out.
        n: contexts of a band.
    """
    counts = np.diff(firings.starts)
    units, live = firings.units, counts > 0
    values = np.empty_like(firings.values)
    values[firings.starts[:-1][units] + rank] = firings.values  # each unit's from the strongest to the weakest
    columns: dict[str, NDArray[Any]] = {"fires": counts, "state": states(counts, tokens)}

    def at(place: NDArray[np.int64]) -> NDArray[np.float32]:
        """The value at a rank of every live unit; NaN for the dead."""
        found = np.full(len(counts), np.nan, np.float32)
        found[live] = values[firings.starts[:-1][live] + np.clip(place[live], 0, counts[live] - 1)]
        return found

    columns |= {"max_a": at(counts * 0), "mean_a": _mean(units, firings.values, counts)}
    columns |= {"p50": at(counts // 2), "p99": at(counts // 100)}
    columns |= {"share": _mean(units, firings.shares, counts), **_effects(units, firings.effects, len(counts))}
    top, share, entropy, peaks = _tokens(units, text.ids[firings.tokens], counts)
    columns |= {"top_token": top, "top_token_share": share, "token_entropy": entropy}
    hist = np.zeros((len(counts), schema.BINS), np.int64)
    bins = np.ceil(schema.BINS * firings.values / columns["max_a"][units]).clip(1, schema.BINS).astype(np.int64) - 1
    np.add.at(hist, (units, bins), 1)
    last = [-(-counts * part // DOUBLE_DECILES) - 1 for part in range(1, DOUBLE_DECILES + 1)]
    edges = np.stack([at(place) for place in (counts * 0, np.minimum(n, counts) - 1, *last)], axis=1)
    return Statistics(columns, hist.astype(np.uint32), edges, peaks)


def states(counts: NDArray[np.int64], tokens: int) -> NDArray[np.int64]:
    """`schema.STATES` of units by how often they fired on so many tokens."""
    return np.where(counts == 0, 0, np.where(counts > SHARED * tokens, 3, np.where(counts < schema.RARE, 1, 2)))


def _mean(units: NDArray[np.int64], values: NDArray[np.float32], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore"):
        return np.bincount(units, values.astype(np.float64), len(counts)) / counts


def _effects(units: NDArray[np.int64], effects: NDArray[np.float32], n_units: int) -> dict[str, NDArray[Any]]:
    """Mean effect of a firing in nats, its standard error, and over how many firings; NaN where there are too few."""
    known = np.isfinite(effects)
    units, found = units[known], effects[known].astype(np.float64)
    n = np.bincount(units, minlength=n_units)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.bincount(units, found, n_units) / n
        spread = np.bincount(units, (found - mean[units]) ** 2, n_units) / (n - 1)
        error = np.sqrt(np.abs(spread) / n)
    enough = n >= MEASURED
    return {"effect": np.where(enough, mean, np.nan), "effect_se": np.where(enough, error, np.nan), "effect_n": n}


def _tokens(
    units: NDArray[np.int64], ids: NDArray[np.int64], counts: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], list[NDArray[Any]]]:
    """Of each unit: its commonest token, the share of its firings there, the entropy of its tokens in bits, and the commonest few."""
    n_units, vocabulary = len(counts), int(ids.max(initial=0)) + 1
    joint, times = np.unique(units * vocabulary + ids, return_counts=True)
    whose, which = joint // vocabulary, joint % vocabulary
    p = times / counts[whose]
    entropy = np.bincount(whose, -p * np.log2(p), n_units)
    order = np.lexsort((which, -times, whose))
    begins = np.searchsorted(whose[order], np.arange(n_units + 1))
    peaks: list[NDArray[Any]] = []
    for unit in range(n_units):
        rows = order[begins[unit] : min(begins[unit + 1], begins[unit] + PEAK_TOKENS)]
        found = np.empty(len(rows), schema.PAIRS)
        found["token"], found["count"] = which[rows], times[rows]
        peaks.append(found)
    unknown = counts == 0
    top = np.array([float(found["token"][0]) if len(found) else np.nan for found in peaks])
    most = np.array([found["count"][0] if len(found) else 0 for found in peaks])
    with np.errstate(invalid="ignore"):
        return top, most / counts, np.where(unknown, np.nan, np.abs(entropy)), peaks
