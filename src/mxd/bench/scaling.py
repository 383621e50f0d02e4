"""What a training step of ours costs as one thing grows: experts, K, students on the same batch, tokens.

Each curve comes with an exponent: the slope of the least-squares line through log cost over log size (1: proportional).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from ..layers import MxD
from . import dense
from .rows import Row, row
from .timing import in_turns, timed, verify

CHECK_TOKENS = 64
"""Tokens on which each point is verified against the dense reference, whose matrices of tokens x N would not fit at the largest N."""
BASE = {"d": 768, "h": 3072, "n": 16_384, "k": 32, "tokens": 1024, "students": 1}
SWEEPS: dict[str, tuple[int, ...]] = {
    "n": (4096, 8192, 16_384, 32_768, 65_536, 131_072, 262_144),
    "k": (8, 16, 32, 64, 128, 256),
    "students": (1, 2, 4, 8, 16),
    "tokens": (256, 512, 1024, 2048, 4096, 8192),
}
QUICK_BASE = {"d": 16, "h": 24, "n": 64, "k": 4, "tokens": 32, "students": 1}
QUICK: dict[str, tuple[int, ...]] = {"n": (32, 64), "k": (2, 4), "students": (1, 2), "tokens": (16, 32)}
SECONDS = 30.0
"""A sweep ends before the point whose one step would take longer, going by the point before."""


def case(what: str) -> str:
    """The case that the points of a sweep come under."""
    return f"MxD step against {what.upper() if what in 'nk' else what}"


def rows(*, device: torch.device, threads: int, runs: int, quick: bool) -> Iterator[Row]:
    """One row per point; the rival is the point before it in nothing but size, so there is none."""
    base, sweeps = (QUICK_BASE, QUICK) if quick else (BASE, SWEEPS)
    for what, sizes in sweeps.items():
        last: float | None = None
        for size in sizes:
            grown = size / sizes[max(0, sizes.index(size) - 1)]
            if last is not None and last * grown > 1e3 * SECONDS:
                break
            point = {**base, what: size}
            last, check, done = _measure(device, point, runs)
            yield row(
                case(what),
                None,
                device=device.type,
                shape={**point, "threads": threads} if device.type == "cpu" else point,
                dtype="float32" if device.type == "cpu" else "float32, products in the default precision",
                ours_ms=last,
                rival_ms=None,
                check=check,
                runs=done,
                sweep=what,
            )


def _measure(device: torch.device, point: Mapping[str, int], runs: int) -> tuple[float, str, int]:
    """Median milliseconds of a step of all students, what was verified, and how many runs there were."""
    widths = {name: point[name] for name in ("d", "h", "n", "k")}
    layers = [dense.make(device, **widths) for _ in range(point["students"])]
    check = _check(layers[0], device, point)
    x, y = dense.batch(device, d=point["d"], tokens=point["tokens"])
    steps = [dense.step(layer, lambda x, layer=layer: layer(x).y, x, y, ours=True) for layer in layers]

    def every() -> None:
        for step in steps:
            step()

    timed(every, device)  # the first step makes Adam's moments
    return in_turns({"ours": every}, runs=runs, device=device, warm_up=0)["ours"], check, runs


def _check(layer: MxD, device: torch.device, point: Mapping[str, int]) -> str:
    x, y = dense.batch(device, d=point["d"], tokens=min(CHECK_TOKENS, point["tokens"]))
    error = dense.worst_gradient(lambda x: layer(x).y, lambda x: dense.mxd(layer, x), layer, x, y, precision="fp32")
    return verify(f"gradients in float32 ({len(x)} tokens)", error, 1e-5)
