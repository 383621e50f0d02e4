"""Which units of a student fired where: kept on disk while the host reads, so that everything else is made without it.

``explore/codes/STUDENT/`` holds raw little-endian arrays that only grow, and ``about.json``, which says how much of them is whole::

    counts.u4    firings of each token            units.u4    the unit of each firing, in the order of the tokens
    values.f4    its activation                   shares.f4   ‖its contribution‖ / ‖the layer's output‖
    effects.f4   nats lost without it, to first order; NaN where no gradient was taken
    scales.f2    of kinds whose units are maps: what multiplies their rows at each of the first tokens, [.., d_out]

The first token of every sequence is there with no firings: its activations are tens of times larger than the others'.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import Run
from ..errors import RunError
from ..sealed import read_json, write_json
from .store import folder

FILES: dict[str, str] = {"counts": "<u4", "units": "<u4", "values": "<f4", "shares": "<f4", "effects": "<f4"}


class Firings(NamedTuple):
    """The firings of a range of units, unit by unit, in the order of the text."""

    first: int
    """The first unit."""
    starts: NDArray[np.int64]
    """[units + 1] where each unit's firings begin."""
    tokens: NDArray[np.int64]
    """[firings] which token of the whole text."""
    values: NDArray[np.float32]
    shares: NDArray[np.float32]
    effects: NDArray[np.float32]

    @property
    def units(self) -> NDArray[np.int64]:
        """[firings] whose firing each is, counted from `first`."""
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))


def codes_folder(run: Run, student: str) -> Path:
    return folder(run) / "codes" / run.student(student).name


class CodesWriter:
    """Appends the codes of a student, sequence by sequence; what was not committed is forgotten."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        """Go on where an earlier writer with the same `about` committed last, or begin anew."""
        self.path, self._about = path, about
        path.mkdir(parents=True, exist_ok=True)
        self.sequences = self._pairs = 0
        kept = _about(path)
        if kept is not None and {k: v for k, v in kept.items() if k not in ("sequences", "firings")} == about:
            self.sequences, self._pairs = kept["sequences"], kept["firings"]
        self._files = {name: (path / f"{name}{_suffix(kind)}").open("ab") for name, kind in FILES.items()}
        self._files["scales"] = (path / "scales.f2").open("ab")
        length, width = about["tokens_per_sequence"], about["scale_width"]
        sizes = {"counts": 4 * self.sequences * length, "scales": 2 * min(self.sequences, about["scale_sequences"]) * length * width}
        try:
            for name, file in self._files.items():
                file.truncate(sizes.get(name, 4 * self._pairs))
        except OSError:
            self.close()
            raise

    @property
    def wants_scales(self) -> bool:
        """Whether scales of the next sequence are kept."""
        return bool(self._about["scale_width"]) and self.sequences < self._about["scale_sequences"]

    def add(self, sequences: int, *, scales: NDArray[Any] | None = None, **arrays: NDArray[Any]) -> None:
        """The arrays of so many more sequences, named as the files are; `scales` [token, d_out] as far as they are wanted."""
        if scales is not None and self.wants_scales:
            rows = min(sequences, self._about["scale_sequences"] - self.sequences) * self._about["tokens_per_sequence"]
            self._files["scales"].write(np.ascontiguousarray(scales[:rows], dtype="<f2").tobytes())
        for name, kind in FILES.items():
            self._files[name].write(np.ascontiguousarray(arrays[name], dtype=kind).tobytes())
        self.sequences += sequences
        self._pairs += len(arrays["units"])

    def commit(self) -> None:
        """Flush to disk, then say so."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        write_json(self.path / "about.json", {**self._about, "sequences": self.sequences, "firings": self._pairs})

    def close(self) -> None:
        for file in self._files.values():
            file.close()


