"""Where the time of a run goes, in seconds by part."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

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
