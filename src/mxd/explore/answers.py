"""What the page is told about a run and about all units of a student, out of its files: JSON-ready values, no host and no PyTorch."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import Run, StudentRecord
from ..errors import MxdError, RunError
from ..sealed import read_json
from . import banners, kept, published, schema, weights
from .contexts import cut, shown
from .replies import Refusal, short, told
from .shelf import Shelf, Units

EDGES = [round(-7 + 0.175 * i, 4) for i in range(41)]
"""Edges of the histogram of log10 firing frequency, -7 to 0."""
COLUMNS = (*schema.COLUMNS, "star", "labelled")
MOST_ROWS = 200
MOST_CHARACTERS = 200
"""Of a search."""
MOST_FOUND = 20_000
SPARK = 24
POINTS = 2000
WITHOUT = 0.1
"""A unit whose best match has a smaller Jaccard index has none."""
EXAMPLES = 3
SEARCHED = ("label", "note", "token", "text")


class Answers:
    """Everything that is read out of the run's files. Usable from several threads."""

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf

    def token(self, token: int) -> str | None:
        """The text of a token; None where what was collected does not say."""
        try:
            return self.shelf.text().store.tokens.get(token)
        except RunError:
            return None

    # ---- the run ------------------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Who it is, its students, the figures of its report, and what to be careful with."""
        run = self.shelf.run
        info, (report, why) = run.info, _report(run)
        by_name = {figures.get("name"): figures for figures in report["students"]} if report else {}
        students = [self._student(run, record, by_name.get(record.name)) for record in run.students]
        return {
            "name": run.path.resolve().name,
            "host": info["host"]["name"],
            "host_fingerprint": info["host"].get("fingerprint"),
            "seed": info.get("seed"),
            "train_tokens": info.get("train_tokens"),
            "text": [{name: source.get(name) for name in ("name", "kind", "documents")} for source in info["text"].get("sources", ())],
            "split_rule": info["text"].get("split_rule"),
            "versions": info.get("versions"),
            "git_commit": info.get("git_commit"),
            "report": {name: value for name, value in report.items() if not isinstance(value, dict | list)} if report else None,
            "report_why": None if why is None else told(why),
            "students": students,
            "published": published.frontier(info["host"]["name"], {record.hookpoint for record in run.students}),
            "banners": banners.of_run(students, run.path),
            "examples": self._examples(),
        }

    def _student(self, run: Run, record: StudentRecord, figures: dict[str, Any] | None) -> dict[str, Any]:
        store: dict[str, Any] | None = None
        frequency: dict[str, Any] | None = None
        why: MxdError | None = None
        try:
            units = self.shelf.units(record.name)
            store, frequency = _store(units), _frequency(units)
        except MxdError as error:
            why = error
        return {
            **{name: getattr(record, name) for name in ("name", "kind", "k", "d_in", "d_out", "n_units", "hookpoint", "params", "recipe")},
            "word": "none" if not record.n_units else "expert" if weights.maps(record.kind) else "latent",
            "is_control": record.is_control,
            "weights_sha256": run.weights_sha256(record.name),
            "store": store,
            "why": None if why is None else told(why),
            "figures": None if figures is None else {name: value for name, value in figures.items() if name != "firing_histogram"},
            "frequency": frequency,
        }

    def _examples(self) -> list[dict[str, Any]]:
        try:
            store = self.shelf.text().store
            count = int(store.meta.get("sequences", 0))
            chosen = sorted({(2 * i + 1) * count // (2 * EXAMPLES) for i in range(EXAMPLES)}) if count else []
            return [{"seq": seq, "text": store.sequence(seq).text[:200]} for seq in chosen]
        except (RunError, ValueError):
            return []

    # ---- all units of a student ---------------------------------------------------------------------------------------------

    def columns(self, student: str, names: Sequence[str]) -> tuple[dict[str, Any], NDArray[np.float32]]:
        """The header, and the columns [name, unit]; NaN where unknown.

        Raises:
            Refusal: no such student or column.
        """
        units = self.shelf.units(student)
        for name in names:
            if name not in COLUMNS:
                raise Refusal(404, "no such column", expected=", ".join(COLUMNS), got=name[:80])
        known = units.columns
        if "star" in names:
            star = np.zeros(units.store.n_units, np.float32)
            star[[unit for unit, note in self.noted(student).items() if note["star"]]] = 1
            known = {**known, "star": star}
        header = {"names": list(names), "n": units.store.n_units, "weights_sha256": self._weights(units), "tokens": units.store.tokens}
        return header, np.stack([known[name] for name in names]) if names else np.zeros((0, units.store.n_units), np.float32)

    def rows(self, student: str, units: Sequence[int]) -> dict[str, Any]:
        """What the table shows of some units beside their columns.

        Raises:
            Refusal: no such student or unit, or too many.
        """
        found = self.shelf.units(student)
        store, units = found.store, list(dict.fromkeys(units))
        if len(units) > MOST_ROWS:
            raise Refusal(422, "too many rows at once", expected=f"at most {MOST_ROWS}", got=str(len(units)))
        for unit in units:
            check_unit(found, unit)
        labels, best, hists, probes, notes = (
            store.labels(units),
            store.best(units),
            store.hists(units),
            store.probes(units),
            self.noted(student),
        )
        top = found.columns["top_token"]
        rows: list[dict[str, Any]] = []
        for unit in units:
            context = best.get(unit)
            note = notes.get(unit)
            rows.append(
                {
                    "unit": unit,
                    "label": labels.get(unit, [None])[0],
                    "best": None if context is None else self.context(cut(context)),
                    "spark": _spark(hists[unit]) if unit in hists else [],
                    "top_token": None if math.isnan(top[unit]) else self.token(int(top[unit])),
                    "note": None if note is None else {name: note[name] for name in ("star", "text", "tags", "updated")},
                    "probes": probes.get(unit, []),
                }
            )
        return {"units": rows}

    def context(self, context: schema.Context) -> dict[str, Any]:
        """A stored context, with its text."""
        return shown(context, self.shelf.text().store)

    def search(self, student: str, words: str, where: Sequence[str] = SEARCHED) -> dict[str, Any]:
        """Units whose labels, notes or peak tokens hold `words`; for `text`, which needs the host, see `mxd.explore.reads`.

        Raises:
            Refusal: no such student, too long a text, or nowhere to look.
        """
        if len(words) > MOST_CHARACTERS:
            raise Refusal(422, "too long a search", expected=f"at most {MOST_CHARACTERS} characters", got=str(len(words)))
        if strange := set(where) - set(SEARCHED):
            raise Refusal(422, "nothing of that name to search", expected=", ".join(SEARCHED), got=", ".join(sorted(strange))[:80])
        units, by = self.shelf.units(student), cast("dict[str, list[int]]", {name: [] for name in SEARCHED})
        wanted = words.strip().lower()
        if wanted and "label" in where:
            by["label"] = [unit for unit in units.store.labelled(words.strip()) if 0 <= unit < units.store.n_units][:MOST_FOUND]
        if wanted and "note" in where:
            by["note"] = [
                unit for unit, n in self.noted(student).items() if any(wanted in text.lower() for text in (n["text"], *n["tags"]))
            ]
        if wanted and "token" in where:
            owners, tokens = units.peaks
            by["token"] = np.unique(owners[np.isin(tokens, self.shelf.text().words.get(wanted, []))]).tolist()[:MOST_FOUND]
        return {"units": list(dict.fromkeys(unit for name in SEARCHED for unit in by[name])), "by": by, "host_needed": "text" in where}

    def matches(self, student: str) -> dict[str, Any]:
        """By other student, how well the units of this one are matched there: the best Jaccard indices, the largest first."""
        found: dict[str, Any] = {}
        for other, best in self.shelf.units(student).store.best_matches().items():
            known = np.sort(best[np.isfinite(best)])[::-1]
            at = np.linspace(0, len(known) - 1, min(len(known), POINTS)).round().astype(int)
            found[other] = {"best": [short(float(value), 4) for value in known[at]], "without": int((known < WITHOUT).sum())}
        return {"students": found}

    def noted(self, student: str) -> dict[int, dict[str, Any]]:
        """The notes on the units of a student's present weights, by unit."""
        run, n_units = self.shelf.run, self.shelf.run.student(student).n_units
        weights = run.weights_sha256(student)
        return {note["unit"]: note for note in self.shelf.notes.all() if note["weights_sha"] == weights and 0 <= note["unit"] < n_units}

    def notes(self) -> dict[str, Any]:
        """All notes; ``stale`` are those on weights that no student of the run has any more."""
        run = self.shelf.run
        weights = {run.weights_sha256(record.name) for record in run.students}
        return {"notes": [{**note, "stale": note["weights_sha"] not in weights} for note in self.shelf.notes.all()]}

    def benches(self) -> list[dict[str, Any]]:
        """The kept bench runs that are whole."""
        return [one for one in self.shelf.notes.benches() if kept.bench(one["student"], one["request"], one["result"]) is None]

    def sentences(self, students: Collection[str]) -> list[dict[str, Any]]:
        """The kept sentences that are whole, with what these students made of them; none that none of them read."""
        found: list[dict[str, Any]] = []
        for one in self.shelf.notes.sentences():
            answer = self.shelf.notes.sentence(one["id"])
            if kept.sentence(one["request"], answer) is None:
                read = [student for student in answer["students"] if student["name"] in students]
                names = [student["name"] for student in read]
                found += [{**one, "students": names, "answer": {**answer, "students": read}}] if read else []
        return found

    def _weights(self, units: Units) -> str:
        return units.store.meta.get("weights_sha256", "")


def check_unit(units: Units, unit: int) -> int:
    """
    Raises:
        Refusal: there is no such unit.
    """
    if not 0 <= unit < units.store.n_units:
        raise Refusal(404, f"no unit {unit}"[:80], expected=f"a number from 0 to {units.store.n_units - 1}", got=str(unit)[:20])
    return unit


def _store(units: Units) -> dict[str, Any]:
    """Of what, and how much, was collected."""
    meta = units.store.meta
    counts = np.bincount(np.nan_to_num(units.firing["state"]).astype(int).clip(0, 3), minlength=4)
    numbers = {name: _whole(meta.get(name)) for name in ("tokens", "sequences", "documents", "effect_tokens")}
    return {
        **numbers,
        **{name: meta.get(name) for name in ("split", "created", "weights_sha256")},
        **dict(zip(schema.STATES, counts.tolist(), strict=True)),
        "labelled": int(units.labelled.sum()),
    }


def _whole(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None


def _frequency(units: Units) -> dict[str, Any]:
    """How many units fire how often: by log10 of the share of tokens."""
    fires = units.firing["fires"]
    live = fires[fires > 0]
    logs = np.log10(live / max(units.store.tokens, 1)).clip(EDGES[0], EDGES[-1])
    return {"edges": EDGES, "counts": np.histogram(logs, EDGES)[0].tolist(), "dead": int((fires == 0).sum())}


def _spark(hist: NDArray[np.uint32]) -> list[int]:
    """A unit's histogram in fewer bins."""
    return np.bincount(np.arange(len(hist)) * SPARK // len(hist), weights=hist, minlength=SPARK).astype(int).tolist()


def _report(run: Run) -> tuple[dict[str, Any] | None, MxdError | None]:
    """report.json; or why there is none."""
    path = Path(run.path / "report.json")
    again = f"mxd eval {run.path}"
    if not path.is_file():
        return None, RunError("this run was not evaluated yet", expected=str(path), next=again)
    try:
        found = read_json(path)
    except RunError as error:
        return None, error
    students = cast("dict[str, Any]", found).get("students") if isinstance(found, dict) else None
    if not isinstance(students, list) or not all(isinstance(student, dict) for student in cast("list[Any]", students)):
        return None, RunError(f"{path} is damaged", expected="what mxd eval writes", next=again)
    return cast("dict[str, Any]", found), None
