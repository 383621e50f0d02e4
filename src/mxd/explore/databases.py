"""From the codes to the databases of all students, side by side. Of the host only its unembedding is asked."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from ..checkpoint import Run, StudentRecord
from ..host import Host
from ..layers import SparseLayer
from ..sealed import read_json
from ..unit_config import CollectConfig
from ..written import table_of
from . import directions
from .bands import Text, text_of
from .build import build
from .codes import Codes, codes_folder
from .partners import Fired, fired
from .probed import probes, report_sha
from .progress import Progress
from .store import units_path
from .texts import Texts

AT_ONCE = 2
"""Databases made at once: each holds up to 2,000,000 firings in memory."""
SAMPLE = 16
"""Sequences on which the size of the residual stream at the final norm is measured."""


def make(run: Run, config: CollectConfig, found: Texts, host: Host, meta: dict[str, str], progress: Progress) -> list[str]:
    """The databases of all students that have codes: also of those that had one, for they are matched with the new ones."""
    names = [r.name for r in run.students if r.n_units and codes_fit(run, r, found)]
    maker = _Maker(run, config, found, host, meta, {name: Codes(run, name) for name in names})
    futures: list[Future[None]] = []
    # NumPy, SciPy and SQLite let other threads work; what takes PyTorch, with threads of its own, stays in this one.
    pool = ThreadPoolExecutor(min(AT_ONCE, torch.get_num_threads()), "mxd-databases")
    try:
        for name in names:
            progress.say(f"tokens promoted by {name}")
            written, bias = progress.stage("directions", partial(maker.of_weights, name))
            progress.say(f"contexts of {name}")
            futures.append(pool.submit(progress.stage, "contexts", partial(maker.build, name, written, bias)))
        for future in futures:
            future.result()
    finally:
        maker.halt.set()
        pool.shutdown(cancel_futures=True)
    progress.finished()
    return names


class _Maker:
    """What the databases of all students are made from."""

    def __init__(self, run: Run, config: CollectConfig, found: Texts, host: Host, meta: dict[str, str], codes: Mapping[str, Codes]) -> None:
        self._run, self._config, self._host, self._meta, self._codes = run, config, host, meta, codes
        self._where: dict[str, Fired] = {name: fired(one) for name, one in codes.items()}
        self._text: Text = text_of(found.ids, found.documents, config.seed, eos=host.tokenizer.eos_token_id)
        self._unembed = directions.unembedding(host, torch.from_numpy(found.ids[:SAMPLE]))
        self.halt = threading.Event()
        """Set when no more databases are wanted."""

    def of_weights(self, name: str) -> tuple[directions.Written | None, NDArray[np.float32] | None]:
        """What the units of a student write, and the bias of its gate; None where its kind has no such thing."""
        layer = self._run.load(name, self._host.device)
        table, gates = _table(layer), layer.gates()
        bias = gates[0][1].detach().float().cpu().numpy() if len(gates) == 1 and len(gates[0][1]) == layer.n_units else None
        if table is None or table.shape[1] != self._unembed.weight.shape[1]:
            return None, bias
        return directions.written(self._codes[name], self._text, table, self._unembed), bias

    def build(self, name: str, written: directions.Written | None, bias: NDArray[np.float32] | None) -> None:
        """Write the database of a student."""
        run, record, codes = self._run, self._run.student(name), self._codes[name]
        own = {"student": name, "kind": record.kind, "k": str(record.k), "hookpoint": record.hookpoint, "n_units": str(record.n_units)}
        own |= {"weights_sha256": run.weights_sha256(name), "firings": str(codes.firings), "report_sha256": report_sha(run)}
        build(
            units_path(run, name),
            codes,
            self._text,
            written=written,
            bias=bias,
            own=self._where[name],
            others={other: places for other, places in self._where.items() if other != name},
            probes=probes(run, name),
            contexts=self._config.contexts,
            meta={**self._meta, **own},
            halt=self.halt,
        )


def codes_fit(run: Run, record: StudentRecord, found: Texts) -> bool:
    """Whether the codes of a student are whole, and of this text and these weights."""
    path = codes_folder(run, record.name) / "about.json"
    about = read_json(path) if path.is_file() else {}
    same = about.get("ids_sha256") == found.sha256 and about.get("weights_sha256") == run.weights_sha256(record.name)
    return same and about.get("sequences") == len(found.ids)


def _table(layer: SparseLayer) -> torch.Tensor | None:
    """The units' rows; None for kinds that have none, or none of the output's width."""
    table = table_of(layer)
    return None if table is None or table.shape != (layer.n_units, layer.d_out) else table.detach().float()
