"""How much more alike the samples of one unit are than samples of different units: the measure, its interval, its null.

With e_ui the unit vector of sample i (i = 1 … S, one for each seed) of unit u, and cos the cosine,

    A[u, v] = mean over i ≠ j of cos(e_ui, e_vj)          coherence of u = A[u, u] − mean over v ≠ u of A[u, v]

in [−2, 2]. Samples of different units come with the same seeds, hence the same random numbers; so only pairs with different seeds are
compared, between units as well as within one, and what the seeds share cancels.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from ...errors import ConfigError
from ..bootstrap import Array, Interval

PERMUTATIONS = 1000
"""Permutations behind the null distribution; no p is smaller than 1 over one more than this."""


class Coherence(NamedTuple):
    """The coherence of a set of units."""

    units: Array
    """Coherence of each unit [unit]."""
    within: float
    """Mean over units of A[u, u]."""
    between: float
    """Mean over pairs of different units of A[u, v]."""
    mean: Interval
    """within − between, with the 95 % interval over units: both terms are resampled, a unit is never paired with a copy of itself."""
    p: float
    """Share of permutations with at least this mean, the sample itself counted as one (Phipson and Smyth 2010): samples of the same seed
    change units, each seed on its own. What the samples of a unit share is then gone, what those of a seed share is kept."""


def coherence(vectors: Float[NDArray[np.float64], "unit sample d"], *, resamples: int, seed: int) -> Coherence:
    """The coherence of units whose samples are represented by these vectors; a vector of zeros is like none (cosine 0).

    Args:
        vectors: sample i of every unit made with the same random numbers.
        resamples: bootstrap resamples behind the interval.
        seed: of the bootstrap and of the permutations.

    Raises:
        ConfigError: fewer than two units or than two samples each: nothing to compare.
    """
    units, samples, _ = vectors.shape
    if units < 2 or samples < 2:
        raise ConfigError("too little to compare", expected="at least 2 units and 2 samples of each", got=f"{units} and {samples}")
    flat = normalised(np.asarray(vectors, dtype=np.float64).reshape(units * samples, -1))
    # [sample, unit, sample, unit]; samples of the same seed are never compared
    cosines = (flat @ flat.T).reshape(units, samples, units, samples).transpose(1, 0, 3, 2)
    cosines = np.where(np.eye(samples, dtype=bool)[:, None, :, None], 0.0, cosines)
    alike = cosines.sum((0, 2)) / (samples * (samples - 1))
    own = alike.diagonal().copy()
    others = alike - np.diag(own)
    scores = own - others.sum(1) / (units - 1)
    rng = np.random.default_rng(seed)
    return Coherence(
        scores,
        float(own.mean()),
        float(others.sum() / (units * (units - 1))),
        _interval(own, others, resamples, rng),
        _p(cosines, own, rng),
    )


def normalised(vectors: Float[NDArray[np.float64], "row d"]) -> Float[NDArray[np.float64], "row d"]:
    """Rows of length 1; rows of zeros stay."""
    sizes = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(sizes > 0, sizes, 1.0)


def _interval(own: Array, others: Array, resamples: int, rng: np.random.Generator) -> Interval:
    n = len(own)

    def mean(counts: NDArray[np.float64]) -> Array:
        pairs = n * n - (counts**2).sum(-1)
        between = ((counts @ others) * counts).sum(-1) / np.where(pairs > 0, pairs, np.nan)
        return (counts @ own) / n - between

    drawn = mean(rng.multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64))
    drawn = drawn[np.isfinite(drawn)]  # a resample of one unit only has nothing to compare
    low, high = np.percentile(drawn, [2.5, 97.5]) if len(drawn) else (math.nan, math.nan)
    return Interval(float(mean(np.ones(n))), float(low), float(high))


def _p(cosines: NDArray[np.float64], own: Array, rng: np.random.Generator) -> float:
    """`cosines` [sample, unit, sample, unit]. The sum over all pairs never changes: only the units' own are compared."""
    samples, units = cosines.shape[:2]
    seeds = np.arange(samples)
    seen = own.sum() * samples * (samples - 1) - 1e-9 * samples * samples * units
    reached, at_once = 1, max(1, 2**21 // (samples * samples * units))
    for start in range(0, PERMUTATIONS, at_once):
        number = min(at_once, PERMUTATIONS - start)
        places = rng.permuted(np.broadcast_to(np.arange(units), (number, samples, units)), axis=2)
        found = cosines[seeds[:, None, None], places[:, :, None, :], seeds[None, :, None], places[:, None, :, :]]
        reached += int((found.sum((1, 2, 3)) >= seen).sum())
    return reached / (PERMUTATIONS + 1)


class Words(NamedTuple):
    """In how many pieces of ordinary text each token occurs."""

    pieces: int
    """How many pieces were looked at."""
    seen: Mapping[int, int]
    """Pieces with the token, by token; tokens that are not named occur in none."""


def count_words(pieces: Sequence[Sequence[int]]) -> Words:
    """`Words` of these token sequences."""
    return Words(len(pieces), Counter(token for piece in pieces for token in set(piece)))


def tfidf(texts: Sequence[Sequence[int]], words: Words) -> Float[NDArray[np.float64], "text d"]:
    """Token counts weighted by how rare a token is: tf · (ln((1 + n) / (1 + df)) + 1), not normalised.

    The smooth variant of inverse document frequency that scikit-learn uses; d is the number of different tokens in `texts`.
    """
    column = {token: i for i, token in enumerate(sorted({token for text in texts for token in text}))}
    found = np.zeros((len(texts), max(len(column), 1)))
    for row, text in enumerate(texts):
        for token, count in Counter(text).items():
            found[row, column[token]] = count * (math.log((1 + words.pieces) / (1 + words.seen.get(token, 0))) + 1)
    return found


def ellipse(points: Sequence[tuple[float, float]], deviations: float = 1.0, corners: int = 60) -> list[tuple[float, float]]:
    """The covariance ellipse of points in a plane: all places `deviations` Mahalanobis units from their mean, as a closed polygon.

    Along an axis through the mean it reaches as far as `deviations` standard deviations (n − 1 in the denominator) of the points'
    projections. Empty for fewer than three points.
    """
    if len(points) < 3:
        return []
    values = np.asarray(points, dtype=np.float64)
    sizes, axes = np.linalg.eigh(np.cov(values.T))
    around = np.linspace(0, 2 * np.pi, corners + 1)
    circle = np.stack([np.cos(around), np.sin(around)])
    shape = axes @ (deviations * np.sqrt(np.maximum(sizes, 0))[:, None] * circle) + values.mean(0)[:, None]
    return [(float(x), float(y)) for x, y in shape.T]
