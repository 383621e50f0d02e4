"""What a command prints when its work is done: a run, a report, where the time went."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import tables
from .checkpoint import Run
from .evals import figures
from .evals import report as reports


def run(made: Run) -> None:
    """The students of a run."""
    read = made.info.get("train_tokens")
    state = "finished" if made.info.get("finished") else "interrupted"
    title = f"{made.path}: {state}, host {made.info['host']['name']}" + (f", {read:,} training tokens read" if read else "")
    tables.console().print(tables.run_table(title, made.students))


def report(path: Path, split: str = "test", edit: Path | None = None) -> None:
    """The report of the run at `path`, and where its page lies."""
    made = Run.open(path)
    name = edit.stem if edit else None
    files = reports.files(made, split, name)
    found = reports.read(made, split, name)
    with reports.understood(files["json"]):
        _tables(found)
    print(f"report: {files['html']}")


def _tables(found: dict[str, Any]) -> None:
    for hookpoint in figures.hookpoints(found):
        heads, rows = reports.table(found, hookpoint)
        title = f"{found['host']}, {hookpoint}. {reports.headline(found, hookpoint)}"
        console = tables.console()
        console.print(tables.report_table(title, heads, rows, width=console.width))
        for student in figures.students_at(found, hookpoint):
            if student.get("routing"):
                print(f"{student['name']}: {reports.against_controls(found, student)} {reports.verdict(student)}")


def time_split(made: Run, training: float, evaluation: float) -> dict[str, float]:
    """Seconds by part: those the pipeline kept, the students' own, and what is left of the measured whole."""
    if training < 1:
        return {"evaluation": evaluation}
    kept = made.info.get("seconds", {})
    split = {part: float(seconds) for part, seconds in kept.items() if part != "warm start"}
    split["students"] = sum(record.train_seconds for record in made.students)
    split["rest"] = max(training - sum(split.values()), 0.0)
    return {**split, "evaluation": evaluation}
