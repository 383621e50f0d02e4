"""Whether what came out of a file is of the types that a record is declared with. Files may come from anyone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, get_type_hints


def wrong(record: type, values: Mapping[str, Any]) -> list[str]:
    """Fields of a dataclass or NamedTuple whose values are of another type, each as ``name: value``; fields that are not there pass.

    An int stands for a float, a bool for no int.
    """
    found: list[str] = []
    for name, hint in get_type_hints(record).items():
        if name in values and not _fits(values[name], hint):
            found.append(f"{name}: {str(values[name])[:40]!r}")
    return found


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def leads_out(path: str) -> bool:
    """Whether a relative path, by its words alone, leaves the folder that it is relative to, on any system."""
    words = PurePosixPath(path)
    return not path or "\x00" in path or words.is_absolute() or ".." in words.parts or bool(PureWindowsPath(path).drive) or "\\" in path
