"""The databases of a run, held open while it is explored, and opened again when their files change: a finished collection shows at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import Run
from . import schema
from .notes import Notes
from .replies import Refusal
from .store import TextStore, UnitStore, notes_path, text_path, units_path

Value = TypeVar("Value")
RETIRED = 8
"""Databases that were replaced and are kept open for requests that still read them."""


class Text:
    """``text.sqlite``, and what is made of it once."""

    def __init__(self, run: Run) -> None:
        self.store = TextStore(run)

    @cached_property
    def words(self) -> dict[str, list[int]]:
        """Ids by the text of the token, without blanks around it and in small letters."""
        found: dict[str, list[int]] = {}
        for token, text in self.store.tokens.items():
            found.setdefault(text.strip().lower(), []).append(token)
        return found


class Units:
    """``STUDENT.sqlite``, and what is made of it once."""

    def __init__(self, run: Run, student: str) -> None:
        self.store = UnitStore(run, student)

    @cached_property
    def firing(self) -> dict[str, NDArray[np.float32]]:
        """The columns `state` and `fires`, which are needed first."""
        return self.store.columns(("state", "fires"))

    @cached_property
    def labelled(self) -> NDArray[np.float32]:
        """[n_units] 1 where a unit has a label."""
        found = np.zeros(self.store.n_units, np.float32)
        units = [unit for (unit,) in self.store.ask("SELECT DISTINCT unit FROM label", seconds=5)]
        found[[unit for unit in units if isinstance(unit, int) and 0 <= unit < self.store.n_units]] = 1
        return found

    @cached_property
    def columns(self) -> dict[str, NDArray[np.float32]]:
        """Every column [n_units], and `labelled`."""
        return {**self.store.columns(), "labelled": self.labelled}

    @cached_property
    def peaks(self) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
        """Units and their peak tokens, pair by pair."""
        rows = self.store.ask("SELECT unit, peak_tokens FROM unit_blob ORDER BY unit", seconds=5)
        tokens = [self.store.numbers(blob, schema.PAIRS, most=64)["token"] for _, blob in rows]
        units = np.repeat(np.array([unit for unit, _ in rows], np.int64), [len(found) for found in tokens])
        return units, np.concatenate(tokens) if tokens else np.zeros(0, np.uint32)


class Shelf:
    """The run at a path, and its databases. Usable from several threads."""

    def __init__(self, path: str | Path) -> None:
        """
        Raises:
            RunError: there is no run.
        """
        self.path, self._lock = Path(path), threading.RLock()
        self._kept: dict[Path, tuple[Any, Any]] = {}
        self._retired: list[Any] = []
        _ = self.run

    @property
    def run(self) -> Run:
        """The run; read again when run.json changed.

        Raises:
            RunError: it was moved, removed, or damaged.
        """
        return self._get(self.path / "run.json", lambda: Run.open(self.path))

    def text(self) -> Text:
        """
        Raises:
            RunError: there is none, or it is damaged.
        """
        run = self.run
        return self._get(text_path(run), lambda: Text(run))

    def units(self, student: str) -> Units:
        """
        Raises:
            Refusal: no such student, it has no units, or nothing was collected about it yet.
            RunError: the database is damaged.
        """
        run = self.run
        record = next((record for record in run.students if record.name == student), None)
        if record is None:
            names = ", ".join(record.name for record in run.students)
            raise Refusal(404, f"no student of that name in {run.path}", expected=names, got=student[:80])
        if not record.n_units:
            raise Refusal(404, f"{student} has no units", expected="a student with experts or latents", got=record.kind)
        path = units_path(run, student)
        if not path.is_file():
            raise Refusal(404, f"nothing was collected about {student} yet", expected=str(path), next=f"mxd collect {run.path}")
        return self._get(path, lambda: Units(run, student))

    def stamp(self, student: str) -> str:
        """What changes when the database of a student, or the notes, do."""
        run = self.run
        found = [_stamp(path) for path in (units_path(run, student), notes_path(run), notes_path(run).with_name("notes.sqlite-wal"))]
        return "-".join("".join(f"{part:x}" for part in stamp) if stamp else "0" for stamp in found)

    @property
    def notes(self) -> Notes:
        """The notes; of a folder that was replaced, those of the new one."""
        run = self.run
        return self._get(notes_path(run), lambda: Notes(run), identity=True)

    def close(self) -> None:
        with self._lock:
            for _, value in self._kept.values():
                _close(value)
            for value in self._retired:
                _close(value)
            self._kept, self._retired = {}, []

    def _get(self, path: Path, make: Callable[[], Value], *, identity: bool = False) -> Value:
        """What was made of a file, or made anew where the file is another one; with `identity`, whatever was written into it since."""
        with self._lock:
            stamp = _stamp(path)
            here = stamp[:1] if identity and stamp else stamp
            if path in self._kept and self._kept[path][0] == here and (stamp or identity):
                return self._kept[path][1]
            made = make()
            if path in self._kept:
                self._retired.append(self._kept[path][1])
            for old in self._retired[:-RETIRED]:
                _close(old)
            self._retired = self._retired[-RETIRED:]
            self._kept[path] = (here, made)
            return made


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Which file it is, when it was written and how long it is; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _close(value: Any) -> None:
    if isinstance(value, Text | Units):
        value.store.close()
    elif isinstance(value, Notes):
        value.close()
