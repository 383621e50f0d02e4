"""The table of docs/reliability.md, out of benchmarks/results/reliability.json (`make torture`, `make soak`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent.parent / "docs" / "reliability.md"
FIGURES = PAGE.parent.parent / "benchmarks" / "results" / "reliability.json"
CLEAN = "no crash, no hang, no other error"


def table() -> str:
    """One line a test."""
    found: dict[str, dict[str, Any]] = json.loads(FIGURES.read_text(encoding="utf-8"))["tests"]
    lines = ["| what | how often | outcome |", "|---|---|---|"]
    lines += [f"| {what} | {number} | {outcome} |" for what, number, outcome in (_row(name, figures) for name, figures in found.items())]
    return "\n".join(lines)


def _row(name: str, figures: dict[str, Any]) -> tuple[str, str, str]:
    bad = sum(int(figures.get(key, 0)) for key in ("lost", "unnoticed", "crashes"))
    if bad:
        return name, "", f"**{bad} of them failed**"
    if name == "soak":
        what = f"rounds of train, kill, go on, verify and evaluate on the built-in model, {figures['minutes']:.0f} minutes"
        memory = f"{figures['mib_first_quarter']:.0f} MiB of memory in the first quarter, {figures['mib_last_quarter']:.0f} in the last"
        return what, f"{figures['rounds']}", f"same bits, same figures; {memory}, {figures['open_files']} open files throughout"
    if "kills" in figures:
        return f"SIGKILL at a random instant of a training, over {figures['runs']} runs", f"{figures['kills']}", "went on to the same bits"
    if "faults" in figures:
        return f"{name.split(': ')[1]} at one file operation after the other", f"{figures['faults']}", "went on to the same bits"
    if "damaged" in figures:
        outcome = f"each noticed and named; {figures['without_effect']} changed nothing that is read"
        return "bytes flipped or the end cut off, in files of a run and its activations", f"{figures['damaged']:,}", outcome
    return name, f"{figures['inputs']:,}", CLEAN
