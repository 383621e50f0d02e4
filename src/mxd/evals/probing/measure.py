"""Sparse probing: does a single unit know a property of the text? One-against-all logistic regressions on one, two and five units.

Protocol, ours and the published one: docs/evaluation.md. Controls pass through the same functions as the students: the host's own
neurons, as many random directions, shuffled labels; a probe on the whole of y is the ceiling.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ... import labelled
from ...config import EvalConfig
from ...errors import ConfigError, MxdError
from ...labelled import Sample, Task
from ...layers import LAYERS, SparseLayer
from ...ops import topk_gate
from ..parts import Found, Part, Subject, missing
from ..trained_on import trained_on
from . import probes
from .figures import Row, figures_of
from .probes import Features, Outcome, Roles
from .read import Codes, Dense, Linear, Piece, Reading, Side, codes, layer_codes, piece_of, scores
from .show import show

if TYPE_CHECKING:
    from ...host import Host

log = logging.getLogger("mxd")

SIZES = (1, 2, 5)
"""Units per probe."""
RANDOM_SEED = 7919
"""Added to the seed for random directions, 1 more for shuffled labels."""


class Loaded(NamedTuple):
    """One task as it is probed."""

    task: Task
    classes: list[str]
    """Those with enough samples."""
    skipped: dict[str, str]
    """The others, and why."""
    rows: NDArray[np.int64]
    """Row in the `Reading` of every sample."""
    labels: NDArray[np.int64]
    """Number of its class."""
    groups: list[str]
    """Its group."""
    roles: Roles

    def one_against_all(self, labels: NDArray[np.int64] | None = None) -> NDArray[np.bool_]:
        """[class, sample]; of `labels` if given."""
        return (self.labels if labels is None else labels) == np.arange(len(self.classes))[:, None]


class Texts(NamedTuple):
    """The tasks and the host's reading of them: shared by the students of a hookpoint."""

    tasks: dict[str, Loaded]
    skipped: dict[str, str]
    """Tasks that could not be had, and why."""
    reading: Reading


def measure(subject: Subject) -> Found:
    """The probes of one student and of the controls beside it.

    Raises:
        ConfigError: as `probes.check`.
        MxdError: none of the tasks could be had.
    """
    probes.check(subject.config)
    layer = subject.layer
    if not layer.n_units:
        return missing(f"the {layer.kind} control has no units")
    hook = subject.hookpoint
    texts = subject.shared.get((hook, "texts"), lambda: _texts(subject))
    side: Side = layer.reads
    subject.say(0.61, "codes")
    pre = scores(layer, texts.reading.mean(side))
    own: dict[str, Features] = {} if pre is None else {"pre": pre}
    code = own["code"] = layer_codes(layer, texts.reading, lambda share: subject.say(0.61 + 0.08 * share, "codes"))
    k = control_k(layer, code.l0)
    random = subject.shared.get((hook, "random", side, layer.n_units, k), lambda: _random_rows(subject, texts, side, k))
    neurons = subject.shared.get((hook, "neurons"), lambda: _neurons(subject.host, hook, texts.reading))
    found: dict[str, Any] = {}
    for number, (name, loaded) in enumerate(texts.tasks.items()):
        subject.say(0.8 + 0.2 * number / len(texts.tasks), f"probes of {name}")
        rows = _probe(subject, loaded, "student", own) + _shuffled(subject, loaded, own) + random[name]
        rows += subject.shared.get((hook, "neurons", name), lambda t=loaded: _probe(subject, t, "neurons", neurons))
        rows += subject.shared.get((hook, "dense", name), lambda t=loaded: _dense(texts.reading, t))
        found[name] = {**_about(loaded), **figures_of(loaded.classes, rows, _test(loaded), subject.config)}
    return {"protocol": {**_protocol(subject, texts), "random_k": k}, "tasks": found, "skipped": texts.skipped}


def control_k(layer: SparseLayer, l0: float) -> int:
    """How many random units fire at a token: the layer's K, or, where its gate is a ReLU (K = n_units), as many as its own do on average.

    Of random directions about half are positive at any token: without TopK they would be a far denser code than the student's.
    """
    return layer.k if layer.k < layer.n_units else max(1, round(l0))


def _rule(config: EvalConfig) -> probes.Rule:
    return "paper" if config.suite == "paper" or config.probe_selection == "paper" else "ours"


