"""Progress on the terminal: what is being done, how fast, and how long it will take."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Bar:
    """A progress bar with units per second and time left; without a terminal, a line every ten seconds.

    Use as a context manager: ``with Bar("training", total, "tokens") as bar: bar.update(done, note)``.
    """

    def __init__(self, what: str, total: int, unit: str, *, quiet: bool = False) -> None:
        self._what, self._total, self._unit, self._quiet = what, total, unit, quiet
        self._console = Console(file=sys.stderr)
        self._spoken = time.monotonic()
        self._noted, self._note = -math.inf, ""
        self._first: tuple[float, int] | None = None
        self._bar: Progress | None = None
        if self._console.is_terminal and not quiet:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[speed]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._bar = Progress(*columns, console=self._console, transient=False)
            self._task = self._bar.add_task(what, total=total, speed="", note="")

    def __enter__(self) -> Bar:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, note: str | Callable[[], str] = "") -> None:
        """Say that `done` of the total units are finished; `note` stands behind the bar. One that costs something to make is given as
        a function, and asked for twice a second.

        Speed and time left count from the first call, so that what had to be set up before the first unit does not distort them.
        """
        now = time.monotonic()
        if self._first is None:
            self._first = (now, done)
        if callable(note):
            if now - self._noted >= 0.5 or done >= self._total:
                self._noted, self._note = now, note()
            note = self._note
        seconds, units = now - self._first[0], done - self._first[1]
        speed = units / seconds if seconds > 0 else 0.0
        text = f"{speed:,.0f} {self._unit}/s" if speed >= 10 else f"{speed:.2f} {self._unit}/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, speed=text, note=note)
        elif not self._quiet and (now - self._spoken >= 10 or done >= self._total):
            self._spoken = now
            line = f"{self._what}: {done:,} of {self._total:,} {self._unit}"
            if speed > 0:
                line += f", {text}, {(self._total - done) / speed:.0f} s left"
            print(f"{line} · {note}" if note else line, file=sys.stderr, flush=True)
