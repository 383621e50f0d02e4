"""A run whose codes were made up, so that every number of its databases is known: as many units as asked for, no host needed to read it.

Unit 0 never fires. Unit 1 fires on every token but the first of a sequence, with activation 1. Unit 2 fires exactly on the letter "t",
with activation 1 + its position in the sequence. Unit 3 fires exactly where unit 2 does, with twice the activation. All others fire on
seeded random tokens, the lower numbers more often.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

import mxd
from mxd.checkpoint import Run
from mxd.explore import collect, databases, schema, texts
from mxd.explore.codes import CodesWriter, codes_folder
from mxd.explore.progress import Progress
from mxd.explore.store import making, text_path, units_path
from mxd.pipeline import reopen
from mxd.sealed import read_json, write_sealed
from mxd.unit_config import CollectConfig
from tests.small import small_run

LETTER = ord("t") - ord("!")
"""Its token: the byte-level alphabet begins with "!"."""
PLANTED = 4
"""Units with a meaning; the others are random."""


def make_store(
    path: Path,
    *,
    n_units: int = 300,
    tokens: int = 4096,
    seed: int = 0,
    kinds: tuple[str, ...] = ("mxd", "transcoder"),
    documents: Callable[[int], str] | None = None,
    contexts: int = 10,
    **options: Any,
) -> Run:
    """A run in ``path/run`` with about `n_units` units a student, and its databases.

    Args:
        path: an empty folder; host and texts are saved in it too.
        n_units: at least `PLANTED` + 1.
        tokens: of held-out text, first positions included.
        seed: of the random firings.
        kinds: of the students.
        documents: the text of a document by its number; else there are plain words in them.
        contexts: of each band, at most.
        options: of the training run.
    """
    small = {"tokens": 512, "tokens_per_step": 256, "buffer_tokens": 512, "number": 220}
    config = small_run(path, kinds=kinds, budget=str(34 * n_units), **(small | options))
    if documents:
        shutil.rmtree(path / "texts")
        (path / "texts").mkdir()
        lines = (json.dumps({"text": documents(number)}) for number in range(220))
        (path / "texts/texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    run = mxd.train(config, quiet=True)
    return fill(run, CollectConfig(tokens=tokens, effect_tokens=256, contexts=contexts), seed)


def fill(run: Run, config: CollectConfig, seed: int = 0) -> Run:
    """Collect with made-up codes."""
    host, corpus = reopen(run)
    progress = Progress(run, lambda _done, _note: None)
    found = collect._texts(run, config, host, corpus)
    losses = np.full(found.ids.shape, np.nan, np.float32)
    losses[:, 1:] = 2.0
    meta = collect._meta(run, config, found, host)
    texts.write_database(text_path(run), found, losses, host, config.split, meta)
    for record in run.students:
        if record.n_units:
            about = collect._about(run, record, found, 0)
            writer = CodesWriter(codes_folder(run, record.name), about)
            writer.add(len(found.ids), **made_up(found.ids, record.n_units, seed))
            writer.commit()
            writer.close()
    databases.make(run, config, found, host, meta, progress)
    return run


def made_up(ids: NDArray[np.int64], n_units: int, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Firings of the planted units and of random ones: 6 more a token."""
    rng = np.random.default_rng(seed)
    _sequences, length = ids.shape
    tokens = np.arange(ids.size)
    inside = tokens[tokens % length > 0]
    letter = inside[ids.reshape(-1)[inside] == LETTER]
    others = PLANTED + (rng.random((len(inside), 6)) ** 3 * (n_units - PLANTED)).astype(np.int64)
    which = np.concatenate([inside, letter, letter, inside.repeat(6)])
    units = np.concatenate([np.full(len(inside), 1), np.full(len(letter), 2), np.full(len(letter), 3), others.reshape(-1)])
    values = np.concatenate([np.ones(len(inside)), 1.0 + letter % length, 2.0 * (1.0 + letter % length), rng.random(others.size) * 5 + 0.1])
    _, first = np.unique(which * n_units + units, return_index=True)
    order = first[np.lexsort((units[first], which[first]))]
    effects = np.where(which < 256, 0.5, np.nan)
    return {
        "counts": np.bincount(which[order], minlength=ids.size),
        "units": units[order],
        "values": values[order],
        "shares": np.full(len(order), 0.25),
        "effects": effects[order],
    }


