"""Writes the tables of docs/results.md from docs/results/*.json, the reports of its runs.

    python tools/results_tables.py

What stands between the marks in docs/results.md is replaced; the text around them is written by hand.
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"
PAGE = DOCS / "results.md"
ORDER = ("mxd", "transcoder", "skip-transcoder", "topk-sae", "dense", "additive")


def main() -> None:
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((DOCS / "results").glob("seed*.json"))]
    text = PAGE.read_text(encoding="utf-8")
    for recipe in ("ours", "host-encoder", "paper"):
        text = _between(text, recipe, _table(reports, recipe))
    text = _between(text, "routing", _routing(reports))
    PAGE.write_text(text, encoding="utf-8")


def _between(text: str, mark: str, table: str) -> str:
    pattern = rf"(<!-- {mark} -->\n).*?(<!-- end -->)"
    changed, found = re.subn(pattern, lambda m: f"{m[1]}{table}\n{m[2]}", text, flags=re.DOTALL)
    if found != 1:
        raise SystemExit(f"{PAGE} has {found} places marked {mark}")
    return changed


def _students(reports: list[dict[str, Any]], recipe: str) -> dict[str, list[dict[str, Any]]]:
    """Per kind the student of each seed."""
    found: dict[str, list[dict[str, Any]]] = {}
    for kind in ORDER:
        per_seed = [s for report in reports for s in report["students"] if (s["kind"], s["recipe"]) == (kind, recipe)]
        if per_seed:
            found[kind] = per_seed
    return found


def _table(reports: list[dict[str, Any]], recipe: str) -> str:
    lines = [
        "| kind | excess CE, nats (mean; each seed with its 95 % interval) | CE recovered | KL | top-1 | FVU | L0 | dead | busiest |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kind, students in _students(reports, recipe).items():
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
    lines = ["| recipe | seed | N_r | G_r | ID | FVU | null | dense | best constant |", "|---|---|---|---|---|---|---|---|---|"]
    for recipe in ("ours", "host-encoder", "paper"):
        for student in _students(reports, recipe).get("mxd", []):
            r = student["routing"]
            intervals = " | ".join(f"{r[m]['value']:.3f} [{r[m]['ci95'][0]:.3f}, {r[m]['ci95'][1]:.3f}]" for m in ("n_r", "g_r", "id"))
            rest = " | ".join(_small(r[m]) for m in ("fvu", "fvu_null", "fvu_dense", "fvu_best_constant"))
            lines.append(f"| {recipe} | {student['seed']} | {intervals} | {rest} |")
    return "\n".join(lines)


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
