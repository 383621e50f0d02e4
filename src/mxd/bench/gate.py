"""Cheaper gates against computing every score: the proved bfloat16 screen, and product keys.

The screen must find the very units of the full gate; product keys are another function (a kind of its own, ``mxd-pk``), checked
against all √N·√N sums written out. Both are timed forward, where their cost is; ``products_share`` is the share of a full gate's
multiplications that they do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from ..layers.product_key import largest_sums
from ..ops import gemm, topk_gate
from ..ops.settings import using
from .rows import Row, row
from .timing import in_turns, relative_error, verify

K = 32


def shapes(device: torch.device, quick: bool) -> list[dict[str, int]]:
    """From the paper's sizes to a million experts; on a CPU few tokens where every score of a million takes seconds."""
    if quick:
        return [{"d": 32, "n": 1024, "k": K, "tokens": 16}]
    gpu = device.type == "cuda"
    return [{"d": 768, "n": n, "k": K, "tokens": 4096 if gpu else min(1024, 2**26 // n)} for n in (2**14, 2**16, 2**18, 2**20)]


def rows(*, device: torch.device, threads: int, runs: int, quick: bool) -> Iterator[Row]:
    """Two rows a shape."""
    for shape in shapes(device, quick):
        said = {**shape, "threads": threads} if device.type == "cpu" else shape
        for case, check, share, calls in _cases(device, **shape):
            times = in_turns(calls, runs=runs, device=device)
            yield row(
                case,
                "all scores in float32",
                device=device.type,
                shape=said,
                dtype="float32",
                ours_ms=times["ours"],
                rival_ms=times["rival"],
                check=check,
                runs=runs,
                products_share=share,
            )


Calls = Mapping[str, Callable[[], object]]


def _cases(device: torch.device, *, d: int, n: int, k: int, tokens: int) -> Iterator[tuple[str, str, str, Calls]]:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(tokens, d, generator=generator, device=device)
    weight = torch.randn(n, d, generator=generator, device=device) / math.sqrt(d)
    bias = 0.1 * torch.randn(n, generator=generator, device=device)

    def full() -> Tensor:
        with torch.no_grad(), using(precision="fp32", gate="full"):
            return topk_gate(x, weight, bias, k)[0]

    def screened() -> Tensor:
        with torch.no_grad(), using(precision="fp32", gate="screened"):
            return topk_gate(x, weight, bias, k)[0]

    check = verify("the K largest scores", relative_error(_sorted(screened()), _sorted(full())), 1e-5)
    share = f"1 in bfloat16, {2 * k / n:.4f} in float32"
    yield "screened gate (the same units, proved)", check, share, {"ours": screened, "rival": full}

    keys = math.isqrt(n)
    sides = [(weight[:keys], bias[:keys]), (weight[keys : 2 * keys], bias[keys : 2 * keys])]

    def product_keys() -> Tensor:
        u, v = (gemm.linear(x, *side) for side in sides)
        return largest_sums(u, v, k)[0]

    u, v = (x @ side[0].T + side[1] for side in sides)
    part = slice(0, 8)  # all N sums of a few tokens
    sums = (u[part, :, None] + v[part, None, :]).flatten(1).topk(k, dim=1).values
    check = verify("the K largest sums", relative_error(_sorted(product_keys()[part]), _sorted(sums)), 1e-5)
    yield "product-key gate (another kind, mxd-pk)", check, f"{2 * keys / n:.4g}", {"ours": product_keys, "rival": full}


def _sorted(values: Tensor) -> Tensor:
    return values.sort(1).values
