"""Ctrl-C and SIGTERM in the middle of long work: asked for at once, obeyed where nothing is lost."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Whether somebody asked for an end."""

    asked = False


@contextmanager
def stop_requests() -> Iterator[Stop]:
    """Inside, the first Ctrl-C or SIGTERM only sets `Stop.asked`; a second one raises KeyboardInterrupt there and then.

    Signals belong to the main thread: in another one nothing changes, and `Stop.asked` stays False.
    """
    stop = Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.asked:
            raise KeyboardInterrupt("stopped at once")
        stop.asked = True
        print("mxd: stopping after this step (once more: at once)", file=sys.stderr, flush=True)

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
