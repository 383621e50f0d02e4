"""A run whose codes were made up, so that every number of its databases is known: as many units as asked for, no host needed to read it.

Unit 0 never fires. Unit 1 fires on every token but the first of a sequence, with activation 1. Unit 2 fires exactly on the letter "t",
with activation 1 + its position in the sequence. Unit 3 fires exactly where unit 2 does, with twice the activation. All others fire on
seeded random tokens, the lower numbers more often.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import mxd
from mxd.checkpoint import Run
from mxd.explore import collect, texts
from mxd.explore.codes import CodesWriter, codes_folder
from mxd.explore.store import text_path
from mxd.pipeline import reopen
from mxd.unit_config import CollectConfig
from tests.small import small_run

LETTER = ord("t") - ord("!")
"""Its token: the byte-level alphabet begins with "!"."""
PLANTED = 4
"""Units with a meaning; the others are random."""


def make_store(
    path: Path, *, n_units: int = 300, tokens: int = 4096, seed: int = 0, kinds: tuple[str, ...] = ("mxd", "transcoder"), **options: Any
) -> Run:
    """A run in ``path/run`` with about `n_units` units a student, and its databases.

    Args:
        path: an empty folder; host and texts are saved in it too.
        n_units: at least `PLANTED` + 1.
        tokens: of held-out text, first positions included.
        seed: of the random firings.
        kinds: of the students.
        options: of the training run.
    """
    small = {"tokens": 512, "tokens_per_step": 256, "buffer_tokens": 512, "number": 220}
    config = small_run(path, kinds=kinds, budget=str(34 * n_units), **(small | options))
    run = mxd.train(config, quiet=True)
    return fill(run, CollectConfig(tokens=tokens, effect_tokens=256), seed)


def fill(run: Run, config: CollectConfig, seed: int = 0) -> Run:
    """Collect with made-up codes."""
    host, corpus = reopen(run)
    progress = collect._Progress(run, lambda _done, _note: None)
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
    collect._build(run, config, found, host, meta, progress)
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
