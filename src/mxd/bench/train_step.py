"""One MxD training step, ours against the dense reference maths: forward, loss, backward and fused Adam on both sides."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layers import MxD
from ..objectives import norm_weighted
from ..ops import gemm
from ..ops.settings import using
from . import dense
from .memory import Job, peak
from .rows import Row, ratio, row
from .timing import in_turns, verify

CASE = "MxD step: forward, backward, fused Adam"


class Way(NamedTuple):
    """One way to make the step."""

    rival: str
    """``ours`` or ``dense``."""
    setting: str
    """What is said about it: the setting of ours, the number format of the reference."""
    settings: Mapping[str, Any] = MappingProxyType({})
    """Changes of `mxd.ops.settings`."""
    autocast: bool = False
    """bfloat16 autocast of the forward pass."""
    product: str = "auto"
    """``MXD_GEMM`` while it runs."""


OURS = (
    Way("ours", ""),
    Way("ours", "hidden vectors made again", {"recompute": True}),
    Way("ours", "gate screened", {"gate": "screened"}),
)
CPU = (*OURS, Way("ours", "PyTorch's own float32 product", product="mkl"), Way("dense", "float32"))
CUDA = (*OURS, Way("dense", "float32"), Way("dense", "bfloat16 autocast", autocast=True))


def shapes(device: torch.device, quick: bool) -> list[dict[str, int]]:
    """The shapes of the issue's table; GPT-2's alone on a GPU."""
    if quick:
        return [{"d": 16, "h": 24, "n": 96, "k": 4, "tokens": 32}]
    gpt2 = {"d": 768, "h": 3072, "n": 21_490, "k": 32, "tokens": 4096}
    return [gpt2] if device.type == "cuda" else [{**gpt2, "n": 10_736, "tokens": 1024}, gpt2]


def rows(*, device: torch.device, threads: int, runs: int, quick: bool) -> Iterator[Row]:
    """Per shape one row for each setting of ours against each number format of the reference, all of them timed in turn."""
    ways = CUDA if device.type == "cuda" else CPU
    for shape in shapes(device, quick):
        yield from _at(shape, ways, device, threads, runs, quick)


def _at(shape: dict[str, int], ways: tuple[Way, ...], device: torch.device, threads: int, runs: int, quick: bool) -> Iterator[Row]:
    x, y = dense.batch(device, d=shape["d"], tokens=shape["tokens"])
    widths = {name: size for name, size in shape.items() if name != "tokens"}
    checks = {name: _check(way, dense.make(device, **widths), x, y) for name, way in _named(ways).items() if way.rival == "ours"}
    layers = [dense.make(device, **widths) for _ in ways]
    steps = {name: _step(way, layer, x, y) for (name, way), layer in zip(_named(ways).items(), layers, strict=True)}
    times = in_turns(steps, runs=runs, device=device)
    kept = 16 * layers[0].budget()  # bytes of parameters, gradients and two moments, needed on both sides
    # Memory is measured in other processes: this one's own layers are not needed by then.
    del layers, steps
    peaks = {
        name: peak(Job(**shape, threads=threads, device=str(device), rival=way.rival, autocast=way.autocast, settings=dict(way.settings)))
        for name, way in _named(ways).items()
        if way.product == "auto" and not (quick and way.settings)  # a process each: a quick run takes the two it must
    }
    for name, way in _named(ways).items():
        for other, rival in _named(ways).items():
            if way.rival != "ours" or rival.rival != "dense":
                continue
            yield row(
                CASE,
                f"dense reference maths in PyTorch, {rival.setting}",
                device=device.type,
                shape={**shape, "threads": threads} if device.type == "cpu" else shape,
                dtype="float32" if device.type == "cpu" else "float32, products in the default precision",
                ours_ms=times[name],
                rival_ms=times[other],
                check=checks[name],
                runs=runs,
                setting=way.setting,
                memory_ratio=ratio(peaks.get(name), peaks.get(other)),
                ours_mib=_mib(peaks.get(name)),
                rival_mib=_mib(peaks.get(other)),
                kept_mib=_mib(kept),
            )


def _named(ways: tuple[Way, ...]) -> dict[str, Way]:
    return {f"{way.rival} {way.setting}": way for way in ways}


def _mib(size: int | None) -> float | None:
    return None if size is None else round(size / 2**20, 1)


def _check(way: Way, layer: MxD, x: Tensor, y: Tensor) -> str:
    """Gradients against the reference in float32; on CUDA, where the default is lower, the loss in that precision as well."""
    with product(way.product):
        error = dense.worst_gradient(
            lambda x: layer(x).y, lambda x: dense.mxd(layer, x), layer, x, y, **{"precision": "fp32", **way.settings}
        )
        said = verify("gradients in float32", error, 1e-5)
        if x.device.type != "cuda":
            return said
        with torch.no_grad(), using(**way.settings):
            ours, theirs = norm_weighted(layer(x).y, y), norm_weighted(dense.mxd(layer, x), y)
    # The units picked by rounded scores differ at the edge of the K largest: outputs of single tokens move, their mean loss must not.
    return f"{said}; {verify('losses in the default precision', float(abs(ours - theirs) / theirs), 1e-2)}"


def _step(way: Way, layer: MxD, x: Tensor, y: Tensor) -> Any:
    forward = (lambda x: layer(x).y) if way.rival == "ours" else (lambda x: dense.mxd(layer, x))
    step = dense.step(layer, forward, x, y, ours=way.rival == "ours", autocast=way.autocast, **way.settings)

    def call() -> None:
        with product(way.product):
            step()

    return call


@contextmanager
def product(name: str) -> Iterator[None]:
    """Float32 products on a CPU by ``mkl`` or ``onednn`` for as long as the context lasts; ``auto`` changes nothing."""
    if name == "auto":
        yield
        return
    before = os.environ.get("MXD_GEMM")
    os.environ["MXD_GEMM"] = name
    gemm.uses_onednn.cache_clear()
    try:
        yield
    finally:
        del os.environ["MXD_GEMM"]
        if before is not None:
            os.environ["MXD_GEMM"] = before
        gemm.uses_onednn.cache_clear()
