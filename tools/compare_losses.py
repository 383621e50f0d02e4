"""The same students in two runs that differ in one option: their training loss and validation FVU side by side, as JSON.

    python tools/compare_losses.py RUN OTHER --out docs/results/study-precision.json

The loss is the mean over the logged steps of the last tenth of the run; FVU is that of the last probe on validation text.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from mxd.checkpoint import Run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs=2)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    runs = [Run.open(path) for path in args.runs]
    first, second = (run.info["config"] for run in runs)
    differ = {name: [first[name], second[name]] for name in first if first[name] != second[name] and name not in ("out", "kinds")}
    shared = [s.name for s in runs[0].students if s.name in {other.name for other in runs[1].students}]
    rows = [{"student": name, "loss": _pair(runs, name, _loss), "fvu": _pair(runs, name, _fvu)} for name in shared]
    args.out.write_text(json.dumps({"options": differ, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def _pair(runs: list[Run], name: str, figure: Any) -> list[float]:
    return [float(f"{figure([row for row in run.metrics() if row['student'] == name]):.6g}") for run in runs]


def _loss(rows: list[dict[str, Any]]) -> float:
    logged = [row for row in rows if "loss" in row]
    return statistics.mean(row["loss"] for row in logged if row["step"] > 0.9 * logged[-1]["step"])


def _fvu(rows: list[dict[str, Any]]) -> float:
    return [row["probe"]["fvu"] for row in rows if "probe" in row][-1]


if __name__ == "__main__":
    main()
