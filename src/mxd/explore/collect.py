"""``mxd collect RUN``: read held-out text once, and keep what every unit of every student does in ``runs/NAME/explore``.

    text fixed on disk -> one pass of the host -> codes/STUDENT -> text.sqlite, STUDENT.sqlite

The pass can be stopped at any time and goes on where it was; everything after it is made from the codes, without the host.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from .._version import __version__
from ..checkpoint import Run, StudentRecord
from ..errors import ConfigError, RunError
from ..host import Host
from ..text import Corpus
from ..unit_config import CollectConfig
from . import databases, probed, reading, texts
from .codes import CodesWriter, codes_folder
from .progress import Progress, Say
from .store import UnitStore, folder, now, text_path, units_path
from .texts import Texts

VERSION = 1
"""Raised whenever the same options come to mean other contents."""
SCALE_TOKENS = 262_144
"""Tokens, at most, at which what multiplies the rows of units that are maps is kept."""
ASKED = ("tokens", "effect_tokens", "split", "contexts", "seed")
"""Options that decide what is collected."""

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
            probed.refresh(run, record)
    if not missing:
        Progress(run, lambda _done, _note: None).finished()  # also after another that was stopped
        return []
    host, corpus = open_host()
    progress = Progress(run, say or (lambda _done, _note: None))
    try:
        return _collect(run, config, missing, host, corpus, progress)
    except BaseException as error:
        progress.failed("stopped" if isinstance(error, KeyboardInterrupt) else " ".join(str(error).split()) or type(error).__name__)
        raise


def _collect(run: Run, config: CollectConfig, missing: list[StudentRecord], host: Host, corpus: Corpus, progress: Progress) -> list[str]:
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
    return databases.make(run, config, found, host, meta, progress)


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
