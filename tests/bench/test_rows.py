"""Result files: what a row must say, how new rows meet old ones, and the tables and curves made of them."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest

from mxd.bench import plots
from mxd.bench.rows import FIELDS, complete, merge, ratio, read, row, write
from mxd.errors import MxdError

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def made(case: str = "a", n: int = 1, ours: float = 1.0, **more: Any) -> dict[str, Any]:
    return row(case, "b", device="cpu", shape={"n": n}, dtype="float32", ours_ms=ours, rival_ms=2.0, check="by hand", runs=5, **more)


def test_a_row() -> None:
    found = made(ours=1.23456, setting="bf16")
    assert set(FIELDS) <= set(found)
    assert (found["ours_ms"], found["time_ratio"], found["memory_ratio"], found["setting"]) == (1.235, 0.6173, None, "bf16")
    assert ratio(1.0, None) is None


def test_only_verified_rows_are_kept() -> None:
    assert complete({"case": "a", "verified": True})["ours_ms"] is None
    found = complete({"case": "a", "verified": "sums agree"})
    assert (found["verified"], found["check"]) == (True, "sums agree")
    for wrong in ({"case": "a"}, {"case": "a", "verified": False}, {"verified": True}):
        with pytest.raises(MxdError, match="cannot be kept"):
            complete(wrong)


def test_new_rows_replace_the_same_measurement_and_no_other() -> None:
    machine, versions = {"processor": "x"}, {"torch": "1"}
    old = merge({"machine": {}, "versions": {}, "rows": []}, machine, versions, [made(ours=1.0), made(n=2), made(setting="bf16")])
    assert len(old["rows"]) == 3
    new = merge(old, machine, versions, [made(ours=9.0)])
    assert [r["ours_ms"] for r in new["rows"]] == [9.0, 1.0, 1.0]
    assert all("machine" not in r for r in new["rows"])

    moved = merge(new, {"processor": "y"}, versions, [made(n=2, ours=3.0)])
    assert moved["machine"] == {"processor": "y"}
    assert [r.get("machine") for r in moved["rows"]] == [machine, None, machine], "rows of before say where they are from"
    back = merge(moved, machine, versions, [made(n=3)])
    assert [r.get("machine") for r in back["rows"]] == [None, {"processor": "y"}, None, None]


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a-cpu.json"
    assert read(path) == {"machine": {}, "versions": {}, "rows": []}
    contents = merge(read(path), {"processor": "x"}, {}, [made()])
    write(path, contents)
    assert read(path) == contents
    assert [p.name for p in path.parent.iterdir()] == ["a-cpu.json"]
    for text in ("{", "[]", '{"rows": 1}', "{}"):
        path.write_text(text)
        with pytest.raises(MxdError, match="is not a file of results"):
            read(path)


# --- curves -------------------------------------------------------------------------------------------------------------------------


def points(what: str, costs: dict[int, float], device: str = "cpu") -> list[dict[str, Any]]:
    return [
        {**made(sweep=what), "device": device, "shape": {"n": 7, "k": 7, "students": 7, "tokens": 7, what: size}, "ours_ms": cost}
        for size, cost in costs.items()
    ]


def test_exponents() -> None:
    assert plots.exponent([(1, 3.0), (2, 12.0), (8, 192.0)]) == pytest.approx(2.0)
    assert plots.exponent([(10, 5.0), (1000, 5.0)]) == pytest.approx(0.0)
    # log2: (0, 0), (1, 1), (2, 0): the least-squares line is level
    assert plots.exponent([(1, 1.0), (2, 2.0), (4, 1.0)]) == pytest.approx(0.0)
    assert plots.exponent([(4, 1.0)]) is None
    assert plots.exponent([]) is None


def test_points_of_one_sweep_and_device_in_order() -> None:
    rows = points("n", {64: 4.0, 32: 2.0}) + points("k", {4: 1.0}) + points("n", {16: 1.0}, "cuda")
    assert plots.points(rows, "n", "cpu") == [(32, 2.0), (64, 4.0)]
    assert plots.points(rows, "n", "cuda") == [(16, 1.0)]


def test_the_figure_has_a_panel_for_every_curve() -> None:
    rows = points("n", {32: 2.0, 64: 4.0, 128: 8.0}) + points("students", {1: 1.0, 4: 2.0}) + points("k", {4: 1.0})
    drawn = plots.figure(rows, "cpu")
    assert drawn is not None
    root = ElementTree.fromstring(drawn)
    assert len([e for e in root if e.tag.endswith("svg")]) == 2, "a sweep of one point is no curve"
    assert drawn.count("<circle") == 5
    assert "exponent 1.00" in drawn
    assert "exponent 0.50" in drawn
    assert len(drawn) < 20_000
    assert plots.figure(rows, "cuda") is None


# --- tables -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def bench_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """tools/bench_tables.py on an empty folder of results."""
    monkeypatch.syspath_prepend(str(TOOLS))
    monkeypatch.delitem(sys.modules, "bench_tables", raising=False)
    module = importlib.import_module("bench_tables")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def put(folder: Path, name: str, *rows: dict[str, Any]) -> None:
    path = folder / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": {"processor": "Some CPU", "threads": 2}, "versions": {"torch": "1"}, "rows": list(rows)}))


def test_without_results_every_target_is_not_measured(bench_tables: ModuleType) -> None:
    lines = bench_tables.targets().splitlines()[2:]
    assert len(lines) == len(bench_tables.TARGETS) + len(plots.AXES)
    assert all("| not measured |" in line for line in lines)
    assert set(bench_tables.tables()) >= {"targets", "train_step", "peers", "gate"}
    assert bench_tables.tables()["peers"] == "Not measured."
    assert bench_tables.plots() == {}


def step(n: int, tokens: int, time: float, setting: str = "") -> dict[str, Any]:
    rival = "dense reference maths in PyTorch, float32"
    shape = {"n": n, "tokens": tokens}
    return {**made(setting=setting), "rival": rival, "shape": shape, "time_ratio": time, "memory_ratio": 0.36}


def test_targets_are_reached_or_missed(bench_tables: ModuleType, tmp_path: Path) -> None:
    made_again = step(21_490, 4096, 0.2, "hidden vectors made again")
    put(
        tmp_path, "train_step-cpu", step(21_490, 4096, 0.1, "gate screened"), step(21_490, 4096, 0.35), step(10_736, 1024, 0.46), made_again
    )
    generation = {**made(), "shape": {"kind": "mxd", "sequences": 1}, "throughput_ratio": 0.9}
    put(tmp_path, "generation-cpu", {**generation, "setting": "static", "throughput_ratio": 0.1}, generation)
    put(tmp_path, "scaling-cpu", *points("n", {32: 2.0, 64: 4.4}), *points("k", {4: 1.0, 8: 1.5}))
    text = bench_tables.targets()
    lines = [[cell.strip() for cell in line.split("|")[2:5]] for line in text.splitlines()[2:]]
    assert lines[:2] == [["≤ 0.35", "**0.350**", "reached"], ["≤ 0.35", "**0.360**", "missed"]]
    assert lines[2:5] == [["≤ 0.35", "**0.200**", "reached"], ["≤ 0.35", "**0.360**", "missed"], ["≤ 0.45", "**0.460**", "missed"]]
    assert ["≥ 0.85", "**0.900**", "reached"] in lines
    assert lines[-4:-2] == [["≤ 1", "**1.14**", "missed"], ["stated", "**0.58**", ""]]


def test_every_row_is_in_the_table(bench_tables: ModuleType, tmp_path: Path) -> None:
    elsewhere = {**step(10_736, 1024, 0.4), "machine": {"processor": "Another"}}
    put(tmp_path, "train_step-cpu", step(21_490, 4096, 0.3, "gate screened"), elsewhere)
    text = bench_tables.tables()["train_step"]
    assert text.startswith("Some CPU, 2 threads; torch 1 ([JSON](results/train_step-cpu.json)):")
    assert "a · gate screened | n 21,490, tokens 4,096; float32 |" in text
    assert "measured elsewhere or earlier" in text
    put(tmp_path, "scaling-cpu", *points("n", {32: 2.0, 64: 4.4}))
    assert "](plots/scaling-cpu.svg)" in bench_tables.tables()["scaling"]
    assert [path.name for path in bench_tables.plots()] == ["scaling-cpu.svg"]
