"""Reading ahead: the same items in the same order, no further ahead than asked, and no thread left behind."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from mxd.ahead import ahead
from mxd.errors import ConfigError


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "mxd-read-ahead"]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert threads() == []


def until(holds: Callable[[], bool]) -> None:
    """Wait for another thread, at most five seconds."""
    end = time.monotonic() + 5
    while not holds():
        assert time.monotonic() < end, "the other thread did not get there"
        time.sleep(0.001)


@pytest.mark.parametrize("depth", [1, 2, 7, 1000])
def test_every_item_in_its_order(depth: int) -> None:
    assert list(ahead(iter(range(300)), depth)) == list(range(300))
    assert list(ahead([], depth)) == []
    assert list(ahead([None, False, 0], depth)) == [None, False, 0]


@pytest.mark.parametrize("depth", [1, 3])
def test_as_far_ahead_as_asked_and_no_further(depth: int) -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for n in itertools.count():
            made.append(n)
            yield n

    with closing(ahead(items(), depth)) as stream:
        assert made == [], "nothing before the first is asked for"
        next(stream)
        until(lambda: len(made) == 1 + depth)  # one taken, `depth` waiting, without anyone asking
        time.sleep(0.05)
        assert len(made) == 1 + depth
        next(stream)
        until(lambda: len(made) == 2 + depth)


def test_items_are_made_in_another_thread_while_the_consumer_works() -> None:
    second = threading.Event()

    def items() -> Iterator[str]:
        yield threading.current_thread().name
        second.set()
        yield "second"

    with closing(ahead(items(), 2)) as stream:
        assert next(stream) == "mxd-read-ahead"
        assert second.wait(5), "the second item is made although only the first was asked for"


@pytest.mark.parametrize("error", [ValueError("torn"), KeyboardInterrupt()])
def test_an_error_comes_after_the_items_before_it(error: BaseException) -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise error

    stream = ahead(items(), 8)
    assert [next(stream), next(stream)] == [1, 2]
    with pytest.raises(type(error)) as caught:
        next(stream)
    assert caught.value is error
    assert list(stream) == []


def test_an_error_at_the_start_of_the_iterator() -> None:
    class Broken:
        def __iter__(self) -> Iterator[int]:
            raise OSError("no disk")

    with pytest.raises(OSError, match="no disk"):
        next(ahead(Broken(), 1))


def test_closing_stops_a_thread_that_waits_and_closes_its_iterator() -> None:
    closed_by: list[str] = []

    def items() -> Iterator[int]:
        try:
            yield from itertools.count()
        finally:
            closed_by.append(threading.current_thread().name)

    stream = ahead(items(), 2)
    next(stream)
    (thread,) = threads()
    began = time.monotonic()
    stream.close()
    assert time.monotonic() - began < 1
    assert not thread.is_alive()
    assert closed_by == ["mxd-read-ahead"]


def test_an_error_in_the_loop_leaves_no_thread() -> None:
    with pytest.raises(KeyboardInterrupt), closing(ahead(itertools.count(), 2)) as stream:
        for n in stream:
            if n == 3:
                raise KeyboardInterrupt
    assert threads() == []


def test_a_stream_that_is_never_started_has_no_thread() -> None:
    ahead(itertools.count(), 2).close()
    assert threads() == []


@pytest.mark.parametrize("depth", [0, -1])
def test_a_depth_below_one_is_refused(depth: int) -> None:
    with pytest.raises(ConfigError, match=rf"nothing to read ahead \| expected a depth of at least 1 \| got {depth}$"):
        ahead([1], depth)
