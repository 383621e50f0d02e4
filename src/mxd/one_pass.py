"""One pass over a stream of activations: every batch goes to every student that is still running."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .slices import ActivationBatch
from .tracking import Metrics
from .train import Student


def train(
    students: list[Student],
    stream: Iterable[Mapping[str, ActivationBatch]],
    *,
    metrics: Metrics,
    log_every_steps: int,
    probe: Callable[[Student], dict[str, Any]] | None = None,
    probe_every_steps: int = 0,
    on_step: Callable[[int, list[Student]], None] | None = None,
    first_step: int = 1,
    began: float | None = None,
) -> None:
    """Give every batch of the stream to every student that is still running.

    Args:
        students: set up already (`Student.start`).
        stream: per step one batch per hookpoint.
        metrics: gets one row per logged step and student.
        log_every_steps: steps between two rows of a student.
        probe: measures a student on held-out activations; its figures go to the metrics under ``probe``.
        probe_every_steps: steps between two probes; 0 for none.
        on_step: called after each step with the number of steps done, for progress.
        first_step: number of the first step of the stream.
        began: when training began, by `time.monotonic`, for the metrics; default: now.
    """
    began = time.monotonic() if began is None else began
    for step, batches in enumerate(stream, first_step):
        running = [s for s in students if s.stopped is None]
        if not running:
            break
        for student in running:
            student.step(batches[student.spec.hookpoint])
        if step % log_every_steps == 0 or step == 1:
            for student in running:
                metrics.write(_row(student, step, time.monotonic() - began))
        if probe is not None and probe_every_steps and (step % probe_every_steps == 0 or step == 1):
            for student in running:
                metrics.write({"step": step, "tokens": student.tokens, "student": student.name, "probe": probe(student)})
        if on_step is not None:
            on_step(step, students)


def _row(student: Student, step: int, seconds: float) -> dict[str, Any]:
    row: dict[str, Any] = {
        "step": step,
        "tokens": student.tokens,
        "student": student.name,
        "loss": student.last_loss,
        "lr": student.learning_rate(),
        "seconds": round(seconds, 3),
        **student.counts.summary(),
    }
    if student.stopped:
        row["stopped"] = student.stopped
    return row
