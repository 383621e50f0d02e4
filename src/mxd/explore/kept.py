"""What a kept bench run and a kept sentence must be. The page draws them as they are, and a file of notes may come from a stranger."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, cast

from . import asks
from .replies import Refusal

ANY_UNIT = 2**31
"""Units of a student that the run may not have any more."""
_STATS = ("nats_per_token", "repeats", "splits_at", "tokens")


def bench(student: str, request: Any, result: Any, n_units: int = ANY_UNIT) -> str | None:
    """What is wrong with a bench run; None if nothing is."""
    if not isinstance(request, dict) or not isinstance(result, dict):
        return "request and result: no JSON objects"
    try:
        asks.generation({**cast(asks.Body, request), "student": student}, {student: n_units})
    except Refusal as refused:
        return refused.what
    lanes = cast(asks.Body, result).get("lanes")
    if not isinstance(lanes, list) or not lanes or not all(_lane(lane) for lane in cast("list[Any]", lanes)):
        return "lanes: not what they must be"
    return None


def _lane(lane: Any) -> bool:
    if not isinstance(lane, dict) or lane.get("lane") not in asks.LANES or not isinstance(lane.get("note", ""), str):
        return False
    stats, tokens = lane.get("stats"), lane.get("tokens")
    if stats is not None and not (isinstance(stats, dict) and all(_number(cast(asks.Body, stats).get(name)) for name in _STATS)):
        return False
    return isinstance(tokens, list) and all(_token(token) for token in cast("list[Any]", tokens))


def _token(token: Any) -> bool:
    """[id, text, probability, the host's loss]"""
    found = cast("list[Any]", token) if isinstance(token, list) else []
    return len(found) == 4 and type(found[0]) is int and isinstance(found[1], str) and _number(found[2]) and _number(found[3])


def sentence(request: Any, answer: Any) -> str | None:
    """What is wrong with a sentence that was read; None if nothing is."""
    if not isinstance(request, dict) or not (isinstance(request.get("text"), str) or type(request.get("seq")) is int):
        return "request: neither text nor seq"
    if not isinstance(answer, dict) or not isinstance(answer.get("students"), list) or type(answer.get("mean_from")) is not int:
        return "answer: not what it must be"
    tokens, host = answer.get("tokens"), answer.get("host")
    if not isinstance(tokens, dict) or not isinstance(host, dict) or not isinstance(tokens.get("text"), str):
        return "tokens: not what they must be"
    named = tokens.get("names")
    ids = tokens.get("ids")
    n = len(cast("list[Any]", ids)) if isinstance(ids, list) else 0
    if not n or not _each(ids, n, whole=True) or not _each(tokens.get("cuts"), n + 1, whole=True):
        return "tokens: not what they must be"
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in cast(asks.Body, named).values()):
        return "tokens: not what they must be"
    if not isinstance(tokens.get("special"), list) or not _predicted(host, n):
        return "host: not what it must be"
    if not all(_read(student, n) for student in cast("list[Any]", answer["students"])):
        return "students: not what they must be"
    return None


def _read(student: Any, n: int) -> bool:
    """Whether this is what one student makes of `n` tokens."""
    if not isinstance(student, dict) or not isinstance(student.get("name"), str) or not isinstance(student.get("labels"), dict):
        return False
    found = cast(asks.Body, student)
    if not _predicted(found, n) or not _each(found.get("kl"), n) or not all(isinstance(v, str) for v in found["labels"].values()):
        return False
    units = found.get("units")
    if not isinstance(units, dict) or not _each(units.get("from"), n + 1, whole=True) or type(found.get("k")) is not int:
        return False
    starts = cast("list[int]", units["from"])
    if starts[0] != 0 or any(b < a for a, b in itertools.pairwise(starts)):
        return False
    return _each(units.get("unit"), starts[-1], whole=True) and all(_each(units.get(c), starts[-1]) for c in ("a", "share", "effect"))


def _predicted(found: asks.Body, n: int) -> bool:
    top = found.get("top")
    return _each(found.get("loss"), n) and _each(found.get("p"), n) and isinstance(top, list) and all(_top(t) for t in top)


def _top(found: Any) -> bool:
    """The likeliest next tokens, [text, probability] each; none after the last token."""
    pairs = cast("list[Any]", [] if found is None else found if isinstance(found, list) else [0])
    return all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and _number(pair[1]) for pair in pairs)


def _each(values: Any, n: int, *, whole: bool = False) -> bool:
    """Whether these are `n` numbers, or nulls where they need not be whole."""
    found: Sequence[Any] = values if isinstance(values, list) else ()
    return isinstance(values, list) and len(found) == n and all(type(v) is int if whole else _number(v) for v in found)


def _number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf"))
