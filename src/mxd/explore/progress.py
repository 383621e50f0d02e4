"""How far collecting has come: told to the terminal, and through ``explore/collect.json`` to the page."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

from ..checkpoint import Run
from ..sealed import write_json
from .store import folder

Say = Callable[[int, str], None]


class Progress:
    """What is being done, and the seconds that each stage took."""

    def __init__(self, run: Run, say: Say) -> None:
        self._path, self._say, self.total = folder(run) / "collect.json", say, 0
        self._begun, self._first, self._done, self._spoken = time.monotonic(), -1, 0, 0.0
        self.seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    def at(self, done: int, note: str) -> None:
        """So many tokens were read."""
        if self._first < 0:
            self._first, self._begun = done, time.monotonic()
        self._done = done
        self._say(done, note)
        if time.monotonic() - self._spoken > 1:
            speed = (done - self._first) / max(time.monotonic() - self._begun, 1e-6)
            self._write("running", note, (self.total - done) / speed if speed else None)

    def say(self, note: str) -> None:
        """What comes after the pass."""
        self._say(self._done, note)
        self._write("running", note, None)

    def stage(self, name: str, work: Callable[[], Any]) -> Any:
        """Do it, in whichever thread, and add up the time it takes."""
        begun = time.monotonic()
        done = work()
        with self._lock:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - begun
        return done

    def finished(self) -> None:
        self._write("done", "", 0.0)

    def failed(self, why: str) -> None:
        self._write("failed", why, None)

    def _write(self, state: str, stage: str, left: float | None) -> None:
        self._spoken = time.monotonic()
        about = {"state": state, "pid": os.getpid(), "stage": "" if state == "failed" else stage, "done": self._done, "total": self.total}
        about |= {"seconds_left": left, "why": stage if state == "failed" else None}
        write_json(self._path, {**about, "seconds": {name: round(each, 2) for name, each in self.seconds.items()}})
