"""Writing a run folder (`mxd.checkpoint` says what lies in it): whole or not at all, and never over another one unasked."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .checkpoint import FORMAT_VERSION, STATE, Run, StudentRecord, save_layer
from .errors import RunError
from .layers import SparseLayer
from .sealed import UNFINISHED, read_json, write_sealed


class RunWriter:
    """A run folder being written. The old one of that name, if it may be replaced, goes only when the new one is whole.

    Args:
        path: the folder.
        overwrite: a run that is there may be replaced.
        going_on: the run that is there is gone on with, and stays whatever happens.
    """

    def __init__(self, path: Path, *, overwrite: bool, going_on: bool = False) -> None:
        self.path = path
        self._old: Path | None = None
        self._keep = going_on
        if going_on:
            return
        check_writable(path, overwrite=overwrite)
        if path.exists() and any(path.iterdir()):
            self._old = path.with_name(f"{_REPLACED.format(path.name)}{os.getpid()}")
            os.replace(path, self._old)
        path.mkdir(parents=True, exist_ok=True)

    @property
    def replaces(self) -> bool:
        """Whether an older run waits to be dropped, or to be put back."""
        return self._old is not None

    def write_info(self, info: dict[str, Any]) -> None:
        """Write run.json."""
        write_sealed(self.path / "run.json", {"format_version": FORMAT_VERSION, **info})

    def save(
        self,
        layers: Sequence[SparseLayer],
        records: Sequence[StudentRecord],
        info: dict[str, Any],
        *,
        finished: bool,
        kept: Sequence[StudentRecord] = (),
        order: Sequence[str] = (),
    ) -> None:
        """Write every student's folder and list each in run.json as soon as it is there, so that a full disk costs only the rest.

        Args:
            layers, records: the students.
            info: what else stands in run.json.
            finished: nothing is left to train.
            kept: students whose folders are there already.
            order: names in the order in which run.json lists them; default: as given.
        """
        saved = [dataclasses.asdict(record) for record in kept]
        for number, (layer, record) in enumerate(zip(layers, records, strict=True), 1):
            save_layer(self.path / record.folder, layer, record)
            saved.append(dataclasses.asdict(record))
            if order:
                saved.sort(key=lambda student: order.index(student["name"]))
            self._keep = True
            self.write_info({**info, "students": saved, "finished": finished and number == len(layers)})

    def finish(self) -> None:
        """The new run is whole: drop the one it replaces."""
        self._keep = True
        if self._old is not None:
            shutil.rmtree(self._old)
            self._old = None

    def abandon(self) -> None:
        """Something went wrong: put back the run that was there; without one, keep what was saved, if anything was."""
        if self._old is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            os.replace(self._old, self.path)
            self._old = None
        elif not self._keep:
            shutil.rmtree(self.path, ignore_errors=True)


_REPLACED = ".{}.replaced-"


def put_back(path: Path) -> None:
    """Clear up after a process that was killed as it wrote the run at `path`; nobody else may be writing there.

    Half a file goes. If another run was being replaced, what the new one had kept stays, or else the old run comes back.
    """
    # Where nothing says that it is a run, only what a run begins with is known to be ours.
    for half in path.rglob(f".*{UNFINISHED}") if (path / "run.json").is_file() else path.glob(f".run.json.*{UNFINISHED}"):
        half.unlink(missing_ok=True)
    for old in path.absolute().parent.glob(f"{_REPLACED.format(path.name)}*") if path.absolute().parent.is_dir() else ():
        with contextlib.suppress(RunError):
            Run.open(path)
            shutil.rmtree(old)
            continue
        if (path / STATE).is_dir():
            shutil.rmtree(old)
            continue
        shutil.rmtree(path, ignore_errors=True)
        os.replace(old, path)


def check_writable(path: Path, *, overwrite: bool) -> None:
    """Raise `RunError` if `path` holds a run that would be lost, or something that is not a run."""
    if not path.exists():
        return
    if not path.is_dir():
        raise RunError(f"{path} is a file", expected="a folder for the run", next="choose another --out")
    if not any(path.iterdir()):
        return
    if not (path / "run.json").is_file():
        raise RunError(f"{path} is not empty and not a run folder", expected="a new or empty folder", next="choose another --out")
    info = read_json(path / "run.json")
    if not overwrite and isinstance(info, dict) and info.get("students"):
        state = "finished" if info.get("finished") else "interrupted"
        raise RunError(
            f"{path} holds a {state} run", expected="a folder without one", next="choose another --out, or add --overwrite to replace it"
        )
