"""Whole training runs as something to time: what `mxd train` does, from loading the host to the saved weights, without its output."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from ..checkpoint import Run
from ..config import TrainConfig
from ..errors import MxdError
from ..pipeline import train


class Timed(NamedTuple):
    """One finished run and where its time went, in seconds."""

    run: Run
    """The run."""
    whole: float
    """From the call to the saved run folder."""
    loading: float
    """Reading text and loading the host."""
    harvest: float
    """Waiting for the host, or for the disk."""
    students: float
    """The students' own steps, all of them together."""

    @property
    def training(self) -> float:
        """Everything but loading."""
        return self.whole - self.loading


def timed_train(config: TrainConfig) -> Timed:
    """Train as `config` says and say how long what took."""
    began = time.perf_counter()
    run = train(config, quiet=True)
    whole = time.perf_counter() - began
    seconds = run.info["seconds"]
    students = sum(record.train_seconds for record in run.students)
    return Timed(run, whole, float(seconds.get("text and host", 0.0)), float(seconds.get("harvest", 0.0)), students)


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for runs, gone afterwards."""
    with TemporaryDirectory(prefix="mxd-bench-") as folder:
        yield Path(folder)


def same_weights(ours: Run, theirs: Iterable[Run]) -> str:
    """In words, that every student of `theirs` has the very bytes of its namesake in `ours`.

    Raises:
        MxdError: one differs, or there is nothing to compare: nothing may be timed.
    """
    compared = 0
    for run in theirs:
        for path in sorted(run.path.rglob("*.safetensors")):
            twin = ours.path / path.relative_to(run.path)
            if not twin.is_file() or twin.read_bytes() != path.read_bytes():
                raise MxdError(
                    "two ways to train one student do not give the same weights, so nothing is timed",
                    expected="the same bytes",
                    got=str(path.relative_to(run.path)),
                )
            compared += 1
    if not compared:
        raise MxdError("there are no weights to compare, so nothing is timed")
    return f"weights bit for bit the same ({compared} of {compared} files)"
