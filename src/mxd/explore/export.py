"""The page in one file: markup, styles, script and what was collected about some units, to be opened without a server or a network.

The scripts are classic ones, so that all of them in their order are one script; its hash stands in a content security policy at the head
of the file, and nothing else may run. The data is compressed JSON in a block that browsers do not look at.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import html as markup
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from ..checkpoint import Run
from ..errors import ConfigError, RunError
from ..sealed import write_atomic
from . import unit_page
from .answers import COLUMNS, MOST_ROWS, Answers
from .chosen import Choice, Units, chosen, collected
from .packing import Packing
from .replies import to_json
from .shelf import Shelf
from .store import UnitStore

FORMAT = 1
"""Of the data; the page refuses another."""
TOP = 300
"""Units of each student, unless told otherwise."""
CONTEXTS = 10
"""Contexts of each band, unless told otherwise."""
LARGEST = 50_000_000
"""Bytes of a file; browsers get slow beyond."""
SAMPLE, SAMPLE_TEXTS = 48, 1000
"""Units of a student, and sequences, that the size of all is estimated from."""
WEIGHTS = {"unit": 400.0, "context": 12.0}
"""What they take, compressed, in the level of one token."""
PAGE = Path(__file__).with_name("page")
UNPACK = "packed.js"
"""The script that only exported files have."""
_SCRIPT = re.compile(r'<script src="/static/(\w+\.js)" defer></script>\n?')
_STYLE = re.compile(r'<link rel="stylesheet" href="/static/(\w+\.css)">\n?')


class Size(NamedTuple):
    """Of a file."""

    bytes: int
    units: int
    """Of all students together."""


def write_html(
    source: Run | Answers,
    path: Path,
    *,
    students: Sequence[str] | None = None,
    units: Units = None,
    top: int = TOP,
    by: str = "effect",
    contexts: int = CONTEXTS,
    overwrite: bool = False,
) -> Size:
    """Write the page and some units to one file, atomically.

    Args:
        source: a run; or what a server answers from, which is open already.
        path: file to write.
        students: names; None: all of which something was collected.
        units: numbers of one student's, or "starred"; None: the first of each student by a column.
        top: how many those are.
        by: the column, the largest value first.
        contexts: of each band, at most.
        overwrite: replace the file if there is one.

    Raises:
        RunError: nothing was collected, no such student, or the file is there already.
        ConfigError: no such unit or column, or the file would be larger than `LARGEST`.
    """
    if path.is_dir() or (path.exists() and not overwrite):
        what = "is a folder" if path.is_dir() else "exists already"
        raise RunError(f"{path} {what}", expected="a new file", next="choose another name, or add --overwrite to replace a file")
    with opened(source) as answers:
        parts = _chosen(answers, students, units, top, by)
        text = _html(answers, parts, contexts)
    write_atomic(path, text)
    return Size(len(text.encode()), sum(len(numbers) for numbers in parts.values()))


def html(
    source: Run | Answers,
    *,
    students: Sequence[str] | None = None,
    units: Units = None,
    top: int = TOP,
    by: str = "effect",
    contexts: int = CONTEXTS,
) -> str:
    """The file that `write_html` writes."""
    with opened(source) as answers:
        return _html(answers, _chosen(answers, students, units, top, by), contexts)


def size(
    source: Run | Answers,
    *,
    students: Sequence[str] | None = None,
    units: Units = None,
    top: int = TOP,
    by: str = "effect",
    contexts: int = CONTEXTS,
) -> Size:
    """How large that file is going to be, from a sample of the units: within a few per cent."""
    with opened(source) as answers:
        parts = _chosen(answers, students, units, top, by)
        return Size(_estimate(answers, parts, contexts), sum(len(numbers) for numbers in parts.values()))


# ---- which, and what is known of them -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(source: Run | Answers) -> Iterator[Answers]:
    """What is answered about a run; its databases are closed afterwards, unless they were open."""
    if isinstance(source, Answers):
        yield source
        return
    shelf = Shelf(source.path)
    try:
        yield Answers(shelf)
    finally:
        shelf.close()


def _chosen(answers: Answers, students: Sequence[str] | None, units: Units, top: int, by: str) -> dict[str, list[int]]:
    """Units by student."""
    run = answers.shelf.run
    names = [record.name for record in collected(run, students or ())]
    if not isinstance(units, str | None) and len(names) > 1:
        raise ConfigError("unit numbers are those of one student", expected="one of --students", got=", ".join(names))
    choice = Choice(units, top, by)
    found = {name: chosen(run, answers.shelf.units(name).store, name, choice, others=len(names) > 1) for name in names}
    if not any(found.values()):
        raise ConfigError("there is no such unit to export", expected="at least one", got="none", next=f"mxd explore {run.path}")
    return found


def _data(answers: Answers, parts: Mapping[str, Sequence[int]], contexts: int, *, texts: bool = True) -> dict[str, Any]:
    """What stands in the file: what the server would answer, each text once (see `packing`); or not at all."""
    run = answers.shelf.run
    weights = {run.weights_sha256(name) for name in parts}
    packing = Packing(answers.shelf.text().store)
    found = {
        "format": FORMAT,
        "run": portable(answers.run(), run.path),
        "students": {name: _student(answers, name, units, contexts, packing) for name, units in parts.items()},
        "notes": [note for note in answers.notes()["notes"] if note["weights_sha"] in weights],
        "bench": [kept for kept in answers.benches() if kept["student"] in parts],
        "sentences": answers.sentences(parts),
    }
    return {**found, **packing.tables()} if texts else found


def portable(value: Any, path: Path) -> Any:
    """`value` without this machine's folders: the run by its name, and of any other whole path its last part."""
    if isinstance(value, dict):
        return {name: portable(inner, path) for name, inner in cast("dict[str, Any]", value).items()}
    if isinstance(value, list):
        return [portable(inner, path) for inner in cast("list[Any]", value)]
    if not isinstance(value, str):
        return value
    if Path(value).is_absolute() and " " not in value:
        return Path(value).name
    for place in sorted({str(path), str(path.resolve())}, key=len, reverse=True):
        value = value.replace(place, path.resolve().name)
    return value


