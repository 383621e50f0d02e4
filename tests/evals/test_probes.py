"""Probes on made-up features: scikit-learn's own answers, a planted unit, noise, shuffled labels, and a choice that never sees the test."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, f1_score

from mxd.config import EvalConfig
from mxd.errors import ConfigError
from mxd.evals.probing import probes
from mxd.evals.probing.probes import Roles, balanced_accuracy, best_thresholds, counts, f1, fit, probe
from mxd.evals.probing.read import Dense

N = 600
ROLES = Roles(np.arange(0, 360), np.arange(360, 480), np.arange(480, N))


def noise(units: int = 150, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((N, units))


def labels(classes: int = 3, seed: int = 1) -> np.ndarray:
    """Class numbers."""
    return np.random.default_rng(seed).integers(0, classes, N)


def one_against_all(numbers: np.ndarray) -> np.ndarray:
    return numbers == np.arange(numbers.max() + 1)[:, None]


@pytest.mark.parametrize(("features", "scale", "C"), [(1, 1.0, 1.0), (1, 1e-2, 1.0), (1, 100.0, 0.1), (4, 1.0, 10.0)])
def test_the_fit_is_that_of_scikit_learn(features: int, scale: float, C: float) -> None:
    rng = np.random.default_rng(features)
    values = scale * rng.standard_normal((7, 200, features))
    own = (values[..., 0] / scale + rng.standard_normal((7, 200)) > 0.8) & (np.arange(200) < 190)
    weights, intercepts = fit(values, own, C)
    for p in range(7):
        model = LogisticRegression(C=C, class_weight="balanced", solver="newton-cholesky", tol=1e-12, max_iter=200).fit(values[p], own[p])
        assert weights[p] == pytest.approx(model.coef_[0], rel=1e-6, abs=1e-9)
        assert intercepts[p] == pytest.approx(float(model.intercept_[0]), rel=1e-6, abs=1e-9)


def test_labels_that_a_feature_parts_still_have_a_finite_fit() -> None:
    values = np.concatenate([np.full(5, -1e3), np.full(5, 1e3)])[None, :, None]
    own = (values[..., 0] > 0).astype(bool)
    weight, intercept = fit(values, own)
    assert np.isfinite([weight[0, 0], intercept[0]]).all() and weight[0, 0] > 0


def test_a_constant_feature_has_no_weight() -> None:
    weight, intercept = fit(np.zeros((1, 20, 1)), np.arange(20)[None] < 5)
    assert weight[0, 0] == pytest.approx(0, abs=1e-12) and intercept[0] == pytest.approx(0, abs=1e-9), "balanced: even odds"


def test_one_class_alone_cannot_be_fitted() -> None:
    with pytest.raises(ValueError, match="samples of both classes"):
        fit(np.zeros((1, 4, 1)), np.ones((1, 4), dtype=bool))


def test_the_best_threshold_is_the_best_of_all() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, (50, 30)).astype(float)  # many ties
    own = rng.random((50, 30)) < 0.3
    own[:, 0] = True
    threshold, value = best_thresholds(scores, own)
    for p in range(50):
        every = [f1_score(own[p], scores[p] > t) for t in np.arange(-0.5, 6, 0.5)]
        assert value[p] == pytest.approx(max(every), abs=1e-12)
        assert f1_score(own[p], scores[p] > threshold[p]) == pytest.approx(value[p], abs=1e-12)


def test_counts_by_hand_and_scores_against_scikit_learn() -> None:
    predicted, own = np.array([1, 1, 0, 0, 1], dtype=bool), np.array([1, 0, 1, 0, 1], dtype=bool)
    sums = counts(predicted, own).sum(0)
    assert sums.tolist() == [2, 1, 1, 1]
    assert float(f1(sums)) == pytest.approx(f1_score(own, predicted)) == pytest.approx(2 / 3)
    assert float(balanced_accuracy(sums)) == pytest.approx(balanced_accuracy_score(own, predicted))
    assert float(f1(np.array([0.0, 3, 2, 1]))) == 0 and np.isnan(balanced_accuracy(np.array([2.0, 0, 0, 0])))


def score(outcomes: list[probes.Outcome], own: np.ndarray) -> list[float]:
    return [float(f1(counts(o.predicted, own[c, ROLES.test]).sum(0))) for c, o in enumerate(outcomes)]


@pytest.mark.parametrize("rule", ["ours", "paper"])
def test_a_planted_unit_is_found(rule: probes.Rule) -> None:
    numbers, values = labels(), noise()
    own = one_against_all(numbers)
    values[:, [7, 70, 149]] = 10.0 * own.T
    found = probe(Dense(values), own, ROLES, (1, 2, 5), rule)
    assert [o.units for o in found[1]] == [(7,), (70,), (149,)]
    for size in (1, 2, 5):
        assert score(found[size], own) == [1.0, 1.0, 1.0]
        assert all(len(set(o.units)) == size for o in found[size])
    assert all(unit in o.units for unit, o in zip((7, 70, 149), found[2], strict=True))


def test_two_units_that_need_each_other() -> None:
    """The label is a + b > 1: no single unit gives it, two together do."""
    rng, values = np.random.default_rng(3), noise()
    values[:, 20], values[:, 30] = rng.standard_normal(N), rng.standard_normal(N)
    own = (values[:, 20] + values[:, 30] > 1)[None]
    own = np.concatenate([own, ~own])
    found = probe(Dense(values), own, ROLES)
    assert set(found[2][0].units) == {20, 30}
    assert score(found[2], own)[0] > 0.9 > 0.85 > score(found[1], own)[0]


def test_noise_is_near_the_floor() -> None:
    numbers = labels(2)
    own = one_against_all(numbers)
    found = probe(Dense(noise()), own, ROLES)
    base = own[0, ROLES.test].mean()
    for size in (1, 2, 5):
        assert np.mean(score(found[size], own)) < 2 * base / (1 + base) + 0.06
    assert max(o.chosen_f1 for o in found[1]) > np.mean(score(found[1], own)), "the figure it was chosen by is too good"


def test_the_published_rule_flatters_noise() -> None:
    own = one_against_all(labels(2))
    values = Dense(noise())
    accuracy: dict[str, float] = {}
    for rule in ("ours", "paper"):
        found = probe(values, own, ROLES, (1,), rule)[1]
        accuracy[rule] = float(np.mean([balanced_accuracy(counts(o.predicted, own[c, ROLES.test]).sum(0)) for c, o in enumerate(found)]))
        if rule == "paper":
            assert [o.chosen_f1 for o in found] == pytest.approx(score(found, own)), "what it is chosen by is what it reports"
    assert accuracy["paper"] > 0.55 > accuracy["ours"]


def test_the_choice_never_sees_the_test_labels() -> None:
    numbers, values = labels(), noise() + 0.7 * labels()[:, None] * (np.arange(150) % 4 == 0)
    garbled = numbers.copy()
    garbled[ROLES.test] = np.random.default_rng(9).integers(0, 3, len(ROLES.test))
    ours = [probe(Dense(values), one_against_all(n), ROLES) for n in (numbers, garbled)]
    for size in (1, 2, 5):
        for a, b in zip(ours[0][size], ours[1][size], strict=True):
            assert a.units == b.units and (a.predicted == b.predicted).all() and a.chosen_f1 == b.chosen_f1
    dense = [probes.dense(values, one_against_all(n), ROLES) for n in (numbers, garbled)]
    assert all((a.predicted == b.predicted).all() for a, b in zip(*dense, strict=True))
    paper = [probe(Dense(values), one_against_all(n), ROLES, (1,), "paper")[1] for n in (numbers, garbled)]
    assert [o.units for o in paper[0]] != [o.units for o in paper[1]], "the published rule does"


def test_nor_the_test_values() -> None:
    numbers, values = labels(), noise()
    other = values.copy()
    other[ROLES.test] = 1e3
    found = [probe(Dense(v), one_against_all(numbers), ROLES) for v in (values, other)]
    assert [[o.units for o in found[0][k]] for k in (1, 2, 5)] == [[o.units for o in found[1][k]] for k in (1, 2, 5)]


def test_shuffled_labels_are_at_chance_even_with_a_planted_unit() -> None:
    numbers, values = labels(2), noise()
    own = one_against_all(numbers)
    values[:, :2] = 10.0 * own.T
    mixed = probes.shuffled(numbers, ROLES, 0)
    assert (mixed[ROLES.test] == numbers[ROLES.test]).all() and (mixed[ROLES.fit] != numbers[ROLES.fit]).any()
    for rows in (ROLES.fit, ROLES.choose):
        assert sorted(mixed[rows]) == sorted(numbers[rows])
    found = probe(Dense(values), one_against_all(mixed), ROLES, (1,))
    accuracy = [float(balanced_accuracy(counts(o.predicted, own[c, ROLES.test]).sum(0))) for c, o in enumerate(found[1])]
    assert np.mean(accuracy) == pytest.approx(0.5, abs=0.1)
    assert (probes.shuffled(numbers, ROLES, 0) == mixed).all() and (probes.shuffled(numbers, ROLES, 1) != mixed).any()


def test_the_scale_of_a_unit_does_not_matter_to_ours() -> None:
    """Of the candidates: which units those are depends on the scale, as published."""
    own, values = one_against_all(labels()), noise(90) + labels()[:, None] * (np.arange(90) == 4)
    scales = 10.0 ** np.random.default_rng(0).integers(-6, 6, 90)
    plain, scaled = probe(Dense(values), own, ROLES), probe(Dense(values * scales + 3 * scales), own, ROLES)
    assert all((a.predicted == b.predicted).all() for a, b in zip(plain[1], scaled[1], strict=True))


def test_candidates_are_the_hundred_largest_differences() -> None:
    own = one_against_all(labels(2))
    values = np.zeros((N, 250))
    values[own[0]] = np.arange(250)
    found = probes.candidates(Dense(values), own, ROLES.fit)
    assert found[0].tolist() == list(range(249, 149, -1)) and found[1].tolist() == list(range(100)), "of the sign of the class"


def test_fewer_units_than_candidates() -> None:
    found = probe(Dense(noise(3)), one_against_all(labels()), ROLES)
    assert [len(found[size][0].units) for size in (1, 2, 5)] == [1, 2, 3]


def test_the_dense_probe_reads_what_no_unit_holds() -> None:
    values, direction = noise(60), np.random.default_rng(5).standard_normal(60)
    own = (values @ direction > 0)[None]
    own = np.concatenate([own, ~own])
    assert np.mean(score(probes.dense(values, own, ROLES), own)) > 0.8 > np.mean(score(probe(Dense(values), own, ROLES, (1,))[1], own))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tasks": ("language", "topik")}, r"unknown task in --tasks .*topic.*all: language, .*bias_in_bios.*got topik"),
        ({"probe_selection": "best"}, "unknown --probe-selection .*ours, paper.*got best"),
        ({"probe_samples_per_class": 39}, "--probe-samples-per-class is too small .*at least 40.*got 39"),
    ],
)
def test_what_cannot_be_asked_for(changed: dict[str, object], message: str) -> None:
    probes.check(EvalConfig())
    with pytest.raises(ConfigError, match=message):
        probes.check(replace(EvalConfig(), **changed))  # type: ignore[arg-type]
