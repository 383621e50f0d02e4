"""Whether what came out of a file is of the types that a record is declared with. Files may come from anyone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints


def wrong(record: type, values: Mapping[str, Any]) -> list[str]:
    """Fields of a dataclass, NamedTuple or TypedDict whose values are of another type, each as ``name: value``; fields that are not
    there pass.

    JSON's types stand for ours: a list for a tuple, text for a path, an int for a float. A bool is no int.
    """
    found: list[str] = []
    for name, hint in get_type_hints(record).items():
        if name in values and not _fits(values[name], hint):
            found.append(f"{name}: {str(values[name])[:40]!r}")
    return found


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin in (tuple, list):
        return isinstance(value, (tuple, list)) and all(_fits(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(item, inner[1]) for item in value.values())
    if isinstance(value, bool):
        return hint in (bool, Any)
    known: dict[Any, Any] = {float: (int, float), Path: str, Any: object}
    return isinstance(value, known.get(hint, hint))


def plain(record: Any) -> dict[str, Any]:
    """A dataclass of options as JSON takes it."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in dataclasses.asdict(record).items()}


def options(record: type, values: Any, needed: Sequence[str]) -> dict[str, Any]:
    """What a file says of a dataclass of options, and the defaults of those that it does not know: it may be older than they are.

    Raises:
        ValueError: it is no JSON object, values are of other types, or one of `needed` is not there.
    """
    if not isinstance(values, dict):
        raise ValueError(f"options: {str(values)[:40]!r}")
    if unfit := wrong(record, values):
        raise ValueError(", ".join(unfit))
    if missing := [name for name in needed if name not in values]:
        raise ValueError(f"no {', '.join(missing)}")
    return {**plain(record()), **values}


def leads_out(path: str) -> bool:
    """Whether a relative path, by its words alone, leaves the folder that it is relative to, on any system."""
    words = PurePosixPath(path)
    return not path or "\x00" in path or words.is_absolute() or ".." in words.parts or bool(PureWindowsPath(path).drive) or "\\" in path
