"""One writer at a time on a folder, for as long as the writer lives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import RunError


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Inside, no other process writes into `folder` by the same rule; readers are not held up.

    The lock is the operating system's own on ``.NAME.lock`` beside the folder, so that it holds while the folder is replaced and goes
    with the process, however that ends: a file that was left behind locks nothing.

    Raises:
        RunError: another writer lives, in this process or in another.
    """
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.absolute().with_name(f".{folder.absolute().name}.lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise RunError(
            f"{folder} is being written to",
            expected="one writer at a time",
            got="a lock that is held",
            next="wait until it is done, or stop it: pgrep -af mxd",
        ) from None
    try:
        yield
    finally:
        lock.release()
