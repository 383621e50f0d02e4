"""The tables and plots about speed, made from benchmarks/results/*.json: targets reached or missed, and every row measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mxd.bench import BENCHMARKS
from mxd.bench.plots import AXES, exponent, figure, points
from mxd.bench.rows import Row, read
from mxd.evals.svg import number

ROOT = Path(__file__).parent.parent / "benchmarks"
PAGE = ROOT / "README.md"
DEVICES = ("cpu", "cuda")


class Target(NamedTuple):
    """One line of the table of targets."""

    what: str
    """What is compared, at which size."""
    limit: float
    """The figure to reach."""
    file: str
    """NAME-DEVICE of the results that hold it."""
    wanted: Mapping[str, Any]
    """What its row must have: `case` and `rival` start with these words, `shape` has these sizes, the rest is equal."""
    field: str = "time_ratio"
    """Field of the row: a time or memory ratio ours / rival, or a throughput."""
    least: bool = False
    """Whether the figure must be at least the limit, not at most."""


DENSE = "dense reference maths in PyTorch, "
GPT2 = {"n": 21_490, "tokens": 4096}
TARGETS = (
    Target("MxD step / dense reference, CPU, N 21,490, 4,096 tokens: time", 0.35, "train_step-cpu", {"rival": DENSE, "shape": GPT2}),
    Target("the same: peak memory", 0.35, "train_step-cpu", {"rival": DENSE, "shape": GPT2}, "memory_ratio"),
    Target(
        "the same with `--recompute` (hidden vectors made again): time",
        0.35,
        "train_step-cpu",
        {"rival": DENSE, "shape": GPT2, "setting": "hidden vectors made again"},
    ),
    Target(
        "the same with `--recompute`: peak memory",
        0.35,
        "train_step-cpu",
        {"rival": DENSE, "shape": GPT2, "setting": "hidden vectors made again"},
        "memory_ratio",
    ),
    Target(
        "MxD step / dense reference, CPU, N 10,736, 1,024 tokens: time",
        0.45,
        "train_step-cpu",
        {"rival": DENSE, "shape": {"n": 10_736, "tokens": 1024}},
    ),
    Target(
        "transcoder step with AuxK / sparsify 1.3.3, CPU, 12,288 latents, 1,024 tokens: time",
        0.9,
        "peers-cpu",
        {"case": "transcoder step, AuxK on", "rival": "sparsify", "shape": {"n": 12_288, "tokens": 1024}},
    ),
    Target(
        "MxD step, default precision / dense reference in float32, H200, N 21,490, 4,096 tokens: time",
        0.1,
        "train_step-cuda",
        {"rival": DENSE + "float32", "shape": GPT2},
    ),
    Target("the same / dense reference in bfloat16: time", 0.25, "train_step-cuda", {"rival": DENSE + "bfloat16", "shape": GPT2}),
    Target(
        "whole training at GPT-2's size, host included, H200: tokens per second",
        1e6,
        "whole-cuda",
        {},
        "ours_tokens_per_second",
        least=True,
    ),
    Target(
        "15 students in one pass / 15 separate runs, the demo's host, CPU: time of the whole command",
        0.6,
        "frontier-cpu",
        {"case": "15 students in one pass, whole command"},
    ),
    Target("the same, without loading host and text", 0.6, "frontier-cpu", {"case": "15 students in one pass, without loading"}),
    Target(
        "training from cache / streaming, one student, the demo's host, CPU, 307,200 tokens in steps of 1,024: time",
        1 / 3,
        "cache-cpu",
        {"case": "one student from cache: reading", "shape": {"tokens": 307_200, "tokens_per_step": 1024}},
    ),
    Target(
        "the same, 102,400 tokens in steps of 512: time",
        1 / 3,
        "cache-cpu",
        {"case": "one student from cache: reading", "shape": {"tokens": 102_400, "tokens_per_step": 512}},
    ),
    Target(
        "generation, host with an MxD in place / host, one sequence, CPU: tokens per second",
        0.85,
        "generation-cpu",
        {"shape": {"kind": "mxd", "sequences": 1}},
        "throughput_ratio",
        least=True,
    ),
)


def targets() -> str:
    """The table of targets: reached, missed, or not measured."""
    lines = ["| ours / rival | target | measured | |", "|---|---|---|---|"]
    for target in TARGETS:
        limit = f"{'≥' if target.least else '≤'} {target.limit:,.3g}" if target.limit < 1000 else f"≥ {target.limit:,.0f}"
        found = _value(target)
        if found is None:
            lines.append(f"| {target.what} | {limit} | not measured | |")
            continue
        reached = found >= target.limit if target.least else found <= target.limit
        lines.append(f"| {target.what} | {limit} | **{number(found)}** | {'reached' if reached else 'missed'} |")
    rows = read(ROOT / "results" / "scaling-cpu.json")["rows"]
    for what, axis in AXES.items():
        slope = exponent(points(rows, what, "cpu"))
        verdict = "" if what != "n" or slope is None else "reached" if slope < 1.005 else "missed"
        measured = "not measured" if slope is None else f"**{slope:.2f}**"
        lines.append(
            f"| cost of an MxD step against {axis}, CPU: exponent | {'≤ 1' if what == 'n' else 'stated'} | {measured} | {verdict} |"
        )
    return "\n".join(lines)


def _value(target: Target) -> float | None:
    """The figure of the first row that fits, in our default setting."""
    for row in read(ROOT / "results" / f"{target.file}.json")["rows"]:
        wanted = {"setting": "", **target.wanted}
        if all(_fits(row.get(name) or "", value) for name, value in wanted.items()):
            return row.get(target.field)
    return None


def _fits(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, Mapping):
        return isinstance(found, Mapping) and all(found.get(name) == value for name, value in wanted.items())
    return found.startswith(wanted) if wanted else not found


def tables() -> dict[str, str]:
    """By mark of benchmarks/README.md: the targets, and per benchmark its rows on every device."""
    return {"targets": targets(), **{name: _benchmark(name) for name in BENCHMARKS}}


def _benchmark(name: str) -> str:
    parts: list[str] = []
    for device in DEVICES:
        path = ROOT / "results" / f"{name}-{device}.json"
        found = read(path)
        if found["rows"]:
            parts.append(f"{_where(found)} ([JSON](results/{path.name})):\n\n{_rows(found['rows'])}")
        plot = ROOT / "plots" / f"{name}-{device}.svg"
        if name == "scaling" and found["rows"]:
            parts.append(f"![Cost of a training step as one thing grows](plots/{plot.name})")
    return "\n\n".join(parts) or "Not measured."


def _where(found: Mapping[str, Any]) -> str:
    machine = found["machine"]
    parts = [machine.get("accelerator"), machine.get("processor"), f"{machine['threads']} threads" if "threads" in machine else None]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"{', '.join(part for part in parts if part)}; {versions}"


def _rows(rows: list[Row]) -> str:
    """One line a row; what all rows have in common in shape is not said away: each stands by itself."""
    with_rival = any(row["rival"] for row in rows)
    heads = ["case", "shape", *(["rival"] if with_rival else []), "ours, ms", *(["rival, ms", "time", "memory"] if with_rival else [])]
    heads += ["runs", "verified"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        case = " · ".join(part for part in (row["case"], row.get("setting")) if part)
        if "versions" in row or "machine" in row:
            case += " (measured elsewhere or earlier; see the JSON)"
        shape = ", ".join(f"{name} {value:,}" if isinstance(value, int) else f"{name} {value}" for name, value in row["shape"].items())
        cells = [case, f"{shape}; {row['dtype']}"]
        cells += [row["rival"] or "–"] if with_rival else []
        cells += [_number(row["ours_ms"])]
        cells += [_number(row[field]) for field in ("rival_ms", "time_ratio", "memory_ratio")] if with_rival else []
        lines.append("| " + " | ".join([*cells, str(row["runs"]), row.get("check") or "yes"]) + " |")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "–" if value is None else number(value)


def plots() -> dict[Path, str]:
    """The SVG files, of the devices that were measured."""
    made: dict[Path, str] = {}
    for device in DEVICES:
        drawn = figure(read(ROOT / "results" / f"scaling-{device}.json")["rows"], device)
        if drawn is not None:
            made[ROOT / "plots" / f"scaling-{device}.svg"] = drawn + "\n"
    return made
