"""Everything that was collected about one unit, as the page takes it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import MxdError
from . import schema, weights
from .answers import Answers, check_unit
from .contexts import shown
from .replies import Refusal, short
from .shelf import Units

CONTEXTS = 10
"""Contexts of each band, unless more are asked for."""
MOST_CONTEXTS = 100
WRITTEN_FIRINGS = 64
"""Firings, at most, that promoted tokens are a mean over: `mxd.explore.directions.FIRINGS`, which needs PyTorch."""


def unit(answers: Answers, student: str, number: int, *, band: int | None = None, start: int = 0, n: int | None = None) -> dict[str, Any]:
    """One unit.

    Args:
        band: only the contexts of this one; None: of all.
        start: the first context of each band.
        n: contexts of each band, at most.

    Raises:
        Refusal: no such student, unit or band, or too many contexts.
        RunError: what was collected is damaged.
    """
    n = CONTEXTS if n is None else n
    if start < 0 or not 1 <= n <= MOST_CONTEXTS:
        raise Refusal(422, "no such contexts", expected=f"from at least 0, n from 1 to {MOST_CONTEXTS}", got=f"from {start}, n {n}"[:80])
    if band is not None and not 0 <= band < len(schema.BANDS):
        raise Refusal(404, "no such band", expected=f"0 to {len(schema.BANDS) - 1}", got=str(band)[:20])
    units, record = answers.shelf.units(student), answers.shelf.run.student(student)
    store = units.store
    check_unit(units, number)
    blobs, columns, labels = store.blobs(number), store.row(number), store.labels([number])
    dead = not columns["fires"]
    norm = weights.norm(answers.shelf.run, record, number)
    return {
        "unit": number,
        "student": student,
        "kind": record.kind,
        "word": "expert" if weights.maps(record.kind) else "latent",
        "weights_sha256": store.meta.get("weights_sha256", ""),
        "tokens": store.tokens,
        "columns": {name: None if value is None else short(value) for name, value in columns.items()},
        "state": _state(columns["state"]),
        "labels": labels.get(number, []),
        "note": answers.noted(student).get(number),
        "hist": {"max": columns["max_a"], "counts": blobs["hist"].tolist()},
        "band_edges": [short(float(edge)) for edge in blobs["band_edges"]],
        "bands": _bands(answers, units, number, blobs["band_edges"], band, start, n),
        "promoted": _written(answers, blobs["promoted"]),
        "suppressed": _written(answers, blobs["suppressed"]),
        "written_from": min(int(columns["fires"] or 0), WRITTEN_FIRINGS),
        "peak_tokens": _peaks(answers, blobs["peak_tokens"], columns["fires"]),
        "partners": _partners(units, blobs["partners"]),
        "matches": _matches(answers, units, number),
        "probes": store.probes([number]).get(number, []),
        "nearest": _nearest(answers, units, student, number) if dead else None,
        "norm": short(norm),
        "gate_bias": short(columns["bias"]),
    }


def _state(state: float | None) -> str:
    return schema.STATES[int(state)] if state in (0, 1, 2, 3) else "dead"


def _bands(
    answers: Answers, units: Units, number: int, edges: NDArray[np.float32], band: int | None, start: int, n: int
) -> list[dict[str, Any]]:
    """The bands that hold something, the strongest first and the silent twins last."""
    text = answers.shelf.text().store
    found: list[dict[str, Any]] = []
    for at, (fires, contexts) in units.store.examples(number).items():
        if band is not None and at != band:
            continue
        # Edges: the largest activation, the smallest shown as strongest, the smallest of each double decile.
        known = at < schema.TWINS and len(edges) == 7
        low, high = (float(edges[1 + at]), float(edges[at if at > 1 else 0])) if known else (None, None)
        contexts_shown = [shown(context, text) for context in contexts[start : start + n]]
        about = {"band": at, "name": schema.BANDS[at], "low": short(low), "high": short(high), "fires": fires, "kept": len(contexts)}
        found.append({**about, "contexts": contexts_shown})
    return found


def _written(answers: Answers, rows: NDArray[Any]) -> list[dict[str, Any]]:
    return [
        {
            "id": int(row["token"]),
            "token": named(answers, int(row["token"])),
            "mean": short(float(row["mean"]), 4),
            "sd": short(float(row["sd"]), 4),
        }
        for row in rows
    ]


def _peaks(answers: Answers, rows: NDArray[Any], fires: float | None) -> list[dict[str, Any]]:
    return [
        {
            "id": int(row["token"]),
            "token": named(answers, int(row["token"])),
            "count": int(row["count"]),
            "share": short(int(row["count"]) / fires, 4) if fires else None,
        }
        for row in rows
    ]


def named(answers: Answers, token: int) -> str:
    """The text of a token; its number where no text that was read holds it and the host is not there."""
    found = answers.token(token)
    return f"#{token}" if found is None else found


def _partners(units: Units, rows: NDArray[Any]) -> list[dict[str, Any]]:
    labels = units.store.labels([int(row["unit"]) for row in rows])
    return [
        {
            "unit": int(row["unit"]),
            "lift": short(float(row["lift"]), 4),
            "jaccard": short(float(row["jaccard"]), 4),
            "label": _label(labels, int(row["unit"])),
        }
        for row in rows
    ]


def _matches(answers: Answers, units: Units, number: int) -> list[dict[str, Any]]:
    found = units.store.matches(number)
    labels: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for student in {match["student"] for match in found}:
        with contextlib.suppress(MxdError):  # the other student's database may be missing or damaged: then only its labels are
            others = [match["unit"] for match in found if match["student"] == student]
            labels[student] = answers.shelf.units(student).store.labels(others)
    return [
        {
            **match,
            "jaccard": short(match["jaccard"], 4),
            "corr": short(match["corr"], 4),
            "label": _label(labels.get(match["student"], {}), match["unit"]),
        }
        for match in found
    ]


def _nearest(answers: Answers, units: Units, student: str, number: int) -> dict[str, Any] | None:
    """The unit that fires and whose gate is most like that of a dead one; None for kinds whose units have no gate of their own."""
    run = answers.shelf.run
    found = weights.nearest(run, run.student(student), number, units.firing["fires"] > 0)
    if found is None:
        return None
    other, cosine = found
    return {"unit": other, "cosine": short(cosine, 4), "label": _label(units.store.labels([other]), other)}


def _label(labels: Mapping[int, list[dict[str, Any]]], number: int) -> str | None:
    return labels[number][0]["text"] if labels.get(number) else None
