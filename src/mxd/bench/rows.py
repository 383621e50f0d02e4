"""Rows of results: what one says, and the files they are kept in.

A file ``NAME-DEVICE.json`` holds ``{"machine": .., "versions": .., "rows": [..]}``. A row has at least the fields of `FIELDS`; milliseconds
are medians over ``runs`` turns, ratios are ours / rival (below 1: ours is faster, or smaller), and what was not measured is null.
Needs no torch: the tables and plots of the documents are made from these files alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import MxdError

Row = dict[str, Any]
FIELDS = ("case", "rival", "device", "shape", "dtype", "ours_ms", "rival_ms", "time_ratio", "memory_ratio", "verified", "runs")
"""What every row has; ``check`` beside them says in words what was verified, ``setting`` what ours ran with if not the default."""
KEY = ("case", "rival", "device", "shape", "dtype", "setting")
"""What makes two rows the same measurement: the newer replaces the older."""


def row(
    case: str,
    rival: str | None,
    *,
    device: str,
    shape: Mapping[str, Any],
    dtype: str,
    ours_ms: float | None,
    rival_ms: float | None,
    check: str,
    runs: int,
    **more: Any,
) -> Row:
    """A row of a result that was verified as `check` says; ``time_ratio`` is taken from the two times. `more` adds fields."""
    return {
        "case": case,
        "rival": rival,
        "device": device,
        "shape": dict(shape),
        "dtype": dtype,
        "ours_ms": _rounded(ours_ms),
        "rival_ms": _rounded(rival_ms),
        "time_ratio": ratio(ours_ms, rival_ms),
        "memory_ratio": None,
        "verified": True,
        "check": check,
        "runs": runs,
        **more,
    }


def ratio(ours: float | None, rival: float | None) -> float | None:
    """ours / rival to four digits; None where one of them was not measured."""
    return float(f"{ours / rival:.4g}") if ours and rival else None


def _rounded(ms: float | None) -> float | None:
    return None if ms is None else float(f"{ms:.4g}")


def complete(given: Mapping[str, Any]) -> Row:
    """`given` with null for what it leaves out.

    Raises:
        MxdError: it names no case, or its result was not verified: such a time is not written down.
    """
    made = {**dict.fromkeys(FIELDS), **given}
    if isinstance(made["verified"], str):  # says how: the flag and the words are kept apart
        made.update(verified=True, check=made["verified"])
    if not made["case"] or made["verified"] is not True:
        raise MxdError(
            "a benchmark returned a row that cannot be kept",
            expected="a case, and verified = true",
            got=f"case {made['case']!r}, verified {made['verified']!r}",
        )
    return made


def read(path: Path) -> dict[str, Any]:
    """A result file, or an empty one where there is none.

    Raises:
        MxdError: the file is not one of ours.
    """
    if not path.exists():
        return {"machine": {}, "versions": {}, "rows": []}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(found["rows"], list)
    except (ValueError, KeyError, TypeError, AssertionError):
        raise MxdError(
            f"{path} is not a file of results", expected="JSON with rows", next="move it away, or choose another --out"
        ) from None
    return {"machine": found.get("machine", {}), "versions": found.get("versions", {}), "rows": found["rows"]}


def merge(
    old: Mapping[str, Any], machine: Mapping[str, Any], versions: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The file's contents with `rows` put in, each in the place of the same measurement if there is one.

    Rows kept from another machine or other versions carry them in themselves from then on.
    """
    head = {"machine": dict(machine), "versions": dict(versions)}
    kept = {identity(r): dict(r) for r in old["rows"]}
    for r in kept.values():
        for name, now in head.items():
            if old.get(name) != now and old.get(name):
                r.setdefault(name, old[name])
            if r.get(name) == now:
                del r[name]
    kept.update({identity(r): dict(r) for r in rows})
    return {**head, "rows": list(kept.values())}


def identity(given: Mapping[str, Any]) -> str:
    """Equal for two rows of the same measurement."""
    return json.dumps([given.get(name) or "" for name in KEY], sort_keys=True)


def write(path: Path, contents: Mapping[str, Any]) -> None:
    """Write a result file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(contents, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