def _protocol(subject: Subject, texts: Texts) -> dict[str, Any]:
    pieces = texts.reading.pieces
    return {
        "selection": _rule(subject.config),
        "samples_per_class": subject.config.probe_samples_per_class,
        "measured_on": subject.config.split,
        "candidates": probes.CANDIDATES,
        "texts": len(pieces),
        "tokens": sum(piece.end - piece.begin for piece in pieces),
        "split_rule": labelled.SPLIT_RULE,
        "trained_on": trained_on(subject.run.info),
    }


def _texts(subject: Subject) -> Texts:
    """Read every task that can be had, once."""
    config = subject.config
    names = config.tasks or (labelled.PUBLISHED if subject.paper else labelled.DEFAULT)
    found: dict[str, tuple[Task, dict[labelled.Split, list[tuple[Sample, Piece]]]]] = {}
    skipped: dict[str, str] = {}
    for number, name in enumerate(names):
        subject.say(0.05 * number / len(names), f"texts of {name}")
        try:
            task = labelled.task(name)
        except MxdError as error:
            log.warning("probes of %s are left out: %s", name, error)
            skipped[name] = str(error)
            continue
        published = subject.paper and name in labelled.PUBLISHED
        chosen = task.chosen(labelled.PUBLISHED_PER_CLASS if published else config.probe_samples_per_class)
        found[name] = (task, {split: list(_pieces(subject, task, samples)) for split, samples in chosen.items()})
    if not found:
        raise ConfigError("no probing task could be had", expected="one of the tasks at least", got="; ".join(skipped.values()))
    pieces = [piece for _, chosen in found.values() for samples in chosen.values() for _, piece in samples]
    sides: list[Side] = sorted({subject.layer.reads, *(LAYERS[r.kind][0].reads for r in subject.run.students if r.kind in LAYERS)})
    reading = Reading(subject.host, subject.hookpoint, pieces, sides, lambda share: subject.say(0.05 + 0.55 * share, "reading texts"))
    return Texts({name: _load(task, chosen, reading, config) for name, (task, chosen) in found.items()}, skipped, reading)


def _pieces(subject: Subject, task: Task, samples: Sequence[Sample]) -> list[tuple[Sample, Piece]]:
    made = ((sample, piece_of(subject.host, task, sample, paper=subject.paper)) for sample in samples)
    return [(sample, piece) for sample, piece in made if piece is not None]


def _load(task: Task, chosen: dict[labelled.Split, list[tuple[Sample, Piece]]], reading: Reading, config: EvalConfig) -> Loaded:
    """Give the samples their roles. With ``--split validation`` the test texts stay unread: a quarter of the training groups chooses."""
    if config.split == "validation":
        train = chosen["train"]
        choosing = {s.id for s, _ in train if labelled.quarter_of(s) == 0}
        parts = [[p for p in train if p[0].id not in choosing], [p for p in train if p[0].id in choosing], chosen["validation"]]
    else:
        parts = [chosen["train"], chosen["validation"], chosen["test"]]
    classes, skipped = list[str](), dict[str, str]()
    for name in task.classes:
        have = [sum(sample.label == name for sample, _ in part) for part in parts]
        if have[0] < probes.LEAST_FIT or min(have[1:]) < probes.LEAST_OTHER:
            skipped[name] = f"too few samples: {have[0]} to fit, {have[1]} to choose, {have[2]} to test"
        else:
            classes.append(name)
    kept = [[pair for pair in part if pair[0].label in classes] for part in parts]
    every = [pair for part in kept for pair in part]
    ends = np.cumsum([0, *(len(part) for part in kept)])
    return Loaded(
        task,
        classes if len(classes) > 1 else [],
        skipped,
        np.array([reading.row[piece] for _, piece in every], dtype=np.int64),
        np.array([classes.index(sample.label) for sample, _ in every], dtype=np.int64),
        [sample.group for sample, _ in every],
        Roles(*(np.arange(a, b) for a, b in pairwise(ends))),
    )


def _test(loaded: Loaded) -> tuple[NDArray[np.bool_], list[str]]:
    """Labels [class, test sample] and groups of the test samples."""
    return loaded.one_against_all()[:, loaded.roles.test], [loaded.groups[i] for i in loaded.roles.test]


def _about(loaded: Loaded) -> dict[str, Any]:
    task, roles = loaded.task, loaded.roles
    return {
        "about": task.about,
        "level": task.level,
        "warning": task.warning,
        "skipped": loaded.skipped,
        "samples": {name: len(rows) for name, rows in zip(("fit", "choose", "test"), roles, strict=True)},
        "floor": [float(2 * p / (1 + p)) for p in _test(loaded)[0].mean(1)] if len(roles.test) else [],
    }


