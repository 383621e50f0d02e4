"""What other tools are given of a run's units: dashboards for Neuronpedia, and the firings for delphi."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import Run, StudentRecord
from ..errors import ConfigError, RunError
from ..interop import delphi, saedashboard
from ..sealed import write_atomic, write_json
from ..unit_config import ExportConfig
from . import export, schema, unit_page, weights
from .chosen import Choice, chosen, collected
from .codes import Codes
from .packing import pieces
from .store import TextStore, UnitStore

FORMATS = ("html", "neuronpedia", "delphi")


def write(run: Run, config: ExportConfig, say: Callable[[str], None] | None = None) -> str:
    """Carry out an export.

    Args:
        say: told what is begun, of formats that can take minutes.

    Returns:
        What was written, in a line.

    Raises:
        ConfigError: options that do not go together, or that the format has no use for.
        RunError: nothing was collected, no such student or unit, or there is an export already.
    """
    _check(config)
    out = config.out or Path(f"{run.path.resolve().name}.html" if config.format == "html" else f"{run.path.resolve().name}-{config.format}")
    units = "starred" if config.starred else config.units or None
    contexts = export.CONTEXTS if config.contexts is None else config.contexts
    if config.format == "html":
        top = export.TOP if config.top is None else config.top
        given: dict[str, Any] = {"units": units, "top": top, "by": config.by, "contexts": contexts, "overwrite": config.overwrite}
        made = export.write_html(run, out, students=config.students or None, **given)
        return f"{out}: {made.units} units, {made.bytes / 1e6:.1f} MB; opens in a browser, without a server or a network"
    choice, number, records = Choice(units, config.top, config.by), 0, collected(run, config.students)
    with export.opened(run) as answers:
        for record in records:
            store = answers.shelf.units(record.name).store
            numbers = chosen(run, store, record.name, choice, others=len(records) > 1)
            number += len(numbers)
            if say:
                say(f"{record.name}: {len(numbers):,} units")
            if config.format == "delphi":
                write_delphi(run, record, out, None if choice == Choice(by=config.by) else numbers, overwrite=config.overwrite)
            else:
                found = (unit_page.unit(answers, record.name, unit, n=contexts) for unit in numbers)
                write_neuronpedia(run, record, out, store, found, contexts=contexts, overwrite=config.overwrite)
    return f"{out}: {number} units of {', '.join(record.name for record in records)}"


def _check(config: ExportConfig) -> None:
    if config.format not in FORMATS:
        raise ConfigError("unknown --format", expected=", ".join(FORMATS), got=config.format)
    ways = [name for name, said in (("--units", config.units), ("--starred", config.starred), ("--top", config.top is not None)) if said]
    if len(ways) > 1:
        raise ConfigError("units can be chosen in one way", expected="one of --units, --starred, --top", got=" and ".join(ways))
    if config.format != "html" and config.top is None and config.by != ExportConfig.by:
        raise ConfigError("--by decides which are the first", expected="--top with --by", got=f"--by {config.by} for all")
    if config.top is not None and config.top < 1:
        raise ConfigError("--top is a number of units", expected="at least 1", got=str(config.top))
    if config.contexts is not None and config.format == "delphi":
        raise ConfigError("delphi's cache holds every firing", expected="no --contexts", got=f"--contexts {config.contexts}")
    if config.contexts is not None and not 1 <= config.contexts <= unit_page.MOST_CONTEXTS:
        raise ConfigError("--contexts is a number of contexts", expected=f"1 to {unit_page.MOST_CONTEXTS}", got=str(config.contexts))
    if config.units and len(config.students) != 1:
        raise ConfigError("unit numbers are those of one student", expected="--units with one of --students", got=f"{len(config.students)}")


def write_delphi(run: Run, record: StudentRecord, out: Path, units: Sequence[int] | None = None, *, overwrite: bool = False) -> list[Path]:
    """Every firing of a student as delphi's cache, in ``out/STUDENT/latents/HOOKPOINT``.

    Students of one name at several hookpoints share a cache, as delphi's own do; its other results go beside ``latents``.

    Args:
        units: only the firings of these; None: of all.

    Raises:
        RunError: nothing was collected, what was is damaged, or there is an export already.
    """
    codes, text = Codes(run, record.name), TextStore(run)
    tokens = _tokens(text, codes)
    folder = out / record.name.split("@")[0] / "latents" / record.hookpoint
    _clear(folder, "*_*.safetensors", overwrite)
    wanted = None if units is None else np.isin(np.arange(record.n_units), units)
    most = min(delphi.FIRINGS_PER_FILE, -(-codes.firings // delphi.FILES) or 1)
    written: list[Path] = []
    for part in codes.chunks(most):
        latent = part.first + part.units
        kept = slice(None) if wanted is None else wanted[latent]
        token = part.tokens[kept]
        firings = delphi.Firings(token // codes.tokens_per_sequence, token % codes.tokens_per_sequence, latent[kept], part.values[kept])
        path = folder / delphi.file_name(part.first, part.first + len(part.starts) - 2)
        write_atomic(path, delphi.encode(firings, part.first, tokens))
        written.append(path)
    about = {**_about(run, record, units), "unit": "delphi's latents are the units of this student"}
    config = delphi.config(
        model=str(run.info["config"]["host"]),
        dataset=_dataset(run),
        split=text.meta.get("split", "test"),
        tokens_per_sequence=codes.tokens_per_sequence,
        tokens=codes.tokens,
        n_files=len(written),
        about=about,
    )
    write_json(folder / "config.json", config)
    return [*written, folder / "config.json"]


def write_neuronpedia(
    run: Run,
    record: StudentRecord,
    out: Path,
    store: UnitStore,
    answers: Iterable[Mapping[str, Any]],
    *,
    contexts: int,
    overwrite: bool = False,
) -> list[Path]:
    """Dashboards of some units in SAEDashboard's form, in ``out/STUDENT/HOOKPOINT``.

    Args:
        answers: each unit, as the page is told of it.
        contexts: of each band, at most.

    Raises:
        RunError: there is an export already.
    """
    folder = out / record.folder
    _clear(folder, "batch-*.json", overwrite)
    layer = _layer(record.hookpoint)
    named: dict[str, Any] = {"model": str(run.info["host"]["name"]).rsplit("/", 1)[-1], "layer": layer, "name": record.name.split("@")[0]}
    sequences = int(store.meta.get("sequences", 0))
    length = store.tokens // sequences + 1 if sequences else 0  # first positions are not counted among the tokens
    read: dict[str, Any] = {"dataset": _dataset(run), "sequences": sequences, "tokens_per_sequence": length}
    files = saedashboard.batches((feature(answer, store.tokens, contexts) for answer in answers), **named, **read)
    dead = np.flatnonzero(store.columns(("fires",))["fires"] == 0)
    written: list[Path] = []
    for name, content in [*files, saedashboard.skipped([int(unit) for unit in dead], **named)]:
        write_atomic(folder / name, content)
        written.append(folder / name)
    return written


def feature(answer: Mapping[str, Any], tokens: int, contexts: int) -> saedashboard.Feature:
    """One unit as SAEDashboard has it.

    Silent twins are left out: it has no place for text on which a unit is off. The two other things that it knows and the page does not,
    the contexts' activations between 255ths of the unit's largest and the histogram of all logits, are rounded and empty.

    Args:
        answer: of the page, to ``/api/s/STUDENT/units/U``.
        tokens: over which firings were counted.
        contexts: of each band, at most.
    """
    columns, largest = answer["columns"], answer["hist"]["max"] or 0.0
    counts = answer["hist"]["counts"]
    stretches: list[saedashboard.Activation] = []
    for band in answer["bands"]:
        if band["band"] == schema.TWINS:
            continue
        share = band["fires"] / tokens if tokens else 0.0
        bin = saedashboard.Bin(band["low"] or 0.0, band["high"] or largest, share) if band["band"] else saedashboard.strongest(largest)
        stretches += [_stretch(context, largest, bin) for context in band["contexts"][:contexts]]
    return saedashboard.Feature(
        index=answer["unit"],
        frequency=(columns["fires"] or 0.0) / tokens if tokens else 0.0,
        promoted=[(entry["token"], entry["mean"]) for entry in answer["promoted"]],
        suppressed=[(entry["token"], entry["mean"]) for entry in answer["suppressed"]],
        bars=[((i + 0.5) * largest / len(counts), int(count)) for i, count in enumerate(counts)],
        activations=stretches,
    )


def _stretch(context: Mapping[str, Any], largest: float, bin: saedashboard.Bin) -> saedashboard.Activation:
    words = list(pieces(context["text"], context["cuts"]))
    values = [0.0] * len(words)
    for offset, level in context["levels"]:
        values[offset] = level / 255 * largest
    values[context["peak"]] = context["a"]  # to the last digit, where the others are levels
    return saedashboard.Activation(words, values, context["peak"], bin)


def _tokens(text: TextStore, codes: Codes) -> NDArray[np.uint32]:
    """Ids of all sequences that were read [sequences, positions].

    Raises:
        RunError: the text is not that of the codes.
    """
    rows: list[NDArray[np.uint32]] = []
    for start in range(0, codes.sequences, 1000):
        end = min(start + 1000, codes.sequences)
        found = text.ask("SELECT ids FROM seq WHERE seq >= ? AND seq < ? ORDER BY seq", (start, end))
        if len(found) != end - start:
            raise text.damaged(f"{start + len(found)} of the {codes.sequences} sequences")
        rows += [text.numbers(ids, "<u4", codes.tokens_per_sequence) for (ids,) in found]
    return np.stack(rows) if rows else np.zeros((0, codes.tokens_per_sequence), np.uint32)


def _clear(folder: Path, pattern: str, overwrite: bool) -> None:
    """Nothing of an earlier export stays beside the new one, which could be of fewer files.

    Raises:
        RunError: there is one, and it is not to be replaced.
    """
    old = sorted(folder.glob(pattern))
    if old and not overwrite:
        raise RunError(f"{folder} holds an export already", expected="a new folder", got=old[0].name, next="another --out, or --overwrite")
    for path in old:
        path.unlink()


def _layer(hookpoint: str) -> int:
    """Number of the block; 0 where the path names none."""
    found = re.search(r"\d+", hookpoint)
    return int(found.group()) if found else 0


def _dataset(run: Run) -> str:
    """What was read; of files and folders their names alone."""
    return ", ".join(str(source.get("name", "?")).rstrip("/").rsplit("/", 1)[-1] for source in run.info["text"]["sources"])


def _about(run: Run, record: StudentRecord, units: Sequence[int] | None) -> dict[str, Any]:
    """Whose firings these are; and what a reader should not conclude from them."""
    about: dict[str, Any] = {
        "student": record.name,
        "kind": record.kind,
        "k": record.k,
        "hookpoint": record.hookpoint,
        "weights_sha256": run.weights_sha256(record.name),
        "host": run.info["host"],
        "first_position": "left out: activations there are not counted",
        "units": None if units is None else [int(unit) for unit in units],
    }
    if weights.maps(record.kind):
        about["note"] = "experts: these are their gate's activations; what an expert writes depends on the token as well"
    return json.loads(json.dumps(about))
