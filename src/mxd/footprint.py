"""How much memory a training run will take, by its plan: said before the start, and refused where it cannot fit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from .config import TrainConfig
from .errors import ConfigError
from .layers.sizing import candidate
from .ops.settings import Settings
from .sites import MLPSite
from .train import SAMPLE_TOKENS, StudentSpec

CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")
FLOAT = 4
"""Bytes of a float32."""


class Footprint(NamedTuple):
    """Bytes, by what they are for. The host is not in it: it is in memory already when the plan is made."""

    students: int
    """Weights of all students, and both averages of their Adam."""
    activations: int
    """The shuffle buffer, the reads made ahead of it and the sample that students start on."""
    step: int
    """What one step of the largest student holds at once: scores, hidden vectors, gradient. An estimate."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)

    def line(self) -> str:
        """In words."""
        parts = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in self._asdict().items())
        return f"about {self.total / 2**30:.1f} GiB of memory beside the host ({parts})"


def footprint(config: TrainConfig, specs: Sequence[StudentSpec], sites: Sequence[MLPSite], device: torch.device) -> Footprint:
    """What training these students will take.

    Args:
        config: of the run.
        specs: its students.
        sites: the MLPs that they replace.
        device: where they are trained.
    """
    row = FLOAT * sum(site.d_in + site.d_out for site in sites)
    ahead = config.buffer_tokens // 2 if config.activations is not None or device.type == "cuda" else 0
    held = config.buffer_tokens + ahead + 2 * min(SAMPLE_TOKENS, config.buffer_tokens, config.tokens)
    return Footprint(
        students=sum(3 * FLOAT * candidate(spec.kind, spec.sizes).budget() for spec in specs),
        activations=row * held,
        step=max((_step(config, spec, device) for spec in specs), default=0),
    )


def _step(config: TrainConfig, spec: StudentSpec, device: torch.device) -> int:
    """A block of scores and its gradient, the vectors of every token (hidden ones three times where gated), the gradients held at once."""
    sizes, tokens = spec.sizes, config.tokens_per_step
    at_once = Settings(scores_mib=config.scores_mib).tokens_at_once(sizes.n_units, device)
    scores = 2 * FLOAT * min(at_once, tokens) * sizes.n_units
    hidden = 0 if config.recompute else tokens * sizes.d_hidden * (6 if sizes.glu else 3)
    vectors = tokens * (4 * (sizes.d_in + sizes.d_out) + 6 * min(sizes.k, sizes.n_units))
    weights = candidate(spec.kind, spec.sizes).budget()
    # On a GPU, first steps hold all gradients at once (see `Student.careful`).
    gradients = weights // 2 if device.type == "cpu" else weights
    return scores + FLOAT * (hidden + vectors + gradients)


def check_memory(needed: Footprint, device: torch.device) -> None:
    """Raise `ConfigError` where the students and the buffer alone, which are counted and not estimated, exceed what is free."""
    free = available(device)
    counted = needed.students + needed.activations
    if free is not None and counted > free:
        raise ConfigError(
            "this run will not fit into memory",
            expected=f"{counted / 2**30:.1f} GiB free on {device} for students and shuffle buffer",
            got=f"{free / 2**30:.1f} GiB",
            next="fewer students at once (--kinds, --k, --layers), or a smaller --budget or --buffer-tokens",
        )


def available(device: torch.device) -> int | None:
    """Bytes that can still be taken on a device: of the machine or, if less, of this process's control group. None if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = [size for size in (_of_machine(), _of_group()) if size is not None]
    return min(found) if device.type == "cpu" and found else None


def _of_machine() -> int | None:
    try:
        lines = MEMINFO.read_text(encoding="ascii").splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
        return sizes["MemAvailable"] + sizes.get("SwapFree", 0)
    except (OSError, ValueError, KeyError):
        return None


def _of_group() -> int | None:
    try:
        limit = (CGROUP / "memory.max").read_text(encoding="ascii").strip()
        return None if limit == "max" else int(limit) - int((CGROUP / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
