"""``notes.sqlite``: the user's stars, notes, tags, kept bench runs and kept sentences. Collecting never touches it."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
import uuid
from typing import Any

from ..checkpoint import Run
from ..errors import RunError
from . import schema
from .store import create, notes_path, now

LONGEST_NOTE = 20_000
"""Characters of a note."""
MOST_TAGS = 20
_ADDED = "sentence"
_FIELDS = ("weights_sha", "unit", "student", "star", "text", "tags", "updated")


class Conflict(RunError):
    """A note was changed elsewhere since it was read. `current` is what it is now."""

    def __init__(self, current: dict[str, Any]) -> None:
        super().__init__("this note was changed elsewhere", expected="the version that was read", next="compare both and save again")
        self.current = current


class Notes:
    """The notes of one run; made at the first write. Usable from several threads, and from several processes."""

    def __init__(self, run: Run) -> None:
        self.path, self._lock = notes_path(run), threading.RLock()
        self._connection: sqlite3.Connection | None = None
        if self.path.is_file():
            self._open()

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None, timeout=5)
            try:
                connection.execute("PRAGMA trusted_schema = 0")
                connection.execute("BEGIN IMMEDIATE")  # two servers may both find none
                if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                    create(connection, schema.NOTES)
                found = _tables(connection)
                if found == {name: made for name, made in schema.NOTES.items() if name != _ADDED}:  # of before there was that table
                    connection.execute(schema.NOTES[_ADDED])
                    found = _tables(connection)
                connection.execute("COMMIT")
                connection.execute("PRAGMA journal_mode = WAL")
                version = connection.execute("PRAGMA user_version").fetchone()[0]
            except sqlite3.Error as error:
                raise self._damaged(str(error)) from None
            if version > schema.VERSION:
                raise RunError(f"{self.path} was written by a newer mxd", got=f"version {version}", next="pip install --upgrade mxd")
            if found != schema.NOTES:
                raise self._damaged("other tables than ours")
            self._connection = connection
        return self._connection

    def close(self) -> None:
        """Let go of the file; it is opened again when it is needed."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
            self._connection = None

    def _damaged(self, why: str) -> RunError:
        return RunError(f"{self.path} is damaged", expected="notes that mxd explore wrote", got=why, next=f"move {self.path} away")

    def _ask(self, query: str, values: tuple[Any, ...] = ()) -> list[Any]:
        with self._lock:
            if self._connection is None and not self.path.is_file():
                return []
            try:
                return self._open().execute(query, values).fetchall()
            except sqlite3.Error as error:
                raise self._damaged(str(error)) from None

    def all(self) -> list[dict[str, Any]]:
        """Every note, the last changed first."""
        return [_note(row) for row in self._ask(f"SELECT {', '.join(_FIELDS)} FROM note ORDER BY updated DESC")]

    def get(self, weights_sha: str, unit: int) -> dict[str, Any] | None:
        """The note on one unit; None if there is none."""
        rows = self._ask(f"SELECT {', '.join(_FIELDS)} FROM note WHERE weights_sha = ? AND unit = ?", (weights_sha, unit))
        return _note(rows[0]) if rows else None

    def put(
        self, weights_sha: str, unit: int, student: str, *, star: bool, text: str, tags: list[str], expected: str | None
    ) -> dict[str, Any] | None:
        """Save a note, or delete it when nothing is left of it.

        Args:
            expected: `updated` of the note as it was read; None if there was none.

        Returns:
            The note as saved; None if it was deleted.

        Raises:
            Conflict: it is not the note that was read.
            RunError: it is too long.
        """
        if len(text) > LONGEST_NOTE or len(tags) > MOST_TAGS or any(len(tag) > 60 for tag in tags):
            what = f"at most {LONGEST_NOTE} characters and {MOST_TAGS} tags of 60"
            raise RunError("this note is too long", expected=what, got=f"{len(text)} characters, {len(tags)} tags", next="shorten it")
        with self._lock:
            connection = self._open()
            connection.execute("BEGIN IMMEDIATE")
            try:
                before = self.get(weights_sha, unit)
                if (before["updated"] if before else None) != expected:
                    raise Conflict(before or {"star": False, "text": "", "tags": [], "updated": None})
                if star or text or tags:
                    values = (weights_sha, unit, student, int(star), text, json.dumps(tags), now())
                    connection.execute("INSERT OR REPLACE INTO note VALUES (?, ?, ?, ?, ?, ?, ?)", values)
                else:
                    connection.execute("DELETE FROM note WHERE weights_sha = ? AND unit = ?", (weights_sha, unit))
                connection.execute("COMMIT")
            except BaseException:
                connection.execute("ROLLBACK")
                raise
            return self.get(weights_sha, unit)

    def benches(self) -> list[dict[str, Any]]:
        """Saved bench runs, the newest first."""
        rows = self._ask("SELECT id, student, request, result, created FROM bench ORDER BY created DESC")
        return [{"id": i, "student": s, "request": json.loads(q), "result": json.loads(r), "created": c} for i, s, q, r, c in rows]

    def save_bench(self, student: str, request: dict[str, Any], result: dict[str, Any]) -> str:
        """Keep a bench run; returns its id."""
        name = uuid.uuid4().hex[:12]
        with self._lock:
            values = (name, student, json.dumps(request), json.dumps(result), now())
            self._open().execute("INSERT INTO bench VALUES (?, ?, ?, ?, ?)", values)
        return name

    def delete_bench(self, name: str) -> None:
        """Forget a bench run."""
        with self._lock:
            self._open().execute("DELETE FROM bench WHERE id = ?", (name,))

    def sentences(self) -> list[dict[str, Any]]:
        """Kept sentences without what was read of them, the newest first."""
        rows = self._ask("SELECT id, request, text, students, created FROM sentence ORDER BY created DESC")
        return [{"id": i, "request": json.loads(q), "text": t, "students": json.loads(s), "created": c} for i, q, t, s, c in rows]

    def sentence(self, name: str) -> Any:
        """What was read of a kept sentence; None if there is no such one."""
        rows = self._ask("SELECT answer FROM sentence WHERE id = ?", (name,))
        return json.loads(rows[0][0]) if rows else None

    def save_sentence(self, request: dict[str, Any], text: str, students: list[str], answer: dict[str, Any]) -> str:
        """Keep a sentence that was read, in the place of what was kept of it before; returns its id."""
        asked = json.dumps(request, sort_keys=True)
        name = hashlib.sha256(asked.encode()).hexdigest()[:12]
        with self._lock:
            values = (name, asked, text, json.dumps(students), json.dumps(answer), now())
            self._open().execute("INSERT OR REPLACE INTO sentence VALUES (?, ?, ?, ?, ?, ?)", values)
        return name

    def delete_sentence(self, name: str) -> None:
        """Forget a sentence."""
        with self._lock:
            self._open().execute("DELETE FROM sentence WHERE id = ?", (name,))


def _tables(connection: sqlite3.Connection) -> dict[str, str]:
    return dict(connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL"))


def _note(row: tuple[Any, ...]) -> dict[str, Any]:
    note = dict(zip(_FIELDS, row, strict=True))
    return {**note, "star": bool(note["star"]), "tags": json.loads(note["tags"])}
