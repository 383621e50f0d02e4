"""What is counted and written down while students train: firing counts and the metrics file."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .layers import Code


class FiringCounts:
    """How often each unit of one layer fired (a > 0), since the start and as a running average per token."""

    def __init__(self, n_units: int, device: torch.device, decay: float = 0.9) -> None:
        self.total = torch.zeros(n_units, dtype=torch.int64, device=device)
        self.recent = torch.zeros(n_units, device=device)
        self.silent = torch.zeros(n_units, dtype=torch.int64, device=device)
        """Tokens since each unit last fired."""
        self.tokens = 0
        self._decay = decay
        self._weight = 0.0

    def add(self, code: Code) -> None:
        """Count one batch of codes."""
        n_units = self.total.shape[0]
        if n_units == 0:
            return
        # Adding up, not bincount of a filtered index: a length that depends on the data would make a GPU wait for the CPU.
        fired = torch.zeros_like(self.total).index_add_(0, code.indices.flatten(), (code.values > 0).flatten().long())
        tokens = code.values[..., 0].numel()
        self.total += fired
        self.silent.add_(tokens).masked_fill_(fired > 0, 0)
        self.tokens += tokens
        self.recent.mul_(self._decay).add_(fired / tokens, alpha=1 - self._decay)
        self._weight = self._decay * self._weight + (1 - self._decay)

    def state(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """All that is counted, as tensors and numbers."""
        return {name: getattr(self, name) for name in ("total", "recent", "silent")}, {"tokens": self.tokens, "weight": self._weight}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, float]) -> None:
        """Go on from what `state` gave."""
        for name in ("total", "recent", "silent"):
            getattr(self, name).copy_(tensors[name])
        self.tokens, self._weight = int(numbers["tokens"]), numbers["weight"]

    @property
    def frequency(self) -> Tensor:
        """Recent share of tokens on which each unit fires, float32 [n_units]; bias of the running average corrected."""
        return self.recent / max(self._weight, 1e-12)

    def dead(self, after_tokens: int) -> Tensor:
        """Numbers of the units that have not fired for at least so many tokens, int64."""
        return (self.silent >= after_tokens).nonzero().flatten()

    def summary(self) -> dict[str, float]:
        """Share of units that have not fired yet, and the highest recent firing frequency."""
        if self.total.shape[0] == 0 or self.tokens == 0:
            return {}
        return {
            "not_fired_yet": float((self.total == 0).float().mean()),
            "max_firing_frequency": float(self.frequency.max()),
        }


class Metrics:
    """The run's metrics.jsonl: one JSON object a line, flushed as written; numbers that are not finite become null.

    Args:
        path: the file.
        keep: which rows of a file that is there stay; default: none. Lines that a crash cut short do not.
    """

    def __init__(self, path: Path, keep: Callable[[dict[str, Any]], bool] | None = None) -> None:
        kept = [row for row in _rows(path) if keep(row)] if keep else []
        self._file = path.open("w", encoding="utf-8")
        for row in kept:
            self.write(row)

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(_finite(row), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _rows(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
