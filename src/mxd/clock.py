"""Where the time of a run goes, in seconds by part."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

Item = TypeVar("Item")


class Clock:
    """Adds up seconds by part: ``with clock("harvest"): ...``."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, part: str) -> Span:
        """A context that puts its duration down to `part`."""
        return Span(self, part)

    def timed(self, part: str, items: Iterable[Item]) -> Iterator[Item]:
        """`items`, with the time spent waiting for each put down to `part`."""
        iterator = iter(items)
        while True:
            with self(part):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item


class Span:
    """One stretch of time on a clock."""

    def __init__(self, clock: Clock, part: str) -> None:
        self._clock, self._part = clock, part

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        seconds = self._clock.seconds
        seconds[self._part] = round(seconds.get(self._part, 0.0) + time.perf_counter() - self._began, 3)


class DeviceTimer:
    """Seconds that a device spends on the work begun inside ``with timer:``, added up, without waiting for it.

    Work for a GPU is only queued by the CPU, whose own clock would count the queueing; marks in the queue count the work. They are read
    by `seconds`, which waits for the last of them.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds = 0.0
        self._marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        if self._on_gpu:
            self._start = self._mark()
        else:
            self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self._on_gpu:
            self._marks.append((self._start, self._mark()))
        else:
            self._seconds += time.perf_counter() - self._began

    @property
    def seconds(self) -> float:
        for start, end in self._marks:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1e3
        self._marks.clear()
        return self._seconds

    @seconds.setter
    def seconds(self, seconds: float) -> None:
        self._marks.clear()
        self._seconds = seconds

    @staticmethod
    def _mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
