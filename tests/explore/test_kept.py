"""What is kept is whole, or it is not shown."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from mxd.explore import kept
from tests.explore import keepsakes


def changed(found: Any, *path: Any, to: Any) -> Any:
    """A copy in which one value is another."""
    made = copy.deepcopy(found)
    inner = made
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = to
    return made


def test_whole_ones_pass() -> None:
    assert kept.bench("mxd-k2", *keepsakes.bench_run()) is None
    assert kept.sentence({"text": "ab"}, keepsakes.sentence("ab", ("mxd-k2",), "a label")) is None
    assert kept.sentence({"seq": 3}, keepsakes.sentence("ab", ())) is None


@pytest.mark.parametrize(
    ("path", "to", "fault"),
    [
        (("prompt",), 3, "prompt"),
        (("edits",), "x", "edits"),
        (("edits", 0, "unit"), 7, "no such unit"),
        (("edits", 0, "op"), "explode", "op"),
        (("lanes",), ["lane"], "lanes"),
        (("seed",), 0.5, "seed"),
    ],
)
def test_requests_of_another_form(path: tuple[Any, ...], to: Any, fault: str) -> None:
    request, result = keepsakes.bench_run()
    assert fault in str(kept.bench("mxd-k2", changed(request, *path, to=to), result, 5))


@pytest.mark.parametrize(
    ("path", "to"),
    [
        (("lanes",), {}),
        (("lanes",), []),
        (("lanes",), [3]),
        (("lanes", 0, "lane"), "nowhere"),
        (("lanes", 0, "note"), 3),
        (("lanes", 0, "stats"), "none"),
        (("lanes", 0, "stats", "repeats"), "4"),
        (("lanes", 0, "tokens"), {}),
        (("lanes", 0, "tokens", 0), [1, "b", 0.5]),
        (("lanes", 0, "tokens", 0, 0), 1.5),
        (("lanes", 0, "tokens", 0, 1), None),
        (("lanes", 0, "tokens", 0, 2), "0.5"),
        (("lanes", 0, "tokens", 0, 3), float("nan")),
    ],
)
def test_results_of_another_form(path: tuple[Any, ...], to: Any) -> None:
    request, result = keepsakes.bench_run()
    assert kept.bench("mxd-k2", request, changed(result, *path, to=to)) == "lanes: not what they must be"


def test_a_lane_without_figures_is_whole() -> None:
    request, result = keepsakes.bench_run()
    assert kept.bench("mxd-k2", request, changed(result, "lanes", 0, "stats", to=None)) is None, "of a run that was stopped"
    assert kept.bench("mxd-k2", [], result) == kept.bench("mxd-k2", request, None) == "request and result: no JSON objects"


@pytest.mark.parametrize(
    ("path", "to"),
    [
        (("tokens",), None),
        (("tokens", "text"), 3),
        (("tokens", "ids"), []),
        (("tokens", "ids", 0), None),
        (("tokens", "cuts"), [0, 2]),
        (("tokens", "names"), []),
        (("tokens", "names"), {"0": 3}),
        (("tokens", "special"), None),
        (("host", "loss"), [None]),
        (("host", "top"), None),
        (("host", "top"), [[["y"]]]),
        (("mean_from",), True),
        (("students",), None),
        (("students", 0), "mxd-k2"),
        (("students", 0, "name"), 3),
        (("students", 0, "labels"), {"2": 3}),
        (("students", 0, "kl"), [0.1]),
        (("students", 0, "k"), "2"),
        (("students", 0, "units"), None),
        (("students", 0, "units", "from"), [0, 2, 1]),
        (("students", 0, "units", "from"), [1, 1, 1]),
        (("students", 0, "units", "unit"), [2, 3]),
        (("students", 0, "units", "unit"), [None]),
        (("students", 0, "units", "a"), ["1"]),
        (("students", 0, "units", "effect"), []),
    ],
)
def test_sentences_of_another_form(path: tuple[Any, ...], to: Any) -> None:
    assert kept.sentence({"text": "ab"}, changed(keepsakes.sentence("ab", ("mxd-k2",)), *path, to=to)) is not None


@pytest.mark.parametrize("asked", [None, {}, {"text": 3}, {"seq": "1"}, {"seq": True}])
def test_sentences_that_nobody_asked_for(asked: Any) -> None:
    assert kept.sentence(asked, keepsakes.sentence("ab", ())) == "request: neither text nor seq"


@pytest.mark.parametrize("whole", [lambda: keepsakes.bench_run()[1], lambda: keepsakes.sentence("ab", ("mxd-k2",))])
def test_any_part_may_be_missing(whole: Callable[[], Any]) -> None:
    """Nothing but an answer: no missing part, wherever it is, ends in an exception."""
    parts = list(places(whole()))
    assert len(parts) > 10
    for path in parts:
        for other in (None, [], {}, "x", 3, True):
            made = changed(whole(), *path, to=other)
            assert isinstance(kept.sentence({"text": "a"}, made), str | None)
            assert isinstance(kept.bench("mxd-k2", keepsakes.bench_run()[0], made), str | None)


def places(found: Any, before: tuple[Any, ...] = ()) -> Any:
    """The path of every value."""
    inner = found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ()
    for key, value in inner:
        yield (*before, key)
        yield from places(value, (*before, key))
