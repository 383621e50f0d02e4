"""The single-unit probes of the run's report, as the databases of units hold them."""

from __future__ import annotations

import hashlib
import sqlite3
from contextlib import closing
from typing import Any, cast

from ..checkpoint import Run, StudentRecord
from ..sealed import read_json
from .build import write_probes
from .store import UnitStore, units_path


def report_sha(run: Run) -> str:
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


def refresh(run: Run, record: StudentRecord) -> None:
    """Take over the probes of a report that is newer than the database."""
    report = report_sha(run)
    store = UnitStore(run, record.name)
    store.close()
    if store.meta.get("report_sha256") == report:
        return
    with closing(sqlite3.connect(units_path(run, record.name), isolation_level=None, timeout=30)) as database:
        database.execute("BEGIN IMMEDIATE")
        write_probes(database, probes(run, record.name))
        database.execute("INSERT OR REPLACE INTO meta VALUES ('report_sha256', ?)", (report,))
        database.execute("COMMIT")
