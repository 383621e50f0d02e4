"""``mxd collect RUN``: read held-out text once, and keep what every unit of every student does in ``runs/NAME/explore``.

    text fixed on disk -> one pass of the host -> codes/STUDENT -> text.sqlite, STUDENT.sqlite

The pass can be stopped at any time and goes on where it was; everything after it is made from the codes, without the host.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from .._version import __version__
from ..checkpoint import Run, StudentRecord
from ..errors import ConfigError, RunError
from ..host import Host
from ..layers import SparseLayer
from ..sealed import read_json, write_json
from ..text import Corpus
from ..unit_config import CollectConfig
from ..written import table_of
from . import directions, reading, texts
from .bands import text_of
from .build import build, write_probes
from .codes import Codes, CodesWriter, codes_folder
from .partners import Fired, fired
from .store import UnitStore, folder, now, text_path, units_path
from .texts import Texts

VERSION = 1
"""Raised whenever the same options come to mean other contents."""
SCALE_TOKENS = 262_144
"""Tokens, at most, at which what multiplies the rows of units that are maps is kept."""
SAMPLE = 16
"""Sequences on which the size of the residual stream at the final norm is measured."""

ASKED = ("tokens", "effect_tokens", "split", "contexts", "seed")
"""Options that decide what is collected."""

Say = Callable[[int, str], None]
Open = Callable[[], tuple[Host, Corpus]]


def collect(run: Run, config: CollectConfig, open_host: Open, say: Say | None = None) -> list[str]:
    """Collect what is missing.

    Args:
        run: the run folder, opened.
        open_host: called once if there is anything to do; gives the run's host and texts.
        say: called with the tokens done and a word on what is being done.

    Returns:
        The names of the students whose databases were made.

    Raises:
        ConfigError: an option that makes no sense, or a full disk ahead.
        RunError: unknown student, no student with units, or collected before with other options.
    """
    _check(config)
    records = _records(run, config.students)
    if config.overwrite:
        _clear(run)
    missing = [record for record in records if not _finished(run, record, config)]
    for record in records:
        if record not in missing:
            _refresh_probes(run, record)
    if not missing:
        _Progress(run, lambda _done, _note: None).finished()  # also after another that was stopped
        return []
    host, corpus = open_host()
    progress = _Progress(run, say or (lambda _done, _note: None))
    try:
        return _collect(run, config, missing, host, corpus, progress)
    except BaseException as error:
        progress.failed("stopped" if isinstance(error, KeyboardInterrupt) else " ".join(str(error).split()) or type(error).__name__)
        raise


def _collect(run: Run, config: CollectConfig, missing: list[StudentRecord], host: Host, corpus: Corpus, progress: _Progress) -> list[str]:
    found = _texts(run, config, host, corpus)
    progress.total = found.ids.size
    students, stack = _open_students(run, missing, found, host)
    with_gradient = _with_gradient(config, found)
    losses = _losses_file(run, with_gradient * found.ids.shape[1])
    with stack:
        length = found.ids.shape[1]
        progress.seconds |= reading.read(
            host,
            found.ids,
            students,
            with_gradient=with_gradient,
            losses=losses,
            say=lambda sequences: progress.at(sequences * length, "the host reads"),
        )
    meta = _meta(run, config, found, host)
    if not text_path(run).is_file():
        values = np.full(found.ids.shape, np.nan, np.float32)
        values[:with_gradient] = np.fromfile(losses, "<f4").reshape(with_gradient, length)
        progress.stage("text", lambda: texts.write_database(text_path(run), found, values, host, config.split, meta))
    return _build(run, config, found, host, meta, progress)


def _build(run: Run, config: CollectConfig, found: Texts, host: Host, meta: dict[str, str], progress: _Progress) -> list[str]:
    """The databases of all students that have codes: also of those that had one, for they are matched with the new ones."""
    names = [r.name for r in run.students if r.n_units and _codes_fit(run, r, found)]
    codes = {name: Codes(run, name) for name in names}
    where: dict[str, Fired] = {name: fired(one) for name, one in codes.items()}
    text = text_of(found.ids, found.documents, config.seed, eos=host.tokenizer.eos_token_id)
    sample = torch.from_numpy(found.ids[:SAMPLE])
    unembed = directions.unembedding(host, sample)
    for name in names:
        record = run.student(name)
        layer = run.load(name, host.device)
        table = _table(layer)
        written = None
        if table is not None and table.shape[1] == unembed.weight.shape[1]:
            progress.say(f"tokens promoted by {name}")
            written = progress.stage("directions", lambda c=codes[name], t=table: directions.written(c, text, t, unembed))
        gates = layer.gates()
        bias = gates[0][1].detach().float().cpu().numpy() if len(gates) == 1 and len(gates[0][1]) == layer.n_units else None
        own = {"student": name, "kind": record.kind, "k": str(record.k), "hookpoint": record.hookpoint, "n_units": str(record.n_units)}
        own |= {"weights_sha256": run.weights_sha256(name), "firings": str(codes[name].firings), "report_sha256": _report_sha(run)}
        progress.say(f"contexts of {name}")
        progress.stage(
            "contexts",
            lambda n=name, w=written, b=bias, o=own: build(
                units_path(run, n),
                codes[n],
                text,
                written=w,
                bias=b,
                own=where[n],
                others={other: places for other, places in where.items() if other != n},
                probes=probes(run, n),
                contexts=config.contexts,
                meta={**meta, **o, "log": json.dumps({k: round(v, 2) for k, v in progress.seconds.items()})},
            ),
        )
    progress.finished()
    return names


def _check(config: CollectConfig) -> None:
    if config.split not in ("validation", "test"):
        raise ConfigError("unknown --split", expected="validation or test", got=config.split)
    if config.tokens < 1 or config.effect_tokens < 0 or not 1 <= config.contexts <= 50:
        got = f"{config.tokens}, {config.effect_tokens} and {config.contexts}"
        raise ConfigError("nothing to collect", expected="--tokens from 1, --effect-tokens from 0, --contexts from 1 to 50", got=got)


def _records(run: Run, names: Sequence[str]) -> list[StudentRecord]:
    records = [run.student(name) for name in names] if names else [record for record in run.students if record.n_units]
    for record in records:
        if not record.n_units:
            raise ConfigError(f"{record.name} has no units to look at", expected="a student of a kind that has units", got=record.kind)
    if not records:
        raise RunError(f"{run.path} has no student with units", expected="at least one", next="mxd train --kinds mxd")
    return records


def _settings(run: Run, config: CollectConfig, host_fingerprint: str) -> dict[str, Any]:
    """What the text that is read depends on."""
    about = {name: getattr(config, name) for name in ASKED}
    text = hashlib.sha256(json.dumps(run.info["text"], sort_keys=True).encode()).hexdigest()
    return {**about, "host": host_fingerprint, "text": text, "version": VERSION}


def _texts(run: Run, config: CollectConfig, host: Host, corpus: Corpus) -> Texts:
    where, settings = folder(run) / "codes", _settings(run, config, host.fingerprint)
    found = texts.kept(where, settings)
    if found is None:
        length = run.info["config"]["tokens_per_sequence"]
        found = texts.draw(corpus, host, config.split, tokens=config.tokens, tokens_per_sequence=length)
        texts.save(where, found, settings)
    return found


def _with_gradient(config: CollectConfig, found: Texts) -> int:
    """Sequences on which gradients are taken."""
    return min(len(found.ids), -(-config.effect_tokens // found.ids.shape[1]))


def _finished(run: Run, record: StudentRecord, config: CollectConfig) -> bool:
    """Whether a student's database is there, for these weights and options."""
    if not units_path(run, record.name).is_file() or not text_path(run).is_file():
        return False
    store = UnitStore(run, record.name)
    store.close()
    meta = store.meta
    asked = {name: str(getattr(config, name)) for name in ASKED}
    was = {name: meta.get(f"asked_{name}") for name in asked}
    if was != asked:
        raise texts.other_options(folder(run), was, asked)
    return meta.get("weights_sha256") == run.weights_sha256(record.name)


