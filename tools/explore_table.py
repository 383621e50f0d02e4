"""The table of docs/explore.md, out of benchmarks/results/explore-cpu.json (`python tools/explore_budgets.py`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent.parent / "docs" / "explore.md"
FIGURES = PAGE.parent.parent / "benchmarks" / "results" / "explore-cpu.json"
LIMITS = {"first page": 1.5, "unit page": 150, "first token": 2, "export": 10, "collecting": 180}


def table() -> str:
    """One line for each thing that a limit was set for, on each run it was measured on."""
    found: dict[str, Any] = json.loads(FIGURES.read_text(encoding="utf-8"))
    about = found["machine"]
    lines = ["| what | where | limit | measured |", "|---|---|---|---|"]
    for what, where, limit, value, unit in _rows(found):
        reached = f"**{value:,.3g} {unit}**" if value <= limit else f"**{value:,.3g} {unit}, missed**"
        lines.append(f"| {what} | {where} | ≤ {limit:g} {unit} | {reached} |")
    lines.append(f"\n{about['processor']}, {about['threads']} threads, Chromium; the medians of several visits.")
    return "\n".join(lines)


def _rows(found: dict[str, Any]) -> Iterator[tuple[str, str, float, float, str]]:
    for name, figures in found.items():
        if "first_page_seconds" not in figures:
            continue
        largest = max(figures["units"].values())
        where = f"{'the demo' if name == 'demo' else name}, up to {largest:,} units a student"
        page, unit, token = figures["first_page_seconds"], figures["unit_page_ms"], figures["first_token_seconds"]
        yield "from the command to the first view", where, LIMITS["first page"], page["cold"], "s"
        yield "a unit's page, from the click to its contexts", where, LIMITS["unit page"], unit["median"], "ms"
        yield "steering's first token, three lanes / the host alone", where, LIMITS["first token"], token["ratio"], "×"
    export, made = found["export"], found["collecting"]
    yield "one file with the page", f"{export['units']} units of the demo", LIMITS["export"], export["bytes"] / 1e6, "MB"
    where = f"the demo, {made['units']:,} units, {made['tokens']:,} tokens"
    yield "`mxd collect`, beyond the host's own pass over the text", where, LIMITS["collecting"], made["seconds"]["beyond_host"], "s"