def grow(run: Run, student: str, n_units: int, seed: int = 0) -> Run:
    """Change `run`: `student` gets a database of `n_units` units, each a copy of one that it had, with seeded numbers in its columns.

    A tenth of them is dead, a third of the scores and effects is unknown, and every 7th of the others is labelled "label NUMBER"; whole
    columns have ties. Contexts are kept of the strongest firings only. The host cannot be run with the student any more.
    """
    path, rng, old = units_path(run, student), np.random.default_rng(seed), run.student(student).n_units
    with contextlib.closing(sqlite3.connect(path)) as database:
        meta = dict(database.execute("SELECT key, value FROM meta"))
        blobs = database.execute("SELECT * FROM unit_blob ORDER BY unit").fetchall()
        best = {row[0]: row for row in database.execute("SELECT * FROM example WHERE band = 0")}
    columns = made_up_columns(rng, n_units, int(meta["tokens"]), old)
    live = [(unit, PLANTED + unit % (old - PLANTED)) for unit in np.flatnonzero(columns["fires"]).tolist()]
    with making(path, schema.UNITS, meta | {"n_units": str(n_units)}) as database:
        rows = zip(range(n_units), *([None if np.isnan(v) else float(v) for v in columns[name]] for name in schema.COLUMNS), strict=True)
        database.executemany(f"INSERT INTO unit VALUES ({', '.join('?' * (1 + len(columns)))})", rows)
        database.executemany("INSERT INTO unit_blob VALUES (?, ?, ?, ?, ?, ?, ?)", ((unit, *blobs[of][1:]) for unit, of in live))
        database.executemany("INSERT INTO example VALUES (?, ?, ?, ?, ?)", ((unit, *best[of][1:]) for unit, of in live if of in best))
        named = ((unit, "auto", f"label {unit}", "statistical", "", None, None, None, None, "2026-01-01") for unit, _ in live[::7])
        database.executemany(f"INSERT INTO label VALUES ({', '.join('?' * 10)})", named)
    for file in (run.path / student).rglob("*.safetensors"):
        wider = {name: np.resize(t, (n_units, *t.shape[1:])) if t.shape[:1] == (old,) else t for name, t in load_file(file).items()}
        save_file(wider, file)
    info = read_json(run.path / "run.json")
    next(about for about in info["students"] if about["name"] == student)["n_units"] = n_units
    write_sealed(run.path / "run.json", {name: value for name, value in info.items() if name != "sha256"})
    return Run.open(run.path)


def made_up_columns(rng: np.random.Generator, n_units: int, tokens: int, partners: int) -> dict[str, NDArray[np.float32]]:
    """`schema.COLUMNS` of units without meaning, float32 [n_units], NaN where unknown."""
    found = {name: rng.random(n_units).round(3).astype(np.float32) for name in schema.COLUMNS}
    fires = np.exp(rng.random(n_units) * np.log(tokens)).astype(np.int64) * (rng.random(n_units) > 0.1)
    state = np.select([fires == 0, fires < schema.RARE, fires > tokens / 2], [0, 1, 3], 2)
    found |= {"fires": fires.astype(np.float32), "state": state.astype(np.float32)}
    found |= {"effect": rng.normal(0.05, 0.1, n_units).astype(np.float32), "max_a": (rng.random(n_units) * 9 + 0.5).astype(np.float32)}
    found |= {"partner": rng.integers(0, partners, n_units).astype(np.float32), "top_token": np.full(n_units, LETTER, np.float32)}
    unknown = rng.random((2, n_units)) < 1 / 3
    for name, value in found.items():
        if name not in ("fires", "state"):
            value[(fires == 0) | (unknown[0] & name.startswith("effect")) | (unknown[1] & name.startswith("score"))] = np.nan
    return found
