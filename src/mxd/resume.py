"""What going on with a run needs, kept beside it while it trains: the state of every student, and how far the stream is.

::

    runs/NAME/state/STEP/state.json            step, numbers of every student, sha256 of every file, and of itself
    runs/NAME/state/STEP/STUDENT.safetensors   weights, optimisers, counts, generator

A state is written beside the others and renamed when it is whole, and the last two are kept. No pickles.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from .checkpoint import STATE
from .errors import RunError
from .sealed import check_sum, check_version, read_json, sync_folder, write_atomic, write_sealed
from .train import Student

log = logging.getLogger("mxd")

FORMAT_VERSION = 1
"""Version of a state; a newer one is refused."""
KEPT = 2
"""States kept: should the newest turn out damaged, there is the one before it."""


class State(NamedTuple):
    """A state, opened for reading: its files are those that were written."""

    path: Path
    step: int
    """Steps done, by every student that was not stopped."""
    numbers: dict[str, dict[str, Any]]
    """By student."""
    info: dict[str, Any]
    """What the run keeps beside its students."""

    def restore(self, student: Student) -> None:
        """Put a student into the state that it had.

        Raises:
            RunError: the state holds none of that name, or another one.
        """
        path = self.path / _file(student.name)
        if student.name not in self.numbers:
            raise RunError(f"{self.path} holds no student {student.name}", expected=", ".join(self.numbers))
        try:
            student.restore(load_tensors(path.read_bytes()), self.numbers[student.name])
        except (SafetensorError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise RunError(f"{path} is not the state of this student", got=" ".join(str(error).split())[:200]) from None


def save(run: Path, students: Sequence[Student], step: int, info: Mapping[str, Any]) -> Path:
    """Write the state of all students as ``run/state/STEP``; older ones than the last two go. To be called between two steps.

    Raises:
        OSError: it could not be written; the states that were there are still there.
    """
    folder = run / STATE
    for left in folder.glob(".writing-*"):  # by a process that was killed as it wrote
        shutil.rmtree(left, ignore_errors=True)
    beside = folder / f".writing-{os.getpid()}"
    beside.mkdir(parents=True)
    try:
        numbers: dict[str, Any] = {}
        sums: dict[str, str] = {}
        for student in students:
            tensors, numbers[student.name] = student.state()
            data = save_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
            sums[_file(student.name)] = hashlib.sha256(data).hexdigest()
            write_atomic(beside / _file(student.name), data)
        about = {"format_version": FORMAT_VERSION, "step": step, "students": numbers, "files": sums, "info": dict(info)}
        write_sealed(beside / "state.json", about)
        target = folder / f"{step:09}"
        if target.exists():  # of the run before this one was gone on with from further back
            shutil.rmtree(target)
        os.replace(beside, target)
        sync_folder(folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    for old in folders(run)[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def newest(run: Path) -> State | None:
    """The newest state that is whole, or None where there is none at all.

    A damaged one is passed over, with a warning, where there is another.

    Raises:
        RunError: all are damaged, or one is of a newer format.
    """
    problems: list[RunError] = []
    for path in folders(run):
        try:
            found = open_state(path)
        except RunError as error:
            problems.append(error)
            continue
        for problem in problems:
            log.warning("%s; going on from %s", problem, path)
        return found
    if problems:
        raise problems[0]
    return None


def drop(run: Path) -> None:
    """Remove the states of a run that has no more use for them."""
    shutil.rmtree(run / STATE, ignore_errors=True)


def drop_after(run: Path, step: int) -> None:
    """Remove states of later steps than `step`: damaged ones that were passed over."""
    for path in folders(run):
        if int(path.name) > step:
            shutil.rmtree(path, ignore_errors=True)


def folders(run: Path) -> list[Path]:
    """The folders of a run's states, the newest first."""
    folder = run / STATE
    found = [path for path in folder.iterdir() if path.name.isdecimal()] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name), reverse=True)


def open_state(path: Path) -> State:
    """One state.

    Raises:
        RunError: a file of it is missing or damaged, or it is of a newer format.
    """
    about = described(path)
    for name, expected in about["files"].items():
        check_file(path / name, expected)
    return State(path, about["step"], about["students"], about["info"])


def described(path: Path) -> dict[str, Any]:
    """What state.json says: ``step``, ``students``, ``info``, and ``files`` with their checksums, which are not looked at.

    Raises:
        RunError: it is missing, damaged or of a newer format.
    """
    about = read_json(path / "state.json")
    version = about.get("format_version") if isinstance(about, dict) else None
    if isinstance(version, int):
        check_version(version, path, FORMAT_VERSION)
    kinds = {"format_version": int, "step": int, "students": dict, "info": dict, "files": dict}
    wrong = [name for name, kind in kinds.items() if not isinstance(about, dict) or not isinstance(about.get(name), kind)]
    if wrong or any(name != Path(name).name or not isinstance(value, str) for name, value in about["files"].items()):
        raise RunError(f"{path / 'state.json'} is damaged", expected="what mxd train writes", got=", ".join(wrong) or "a file elsewhere")
    return about


def check_file(path: Path, expected: str) -> None:
    """Raise `RunError` unless a file of a state has this sha256."""
    check_sum(path, expected, what="is missing, truncated or was changed", mend="")


def _file(student: str) -> str:
    return f"{student}.safetensors"
