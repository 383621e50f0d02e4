"""Taking turns (`mxd.timing`), and checking before that the rivals agree."""

from __future__ import annotations

import torch

from ..errors import MxdError
from ..timing import in_turns as in_turns
from ..timing import timed as timed
from ..timing import wait as wait


def verify(what: str, error: float, limit: float) -> str:
    """What was checked, in words, for the row.

    Raises:
        MxdError: `error` is above `limit`, or not a number: nothing may be timed.
    """
    if not error <= limit:
        raise MxdError(f"{what} do not agree, so nothing is timed", expected=f"a relative error of at most {limit:.0e}", got=f"{error:.2e}")
    return f"{what} agree to {error:.1e}"


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of `expected`, in float64 sums."""
    difference = (found.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp_min(torch.finfo(torch.float64).tiny))