class _Of:
    """Features of the samples of one task, out of those of all pieces."""

    def __init__(self, features: Features, rows: NDArray[np.int64]) -> None:
        self._features, self._rows, self.n_units = features, rows, features.n_units

    def means(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        return self._features.means(self._rows[rows])

    def columns(self, rows: NDArray[np.int64], units: NDArray[np.int64]) -> NDArray[np.float64]:
        return self._features.columns(self._rows[rows], units)


def _rows(source: str, feature: str, found: dict[int, list[Outcome]]) -> list[Row]:
    return [Row(source, feature, size, outcomes) for size, outcomes in found.items()]


def _probe(subject: Subject, loaded: Loaded, source: str, features: dict[str, Features]) -> list[Row]:
    if not loaded.classes:
        return []
    rule, labels = _rule(subject.config), loaded.one_against_all()
    every = [_rows(source, key, probes.probe(_Of(f, loaded.rows), labels, loaded.roles, SIZES, rule)) for key, f in features.items()]
    return [row for rows in every for row in rows]


def _shuffled(subject: Subject, loaded: Loaded, features: dict[str, Features]) -> list[Row]:
    """The student's own units, chosen and fitted under permuted labels."""
    if not loaded.classes:
        return []
    labels = loaded.one_against_all(probes.shuffled(loaded.labels, loaded.roles, subject.config.seed + RANDOM_SEED + 1))
    found: list[Row] = []
    for key, f in features.items():
        found += _rows("shuffled", key, probes.probe(_Of(f, loaded.rows), labels, loaded.roles, (1,), _rule(subject.config)))
    return found


def _dense(reading: Reading, loaded: Loaded) -> list[Row]:
    if not loaded.classes:
        return []
    return [Row("dense", "y", 0, probes.dense(reading.y[loaded.rows], loaded.one_against_all(), loaded.roles))]


def _neurons(host: Host, hookpoint: str, reading: Reading) -> dict[str, Features]:
    """The host's own MLP: what its activation function receives, and its hidden vector (for a gated MLP the product of both halves)."""
    weights = host.weights(hookpoint)
    E, b = (weights.E, weights.b_E) if weights.E_gate is None else (weights.E_gate, weights.b_gate)
    bias = torch.zeros(E.shape[1]) if b is None else b
    gate = (E.t().double().cpu().numpy(), bias.double().cpu().numpy())
    return {"pre": Linear(reading.x, [gate]), "code": Dense(reading.neurons)}


def _random_rows(subject: Subject, texts: Texts, side: Side, k: int) -> dict[str, list[Row]]:
    """The probes of random units, by task: all that is kept of them, their codes are as large as those of a student."""
    features = _random(subject, texts, side, k)
    found: dict[str, list[Row]] = {}
    for number, (name, loaded) in enumerate(texts.tasks.items()):
        subject.say(0.77 + 0.03 * number / len(texts.tasks), f"probes of random units, {name}")
        found[name] = _probe(subject, loaded, "random", features)
    return found


def _random(subject: Subject, texts: Texts, side: Side, k: int) -> dict[str, Features]:
    """As many random directions as the student has units, on what it reads minus its mean over the fitting texts; k of them per token."""
    layer, mean = subject.layer, texts.reading.mean(side)
    rows = np.unique(np.concatenate([loaded.rows[loaded.roles.fit] for loaded in texts.tasks.values()]))
    centre = mean[rows].mean(0) if len(rows) else mean.mean(0)
    rng = np.random.default_rng(subject.config.seed + RANDOM_SEED)
    weight = rng.standard_normal((layer.n_units, mean.shape[1])) / np.sqrt(mean.shape[1])
    device = subject.host.device
    W, c = (torch.as_tensor(part, dtype=torch.float32, device=device) for part in (weight, centre))

    def encode(tokens: Tensor) -> tuple[Tensor, Tensor]:
        return topk_gate(tokens - c, W, torch.zeros(len(W), device=device), k)

    def say(share: float) -> None:
        subject.say(0.69 + 0.08 * share, "codes of random units")

    made: Codes = codes(encode, texts.reading, side, layer.n_units, say)
    return {"pre": Linear(mean - centre, [(weight, np.zeros(len(weight)))]), "code": made}


PART = Part("probes", 2, ("tasks", "probe_samples_per_class", "probe_selection"), measure, show)
"""The part as `mxd.evals.suite` lists it."""
