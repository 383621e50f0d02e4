"""What the page's server says: JSON without NaN, and errors of one line each with the status of what went wrong."""

from __future__ import annotations

import json
import math
from typing import Any, cast

from ..errors import ConfigError, HostError, LayerError, MxdError
from .notes import Conflict


class Refusal(MxdError):
    """A request that is not answered. `status` is that of HTTP."""

    def __init__(self, status: int, what: str, *, expected: str = "", got: str = "", next: str = "") -> None:
        super().__init__(what, expected=expected, got=got, next=next)
        self.status = status


def status_of(error: MxdError) -> int:
    """The status of HTTP that an error is answered with: 503 where the run's files are at fault."""
    if isinstance(error, Refusal):
        return error.status
    if isinstance(error, Conflict):
        return 409
    return 422 if isinstance(error, ConfigError | LayerError | HostError) else 503


def told(error: MxdError) -> dict[str, str]:
    """An error as the page shows it; every part is one line."""
    return {name: " ".join(str(getattr(error, name)).split()) for name in ("what", "expected", "got", "next")}


def refused(error: MxdError) -> dict[str, Any]:
    """The body that an error is answered with."""
    body: dict[str, Any] = {"error": told(error)}
    return {**body, "current": error.current} if isinstance(error, Conflict) else body


def to_json(value: Any) -> bytes:
    """`value` as JSON in UTF-8, numbers that are not finite as null."""
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    except ValueError:
        text = json.dumps(finite(value), allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")  # half a surrogate pair, which only a damaged database has, becomes "?"


def finite(value: Any) -> Any:
    """`value` with None in the place of numbers that are not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: finite(inner) for name, inner in cast("dict[str, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in cast("list[Any]", value)]
    return value


def short(number: float | None, digits: int = 6) -> float | None:
    """A number to `digits` significant digits, so that an answer of many stays small; None where it is not finite."""
    return None if number is None or not math.isfinite(number) else float(f"{number:.{digits}g}")
