"""Logistic regressions on a few features, many at once, and the choice among them: what stands behind the `probes` part.

A probe of one class against all others minimises ½|w|² + C Σ_i s_i log(1 + exp(−t_i (w·v_i + b))), t_i = ±1, with class weights
s_i = n / (2 n_class) (scikit-learn's "balanced"); the intercept is not penalised. Newton's method, batched over problems.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Float64, Int64
from numpy.typing import NDArray

from ... import labelled
from ...config import EvalConfig
from ...errors import ConfigError, nearest

CANDIDATES = 100
"""Units with the largest difference of class means that a probe is fitted to (published protocol)."""
PRUNED = (100, 30, 10, 5, 2)
"""Numbers of units kept, one after the other, on the way to a probe of 5 and of 2 units."""
ITERATIONS = 200
"""Newton steps at most."""
TOLERANCE = 1e-10
"""Largest gradient at which a fit has converged."""

LEAST_FIT, LEAST_OTHER = 20, 8
"""A class with fewer samples to fit on, or to choose on, or to test on, is skipped."""
SELECTIONS = ("ours", "paper")

Array = NDArray[np.float64]
Rule = Literal["ours", "paper"]


def check(config: EvalConfig) -> None:
    """Raise `ConfigError` for an unknown task or rule of selection, or too few samples."""
    for name in config.tasks:
        if name not in labelled.TASKS:
            every = f"{nearest(name, labelled.TASKS)}; all: {', '.join(labelled.TASKS)}"
            raise ConfigError("unknown task in --tasks", expected=every, got=name)
    if config.probe_selection not in SELECTIONS:
        raise ConfigError("unknown --probe-selection", expected=", ".join(SELECTIONS), got=config.probe_selection)
    if config.probe_samples_per_class < 5 * LEAST_OTHER:
        least = f"at least {5 * LEAST_OTHER}"
        raise ConfigError("--probe-samples-per-class is too small", expected=least, got=str(config.probe_samples_per_class))


class Features(Protocol):
    """One number per sample and unit, in whichever form it is kept."""

    n_units: int

    def means(self, rows: Int64[np.ndarray, " row"]) -> Float64[np.ndarray, " n_units"]:
        """The mean of every unit over these samples."""
        ...

    def columns(self, rows: Int64[np.ndarray, " row"], units: Int64[np.ndarray, " unit"]) -> Float64[np.ndarray, "row unit"]:
        """The values of some units on these samples."""
        ...


class Roles(NamedTuple):
    """Which samples serve what: numbers of samples, no sample twice."""

    fit: Int64[np.ndarray, " fit"]
    """Candidates and weights."""
    choose: Int64[np.ndarray, " choose"]
    """The unit and the threshold."""
    test: Int64[np.ndarray, " test"]
    """The figures."""


class Outcome(NamedTuple):
    """One probe of one class."""

    units: tuple[int, ...]
    """The units it reads."""
    predicted: Bool[np.ndarray, " test"]
    """Its answer on the test samples."""
    chosen_f1: float
    """F1 on the samples it was chosen on (in sample: no estimate)."""


def fit(
    values: Float64[np.ndarray, "problem sample feature"], labels: Bool[np.ndarray, "problem sample"], C: float = 1.0
) -> tuple[Float64[np.ndarray, "problem feature"], Float64[np.ndarray, " problem"]]:
    """Weights and intercepts of one logistic regression per problem.

    Raises:
        ValueError: a problem whose labels are all the same.
    """
    positive = labels.sum(1, keepdims=True)
    n = labels.shape[1]
    if not positive.all() or (positive == n).any():
        raise ValueError("a logistic regression needs samples of both classes")
    weight = C * np.where(labels, n / (2 * positive), n / (2 * (n - positive)))
    design = np.concatenate([values, np.ones((*values.shape[:2], 1))], 2)
    ridge = np.ones(design.shape[2])
    ridge[-1] = 0
    sign = np.where(labels, 1.0, -1.0)
    found = np.zeros((len(design), design.shape[2]))

    def loss(theta: Array, rows: NDArray[np.int64]) -> Array:
        margin = sign[rows] * (design[rows] @ theta[..., None])[..., 0]
        return 0.5 * (ridge * theta**2).sum(1) + (weight[rows] * np.logaddexp(0, -margin)).sum(1)

    open_ = np.arange(len(design))
    for _ in range(ITERATIONS):
        theta, x, s = found[open_], design[open_], weight[open_]
        probability = _sigmoid((x @ theta[..., None])[..., 0])
        residual = s * (probability - labels[open_])
        gradient = (x.transpose(0, 2, 1) @ residual[..., None])[..., 0] + ridge * theta
        going = np.abs(gradient).max(1) > TOLERANCE * n
        if not going.any():
            break
        open_, theta, gradient, x = open_[going], theta[going], gradient[going], x[going]
        curvature = (s * probability * (1 - probability))[going]
        hessian = x.transpose(0, 2, 1) @ (curvature[..., None] * x) + np.diag(ridge + 1e-12)
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        before, slope = loss(theta, open_), (gradient * step).sum(1)
        length = np.ones(len(open_))
        for _ in range(30):  # halve the steps that do not descend (Armijo); a margin for rounding near the minimum
            worse = loss(theta - length[:, None] * step, open_) > before - 1e-4 * length * slope + 1e-12 * np.abs(before)
            if not worse.any():
                break
            length[worse] /= 2
        found[open_] = theta - length[:, None] * step
    return found[:, :-1], found[:, -1]


def _sigmoid(x: Array) -> Array:
    return 0.5 * (1 + np.tanh(0.5 * x))


def best_thresholds(
    scores: Float64[np.ndarray, "problem sample"], labels: Bool[np.ndarray, "problem sample"]
) -> tuple[Float64[np.ndarray, " problem"], Float64[np.ndarray, " problem"]]:
    """The threshold of each problem above which calling a sample positive has the largest F1, and that F1.

    Halfway between two neighbouring scores; equal scores are never parted. Of equal F1, the one that calls fewest positive.
    """
    order = np.argsort(-scores, axis=1, kind="stable")
    ranked, hits = np.take_along_axis(scores, order, 1), np.cumsum(np.take_along_axis(labels, order, 1), 1)
    n = scores.shape[1]
    f1 = 2 * hits / (np.arange(1, n + 1) + hits[:, -1:])
    f1[:, :-1][ranked[:, :-1] == ranked[:, 1:]] = -1  # no cut between equals
    cut = f1.argmax(1)
    rows = np.arange(len(scores))
    low = np.where(cut < n - 1, ranked[rows, np.minimum(cut + 1, n - 1)], ranked[:, -1] - 1)
    return (ranked[rows, cut] + low) / 2, f1[rows, cut]


def counts(
    predicted: Bool[np.ndarray, "*batch sample"], labels: Bool[np.ndarray, "*batch sample"]
) -> Float64[np.ndarray, "*batch sample 4"]:
    """For every sample: is it a true positive, false positive, false negative, true negative (0 or 1)."""
    found = [predicted & labels, predicted & ~labels, ~predicted & labels, ~predicted & ~labels]
    return np.stack(found, -1).astype(np.float64)


def f1(sums: Float64[np.ndarray, "*batch 4"]) -> Float64[np.ndarray, "*batch"]:
    """2 TP / (2 TP + FP + FN); 0 where there is no true positive."""
    tp, fp, fn, _ = np.moveaxis(sums, -1, 0)
    return np.where(tp > 0, 2 * tp / np.maximum(2 * tp + fp + fn, 1), 0.0)


def balanced_accuracy(sums: Float64[np.ndarray, "*batch 4"]) -> Float64[np.ndarray, "*batch"]:
    """Mean of the shares of positives and of negatives that are recognised; NaN where there are none of either."""
    tp, fp, fn, tn = np.moveaxis(sums, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return 0.5 * (tp / (tp + fn) + tn / (tn + fp))


def candidates(features: Features, labels: Bool[np.ndarray, "class sample"], rows: Int64[np.ndarray, " row"]) -> list[NDArray[np.int64]]:
    """Per class, the units whose mean is most above that of the other classes, in that order; ties by number."""
    found: list[NDArray[np.int64]] = []
    for own in labels:
        gap = features.means(rows[own[rows]]) - features.means(rows[~own[rows]])
        found.append(np.argsort(-gap, kind="stable")[:CANDIDATES].astype(np.int64))
    return found


def probe(
    features: Features, labels: Bool[np.ndarray, "class sample"], roles: Roles, sizes: Sequence[int] = (1, 2, 5), rule: Rule = "ours"
) -> dict[int, list[Outcome]]:
    """Probes of `sizes` units for every class, by number of units.

    ``ours``: candidates and weights from `roles.fit` (features standardised there), unit and threshold from `roles.choose`. A probe of
    several units starts from all candidates and keeps those of largest weight, in the steps of `PRUNED`.
    ``paper``: candidates and weights from `roles.fit` and `roles.choose` together, features as they are, threshold at even odds, and
    the unit with the largest F1 on `roles.test` itself: an optimistic figure, for comparison with the published ones. Its probes of
    several units are chosen as ours are, and take the threshold at even odds.
    """
    train = roles.fit if rule == "ours" else np.concatenate([roles.fit, roles.choose])
    units = candidates(features, labels, train)
    every = [_standard(features, unit, roles, train, rule) for unit in units]
    fitted, choosing, tested = (np.stack(part) for part in zip(*every, strict=True))  # [class, sample, candidate]
    own = {name: labels[:, rows] for name, rows in (("train", train), ("choose", roles.choose), ("test", roles.test))}
    found: dict[int, list[Outcome]] = {}
    if 1 in sizes:
        found[1] = [
            _single(units[c], fitted[c], choosing[c], tested[c], {n: y[c] for n, y in own.items()}, rule) for c in range(len(labels))
        ]
    kept = np.tile(np.arange(fitted.shape[2]), (len(labels), 1))
    smallest = min((size for size in sizes if size > 1), default=CANDIDATES + 1)
    for size in (size for size in PRUNED if size >= smallest):
        if size < kept.shape[1]:
            weights = fit(np.take_along_axis(fitted, kept[:, None, :], 2), own["train"])[0]
            kept = np.take_along_axis(kept, np.argsort(-np.abs(weights), axis=1, kind="stable")[:, :size], 1)
        if size in sizes:
            parts = [np.take_along_axis(part, kept[:, None, :], 2) for part in (fitted, choosing, tested)]
            found[size] = _several(units, kept, parts, own, rule)
    return found


def _standard(
    features: Features, units: NDArray[np.int64], roles: Roles, train: NDArray[np.int64], rule: Rule
) -> tuple[Array, Array, Array]:
    """Values of the candidates on the samples of each role; ``ours``: minus the mean, over the deviation, of the training samples."""
    values = features.columns(train, units)
    others = [features.columns(rows, units) for rows in (roles.choose, roles.test)]
    if rule == "paper":
        return values, others[0], others[1]
    mean, deviation = values.mean(0), values.std(0)
    deviation[deviation < 1e-12 * np.maximum(np.abs(mean), 1e-30)] = 1  # a unit that is constant: nothing to scale
    first, second = ((other - mean) / deviation for other in others)
    return (values - mean) / deviation, first, second


def _single(units: NDArray[np.int64], train: Array, choose: Array, test: Array, own: dict[str, NDArray[np.bool_]], rule: Rule) -> Outcome:
    """The best of the candidates for one class; values are [sample, candidate]."""
    repeated = {name: np.tile(y, (train.shape[1], 1)) for name, y in own.items()}
    weight, intercept = fit(train.T[..., None], repeated["train"])
    scores = {name: part.T * weight + intercept[:, None] for name, part in (("choose", choose), ("test", test))}
    if rule == "paper":
        predicted = scores["test"] > 0
        values = f1(counts(predicted, repeated["test"]).sum(1))
    else:
        threshold, values = best_thresholds(scores["choose"], repeated["choose"])
        predicted = scores["test"] > threshold[:, None]
    best = int(values.argmax())
    return Outcome((int(units[best]),), predicted[best], float(values[best]))


def _several(
    units: list[NDArray[np.int64]], kept: NDArray[np.int64], parts: list[Array], own: dict[str, NDArray[np.bool_]], rule: Rule
) -> list[Outcome]:
    weight, intercept = fit(parts[0], own["train"])
    choose, test = ((p @ weight[..., None])[..., 0] + intercept[:, None] for p in parts[1:])
    threshold, value = best_thresholds(choose, own["choose"])
    if rule == "paper":
        threshold, value = np.zeros(len(units)), f1(counts(choose > 0, own["choose"]).sum(1))
    return [Outcome(tuple(int(u) for u in units[c][kept[c]]), test[c] > threshold[c], float(value[c])) for c in range(len(units))]


def dense(values: Float64[np.ndarray, "sample feature"], labels: Bool[np.ndarray, "class sample"], roles: Roles) -> list[Outcome]:
    """A probe on all features, per class: scikit-learn's, standardised, its C of .001, .01, .1, 1 and the threshold by `roles.choose`."""
    from sklearn.linear_model import LogisticRegression

    mean, deviation = values[roles.fit].mean(0), values[roles.fit].std(0)
    deviation[deviation == 0] = 1
    scaled = [(values[rows] - mean) / deviation for rows in roles]
    found: list[Outcome] = []
    for own in labels:
        best: Outcome | None = None
        for strength in (0.001, 0.01, 0.1, 1.0):
            model = LogisticRegression(C=strength, class_weight="balanced", max_iter=2000)
            model.fit(scaled[0], own[roles.fit])
            scores = [np.asarray(model.decision_function(part)) for part in scaled[1:]]
            threshold, value = best_thresholds(scores[0][None], own[roles.choose][None])
            if best is None or value[0] > best.chosen_f1:
                best = Outcome((), scores[1] > threshold[0], float(value[0]))
        assert best is not None
        found.append(best)
    return found


def shuffled(labels: NDArray[np.int64], roles: Roles, seed: int) -> NDArray[np.int64]:
    """Class numbers [sample] with those of `roles.fit` and of `roles.choose` permuted, each among themselves; the test's stay."""
    rng = np.random.default_rng(seed)
    found = labels.copy()
    for rows in (roles.fit, roles.choose):
        found[rows] = labels[rows][rng.permutation(len(rows))]
    return found
