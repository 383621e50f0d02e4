"""From the codes of a student to ``STUDENT.sqlite``: statistics, contexts, partners, matches, what units write. No host is run."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Mapping
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import schema
from .bands import Text, Twins, blobs, choose, double_deciles, packed, ranks
from .codes import Codes, Firings
from .directions import Written
from .partners import Fired, matches, partners
from .statistics import SHARED, Statistics, measure
from .store import making

FIRINGS_AT_ONCE = 2_000_000
"""Firings held in memory at once, about 200 bytes each."""
PROBE_FEATURE = "code"
"""Of the probes of a report, those on activations after ReLU and TopK: what the page shows."""


def build(
    path: Path,
    codes: Codes,
    text: Text,
    *,
    written: Written | None,
    bias: NDArray[np.float32] | None,
    own: Fired,
    others: Mapping[str, Fired],
    probes: list[tuple[int, str, str, float, int]],
    contexts: int,
    meta: dict[str, str],
    halt: threading.Event,
) -> None:
    """Write the database of one student; labels of an earlier one for the same weights are taken over.

    Args:
        written: what its units write; None where that is not known for its kind.
        bias: of its gate, by unit; None for kinds with another gate.
        own, others: where it and the other students fired.
        probes: (unit, task, class, F1, test samples).
        contexts: kept of each unit and band.
        halt: once it is set, nothing is written any more.
    """
    labels = _labels(path, meta["weights_sha256"])
    tokens = codes.tokens - codes.sequences
    with making(path, schema.UNITS, meta) as database:
        twins, near = Twins(text), partners(own, own.counts > SHARED * own.tokens)
        for firings in codes.chunks(FIRINGS_AT_ONCE):
            if halt.is_set():
                raise CancelledError
            rank = ranks(firings)
            found = measure(firings, rank, text, tokens, contexts)
            _write_contexts(database, firings, rank, text, twins, contexts)
            _write_units(database, firings.first, found, written, bias, [next(near) for _ in found.hist])
        for name, other in others.items():
            match = matches(own, other)
            rows = zip(*(column.tolist() for column in (match.units, match.ranks, match.others, match.jaccard, match.corr)), strict=True)
            database.executemany(
                "INSERT INTO match VALUES (?, ?, ?, ?, ?, ?)", ((u, name, r, o, j, None if c != c else c) for u, r, o, j, c in rows)
            )
        database.executemany(f"INSERT INTO label VALUES ({', '.join('?' * 10)})", labels)
        write_probes(database, probes)
        write_scores(database)


def _write_contexts(
    database: sqlite3.Connection, firings: Firings, rank: NDArray[np.int64], text: Text, twins: Twins, contexts: int
) -> None:
    chosen = choose(firings, rank, text, contexts)
    found = blobs(firings, rank, chosen, text)
    fires = _fires(firings, rank, contexts)
    rows = [(unit, band, fires[unit - firings.first, band], n, data) for (unit, band), (n, data) in found.items()]
    units: list[int] = []
    places: list[NDArray[np.int64]] = []
    for unit, token in _peaks(firings, chosen.pairs[chosen.bands == 0], text):
        active = firings.tokens[firings.starts[unit] : firings.starts[unit + 1]]
        silent = twins.of(token, active, contexts)
        units += [unit] * len(silent)
        places.append(silent)
    if units:
        tokens, whose = np.concatenate(places), np.array(units)
        bands, repeats = np.full(len(whose), schema.TWINS), np.ones(len(whose), np.int64)
        found = packed(firings, text, whose, bands, tokens, repeats)
        rows += [(unit, band, 0, n, data) for (unit, band), (n, data) in found.items()]
    database.executemany("INSERT INTO example VALUES (?, ?, ?, ?, ?)", ((u, b, int(f), n, d) for u, b, f, n, d in rows))


def _fires(firings: Firings, rank: NDArray[np.int64], contexts: int) -> NDArray[np.int64]:
    """[unit, band] firings: of band 0 the strongest, of the others the whole double decile."""
    counts = np.diff(firings.starts)
    found = np.zeros((len(counts), schema.TWINS + 1), np.int64)
    found[:, 0] = np.minimum(counts, contexts)
    np.add.at(found, (firings.units, double_deciles(rank, counts[firings.units])), 1)
    return found


def _peaks(firings: Firings, strongest: NDArray[np.int64], text: Text) -> list[tuple[int, int]]:
    """(unit of the chunk, the commonest token of its strongest contexts)."""
    ids, units = text.ids[firings.tokens[strongest]], firings.units[strongest]
    starts = np.searchsorted(units, np.arange(len(firings.starts)))
    found: list[tuple[int, int]] = []
    for unit in np.unique(units).tolist():
        names, times = np.unique(ids[starts[unit] : starts[unit + 1]], return_counts=True)
        found.append((unit, int(names[times.argmax()])))
    return found


def _write_units(
    database: sqlite3.Connection,
    first: int,
    found: Statistics,
    written: Written | None,
    bias: NDArray[np.float32] | None,
    near: list[NDArray[Any]],
) -> None:
    last = first + len(found.hist)
    columns: dict[str, NDArray[Any]] = {**found.columns}
    columns["partner"] = np.array([row["unit"][0] if len(row) else np.nan for row in near], dtype=np.float64)
    columns["partner_lift"] = np.array([row["lift"][0] if len(row) else np.nan for row in near], dtype=np.float64)
    if written is not None:
        columns["steadiness"] = written.steadiness[first:last]
    if bias is not None:
        columns["bias"] = bias[first:last]
    lists = [_plain(columns[name]) if name in columns else [None] * (last - first) for name in schema.COLUMNS]
    marks = ", ".join("?" * (1 + len(schema.COLUMNS)))
    database.executemany(f"INSERT INTO unit VALUES ({marks})", zip(range(first, last), *lists, strict=True))
    empty = np.zeros(0, schema.WRITTEN)
    rows: list[tuple[Any, ...]] = []
    for i, unit in enumerate(range(first, last)):
        up, down = (written.promoted[unit], written.suppressed[unit]) if written is not None else (empty, empty)
        arrays = (found.hist[i].astype("<u4"), found.edges[i].astype("<f4"), up, down, found.peak_tokens[i], near[i])
        rows.append((unit, *(array.tobytes() for array in arrays)))
    database.executemany("INSERT INTO unit_blob VALUES (?, ?, ?, ?, ?, ?, ?)", rows)


def _plain(column: NDArray[Any]) -> list[float | None]:
    return [None if value != value else value for value in column.astype(np.float64).tolist()]


def write_probes(database: sqlite3.Connection, probes: list[tuple[int, str, str, float, int]]) -> None:
    """Replace the probe results, and the column `probe_f1`: a unit's best."""
    database.execute("DELETE FROM probe")
    database.executemany("INSERT OR REPLACE INTO probe VALUES (?, ?, ?, ?, ?)", probes)
    database.execute("UPDATE unit SET probe_f1 = (SELECT max(f1) FROM probe WHERE probe.unit = unit.unit)")


def write_scores(database: sqlite3.Connection) -> None:
    """Set the columns `score` and `score_n`: detection of a unit's label, a model's before a statistical one."""
    best = (
        "SELECT {} FROM label WHERE label.unit = unit.unit AND detection IS NOT NULL ORDER BY method = 'statistical', created DESC LIMIT 1"
    )
    database.execute(f"UPDATE unit SET score = ({best.format('detection')}), score_n = ({best.format('detection_n')})")


def _labels(path: Path, weights: str) -> list[tuple[Any, ...]]:
    """The labels in an earlier database of the same weights."""
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as old:
        if old.execute("SELECT value FROM meta WHERE key = 'weights_sha256'").fetchone() == (weights,):
            return old.execute("SELECT * FROM label").fetchall()
    return []
