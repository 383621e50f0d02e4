"""No more threads than cores: what PyTorch does not see by itself is the share of them that a container was given."""

from __future__ import annotations

import math
import os
from collections.abc import MutableMapping
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def limit_threads(environ: MutableMapping[str, str] = os.environ, cgroup: Path = CGROUP) -> None:
    """Have numerical libraries, not imported yet, start as many threads as this process has cores; ``OMP_NUM_THREADS`` goes before.

    Without a quota of the control group they find the right number themselves, and nothing is changed.
    """
    share = quota(cgroup)
    if "OMP_NUM_THREADS" not in environ and share is not None and share < cores():
        environ["OMP_NUM_THREADS"] = str(max(1, math.floor(share)))


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quota(cgroup: Path = CGROUP) -> float | None:
    """Cores' worth of time that the control group grants this process, by cgroup v2 or v1; None where there is no such limit."""
    try:
        granted, period = (cgroup / "cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        try:
            granted, period = ((cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text(encoding="ascii").strip() for name in ("quota", "period"))
        except OSError:
            return None
    try:
        share = int(granted) / int(period)
    except (ValueError, ZeroDivisionError):  # "max"
        return None
    return share if share > 0 else None
