"""The host's pass over the held-out text: what fires where, how much of the output it is, and, on the first tokens, what it is worth."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..devices import layer_device
from ..host import Host
from ..layers import SparseLayer
from ..written import Chunk, Written
from . import gradients
from .codes import CodesWriter

SEQUENCES_AT_ONCE = 8
COMMIT_SEQUENCES = 64
"""After so many sequences what was read is made safe."""

Say = Callable[[int], None]


class Student:
    """A student while the host reads: its layer, and where its codes go."""

    def __init__(self, hookpoint: str, layer: SparseLayer, writer: CodesWriter) -> None:
        self.hookpoint, self.layer, self.writer = hookpoint, layer, writer
        self.written: Written | None = None


def scale_width(layer: SparseLayer) -> int:
    """Numbers a token of what multiplies the units' rows; 0 for kinds whose units write a fixed direction."""
    return layer.d_out if hasattr(layer, "expert") else 0


def read(
    host: Host, ids: NDArray[np.int64], students: Mapping[str, Student], *, with_gradient: int, losses: Path, say: Say | None = None
) -> dict[str, float]:
    """Read every sequence that some student lacks, and append its codes.

    Args:
        ids: token ids [sequence, position].
        students: by name.
        with_gradient: on this many sequences, the first ones, losses and their gradients are taken as well.
        losses: raw float32 file [with_gradient, position] that the host's losses are written into.
        say: called with the number of sequences done.

    Returns:
        Seconds that the host took, with gradients and without, and the students.
    """
    seconds = {"host": 0.0, "host with gradient": 0.0, "students": 0.0}
    begin = min(student.writer.sequences for student in students.values())
    for start in range(begin - begin % SEQUENCES_AT_ONCE, len(ids), SEQUENCES_AT_ONCE):
        block = torch.from_numpy(ids[start : start + SEQUENCES_AT_ONCE])
        lacking = [student for student in students.values() if student.writer.sequences <= start]
        if lacking:
            begun = time.monotonic()
            seen = _seen(host, block, sorted({s.hookpoint for s in lacking}), start, with_gradient, losses)
            read = time.monotonic()
            for student in lacking:
                _add(student, *seen[student.hookpoint])
            seconds["host with gradient" if start < with_gradient else "host"] += read - begun
            seconds["students"] += time.monotonic() - read
        done = start + len(block)
        if done % COMMIT_SEQUENCES == 0 or done == len(ids):
            for student in lacking:
                student.writer.commit()
        if say:
            say(done)
    return seconds


def _seen(
    host: Host, block: Tensor, hookpoints: Sequence[str], start: int, with_gradient: int, losses: Path
) -> dict[str, tuple[Tensor, Tensor, Tensor | None]]:
    """Inputs, outputs and gradients [sequence, position, d] by hookpoint; gradients of the sequences that have one."""
    if start >= with_gradient:
        return {hookpoint: (a.x, a.y, None) for hookpoint, a in host.read(block, hookpoints).items()}
    loss, found = gradients.read(host, block, hookpoints)
    with losses.open("r+b") as file:
        file.seek(4 * start * block.shape[1])
        file.write(loss[: with_gradient - start].cpu().numpy().astype("<f4").tobytes())
    parts: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {}
    for hookpoint, seen in found.items():
        gradient = seen.gradient.clone()
        gradient[max(0, with_gradient - start) :] = float("nan")
        parts[hookpoint] = (seen.x, seen.y, gradient)
    return parts


@torch.no_grad()
def _add(student: Student, x: Tensor, y: Tensor, gradient: Tensor | None) -> None:
    """Append the codes of a block of sequences."""
    sequences, length = x.shape[:2]
    first = torch.zeros(sequences, length, dtype=torch.bool)
    first[:, 0] = True
    x, y = x.flatten(0, 1), y.flatten(0, 1)
    if student.written is None:
        student.written = Written(student.layer, y if student.layer.reads == "output" else x)
    parts: list[dict[str, NDArray[Any]]] = []
    device = layer_device(student.layer)
    slopes = None if gradient is None else gradient.flatten(0, 1).to(device)
    for chunk in student.written.chunks(x, y):
        rows = chunk.rows
        parts.append(_firings(student, chunk, first.flatten()[rows].to(device), None if slopes is None else slopes[rows]))
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    student.writer.add(sequences, **joined)


def _firings(student: Student, chunk: Chunk, first: Tensor, slopes: Tensor | None) -> dict[str, NDArray[Any]]:
    """What the files of `codes` hold of a few tokens. The first token of a sequence has no firings."""
    assert student.written is not None
    values, indices = chunk.code.values, chunk.code.indices
    active = (values > 0) & ~first[:, None]
    added = student.written.units(chunk)
    whole = (chunk.rest + added.sum(1)).norm(dim=1).clamp(min=1e-30)
    shares = added.norm(dim=2) / whole[:, None]
    # Without a unit y lacks what it adds, which changes the loss by − ⟨added, gradient⟩ to first order.
    effects = torch.full_like(values, float("nan")) if slopes is None else -torch.einsum("tko,to->tk", added, slopes)
    found: dict[str, Tensor] = {
        "counts": active.sum(1),
        "units": indices[active],
        "values": values[active],
        "shares": shares[active],
        "effects": effects[active],
    }
    if student.writer.wants_scales:
        scale = student.layer.unit_scale(chunk.code, chunk.x)
        found["scales"] = torch.full_like(chunk.rest, float("nan")) if scale is None else scale
    return {name: tensor.cpu().numpy() for name, tensor in found.items()}
