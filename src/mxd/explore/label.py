"""``mxd label RUN``: names and scores for units, written into the databases of their students.

Statistical labels are made for all units at once; labels by a language model unit by unit, the most important first. The same command
goes on where an earlier one ended, whatever ended it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..checkpoint import Run
from ..endpoint import address
from ..errors import ConfigError, RunError
from ..unit_config import LabelConfig
from . import detection, schema, statistical
from .by_model import by_model
from .codes import Codes
from .detection import Text
from .labelling import Bars, Student, Subject, chosen, labels, spread, write, writing
from .store import TextStore, UnitStore, units_path

AT_ONCE = 500
"""Statistical labels written in one transaction."""


def label(run: Run, config: LabelConfig, bars: Bars, say: Callable[[str], None]) -> None:
    """Label units of a run that `mxd collect` has read.

    Args:
        bars: progress.
        say: called with lines for the user: what it will cost, what was done.

    Raises:
        ConfigError: options that cannot work.
        RunError: there is nothing to label, or the endpoint cannot be used; what was labelled before stays.
        Spent: what may be spent is spent.
    """
    check(config)
    text_store = TextStore(run)
    text = Text.read(text_store)
    subject = Subject(text, text_store, text.windows(testing=True), _students(run, config, text))
    try:
        _statistical(subject, config, bars, say)
        if config.endpoint:
            by_model(run, subject, config, bars, say)
    finally:
        text_store.close()
        for student in subject.students:
            student.store.close()


def check(config: LabelConfig) -> None:
    """Refuse options that cannot work, before anything is read.

    Raises:
        ConfigError: which, and why.
    """
    if bool(config.endpoint) != bool(config.model):
        has, lacks = ("--endpoint", "--model") if config.endpoint else ("--model", "--endpoint")
        raise ConfigError(f"{has} without {lacks}", expected="both, or neither", next=f"add {lacks}")
    if config.endpoint:
        address(config.endpoint)
    if config.model == statistical.AUTHOR:
        raise ConfigError("a model of that name cannot be told from no model", expected="another --model", got=config.model)
    for name in ("max_tokens", "max_cost", "price_in", "price_out", "requests_per_minute"):
        value, option = getattr(config, name), f"--{name.replace('_', '-')}"
        if value is not None and not config.endpoint:
            raise ConfigError(f"{option} without --endpoint", expected="an endpoint that is asked", next="add --endpoint and --model")
        if value is not None and not (value >= 0 if name.startswith("price") else value > 0):
            raise ConfigError(f"{option} makes no sense", expected="a positive number", got=str(value))
    if config.max_cost is not None and (config.price_in is None or config.price_out is None):
        raise ConfigError("--max-cost without prices", expected="prices of a million tokens", next="add --price-in and --price-out")
    if config.units and config.top is not None:
        raise ConfigError("--units and --top", expected="one of them", next="leave one out")
    if config.by not in schema.COLUMNS:
        raise ConfigError("no such column in --by", expected=", ".join(schema.COLUMNS), got=config.by)
    counts = (("top", config.top), ("parallel", config.parallel), ("timeout", config.timeout), ("reply-tokens", config.reply_tokens))
    for name, value in counts:
        if value is not None and not value > 0:
            raise ConfigError(f"--{name} makes no sense", expected="a positive number", got=str(value))


def _students(run: Run, config: LabelConfig, text: Text) -> list[Student]:
    names = list(config.students) or [record.name for record in run.students if units_path(run, record.name).is_file()]
    if not names:
        raise RunError(f"nothing was collected about the units of {run.path}", next=f"mxd collect {run.path}")
    found: list[Student] = []
    for name in names:
        store, codes = UnitStore(run, name), Codes(run, name)
        if (text.ids.shape, store.n_units) != ((codes.sequences, codes.tokens_per_sequence), codes.n_units):
            raise RunError(
                f"the codes of {name} are of another collection than its database",
                expected=f"{store.n_units} units on {text.ids.shape[0]} sequences of {text.ids.shape[1]} tokens",
                got=f"{codes.n_units} on {codes.sequences} of {codes.tokens_per_sequence}",
                next=f"mxd collect {run.path} --overwrite",
            )
        for unit in config.units:
            store.check_unit(unit)
        found.append(Student(name, store, codes))
    return found


def _statistical(subject: Subject, config: LabelConfig, bars: Bars, say: Callable[[str], None]) -> None:
    """Statistical labels for the units that have none: with a model too, so that every unit has a name."""
    known: statistical.Known | None = None
    for student in subject.students:
        have = set() if config.overwrite else {unit for (unit,) in labels(student, "unit", statistical.AUTHOR)}
        asked = range(student.store.n_units) if config.endpoint and not config.units else chosen(student, config)
        units = sorted(set(asked) - have)
        if config.dry_run:
            say(f"{student.name}: {len(units):,} statistical labels to make")
        elif units:
            known = known or statistical.Known(subject.text, subject.store)
            scores = _write_statistical(known, student, units, config.seed, bars)
            say(f"{student.name}: {len(units):,} statistical labels, {spread(scores)}")


def _write_statistical(known: statistical.Known, student: Student, units: list[int], seed: int, bars: Bars) -> list[float]:
    """Make and write the labels of these units; returns the scores."""
    scores: list[float] = []
    with writing(student) as database, bars(f"statistical labels of {student.name}", len(units)) as bar:
        for at in range(0, len(units), AT_ONCE):
            rows: list[tuple[Any, ...]] = []
            for unit in units[at : at + AT_ONCE]:
                made = statistical.label(known, *student.codes.active(unit), detection.dice(seed, unit, "detection"))
                rows.append((unit, statistical.AUTHOR, made.text, "statistical", "", made.detection, made.n, None, None))
                scores += [] if made.detection is None else [made.detection]
            write(database, rows)
            bar.update(at + len(rows))
    return scores
