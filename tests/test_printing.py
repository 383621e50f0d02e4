"""Where the time of a run went: by hand."""

from __future__ import annotations

from pathlib import Path

from mxd.checkpoint import Run, StudentRecord
from mxd.printing import time_split


def student(seconds: float) -> StudentRecord:
    return StudentRecord("mxd-k2", "layers.1.mlp", "mxd", 2, 4, 4, 8, 100, "ours", 0, 64, 1, seconds, 1.0, False)


def test_the_parts_of_the_time_add_up_to_the_whole() -> None:
    run = Run(Path(), {"seconds": {"harvest": 20.0, "warm start": 9.0, "saving": 2}}, [student(30.0), student(10.0)])
    found = time_split(run, training=70.0, evaluation=5.0)
    assert found == {"harvest": 20.0, "saving": 2.0, "students": 40.0, "rest": 8.0, "evaluation": 5.0}, "warm starts are the students' own"
    assert time_split(run, training=60.0, evaluation=5.0)["rest"] == 0.0
    assert time_split(run, training=0.5, evaluation=5.0) == {"evaluation": 5.0}, "nothing was trained"
