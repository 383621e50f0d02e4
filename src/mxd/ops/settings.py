"""How the sparse operations run: which implementation, in which precision, in how much memory, repeatably or not.

One value for the process, changed for as long as a context lasts: ``with ops.using(precision="bf16"): ...``. A backward pass keeps
to what held in its forward pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ConfigError, nearest

BACKENDS = ("auto", "eager", "triton")
PRECISIONS = ("auto", "fp32", "tf32", "bf16")
GATES = ("full", "screened")


@dataclass(frozen=True)
class Settings:
    """What `using` can change."""

    backend: str = "auto"
    """eager (PyTorch), triton, or auto: triton on CUDA devices where it is installed."""
    precision: str = "fp32"
    """Of the dense products: fp32; tf32; bf16 (operands rounded to bfloat16, sums and results float32, parameters stay float32);
    auto: bf16 on CUDA devices that have it, fp32 elsewhere."""
    gate: str = "full"
    """full: every score in `precision`; screened: bfloat16 bounds pick candidates and float32 products decide: the K units of
    float32 scores, proved for each token (see `mxd.ops.topk_gate.screen`), whatever `precision` says of the other products."""
    scores_mib: float | None = None
    """Largest block of scores (tokens x units) held at once, in MiB; fewer tokens at a time where it would be larger. None: 32 on a
    CPU, whose cache then holds it, 512 elsewhere."""
    recompute: bool = False
    """Hold no dense hidden vectors (z) between a forward and a backward pass; make them again, a piece at a time."""
    deterministic: bool = False
    """On CUDA: no atomic additions, so that the same seed gives the same bits. The CPU is always deterministic."""

    def __post_init__(self) -> None:
        for name, known in (("backend", BACKENDS), ("precision", PRECISIONS), ("gate", GATES)):
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(f"unknown {name}", expected=nearest(value, known), got=value)
        if self.scores_mib is not None and not self.scores_mib > 0:
            raise ConfigError("scores_mib must be positive", expected="a number of MiB", got=f"{self.scores_mib:g}")

    def product(self, device: torch.device) -> str:
        """The precision of products on `device`: fp32, tf32 or bf16."""
        if self.precision != "auto":
            return self.precision
        return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"

    def tokens_at_once(self, n_units: int, device: torch.device) -> int:
        """Tokens whose scores fit `scores_mib`, at least 1."""
        mib = self.scores_mib or (32 if device.type == "cpu" else 512)
        return max(1, int(mib * 2**20) // (4 * max(n_units, 1)))


_current = Settings()


def current() -> Settings:
    """The settings that hold now."""
    return _current


@contextmanager
def using(**changes: Any) -> Iterator[Settings]:
    """Hold other settings for as long as the context lasts.

    Raises:
        ConfigError: an unknown value.
    """
    global _current
    before = _current
    _current = dataclasses.replace(before, **changes)
    try:
        yield _current
    finally:
        _current = before
