"""Seconds by part, and seconds of work that was only queued."""

from __future__ import annotations

import pytest
import torch

from mxd import clock
from mxd.clock import Clock, DeviceTimer


def test_parts_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([1.0, 1.5, 2.0, 5.0, 7.0, 7.25])
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(now))
    kept = Clock()
    with kept("a"):
        pass
    with kept("b"):
        pass
    with kept("a"):
        pass
    assert kept.seconds == {"a": 0.75, "b": 3.0}


def test_on_the_cpu_a_timer_counts_the_wall(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([1.0, 1.5, 4.0, 4.25])
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(now))
    timer = DeviceTimer(torch.device("cpu"))
    for _ in range(2):
        with timer:
            pass
    assert timer.seconds == 0.75


def test_on_a_gpu_it_counts_between_marks_in_the_queue_and_waits_only_when_read(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[float] = []
    waited: list[float] = []

    class Event:
        """Recorded at 0, 1, 3, 6, .. milliseconds of the device."""

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            n = len(recorded)
            self.at = n * (n + 1) / 2
            recorded.append(self.at)

        def synchronize(self) -> None:
            waited.append(self.at)

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    timer = DeviceTimer(torch.device("cuda"))
    for _ in range(2):
        with timer:
            pass
    assert recorded == [0.0, 1.0, 3.0, 6.0] and waited == []
    assert timer.seconds == pytest.approx((1 + 3) / 1000)
    assert waited == [1.0, 6.0] and timer.seconds == pytest.approx(0.004), "marks are counted once"
