"""Coherence of samples against cases by hand; its interval and its null; word vectors; the covariance ellipse."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from mxd.errors import ConfigError
from mxd.evals.steering import coherence as module
from mxd.evals.steering.coherence import coherence, count_words, ellipse, tfidf


def by_hand(vectors: np.ndarray) -> tuple[list[float], float, float]:
    """The definition, pair by pair."""
    units, samples = vectors.shape[:2]
    pairs = list(itertools.permutations(range(samples), 2))

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))

    alike = [[sum(cosine(vectors[u, i], vectors[v, j]) for i, j in pairs) / len(pairs) for v in range(units)] for u in range(units)]
    scores = [alike[u][u] - sum(alike[u][v] for v in range(units) if v != u) / (units - 1) for u in range(units)]
    between = [alike[u][v] for u, v in itertools.permutations(range(units), 2)]
    return scores, sum(alike[u][u] for u in range(units)) / units, sum(between) / len(between)


def test_the_definition_pair_by_pair() -> None:
    vectors = np.random.default_rng(0).normal(size=(5, 3, 4))
    found = coherence(vectors, resamples=200, seed=0)
    scores, within, between = by_hand(vectors)
    assert found.units.tolist() == pytest.approx(scores, rel=1e-12)
    assert (found.within, found.between) == pytest.approx((within, between), rel=1e-12)
    assert found.mean.value == pytest.approx(within - between, rel=1e-12) == pytest.approx(float(np.mean(scores)), rel=1e-12)


def test_three_cases_by_hand() -> None:
    axes = np.eye(4)
    apart = np.repeat(axes[:, None], 3, axis=1)  # each unit its own direction, all its samples the same
    found = coherence(apart, resamples=200, seed=0)
    assert found.units.tolist() == pytest.approx([1.0] * 4, abs=1e-12) and (found.mean.low, found.mean.high) == pytest.approx((1, 1))
    opposite = np.stack([np.tile(axes[0], (3, 1)), np.tile(-axes[0], (3, 1))])
    assert coherence(opposite, resamples=50, seed=0).mean.value == pytest.approx(2.0, abs=1e-12)
    same = np.ones((6, 3, 2))
    found = coherence(same, resamples=50, seed=0)
    assert found.mean.value == pytest.approx(0.0, abs=1e-12) and found.p == 1.0
    assert found.within == pytest.approx(1.0) and found.between == pytest.approx(1.0)


def test_what_a_seed_shares_is_no_coherence() -> None:
    """Adversarial: units do nothing, and the samples differ by their seed alone; comparing all pairs would give −1/3 and not 0."""
    by_seed = np.repeat(np.eye(3)[None], 5, axis=0)
    found = coherence(by_seed, resamples=50, seed=0)
    assert found.mean.value == pytest.approx(0.0, abs=1e-12) and found.p == 1.0
    rng = np.random.default_rng(1)
    noisy = 5 * rng.normal(size=(1, 4, 30)) + rng.normal(size=(20, 4, 30))
    found = coherence(noisy, resamples=500, seed=0)
    assert abs(found.mean.value) < 0.02 and found.p > 0.05


def test_random_vectors_are_not_coherent_and_planted_ones_are() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(40, 4, 50))
    found = coherence(noise, resamples=1000, seed=0)
    assert found.mean.low < 0 < found.mean.high and abs(found.mean.value) < 0.02 and found.p > 0.05
    planted = coherence(noise + 2 * rng.normal(size=(40, 1, 50)), resamples=1000, seed=0)
    assert planted.mean.low > 0.7 and planted.p == 1 / (module.PERMUTATIONS + 1)
    assert planted.mean.value == pytest.approx(0.8, abs=0.02), "4 / (4 + 1)"


def test_the_null_holds_its_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PERMUTATIONS", 199)
    found = [coherence(np.random.default_rng(s).normal(size=(6, 3, 8)), resamples=2, seed=s).p for s in range(120)]
    assert 0.35 < np.mean(found) < 0.65 and 0.005 < np.mean([p <= 0.05 for p in found]) < 0.12


def test_the_interval_covers_other_draws_of_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PERMUTATIONS", 1)
    truth, inside = 1 / 5, 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        vectors = rng.normal(size=(25, 4, 60)) + 0.5 * rng.normal(size=(25, 1, 60))
        low, high = coherence(vectors, resamples=400, seed=seed).mean[1:]
        inside += low < truth < high
    assert inside / 60 > 0.85


def test_same_seed_same_bits_and_length_does_not_count() -> None:
    vectors = np.random.default_rng(0).normal(size=(5, 3, 4))
    first, second = (coherence(vectors, resamples=100, seed=3) for _ in range(2))
    assert first[1:] == second[1:] and first.units.tobytes() == second.units.tobytes()
    assert coherence(vectors, resamples=100, seed=4).mean[1:] != first.mean[1:]
    longer = coherence(vectors * np.arange(1, 6)[:, None, None], resamples=100, seed=3)
    assert longer.mean.value == pytest.approx(first.mean.value, rel=1e-12)


def test_a_vector_of_zeros_is_like_none() -> None:
    vectors = np.zeros((2, 2, 3))
    vectors[0] = [[1, 0, 0], [1, 0, 0]]
    assert coherence(vectors, resamples=20, seed=0).units.tolist() == pytest.approx([1.0, 0.0])


@pytest.mark.parametrize("shape", [(1, 4, 3), (4, 1, 3)])
def test_too_little_to_compare(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match=r"^too little to compare \| expected at least 2 units and 2 samples of each \| got \d and \d$"):
        coherence(np.ones(shape), resamples=10, seed=0)


def test_word_vectors_by_hand() -> None:
    words = count_words([[1, 1, 2], [1, 3]])
    assert words.pieces == 2 and dict(words.seen) == {1: 2, 2: 1, 3: 1}
    found = tfidf([[1, 2, 2], [7]], words)
    rare, rarer = math.log(3 / 2) + 1, math.log(3) + 1
    assert found.tolist() == [pytest.approx([1.0, 2 * rare, 0.0]), pytest.approx([0.0, 0.0, rarer])]


def test_ellipse_by_hand() -> None:
    assert ellipse([(0, 0), (1, 1)]) == []
    edge = ellipse([(-3, 1), (3, 1), (0, 3), (0, -1)], corners=4)
    # variances 18/3 and 8/3 around (0, 1), without covariance
    corners = [(-math.sqrt(6), 1.0), (0.0, 1 - math.sqrt(8 / 3)), (0.0, 1 + math.sqrt(8 / 3)), (math.sqrt(6), 1.0)]
    assert sorted((round(x, 9), y) for x, y in edge[:4]) == [pytest.approx(corner, abs=1e-9) for corner in corners]
    assert edge[0] == pytest.approx(edge[-1], abs=1e-12)
    cloud = np.random.default_rng(0).normal(size=(500, 2)) @ np.array([[2.0, 0.0], [1.5, 0.3]])
    inverse, middle = np.linalg.inv(np.cov(cloud.T)), cloud.mean(0)
    assert [float((p - middle) @ inverse @ (p - middle)) for p in np.array(ellipse(cloud.tolist(), 2.0))] == pytest.approx([4.0] * 61)
    flat = ellipse([(0, 0), (1, 1), (2, 2)])
    assert all(x == pytest.approx(y, abs=1e-7) for x, y in flat)
