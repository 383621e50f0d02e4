"""The thread that owns the host: loads it once the page is there, then does one piece of work after the other.

The event loop of the server never runs PyTorch. Long work (a generation) lets waiting short work (reading a sentence) in between two
tokens, so that it keeps nobody waiting; what only asks the databases never comes here.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from secrets import token_hex
from typing import TYPE_CHECKING, Any

from ..errors import MxdError
from .replies import Refusal, told

if TYPE_CHECKING:
    from .model import Model
    from .shelf import Shelf

MOST_WAITING = 4
"""Pieces of long work, the running one included, and as many of short work; more are refused."""
SECONDS = 120.0
"""A piece of work ends after this time."""
LONGEST_WAIT = 3.0
"""The host is loaded after this time even if nobody has looked at the page yet."""

Work = Callable[["Model", "Job"], Any]


class Cancelled(Exception):
    """Nobody waits for this work any more."""


class Job:
    """One piece of work. Its result, or what went wrong, is in `future`."""

    def __init__(self, name: str, work: Work, *, long: bool = False, pane: str = "") -> None:
        """
        Args:
            name: what it is, for the log.
            work: called in the host's thread.
            long: whether short work may be done in between.
            pane: part of the page that asks; a newer job of the same one takes this one's place.
        """
        self.id, self.name, self.work, self.long, self.pane = token_hex(6), name, work, long, pane
        self.future: Future[Any] = Future()
        self.deadline = float("inf")
        self.between: Callable[[], None] = lambda: None
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    @property
    def late(self) -> bool:
        """Whether it has taken longer than it may."""
        return time.monotonic() > self.deadline

    def check(self) -> None:
        """To be called between two steps.

        Raises:
            Cancelled: it was cancelled.
            Refusal: it takes too long.
        """
        if self.cancelled:
            raise Cancelled
        if self.late:
            raise Refusal(503, "this took too long", expected=f"at most {SECONDS:g} s", next="ask for less")
        self.between()


class Worker:
    """The host's thread and its queue. All methods may be called from any thread."""

    def __init__(self, load: Callable[[], Model]) -> None:
        """`load` makes the model, in the thread; PyTorch is imported there."""
        self._load, self._model = load, None
        self._state, self._why = "loading", None
        self._change = threading.Condition()
        self._long: deque[Job] = deque()
        self._short: deque[Job] = deque()
        self._running: list[Job] = []
        """What is being done: long work, and short work in between."""
        self._closed = False
        self._go = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mxd-host", daemon=True)

    _model: Model | None
    _why: MxdError | None

    def start(self) -> None:
        """Start the thread; it waits for `go`, `LONGEST_WAIT` at most: importing PyTorch would hold the first page up."""
        self._thread.start()

    def go(self) -> None:
        """Load the host now."""
        self._go.set()

    @property
    def model(self) -> Model | None:
        """What was loaded; None before."""
        return self._model

    def status(self) -> dict[str, Any]:
        """State of the host, jobs waiting, the job that runs."""
        with self._change:
            waiting = sum(not job.cancelled for job in (*self._long, *self._short))
            why = None if self._why is None else told(self._why)
            return {"state": self._state, "why": why, "queue": waiting, "job": self._running[0].id if self._running else None}

    def submit(self, job: Job) -> Job:
        """Put a job into the queue; others of its pane are cancelled.

        Raises:
            Refusal: the host is not there, or too many jobs wait.
        """
        with self._change:
            if self._state == "loading":
                raise Refusal(503, "the host is still being loaded", next="try again in a moment")
            if self._state == "failed" or self._closed:
                raise Refusal(
                    503, "the host is not there", got=self._why.what if self._why else "", next=self._why.next if self._why else ""
                )
            queue = self._long if job.long else self._short
            for other in self._known():
                if job.pane and other.pane == job.pane:
                    other.cancel()
            ahead = [other for other in self._known() if other.long == job.long and not other.cancelled]
            if len(ahead) >= MOST_WAITING:
                raise Refusal(429, "too much is waiting for the host", expected=f"at most {MOST_WAITING} at once", next="wait, or stop one")
            queue.append(job)
            self._change.notify()
        return job

    def cancel(self, name: str) -> bool:
        """Cancel the job of this id; False if it is over or never was."""
        with self._change:
            found = [job for job in self._known() if job.id == name and not job.cancelled]
            for job in found:
                job.cancel()
            return bool(found)

    def close(self, seconds: float = 2.0) -> bool:
        """Cancel everything and wait for the thread, so long at most; whether it is over."""
        with self._change:
            self._closed = True
            for job in self._known():
                job.cancel()
            self._change.notify()
        self._go.set()
        if self._thread.is_alive():
            self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        self._go.wait(LONGEST_WAIT)
        if self._closed:
            return
        try:
            self._model = self._load()
            state = "ready"
        except MxdError as error:
            state, self._why = "failed", error
        except Exception as error:
            state, self._why = "failed", _unexpected("loading the host", error)
        with self._change:
            self._state = state
        while (job := self._take()) is not None:
            self._do(job)

    def _known(self) -> list[Job]:
        return [*self._long, *self._short, *self._running]

    def _take(self) -> Job | None:
        """The next job, short ones first; None at the end."""
        with self._change:
            while not (self._short or self._long or self._closed):
                self._change.wait()
            if self._closed:
                for job in (*self._short, *self._long):
                    if job.future.set_running_or_notify_cancel():
                        job.future.set_exception(Cancelled())
                return None
            return self._short.popleft() if self._short else self._long.popleft()

    def _do(self, job: Job) -> None:
        if not job.future.set_running_or_notify_cancel():
            return  # whoever asked is gone already
        job.deadline = time.monotonic() + SECONDS
        if job.long:
            job.between = self._short_ones
        with self._change:
            self._running.append(job)
        try:
            if job.cancelled or self._model is None:
                raise Cancelled
            result = job.work(self._model, job)
            self._over(job)
            job.future.set_result(result)
        except (Cancelled, MxdError) as error:
            self._over(job)
            job.future.set_exception(error)
        except Exception as error:
            self._over(job)
            job.future.set_exception(_unexpected(job.name, error))

    def _over(self, job: Job) -> None:
        """Whoever hears of the result finds the queue without it."""
        with self._change:
            self._running.remove(job)

    def _short_ones(self) -> None:
        """Do the short jobs that wait now."""
        with self._change:
            waiting = [self._short.popleft() for _ in range(len(self._short))]
        for job in waiting:
            self._do(job)


def _unexpected(what: str, error: Exception) -> Refusal:
    """A bug or a lack of memory, as one line; the log says where, and nothing that somebody wrote."""
    last = traceback.extract_tb(error.__traceback__)[-1:]
    where = f" at {last[0].filename.rpartition('/')[2]}:{last[0].lineno}" if last else ""
    print(f"mxd: unexpected {type(error).__name__} while {what}{where}", file=sys.stderr, flush=True)
    said = " ".join(str(error).split())[:160]
    return Refusal(503, f"{what} failed", got=f"{type(error).__name__}: {said}", next="ask for less, or mxd explore again with --debug")


def loader(shelf: Shelf, device: str) -> Callable[[], Model]:
    """What loads the model of a run: see `mxd.explore.model`."""

    def load() -> Model:
        from .model import Model

        return Model.load(shelf, device)

    return load
