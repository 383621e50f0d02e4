"""Whether the files of a run, or of cached activations, are those that were written: every checksum looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from . import resume
from .cache import MANIFEST, Cache
from .checkpoint import Run, StudentRecord
from .errors import MxdError, RunError
from .sealed import check_sum, read_json


class Checked(NamedTuple):
    """One file."""

    path: Path
    bytes: int
    problem: str = ""
    """What is wrong with it, in a line; empty if nothing is."""


def verify(path: str | Path) -> Iterator[Checked]:
    """Every file of the run or the cached activations in a folder, as it is checked. Files that mxd did not write are left out.

    Raises:
        RunError: it is neither.
    """
    path = Path(path).expanduser()
    if (path / "run.json").is_file():
        return _run(path)
    if (path / MANIFEST).is_file():
        return _cache(path)
    raise RunError(
        f"{path} holds nothing to verify", expected="a run (run.json) or cached activations (manifest.json)", next="mxd train --out DIR"
    )


def _run(path: Path) -> Iterator[Checked]:
    yield _checked(path / "run.json", lambda: Run.open(path))
    try:
        run = Run.open(path)
    except MxdError:
        return
    for record in run.students:
        yield from _student(run, record)
    if (path / "metrics.jsonl").is_file():
        yield _checked(path / "metrics.jsonl", run.metrics)
    for state in resume.folders(path):
        yield from _state(state)
    for report in sorted(path.glob("report*.json")):
        yield _checked(report, lambda report=report: read_json(report))
        yield from _drawn(report)
    for measured in sorted(path.glob("evals/*/*.json")):
        yield _checked(measured, lambda measured=measured: read_json(measured))


def _student(run: Run, record: StudentRecord) -> Iterator[Checked]:
    folder = run.path / record.folder
    yield _checked(folder / "cfg.json", lambda: read_json(folder / "cfg.json"))
    weights = sorted(folder.glob("*.safetensors")) or [folder / "weights"]
    yield _checked(weights[0], lambda: run.load(record.name))


def _state(path: Path) -> Iterator[Checked]:
    yield _checked(path / "state.json", lambda: resume.described(path))
    try:
        files: dict[str, str] = resume.described(path)["files"]
    except MxdError:
        return
    for name, expected in files.items():
        yield _checked(path / name, lambda name=name, expected=expected: resume.check_file(path / name, expected))


def _drawn(report: Path) -> Iterator[Checked]:
    """The pages and plots that a report.json names."""
    try:
        files: dict[str, str] = read_json(report).get("files", {})
    except (MxdError, AttributeError):
        return
    for name, expected in files.items():
        path = report.with_name(Path(name).name)
        yield _checked(path, lambda path=path, expected=expected: check_sum(path, expected, mend=f"mxd report {path.parent}"))


def _cache(path: Path) -> Iterator[Checked]:
    yield _checked(path / MANIFEST, lambda: Cache.open(path))
    try:
        cache = Cache.open(path)
    except MxdError:
        return
    for file, check in cache.checks():
        yield _checked(file, check)


def _checked(path: Path, check: Callable[[], Any]) -> Checked:
    size = path.stat().st_size if path.is_file() else 0
    try:
        check()
    except MxdError as error:
        return Checked(path, size, str(error))
    except OSError as error:
        return Checked(path, size, f"{path}: {error.strerror}")
    return Checked(path, size)
