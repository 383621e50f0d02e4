"""What the long forms of these tests came to, for docs/reliability.md: benchmarks/results/reliability.json, written where asked for."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

from mxd.sealed import write_json

ASKED = "MXD_RELIABILITY_FIGURES"
"""Environment variable with the path of the file; ``make torture`` sets it."""


def note(what: str, **figures: float) -> None:
    """Keep the figures of one test."""
    if not (target := os.environ.get(ASKED)):
        return
    path = Path(target)
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"tests": {}}
    found["tests"][what] = figures
    found["machine"] = {"processor": platform.machine(), "python": platform.python_version()}
    write_json(path, found)
