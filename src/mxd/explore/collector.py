"""``mxd collect`` beside the server: started where something is missing, followed through ``explore/collect.json``, ended with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import Any, cast

from ..checkpoint import Run
from ..errors import MxdError
from ..sealed import read_json
from .shelf import Shelf
from .store import folder, text_path

STILL_SECONDS = 600.0
"""A collection of another process that has not been heard of for so long is taken to be over, whoever has its process number now."""
END_SECONDS = 10.0
"""So long a child may take to put away what it has read."""
STATES = ("running", "done", "failed")


class Collector:
    """One child at most. All methods may be called from any thread."""

    def __init__(self, shelf: Shelf, *, students: Sequence[str] = (), device: str = "auto") -> None:
        """`students`: only these; none for all that have units."""
        self._shelf, self._students, self._device = shelf, tuple(students), device
        self._child: subprocess.Popen[bytes] | None = None
        self._said: Any = None
        self._lock = threading.Lock()
        self._closed = False

    def missing(self) -> list[str]:
        """Students about whose present weights nothing was collected."""
        run = self._shelf.run
        records = [run.student(name) for name in self._students] or run.students
        return [record.name for record in records if record.n_units and not self._has(run, record.name)]

    def _has(self, run: Run, student: str) -> bool:
        try:
            meta = self._shelf.units(student).store.meta
            return text_path(run).is_file() and meta.get("weights_sha256") == run.weights_sha256(student)
        except MxdError:
            return False

    def go(self) -> None:
        """Start a child if something is missing and nobody collects already."""
        with self._lock:
            try:
                if self._closed or self._child is not None or self._other() is not None or not self.missing():
                    return
                path = str(self._shelf.path)
            except MxdError:
                return  # the page says what is wrong with the run
            command = [sys.executable, "-m", "mxd", "collect", path, "--device", self._device]
            command += ["--students", *self._students] if self._students else []
            self._said = tempfile.TemporaryFile()  # noqa: SIM115
            # In a session of its own: Ctrl-C ends the server, and the server ends it.
            self._child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._said, start_new_session=True
            )

    def status(self) -> dict[str, Any]:
        """``state`` none, running, done or failed; ``stage``; tokens ``done`` of ``total``; ``seconds_left``; ``why`` it failed."""
        with self._lock:
            told, child = self._told(), self._child
            code = child.poll() if child else None
            mine = child is not None and told.get("pid") == child.pid
            about: dict[str, Any] = {name: told.get(name) for name in ("stage", "done", "total", "seconds_left")}
            if child is not None and code is None:
                return {"state": "running", **(about if mine else _nothing("starting")), "why": None}
            if child is not None and code:
                return {"state": "failed", **about, "why": self._last_words() or told.get("why") or f"it ended with code {code}"}
            if told.get("state") == "running" and self._other() is None:
                return {"state": "failed", **about, "why": f"it ended in the middle | next: mxd collect {self._shelf.path}"}
            return {"state": told.get("state", "none"), **about, "why": told.get("why")}

    def close(self) -> None:
        """End the child: it keeps what it has read so far."""
        with self._lock:
            self._closed = True
            child = self._child
        if child is not None and child.poll() is None:
            child.send_signal(signal.SIGINT if os.name == "posix" else signal.SIGTERM)
            try:
                child.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        if self._said is not None:
            self._said.close()

    def _told(self) -> dict[str, Any]:
        """What collect.json says, as far as it is of the types that it must be of."""
        try:
            found: Any = read_json(folder(self._shelf.run) / "collect.json")
        except MxdError:
            return {}
        if not isinstance(found, dict) or cast("dict[str, Any]", found).get("state") not in STATES:
            return {}
        kinds: dict[str, Any] = {
            "state": str,
            "pid": int,
            "stage": str,
            "done": int,
            "total": int,
            "seconds_left": (int, float),
            "why": str,
        }
        return {name: value for name, kind in kinds.items() if isinstance(value := cast("dict[str, Any]", found).get(name), kind)}

    def _other(self) -> int | None:
        """The process that collects, if it is not our child and lives."""
        told = self._told()
        pid = told.get("pid", 0)
        if told.get("state") != "running" or pid <= 0 or (self._child is not None and pid == self._child.pid):
            return None
        try:
            written = (folder(self._shelf.run) / "collect.json").stat().st_mtime
            if time.time() - written > STILL_SECONDS:
                return None
            if os.name == "posix":
                os.kill(pid, 0)
        except PermissionError:
            return pid  # somebody else's, but there
        except (OSError, OverflowError, MxdError):
            return None
        return pid

    def _last_words(self) -> str:
        """The error of a child that failed."""
        self._said.seek(0)
        lines = [line.strip() for line in self._said.read()[-4000:].decode("utf-8", "replace").splitlines() if line.strip()]
        return next((line.removeprefix("mxd: error: ") for line in reversed(lines) if line.startswith("mxd: ")), "")[:400]


def _nothing(stage: str) -> dict[str, Any]:
    return {"stage": stage, "done": None, "total": None, "seconds_left": None}
