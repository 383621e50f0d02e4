"""The SQLite files of ``runs/NAME/explore``: made whole or not at all, and read with checks, for they may come from a stranger."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import Run
from ..errors import RunError
from . import schema
from .spans import utf16

QUERY_SECONDS = 0.5
"""A query that takes longer is ended."""


def folder(run: Run) -> Path:
    """Where everything of this package lies in a run."""
    return run.path / "explore"


def text_path(run: Run) -> Path:
    return folder(run) / "text.sqlite"


def units_path(run: Run, student: str) -> Path:
    return folder(run) / f"{run.student(student).name}.sqlite"


def notes_path(run: Run) -> Path:
    return folder(run) / "notes.sqlite"


def now() -> str:
    """The time, ISO 8601 in UTC with microseconds: two saves differ."""
    return datetime.now(timezone.utc).isoformat()


@contextlib.contextmanager
def making(path: Path, tables: Mapping[str, str], meta: Mapping[str, str]) -> Iterator[sqlite3.Connection]:
    """A new database that takes the place of `path` when the context ends well, checked and flushed to disk before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.writing")
    beside.unlink(missing_ok=True)
    connection = sqlite3.connect(beside, isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode = OFF")
        connection.execute("PRAGMA synchronous = OFF")
        create(connection, tables)
        connection.execute("BEGIN")
        connection.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
        yield connection
        connection.execute("COMMIT")
        if connection.execute("PRAGMA quick_check").fetchone() != ("ok",):
            raise RunError(f"{path} could not be written", got="a database that fails its own check", next="mxd collect RUN --overwrite")
        connection.close()
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        connection.close()
        beside.unlink(missing_ok=True)


def create(connection: sqlite3.Connection, tables: Mapping[str, str]) -> None:
    """Make the tables, and mark the file as ours."""
    connection.execute(f"PRAGMA application_id = {schema.APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {schema.VERSION}")
    for statement in tables.values():
        connection.execute(statement)


class Database:
    """One file, opened for reading: shared by threads, one query at a time."""

    def __init__(self, path: Path, tables: Mapping[str, str], *, next: str) -> None:
        """
        Raises:
            RunError: there is none, it is not ours, of a newer format, or damaged; `next` is the command that makes it.
        """
        self.path, self._next, self._lock, self._deadline = path, next, threading.RLock(), float("inf")
        if not path.is_file():
            raise RunError(f"there is no {path.name} in this run", expected=str(path), next=next)
        try:
            _undo_half_a_write(path)
            self._connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, check_same_thread=False)
            self._connection.execute("PRAGMA query_only = 1")
            self._connection.execute("PRAGMA trusted_schema = 0")
            self._connection.set_progress_handler(lambda: time.monotonic() > self._deadline, 10_000)
            self._check(tables)
            self.meta: dict[str, str] = dict(self.ask("SELECT key, value FROM meta"))
        except sqlite3.Error as error:
            raise self.damaged(str(error)) from None

    def _check(self, tables: Mapping[str, str]) -> None:
        (application,), (version,) = (self._connection.execute(f"PRAGMA {name}").fetchone() for name in ("application_id", "user_version"))
        if application != schema.APPLICATION_ID:
            raise self.damaged("a database of another program")
        if version > schema.VERSION:
            raise RunError(
                f"{self.path} was written by a newer mxd",
                expected=f"version up to {schema.VERSION}",
                got=str(version),
                next="pip install --upgrade mxd",
            )
        found = {name: sql for name, sql in self._connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL")}
        if found != dict(tables):
            strange = sorted(name for name in {*found, *tables} if found.get(name) != tables.get(name))
            raise self.damaged(f"other tables than ours: {', '.join(strange)[:80]}")

    def ask(self, query: str, values: Sequence[Any] = (), *, seconds: float = QUERY_SECONDS) -> list[Any]:
        """All rows of a query.

        Raises:
            RunError: the file is damaged, or the query took longer than `seconds`.
        """
        with self._lock:
            self._deadline = time.monotonic() + seconds
            try:
                return self._connection.execute(query, values).fetchall()
            except sqlite3.Error as error:
                if "interrupted" in str(error):
                    raise RunError(
                        f"a search in {self.path.name} took too long", expected=f"{seconds:g} s", next="search for more"
                    ) from None
                raise self.damaged(str(error)) from None
            finally:
                self._deadline = float("inf")

    def damaged(self, why: str) -> RunError:
        return RunError(f"{self.path} is damaged", expected="a database that mxd collect wrote", got=why, next=f"{self._next} --overwrite")

    def numbers(self, blob: Any, kind: Any, count: int | None = None, most: int = 100_000) -> NDArray[Any]:
        """A blob as an array of `count` numbers, or of at most `most`.

        Raises:
            RunError: it is not.
        """
        size = np.dtype(kind).itemsize
        if not isinstance(blob, bytes) or len(blob) % size or len(blob) // size > most or count not in (None, len(blob) // size):
            raise self.damaged("a blob of another length")
        return np.frombuffer(blob, kind)

    def close(self) -> None:
        with self._lock:
            self._connection.close()


def _undo_half_a_write(path: Path) -> None:
    """What a writer of labels left half done when it was killed is taken back: SQLite can't do that for a connection that only reads."""
    if path.with_name(f"{path.name}-journal").is_file() and os.access(path, os.W_OK):
        with contextlib.closing(sqlite3.connect(path, timeout=5)) as writer:
            writer.execute("SELECT count(*) FROM sqlite_master").fetchone()


class Sequence_(NamedTuple):
    """One stored sequence."""

    seq: int
    ids: NDArray[np.uint32]
    text: str
    cuts: NDArray[np.uint32]
    """Where each token begins in `text`, in UTF-16 units; one more than tokens."""
    host_loss: NDArray[np.float32]
    """Nats, as the host predicted each token; NaN where not measured."""
    doc: int
    """Number of the document in which it begins."""


class TextStore(Database):
    """``text.sqlite``: the held-out sequences that were read."""

    def __init__(self, run: Run) -> None:
        super().__init__(text_path(run), schema.TEXT, next=f"mxd collect {run.path}")

    @cached_property
    def tokens(self) -> dict[int, str]:
        """The text of every token of the host's vocabulary, by id; of special ones their names."""
        return {token: text for token, text in self.ask("SELECT id, text FROM token", seconds=10) if isinstance(text, str)}

    @cached_property
    def special(self) -> frozenset[int]:
        """Ids of special tokens, which stand for no text."""
        return frozenset(token for (token,) in self.ask("SELECT id FROM token WHERE special"))

    def document(self, sequence: Sequence_, position: int) -> tuple[str, str]:
        """Name and source of the document that a token stands in: an end of text ends one, and itself belongs to it."""
        ends = int((sequence.ids[:position] == int(self.meta["eos"])).sum()) if "eos" in self.meta else 0
        rows = self.ask("SELECT name, source FROM doc WHERE doc = ?", (sequence.doc + ends,))
        if not rows or not all(isinstance(word, str) for word in rows[0]):
            raise self.damaged("a text of no document")
        return rows[0][0], rows[0][1]

    def sequence(self, seq: int) -> Sequence_:
        """
        Raises:
            RunError: there is none of this number, or it is damaged.
        """
        rows = self.ask("SELECT ids, text, cuts, host_loss, doc FROM seq WHERE seq = ?", (seq,))
        if not rows:
            raise RunError(
                f"no sequence {seq} in {self.path.name}", expected=f"0 to {int(self.meta.get('sequences', 0)) - 1}", got=str(seq)
            )
        ids, text, cuts, loss, doc = rows[0]
        ids = self.numbers(ids, "<u4")
        if not isinstance(text, str) or not isinstance(doc, int):
            raise self.damaged("a text that is none")
        cuts = self.numbers(cuts, "<u4", len(ids) + 1)
        length = utf16(text)
        if (np.diff(cuts.astype(np.int64)) < 0).any() or int(cuts[-1]) != length:
            raise self.damaged("tokens outside their text")
        return Sequence_(seq, ids, text, cuts, self.numbers(loss, "<f4", len(ids)), doc)


class UnitStore(Database):
    """``STUDENT.sqlite``: what was collected about the units of one student.

    `meta` holds: student, kind, k, hookpoint, n_units, tokens, sequences, documents, split, seed, weights_sha256, text_sha256,
    host_fingerprint, version, created, effect_tokens, log (a JSON object of seconds by stage).
    """

    def __init__(self, run: Run, student: str) -> None:
        super().__init__(units_path(run, student), schema.UNITS, next=f"mxd collect {run.path} --students {student}")
        try:
            self.n_units, self.tokens = int(self.meta["n_units"]), int(self.meta["tokens"])
        except (KeyError, ValueError) as error:
            raise self.damaged(f"no {error}") from None
        if not 0 <= self.n_units <= 2**24 or self.ask("SELECT count(*), min(unit), max(unit) FROM unit")[0] != (
            (self.n_units, 0, self.n_units - 1) if self.n_units else (0, None, None)
        ):
            raise self.damaged("another number of units than it says")

    def columns(self, names: Sequence[str] = schema.COLUMNS) -> dict[str, NDArray[np.float32]]:
        """Columns of the table of units, float32 [n_units], NaN where unknown.

        Raises:
            RunError: no such column.
        """
        for name in names:
            if name not in schema.COLUMNS:
                raise RunError(f"no column {name}", expected=", ".join(schema.COLUMNS), got=name)
        rows = self.ask(f"SELECT {', '.join(names)} FROM unit ORDER BY unit", seconds=10 * QUERY_SECONDS) if names else []
        try:
            table = np.array(rows, dtype=np.float32).reshape(self.n_units, len(names))
        except (TypeError, ValueError):
            raise self.damaged("a column that holds other things than numbers") from None
        return {name: np.ascontiguousarray(table[:, i]) for i, name in enumerate(names)}

    def check_unit(self, unit: int) -> int:
        """
        Raises:
            RunError: no such unit.
        """
        if not 0 <= unit < self.n_units:
            raise RunError(
                f"no unit {unit} in {self.meta.get('student')}", expected=f"a number from 0 to {self.n_units - 1}", got=str(unit)
            )
        return unit

    def row(self, unit: int) -> dict[str, float | None]:
        """One unit's columns; None where unknown."""
        rows = self.ask(f"SELECT {', '.join(schema.COLUMNS)} FROM unit WHERE unit = ?", (self.check_unit(unit),))
        if not all(value is None or isinstance(value, (int, float)) for value in rows[0]):
            raise self.damaged("a column that holds other things than numbers")
        return dict(zip(schema.COLUMNS, rows[0], strict=True))

    def blobs(self, unit: int) -> dict[str, NDArray[Any]]:
        """hist, band_edges, promoted, suppressed, peak_tokens, partners of one unit, as `schema` lays them out; empty for a dead one."""
        names = ("hist", "band_edges", "promoted", "suppressed", "peak_tokens", "partners")
        kinds = ("<u4", "<f4", schema.WRITTEN, schema.WRITTEN, schema.PAIRS, schema.PARTNERS)
        rows = self.ask(f"SELECT {', '.join(names)} FROM unit_blob WHERE unit = ?", (self.check_unit(unit),))
        found = rows[0] if rows else (b"",) * len(names)
        return {name: self.numbers(blob, kind, most=64) for name, blob, kind in zip(names, found, kinds, strict=True)}

    def hists(self, units: Sequence[int]) -> dict[int, NDArray[np.uint32]]:
        """Histograms of several units."""
        marks = ", ".join("?" * len(units))
        rows = self.ask(f"SELECT unit, hist FROM unit_blob WHERE unit IN ({marks})", list(units))
        return {unit: self.numbers(blob, "<u4", schema.BINS) for unit, blob in rows}

    def examples(self, unit: int) -> dict[int, tuple[int, list[schema.Context]]]:
        """By band: how many firings fall into it, and its contexts."""
        rows = self.ask("SELECT band, fires, n, data FROM example WHERE unit = ? ORDER BY band", (self.check_unit(unit),))
        return {band: (fires, schema.unpack(data, n)) for band, fires, n, data in rows if band in range(len(schema.BANDS))}

    def best(self, units: Sequence[int]) -> dict[int, schema.Context]:
        """The first context of several units: of their strongest firing."""
        marks = ", ".join("?" * len(units))
        rows = self.ask(f"SELECT unit, n, data FROM example WHERE band = 0 AND n > 0 AND unit IN ({marks})", list(units))
        return {unit: schema.unpack(data, n)[0] for unit, n, data in rows}

    def labels(self, units: Sequence[int]) -> dict[int, list[dict[str, Any]]]:
        """Labels of several units, those of a model before statistical ones."""
        names = ("unit", "author", "text", "method", "model", "detection", "detection_n", "fuzzing", "fuzzing_n", "created")
        marks = ", ".join("?" * len(units))
        rows = self.ask(
            f"SELECT {', '.join(names)} FROM label WHERE unit IN ({marks}) ORDER BY method = 'statistical', created DESC", list(units)
        )
        found: dict[int, list[dict[str, Any]]] = {}
        for row in rows:
            found.setdefault(row[0], []).append(dict(zip(names[1:], row[1:], strict=True)))
        return found

    def labelled(self, words: str, limit: int = 100_000) -> list[int]:
        """Units one of whose labels holds `words`, letter case ignored."""
        escaped = words.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
        query = "SELECT DISTINCT unit FROM label WHERE text LIKE ? ESCAPE '\\' ORDER BY unit LIMIT ?"
        return [unit for (unit,) in self.ask(query, (f"%{escaped}%", limit))]

    def matches(self, unit: int) -> list[dict[str, Any]]:
        """The units of other students that fire on the same tokens, the closest first."""
        rows = self.ask("SELECT student, other, jaccard, corr FROM match WHERE unit = ? ORDER BY student, rank", (self.check_unit(unit),))
        return [dict(zip(("student", "unit", "jaccard", "corr"), row, strict=True)) for row in rows]

    def best_matches(self) -> dict[str, NDArray[np.float32]]:
        """By other student: every unit's largest Jaccard index with a unit of it, float32 [n_units]; NaN for units that never fire."""
        found: dict[str, NDArray[np.float32]] = {}
        for student, unit, jaccard in self.ask("SELECT student, unit, jaccard FROM match WHERE rank = 0", seconds=10 * QUERY_SECONDS):
            if 0 <= unit < self.n_units:
                if student not in found:
                    found[student] = np.full(self.n_units, np.nan, np.float32)
                found[student][unit] = jaccard
        return found

    def probes(self, units: Sequence[int]) -> dict[int, list[dict[str, Any]]]:
        """Classes that several units were the chosen probe of in `mxd eval --suite full`, the best first."""
        marks = ", ".join("?" * len(units))
        rows = self.ask(f"SELECT unit, task, class, f1, n FROM probe WHERE unit IN ({marks}) ORDER BY f1 DESC", list(units))
        found: dict[int, list[dict[str, Any]]] = {}
        for unit, *rest in rows:
            found.setdefault(unit, []).append(dict(zip(("task", "class", "f1", "n"), rest, strict=True)))
        return found
