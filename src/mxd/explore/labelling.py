"""What labelling needs of a run, which units are meant, and how labels get into the database of a student while others read it."""

from __future__ import annotations

import contextlib
import sqlite3
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, RunError
from ..unit_config import LabelConfig
from . import schema
from .codes import Codes
from .detection import Text
from .store import TextStore, UnitStore, now

TOP = 200
"""Units that a model labels where nothing else is said."""


class Bar(Protocol):
    """How far the work is."""

    def update(self, done: int, note: str = "") -> None: ...


Bars = Callable[[str, int], contextlib.AbstractContextManager[Bar]]
"""A bar for a word on what is being done, and the number of units."""


class Student(NamedTuple):
    """What is needed of one student."""

    name: str
    store: UnitStore
    codes: Codes


class Subject(NamedTuple):
    """What is needed of a run."""

    text: Text
    store: TextStore
    held_out: NDArray[np.int64]
    students: list[Student]


def chosen(student: Student, config: LabelConfig) -> list[int]:
    """The units that were asked for."""
    if config.units:
        return list(dict.fromkeys(config.units))
    if config.top is None and not config.endpoint:
        return list(range(student.store.n_units))
    columns = student.store.columns((config.by, "fires"))
    order, fires = columns[config.by], columns["fires"]
    there = np.flatnonzero((fires >= schema.RARE) & ~np.isnan(order))
    if not len(there) and (fires >= schema.RARE).any():
        raise ConfigError(
            f"--by {config.by} is not known of any unit of {student.name}", expected="a column with numbers", next="--by fires"
        )
    return there[np.argsort(-order[there], kind="stable")][: config.top or TOP].tolist()


def labels(student: Student, what: str, author: str) -> list[Any]:
    """Columns of the labels by one author."""
    return student.store.ask(f"SELECT {what} FROM label WHERE author = ?", (author,), seconds=10)


@contextlib.contextmanager
def writing(student: Student) -> Iterator[sqlite3.Connection]:
    """A second connection to a student's database, which was checked when it was opened for reading."""
    path: Path = student.store.path
    database = sqlite3.connect(f"{path.resolve().as_uri()}?mode=rw", uri=True, isolation_level=None, timeout=30)
    try:
        database.execute("PRAGMA trusted_schema = 0")
        yield database
    except sqlite3.Error as error:
        raise RunError(f"labels cannot be written into {path}", got=str(error), next="the same command goes on from here") from None
    finally:
        database.close()


def write(database: sqlite3.Connection, rows: Sequence[tuple[Any, ...]]) -> None:
    """Write labels and what follows from them, in one short transaction: others may be reading."""
    created = now()
    best = "SELECT {} FROM label WHERE unit = ?1 AND detection IS NOT NULL ORDER BY method = 'statistical', created DESC LIMIT 1"
    database.execute("BEGIN IMMEDIATE")
    try:
        database.executemany("INSERT OR REPLACE INTO label VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", [(*row, created) for row in rows])
        database.executemany(
            f"UPDATE unit SET score = ({best.format('detection')}), score_n = ({best.format('detection_n')}) WHERE unit = ?1",
            [(row[0],) for row in rows],
        )
        database.execute("INSERT OR REPLACE INTO meta VALUES ('updated', ?)", (created,))
        database.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            database.execute("ROLLBACK")
        raise


def spread(scores: Sequence[float]) -> str:
    """A line on the scores of many labels."""
    if not scores:
        return "none with a score"
    low, high = np.quantile(scores, (0.05, 0.95))
    return f"{len(scores):,} with a score: detection {statistics.median(scores):.2f} (median; nine tenths from {low:.2f} to {high:.2f})"
