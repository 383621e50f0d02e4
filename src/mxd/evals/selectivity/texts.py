"""The texts of the selectivity test: as many of each class, each cut to its first tokens."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from ... import labelled
from ...config import EvalConfig
from ...errors import TextError
from ...text import Split

if TYPE_CHECKING:
    from ...host import Host

TASK = "language"
"""The labelled task whose classes are told apart."""
TOKENS = 64
"""Length of every text, BOS included; shorter ones are left out."""
CHOOSE = 64
"""Texts of each class on which units are chosen."""
AT_LEAST = 8
"""A class with fewer texts, to choose or to measure on, is left out: no interval would mean anything."""


class Labelled(NamedTuple):
    """Token ids and classes."""

    ids: Int[Tensor, "text position"]
    """int64; BOS first where the tokenizer has one."""
    labels: Int[Tensor, " text"]
    """Number of the class, int64."""


class Texts(NamedTuple):
    """What units are chosen on, and what is measured on: no text is in both."""

    task: str
    """Name of the labelled task."""
    classes: tuple[str, ...]
    """Names of the classes, in the order of the labels."""
    choose: Labelled
    """To choose units on: training and validation texts; training texts alone where the figures are on validation texts."""
    measure: Labelled
    """To measure on: texts of the split that is evaluated."""
    skipped: dict[str, str]
    """Classes that were left out, and why."""


def read_texts(host: Host, config: EvalConfig) -> Texts:
    """Texts of every class that has enough of them, drawn at random (by the seed) from the splits of the task.

    Raises:
        TextError: fewer than two classes have enough texts.
    """
    task = labelled.task(TASK)
    splits: tuple[Split, ...] = ("train", "validation") if config.split == "test" else ("train",)
    choose = [sample for split in splits for sample in task.split(split)]
    measure = task.split("validation" if config.split == "validation" else "test")
    tokens = min(TOKENS, host.max_tokens or TOKENS)
    found: dict[str, tuple[list[list[int]], list[list[int]]]] = {}
    skipped: dict[str, str] = {}
    for name in task.classes:
        first = _cut(host, (s.text for s in _drawn(choose, name, config.seed)), tokens, CHOOSE)
        then = _cut(host, (s.text for s in _drawn(measure, name, config.seed)), tokens, config.selectivity_documents)
        if min(len(first), len(then)) < AT_LEAST:
            skipped[name] = f"{len(first)} texts of {tokens} tokens to choose on, {len(then)} to measure on; {AT_LEAST} of each are needed"
        else:
            found[name] = (first, then)
    if len(found) < 2:
        what = "; ".join(f"{name}: {why}" for name, why in skipped.items())
        raise TextError("too few texts for selectivity", expected="two classes or more", got=what or "no classes")
    return Texts(TASK, tuple(found), _labelled(rows for rows, _ in found.values()), _labelled(rows for _, rows in found.values()), skipped)


def _drawn(samples: Iterable[labelled.Sample], name: str, seed: int) -> list[labelled.Sample]:
    own = [sample for sample in samples if sample.label == name]
    random.Random(f"{name}/{seed}").shuffle(own)
    return own


def _cut(host: Host, texts: Iterable[str], tokens: int, number: int) -> list[list[int]]:
    """The first `tokens` of the first `number` of texts that have as many."""
    bos = host.tokenizer.bos_token_id
    rows: list[list[int]] = []
    for text in texts:
        if len(rows) == number:
            break
        ids = ([] if bos is None else [int(bos)]) + host.encode(text)
        if len(ids) >= tokens:
            rows.append(ids[:tokens])
    return rows


def _labelled(classes: Iterable[list[list[int]]]) -> Labelled:
    rows = [(ids, number) for number, own in enumerate(classes) for ids in own]
    return Labelled(torch.tensor([ids for ids, _ in rows]), torch.tensor([number for _, number in rows]))
