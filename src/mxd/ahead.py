"""Reading ahead: an iterator runs in a thread of its own, so that whoever consumes it does not wait for disk or host."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from typing import Generic, TypeVar

from .errors import ConfigError

Item = TypeVar("Item")


def ahead(items: Iterable[Item], depth: int) -> Generator[Item]:
    """`items` in their order, made in a background thread that is at most `depth` of them ahead of the consumer.

    The thread starts when the first item is asked for. An error in it is raised here, in its place in the order. Closing the generator
    (``contextlib.closing``; also an error or Ctrl-C in the loop over it, once the generator is closed) stops the thread before the next
    item and closes `items` in it, if `items` can be closed.

    What runs in the thread should copy (numpy, file reads) or drive a GPU; sums and products by torch on the CPU would start a second pool
    of OpenMP threads beside the consumer's, on the same cores.

    Args:
        items: any iterable; used in the thread only.
        depth: items made and not yet consumed, at most; what is held in memory beside the one in use.

    Raises:
        ConfigError: depth below 1.
    """
    if depth < 1:
        raise ConfigError("nothing to read ahead", expected="a depth of at least 1", got=str(depth))
    return _consume(_Shelf(depth), items)


def _consume(shelf: _Shelf[Item], items: Iterable[Item]) -> Generator[Item]:
    # A daemon, so that a consumer that is never closed cannot keep the process from ending.
    thread = threading.Thread(target=_produce, args=(shelf, items), name="mxd-read-ahead", daemon=True)
    thread.start()
    try:
        while made := shelf.take():
            yield made[0]
    finally:
        shelf.close()
        thread.join()


def _produce(shelf: _Shelf[Item], items: Iterable[Item]) -> None:
    error: BaseException | None = None
    try:
        iterator: Iterator[Item] = iter(items)
        try:
            # Room first, then the item: no more than `depth` are ever held.
            while shelf.wait_for_room():
                shelf.put(next(iterator))
        except StopIteration:
            pass
        finally:
            close = getattr(iterator, "close", None)
            if close is not None:
                close()
    except BaseException as caught:
        error = caught
    shelf.end(error)


class _Shelf(Generic[Item]):
    """What the thread has made and the consumer has not taken; both wait on one condition."""

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._made: deque[Item] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._ended = False
        self._error: BaseException | None = None

    def wait_for_room(self) -> bool:
        """Wait until an item fits; False once the consumer has closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._made) < self._depth)
            return not self._closed

    def put(self, item: Item) -> None:
        with self._changed:
            self._made.append(item)
            self._changed.notify_all()

    def end(self, error: BaseException | None) -> None:
        """No item comes any more, because of `error` if there is one."""
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def take(self) -> tuple[()] | tuple[Item]:
        """The next item, alone in a tuple; an empty tuple after the last. Raises the thread's error when its turn has come."""
        with self._changed:
            self._changed.wait_for(lambda: self._made or self._ended)
            if self._made:
                made = (self._made.popleft(),)
                self._changed.notify_all()
                return made
            if self._error is not None:
                raise self._error
            return ()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._made.clear()
            self._changed.notify_all()