def _clear(run: Run) -> None:
    """Forget the text and the codes; databases stay until new ones take their place, notes are never touched."""
    shutil.rmtree(folder(run) / "codes", ignore_errors=True)
    text_path(run).unlink(missing_ok=True)


def _about(run: Run, record: StudentRecord, found: Texts, layer_width: int) -> dict[str, Any]:
    length = found.ids.shape[1]
    sizes = {"n_units": record.n_units, "tokens_per_sequence": length, "scale_width": layer_width}
    sizes["scale_sequences"] = min(len(found.ids), SCALE_TOKENS // length)
    return {**sizes, "ids_sha256": found.sha256, "weights_sha256": run.weights_sha256(record.name)}


def _codes_fit(run: Run, record: StudentRecord, found: Texts) -> bool:
    """Whether the codes of a student are whole, and of this text and these weights."""
    path = codes_folder(run, record.name) / "about.json"
    about = read_json(path) if path.is_file() else {}
    same = about.get("ids_sha256") == found.sha256 and about.get("weights_sha256") == run.weights_sha256(record.name)
    return same and about.get("sequences") == len(found.ids)


def _open_students(run: Run, missing: list[StudentRecord], found: Texts, host: Host) -> tuple[dict[str, reading.Student], ExitStack]:
    """The students whose codes are to be read, and what closes their files."""
    _check_space(run, missing, found)
    students: dict[str, reading.Student] = {}
    with ExitStack() as stack:
        for record in missing:
            layer = run.load(record.name, host.device)
            writer = CodesWriter(codes_folder(run, record.name), _about(run, record, found, reading.scale_width(layer)))
            stack.callback(writer.close)
            students[record.name] = reading.Student(record.hookpoint, layer, writer)
        return students, stack.pop_all()


def _check_space(run: Run, missing: list[StudentRecord], found: Texts) -> None:
    """Refuse what the disk has no room for."""
    tokens = found.ids.size
    needed = sum(20 * tokens * min(r.k, 512) + 2 * min(tokens, SCALE_TOKENS) * r.d_out + 20_000 * r.n_units for r in missing)
    free = shutil.disk_usage(run.path).free
    if needed > free:
        raise ConfigError(
            "the disk has no room for what is to be collected",
            expected=f"{needed / 2**20:,.0f} MiB",
            got=f"{free / 2**20:,.0f} MiB free",
            next="lower --tokens, or name fewer --students",
        )


def _losses_file(run: Run, tokens: int) -> Path:
    path = folder(run) / "codes" / "losses.f4"
    if not path.is_file() or path.stat().st_size != 4 * tokens:
        path.write_bytes(np.full(tokens, np.nan, "<f4").tobytes())
    return path


def _table(layer: SparseLayer) -> torch.Tensor | None:
    """The units' rows; None for kinds that have none, or none of the output's width."""
    table = table_of(layer)
    return None if table is None or table.shape != (layer.n_units, layer.d_out) else table.detach().float()


def _meta(run: Run, config: CollectConfig, found: Texts, host: Host) -> dict[str, str]:
    asked = {f"asked_{name}": getattr(config, name) for name in ASKED}
    length = found.ids.shape[1]
    counted = {"tokens": found.ids.size - len(found.ids), "sequences": len(found.ids), "documents": len(found.names)}
    effect = _with_gradient(config, found) * (length - 1)
    about = {
        "split": config.split,
        "seed": config.seed,
        "effect_tokens": effect,
        "tokens_per_sequence": length,
        "contexts": config.contexts,
    }
    if host.tokenizer.eos_token_id is not None:
        about["eos"] = int(host.tokenizer.eos_token_id)
    source = {"text_sha256": found.sha256, "host_fingerprint": host.fingerprint, "version": __version__, "created": now()}
    return {key: str(value) for key, value in {**asked, **counted, **about, **source}.items()}


def _report_sha(run: Run) -> str:
    path = run.path / "report.json"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def probes(run: Run, student: str) -> list[tuple[int, str, str, float, int]]:
    """(unit, task, class, F1 on test samples, test samples) of the single-unit probes in the run's report, if it has any."""
    if not (run.path / "report.json").is_file():
        return []
    report: Any = read_json(run.path / "report.json")
    found: list[tuple[int, str, str, float, int]] = []
    for figures in cast("list[dict[str, Any]]", report.get("students", [])):
        for task, about in (figures.get("probes") or {}).get("tasks", {}).items() if figures.get("name") == student else ():
            cell = about.get("figures", {}).get("student", {}).get("code", {}).get("k1") or {}
            for row in cell.get("classes", []):
                if row.get("units") and row.get("f1") is not None:
                    tested = int(about.get("samples", {}).get("test", 0))
                    found.append((int(row["units"][0]), task, str(row["class"]), float(row["f1"]), tested))
    return found


def _refresh_probes(run: Run, record: StudentRecord) -> None:
    """Take over the probes of a report that is newer than the database."""
    report = _report_sha(run)
    store = UnitStore(run, record.name)
    store.close()
    if store.meta.get("report_sha256") == report:
        return
    with closing(sqlite3.connect(units_path(run, record.name), isolation_level=None, timeout=30)) as database:
        database.execute("BEGIN IMMEDIATE")
        write_probes(database, probes(run, record.name))
        database.execute("INSERT OR REPLACE INTO meta VALUES ('report_sha256', ?)", (report,))
        database.execute("COMMIT")


class _Progress:
    """Tells the terminal, and through ``explore/collect.json`` the page."""

    def __init__(self, run: Run, say: Say) -> None:
        self._path, self._say, self.total = folder(run) / "collect.json", say, 0
        self._begun, self._first, self._done, self._spoken = time.monotonic(), -1, 0, 0.0
        self.seconds: dict[str, float] = {}

    def at(self, done: int, note: str) -> None:
        """So many tokens were read."""
        if self._first < 0:
            self._first, self._begun = done, time.monotonic()
        self._done = done
        self._say(done, note)
        if time.monotonic() - self._spoken > 1:
            speed = (done - self._first) / max(time.monotonic() - self._begun, 1e-6)
            self._write("running", note, (self.total - done) / speed if speed else None)

    def say(self, note: str) -> None:
        """What comes after the pass."""
        self._say(self._done, note)
        self._write("running", note, None)

    def stage(self, name: str, work: Callable[[], Any]) -> Any:
        """Do it and add up the time it takes."""
        begun = time.monotonic()
        done = work()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - begun
        return done

    def finished(self) -> None:
        self._write("done", "", 0.0)

    def failed(self, why: str) -> None:
        self._write("failed", why, None)

    def _write(self, state: str, stage: str, left: float | None) -> None:
        self._spoken = time.monotonic()
        about = {"state": state, "pid": os.getpid(), "stage": "" if state == "failed" else stage, "done": self._done, "total": self.total}
        write_json(self._path, {**about, "seconds_left": left, "why": stage if state == "failed" else None})
