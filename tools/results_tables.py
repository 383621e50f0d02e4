"""Writes the tables of docs/results.md and README.md from docs/results/*.json, the reports of their runs, those of the studies from
docs/results/studies/*.json (see study_tables.py), and those about speed and the plots from benchmarks/results/*.json (see
bench_tables.py, reliability_table.py and explore_table.py).

    python tools/results_tables.py

What stands between the marks in the pages is replaced; the text around them is written by hand.
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import bench_tables
import explore_table
import reliability_table
import study_tables

DOCS = Path(__file__).parent.parent / "docs"
PAGE = DOCS / "results.md"
README = DOCS.parent / "README.md"
ORDER = ("mxd", "mxd-pk", "transcoder", "skip-transcoder", "topk-sae", "dense", "additive")


def main() -> None:
    for path, text in render().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")


def render() -> dict[Path, str]:
    """Every file this writes, with its text."""
    reports = [_read(path) for path in sorted((DOCS / "results").glob("paper-seed*.json"))]
    own = {"paper": _table(reports), "paper-routing": _routing(reports), "precision": _precision()}
    return {
        PAGE: _filled(PAGE, {**study_tables.tables(), **own, **{mark: _study(mark) for mark in STUDIES}}),
        README: _filled(README, {"demo": _demo(_read(DOCS / "results" / "demo.json")), "speed": bench_tables.targets()}),
        reliability_table.PAGE: _filled(reliability_table.PAGE, {"reliability": reliability_table.table()}),
        explore_table.PAGE: _filled(explore_table.PAGE, {"explore": explore_table.table()}),
        bench_tables.PAGE: _filled(bench_tables.PAGE, bench_tables.tables()),
        **bench_tables.plots(),
        **study_tables.plots(),
    }


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _filled(page: Path, tables: dict[str, str]) -> str:
    text = page.read_text(encoding="utf-8")
    for mark, table in tables.items():
        text, found = re.subn(rf"(<!-- {mark} -->\n).*?(<!-- end -->)", lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.DOTALL)
        if found != 1:
            raise SystemExit(f"{page} has {found} places marked {mark}")
    return text


def _demo(report: dict[str, Any]) -> str:
    lines = ["| student | parameters | excess CE, nats [95 %] | CE recovered | FVU | started from |", "|---|---|---|---|---|---|"]
    for s in report["students"]:
        name = f"{s['kind']} (control)" if s["is_control"] else f"{s['kind']}, K = {s['k']}"
        low, high = s["excess_ce_ci95"]
        start = "the host's encoder" if s["recipe"] == "host-encoder" else "scratch"
        lines.append(
            f"| {name} | {s['params'] / 1e6:.1f} M | {s['excess_ce']:.4f} [{low:.4f}, {high:.4f}] "
            f"| {100 * s['ce_recovered']:.1f} % | {s['fvu']:.3f} | {start} |"
        )
    return "\n".join(lines)


def _students(reports: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Per kind the student of each seed."""
    found: dict[str, list[dict[str, Any]]] = {}
    for kind in ORDER:
        per_seed = [s for report in reports for s in report["students"] if s["kind"] == kind]
        if per_seed:
            found[kind] = per_seed
    return found


