"""The unit that an edit is compared with: of the same student, about as frequent, and with a row of about the same length."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..checkpoint import StudentRecord
from ..errors import MxdError
from ..layers import SparseLayer
from ..written import table_of
from .model import Model


def control_units(model: Model, record: StudentRecord, layer: SparseLayer, units: Sequence[int]) -> dict[int, int]:
    """Another unit for each of `units`, all different: the nearest in log firing frequency and in log norm of its row of the table.

    Only units that fire are taken; where nothing was collected, any. Of kinds without a table the frequency decides alone.
    """
    distance = torch.zeros(len(units), layer.n_units)
    allowed = torch.ones(layer.n_units, dtype=torch.bool)
    try:
        fires = torch.from_numpy(model.shelf.units(record.name).firing["fires"].copy())
    except MxdError:
        fires = None
    if fires is not None and len(fires) == layer.n_units:
        logs = fires.clamp(min=0.5).log()
        distance += (logs[None] - logs[list(units), None]).abs()
        allowed &= fires > 0
    table = table_of(layer)
    if table is not None:
        logs = table.detach().norm(dim=1).clamp(min=1e-12).log().cpu()
        distance += (logs[None] - logs[list(units), None]).abs()
    allowed[list(units)] = False
    found: dict[int, int] = {}
    for row, unit in enumerate(units):
        if not allowed.any():
            break
        found[unit] = int(distance[row].masked_fill(~allowed, torch.inf).argmin())
        allowed[found[unit]] = False
    return found