class Codes:
    """The codes of one student, read from disk as they are asked for.

    Attributes:
        tokens_per_sequence, sequences, tokens, n_units: sizes; ``tokens`` counts first positions too.
        scales: what multiplies the rows of units that are maps at the first tokens, [token, d_out]; None for other kinds.
    """

    def __init__(self, run: Run, student: str) -> None:
        """
        Raises:
            RunError: there are none, or they are damaged.
        """
        path = codes_folder(run, student)
        about, next = _about(path), f"mxd collect {run.path} --overwrite"
        if about is None:
            raise RunError(f"the codes of {student} are not there", expected=str(path / "about.json"), next=next)
        self.tokens_per_sequence, self.sequences, self.n_units = about["tokens_per_sequence"], about["sequences"], about["n_units"]
        self.tokens = self.sequences * self.tokens_per_sequence
        firings = about["firings"]
        self._arrays: dict[str, NDArray[Any]] = {}
        for name, kind in FILES.items():
            file, count = path / f"{name}{_suffix(kind)}", self.tokens if name == "counts" else firings
            if not file.is_file() or file.stat().st_size < 4 * count:
                raise RunError(f"{file} is damaged", expected=f"{4 * count} bytes", got="fewer", next=next)
            self._arrays[name] = np.memmap(file, kind, "r", shape=(count,)) if count else np.zeros(0, kind)
        width, rows = about["scale_width"], min(self.sequences, about["scale_sequences"]) * self.tokens_per_sequence
        self.scales: NDArray[np.float16] | None = None
        if width and rows and (path / "scales.f2").is_file() and (path / "scales.f2").stat().st_size >= 2 * width * rows:
            self.scales = np.memmap(path / "scales.f2", "<f2", "r", shape=(rows, width))
        self._ends = np.concatenate([[0], np.cumsum(self._arrays["counts"], dtype=np.int64)])
        if self._ends[-1] != firings or (firings and int(self._arrays["units"].max()) >= self.n_units):
            raise RunError(f"{path} is damaged", expected=f"{firings} firings of {self.n_units} units", got="others", next=next)

    @property
    def firings(self) -> int:
        return int(self._ends[-1])

    def codes(self, start: int, end: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Units and activations [token, k] of tokens `start` to `end`, k the most of any of them; 0 and 0.0 where there are fewer."""
        counts = np.asarray(self._arrays["counts"][start:end], dtype=np.int64)
        width = int(counts.max(initial=0))
        indices, values = np.zeros((len(counts), width), np.int32), np.zeros((len(counts), width), np.float32)
        there = np.arange(width) < counts[:, None]
        pairs = slice(int(self._ends[start]), int(self._ends[start + len(counts)]))
        indices[there], values[there] = self._arrays["units"][pairs], self._arrays["values"][pairs]
        return indices, values

    def active(self, unit: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The tokens where a unit fired, in order, and its activations there."""
        order, starts = self._by_unit
        pairs = order[starts[unit] : starts[unit + 1]]
        return self._token_of(pairs), np.asarray(self._arrays["values"][pairs], dtype=np.float32)

    def chunks(self, most: int) -> Iterator[Firings]:
        """All units, in ranges that hold at most `most` firings (or one unit)."""
        order, starts = self._by_unit
        first = 0
        while first < self.n_units:
            last = max(int(np.searchsorted(starts, starts[first] + most, "right")) - 1, first + 1)
            pairs = order[starts[first] : starts[last]]
            columns = (np.asarray(self._arrays[name][pairs], dtype=np.float32) for name in ("values", "shares", "effects"))
            yield Firings(first, starts[first : last + 1] - starts[first], self._token_of(pairs), *columns)
            first = last

    def of_tokens(self, end: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
        """Tokens, units and activations of all firings before token `end`."""
        pairs = int(self._ends[min(end, self.tokens)])
        tokens = np.repeat(np.arange(min(end, self.tokens)), self._arrays["counts"][:end])
        return tokens, self._arrays["units"][:pairs].astype(np.int64), np.asarray(self._arrays["values"][:pairs], dtype=np.float32)

    @cached_property
    def _by_unit(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The firings sorted by unit, the order of the text kept, and where each unit's begin."""
        units = np.asarray(self._arrays["units"])
        starts = np.concatenate([[0], np.cumsum(np.bincount(units, minlength=self.n_units))])
        return np.argsort(units, kind="stable"), starts.astype(np.int64)

    def _token_of(self, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.searchsorted(self._ends, pairs, "right") - 1


def _suffix(kind: str) -> str:
    return f".{kind[1:]}"


def _about(path: Path) -> dict[str, Any] | None:
    """What about.json says; None if it is not there or not ours."""
    if not (path / "about.json").is_file():
        return None
    found = read_json(path / "about.json")
    sizes = ("tokens_per_sequence", "n_units", "sequences", "firings", "scale_width", "scale_sequences")
    fine = isinstance(found, dict) and all(isinstance(found.get(s), int) and 0 <= found[s] < 2**40 for s in sizes)
    return found if fine else None