def _table(reports: list[dict[str, Any]]) -> str:
    lines = [
        "| kind | excess CE, nats (mean; each seed with its 95 % interval) | CE recovered | KL | top-1 | FVU | L0 | dead | busiest |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kind, students in _students(reports).items():
        seeds = " · ".join(f"{s['excess_ce']:.4f} [{s['excess_ce_ci95'][0]:.4f}, {s['excess_ce_ci95'][1]:.4f}]" for s in students)
        name = f"{kind} (control)" if students[0]["is_control"] else kind
        lines.append(
            f"| {name} | **{_mean(students, 'excess_ce'):.4f}**; {seeds} | {_percent(students, 'ce_recovered')} "
            f"| {_mean(students, 'kl'):.4f} "
            f"| {_percent(students, 'top1_agreement')} | {_spread(students, 'fvu')} | {_number(students, 'l0', '.1f')} "
            f"| {_percent(students, 'dead_fraction')} | {_number(students, 'max_firing_frequency', '.2f')} |"
        )
    return "\n".join(lines)


def _routing(reports: list[dict[str, Any]]) -> str:
    lines = ["| seed | N_r | G_r | ID | FVU | null | dense | best constant |", "|---|---|---|---|---|---|---|---|"]
    for student in _students(reports)["mxd"]:
        r = student["routing"]
        intervals = " | ".join(_interval(r[m]) for m in ("n_r", "g_r", "id"))
        rest = " | ".join(_small(r[m]) for m in ("fvu", "fvu_null", "fvu_dense", "fvu_best_constant"))
        lines.append(f"| {student['seed']} | {intervals} | {rest} |")
    return "\n".join(lines)


STUDIES = {
    "auxk": {"study-auxk-off.json": "without", "study-auxk-on.json": "with AuxK"},
    "gates": {"study-gates.json": ""},
}
"""Mark of docs/results.md -> reports that stand in its table, and what is said of each."""


def _study(mark: str) -> str:
    """One line a student that every report of the study has, the reports under each other."""
    reports = {said: _read(DOCS / "results" / name) for name, said in STUDIES[mark].items() if (DOCS / "results" / name).is_file()}
    if len(reports) < len(STUDIES[mark]):
        return "Not measured."
    shared = set.intersection(*({s["name"] for s in report["students"]} for report in reports.values()))
    lines = ["| student | | units | parameters | excess CE, nats [95 %] | FVU | dead | busiest |", "|---|---|---|---|---|---|---|---|"]
    for name in [s["name"] for s in next(iter(reports.values()))["students"] if s["name"] in shared]:
        for said, report in reports.items():
            s = next(s for s in report["students"] if s["name"] == name)
            low, high = s["excess_ce_ci95"]
            lines.append(
                f"| {name} | {said} | {s['n_units']:,} | {s['params'] / 1e6:.1f} M | {s['excess_ce']:.4f} [{low:.4f}, {high:.4f}] "
                f"| {s['fvu']:.4f} | {100 * s['dead_fraction']:.1f} % | {s['max_firing_frequency']:.2f} |"
            )
    return "\n".join(lines)


def _precision() -> str:
    """Losses and errors of the same students under two precisions (tools/compare_losses.py)."""
    lines = ["| student | training loss, fp32 | bf16 | validation FVU, fp32 | bf16 |", "|---|---|---|---|---|"]
    for row in _read(DOCS / "results" / "study-precision.json")["rows"]:
        (loss, other_loss), (fvu, other_fvu) = row["loss"], row["fvu"]
        lines.append(f"| {row['student']} | {loss:.3f} | {other_loss:.3f} | {fvu:.4f} | {other_fvu:.4f} |")
    return "\n".join(lines)


def _interval(measure: dict[str, Any]) -> str:
    low, high = measure["ci95"]
    return f"{measure['value']:.3f} [{low:.3f}, {high:.3f}]".replace("-", "−")


def _small(value: float) -> str:
    return f"{value:.3f}" if value >= 0.0005 else f"{value:.1e}"


def _values(students: list[dict[str, Any]], field: str) -> list[float]:
    return [s[field] for s in students if s[field] is not None]


def _mean(students: list[dict[str, Any]], field: str) -> float:
    return statistics.mean(_values(students, field))


def _number(students: list[dict[str, Any]], field: str, form: str) -> str:
    return format(_mean(students, field), form) if _values(students, field) else "–"


def _percent(students: list[dict[str, Any]], field: str) -> str:
    return f"{100 * _mean(students, field):.1f} %" if _values(students, field) else "–"


def _spread(students: list[dict[str, Any]], field: str) -> str:
    values = _values(students, field)
    return f"{statistics.mean(values):.4f} ({min(values):.4f}–{max(values):.4f})"


if __name__ == "__main__":
    main()
