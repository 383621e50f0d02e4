"""What a page says of a unit's own weights, read from the run's files without PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from ..checkpoint import Run, StudentRecord
from ..errors import RunError
from ..sealed import MEND

TABLES: dict[str, str] = {
    "mxd": "C",
    "mxd-pk": "C",
    "additive": "C",
    "transcoder": "W_dec",
    "skip-transcoder": "W_dec",
    "topk-sae": "W_dec",
}
"""Kinds whose units write a row of a table, and the table's name in their file."""
GATES: dict[str, str] = {
    "mxd": "G",
    "additive": "G",
    "cp-mumoe": "G",
    "mov": "G",
    "transcoder": "encoder.weight",
    "skip-transcoder": "encoder.weight",
    "topk-sae": "encoder.weight",
}
"""Kinds whose units have a row of the gate each, and the gate's name in their file."""
_EXPERTS = ("mxd", "mxd-pk", "cp-mumoe", "mov", "additive")


def maps(kind: str) -> bool:
    """Whether the units of a kind are called experts."""
    return kind in _EXPERTS


def norm(run: Run, record: StudentRecord, unit: int) -> float | None:
    """Length of a unit's row of the table; None for kinds without one.

    Raises:
        RunError: the weights are missing or damaged.
    """
    if record.kind not in TABLES:
        return None
    row = _read(run, record, TABLES[record.kind], slice(unit, unit + 1))
    return float(np.linalg.norm(row)) if len(row) else None


def nearest(run: Run, record: StudentRecord, unit: int, among: NDArray[np.bool_]) -> tuple[int, float] | None:
    """The unit of `among` [n_units] whose row of the gate points most the same way, and the cosine; None where there is none.

    Raises:
        RunError: the weights are missing or damaged.
    """
    if record.kind not in GATES or not among.any():
        return None
    gate = _read(run, record, GATES[record.kind], slice(None))
    if not unit < len(gate) == len(among):
        return None
    cosines = gate @ gate[unit] / np.maximum(np.linalg.norm(gate, axis=1) * np.linalg.norm(gate[unit]), 1e-30)
    best = int(np.where(among & (np.arange(len(gate)) != unit), cosines, -np.inf).argmax())
    return best, float(cosines[best])


def _read(run: Run, record: StudentRecord, name: str, rows: slice) -> NDArray[np.float32]:
    """Rows of one of a student's tensors."""
    files = sorted(Path(run.path / record.folder).glob("*.safetensors"))
    if not files:
        raise RunError("a weight file is missing", expected=str(run.path / record.folder), next=MEND)
    try:
        with safe_open(files[0], framework="numpy") as file:
            found: Any = file.get_slice(name)[rows]
    except (SafetensorError, OSError) as error:
        raise RunError(f"{files[0]} cannot be read", expected=f"safetensors with {name}", got=str(error), next=MEND) from None
    return np.asarray(found, dtype=np.float32)
