"""What every result file says about the machine it was measured on."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def machine() -> dict[str, str]:
    """Processor, and the versions that timings depend on."""
    return {"processor": _processor(), "torch": torch.__version__, "python": platform.python_version()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