def _student(answers: Answers, name: str, units: Sequence[int], contexts: int, packing: Packing) -> dict[str, Any]:
    _, columns = answers.columns(name, COLUMNS)
    numbers = np.ascontiguousarray(columns[:, list(units)], dtype="<f4")
    rows: dict[str, Any] = {}
    for start in range(0, len(units), MOST_ROWS):
        for row in answers.rows(name, units[start : start + MOST_ROWS])["units"]:
            rows[str(row["unit"])] = {**row, "best": row["best"] and packing.context(row["best"])}
    data = base64.b64encode(numbers.tobytes()).decode()
    return {
        "columns": {"names": list(COLUMNS), "n": len(units), "units": list(units), "data": data},
        "units": {str(unit): _unit(answers, name, unit, contexts, packing) for unit in units},
        "rows": rows,
        "matches": answers.matches(name),
    }


def _unit(answers: Answers, name: str, unit: int, contexts: int, packing: Packing) -> dict[str, Any]:
    found = unit_page.unit(answers, name, unit, n=contexts)
    packed = [{**band, "contexts": [packing.context(c) for c in band["contexts"]]} for band in found["bands"]]
    return {**found, "bands": [{**band, "kept": len(band["contexts"])} for band in packed]}


# ---- the file -------------------------------------------------------------------------------------------------------------------


def _html(answers: Answers, parts: Mapping[str, Sequence[int]], contexts: int) -> str:
    text = assemble(_data(answers, parts, contexts), f"{answers.shelf.run.path.resolve().name} · mxd")
    if len(text) > LARGEST:
        raise ConfigError(
            "the file would be too large",
            expected=f"at most {LARGEST / 1e6:.0f} MB",
            got=f"{len(text) / 1e6:.0f} MB",
            next="fewer units (--top), students or contexts",
        )
    return text


def _estimate(answers: Answers, parts: Mapping[str, Sequence[int]], contexts: int) -> int:
    """Bytes of the file, from what some units and some of the text take, compressed."""
    few = {name: units[:: max(1, len(units) // SAMPLE)] for name, units in parts.items()}
    packing, weights = Packing(answers.shelf.text().store), {"all": 0.0, "few": 0.0}
    for name, units in parts.items():
        store, sampled = answers.shelf.units(name).store, set(few[name])
        for unit in units:
            weight = _weight(store, unit, contexts, packing)
            weights["all"] += weight
            weights["few"] += weight if unit in sampled else 0.0
    none = {name: [] for name in parts}
    fixed = len(assemble(_data(answers, none, contexts, texts=False), ""))
    some = len(assemble(_data(answers, few, contexts, texts=False), "")) - fixed
    return fixed + round(some * weights["all"] / weights["few"]) + _texts(packing)


def _texts(packing: Packing) -> int:
    """Bytes of what is kept in `packing`: of every so manieth sequence, and in proportion; words and documents are there once."""
    every = max(1, len(packing.spans()) // SAMPLE_TEXTS)
    tables, documents = packing.tables(every), packing.documents(every)
    words, named = packing.counts()
    parts = (
        (tables["sequences"], len(tables["sequences"]), len(packing.spans())),
        (tables["vocabulary"], len(tables["vocabulary"]["ids"]), words),
        (documents, len(documents), named),
    )
    return round(sum(len(_block(part)) * needed / max(1, taken) for part, taken, needed in parts))


def _weight(store: UnitStore, unit: int, contexts: int, packing: Packing) -> float:
    """How much a unit takes beside its text, in levels of tokens; what it shows is kept in `packing`."""
    weight = WEIGHTS["unit"]
    for _, found in store.examples(unit).values():
        for context in found[:contexts]:
            packing.keep(context.seq, context.start, context.length, context.peak)
            weight += WEIGHTS["context"] + len(context.levels)
    return weight


def assemble(data: Mapping[str, Any], title: str) -> str:
    """The page around `data`, which is JSON without NaN."""
    page = (PAGE / "index.html").read_text(encoding="utf-8")
    base, *others = _SCRIPT.findall(page)
    script = "\n".join((PAGE / name).read_text(encoding="utf-8") for name in (base, UNPACK, *others))
    style = "\n".join((PAGE / name).read_text(encoding="utf-8") for name in _STYLE.findall(page))
    # Either would end the element, or begin a comment in it; in the strings where they can stand, both mean the same.
    script = script.replace("</script", r"<\/script").replace("<!--", r"<\!--")
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data:; base-uri 'none'; "
        "form-action 'none'; require-trusted-types-for 'script'"
    )
    block = _block(data)
    begin, end = '<meta charset="utf-8">\n', "</body>"
    tail = f'<script type="application/octet-stream" id="mxd-data">{block}</script>\n<script>{script}</script>\n{end}'
    page = _STYLE.sub(lambda _: f"<style>{style}</style>\n", _SCRIPT.sub("", page))
    page = page.replace(begin, f'{begin}<meta http-equiv="Content-Security-Policy" content="{policy}">\n', 1)
    page = re.sub(r"<title>.*?</title>", lambda _: f"<title>{markup.escape(title)}</title>", page, count=1)
    return page.replace(end, tail, 1)


def _block(data: Any) -> str:
    return base64.b64encode(gzip.compress(to_json(data), 9, mtime=0)).decode()


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
