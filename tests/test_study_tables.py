"""How the tables of docs/results.md join seeds and text: by hand."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.test_docs import ROOT, generator

SEQUENCES = [2, 1, 3]


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(ROOT) / "tools"))
    return generator("study_tables")


def row(rise: float, spread: float = 0.0, seed: int = 0, **more: Any) -> dict[str, Any]:
    """A student whose loss rises by `rise` a sequence, in the first document by `spread` more."""
    sums = [n * rise + (spread if d == 0 else 0.0) for d, n in enumerate(SEQUENCES)]
    value = sum(sums) / sum(SEQUENCES)
    return {"excess_ce": value, "excess_ce_ci95": [value - 0.02, value + 0.02], "excess_ce_sums": sums, "seed": seed, **more}


def test_what_two_students_share_cancels_in_a_paired_difference(tables: ModuleType) -> None:
    value, (low, high) = tables.paired([row(0.03, spread=0.5)], [row(0.01, spread=0.5)], SEQUENCES)
    assert value == pytest.approx(0.02) and low == pytest.approx(0.02) and high == pytest.approx(0.02)
    value, (low, high) = tables.paired([row(0.03, spread=0.5)], [row(0.01)], SEQUENCES)
    assert low < 0.02 < value < high, "a document in which they differ widens it"


def test_seeds_widen_an_interval_by_students_t(tables: ModuleType) -> None:
    students = [row(rise, seed=seed) for seed, rise in enumerate((0.02, 0.03, 0.04))]
    half = 4.303 * 0.01 / math.sqrt(3)
    value, (low, high) = tables.paired(students, [row(0.0, seed=s) for s in range(3)], SEQUENCES)
    assert value == pytest.approx(0.03) and (high - low) / 2 == pytest.approx(half)
    value, (low, high) = tables.combined(students, "excess_ce")
    assert value == pytest.approx(0.03) and (high - low) / 2 == pytest.approx(math.hypot(half, 0.02))


def test_a_student_is_held_against_the_skip_transcoder_of_its_own_k_and_seeds(tables: ModuleType) -> None:
    def student(kind: str, k: int, rise: float, seed: int = 0, recipe: str = "ours+lr=4e-3") -> dict[str, Any]:
        return row(rise, seed=seed, kind=kind, k=k, recipe=recipe)

    rows = [student("skip-transcoder", k, 0.01 * k, seed) for k in (8, 32) for seed in (0, 1)]
    rows += [student("skip-transcoder", 8, 9.0, recipe="ours+lr-c=4")]
    found = {"document_sequences": SEQUENCES}
    assert tables._against_skip(found, [student("mxd", 8, 0.09)], rows) == "0.0100 [0.0100, 0.0100]"
    assert tables._against_skip(found, [student("dense", 0, 0.30)], rows) == "−0.0200 [−0.0200, −0.0200]"
    assert tables._against_skip(found, [student("mxd", 8, 0.09, seed=2)], rows) == "–", "no such seed"
    assert tables._against_skip(found, [rows[0]], rows) == "–", "not against itself"


def test_a_control_trained_by_two_runs_is_one_seed(tables: ModuleType) -> None:
    def dense(seed: int) -> dict[str, Any]:
        return row(0.01, seed=seed, kind="dense", k=0, recipe="ours")

    assert [[r["seed"] for r in group] for group in tables._groups([dense(0), dense(1), dense(1), dense(2), dense(2)])] == [[0, 1, 2]]
