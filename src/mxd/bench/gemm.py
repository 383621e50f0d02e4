"""Float32 products on this CPU: MKL (PyTorch's default on x86) against oneDNN (what mxd takes on AMD processors)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .rows import Row, row
from .timing import in_turns, relative_error, verify

SHAPES = ((1024, 576, 1536), (2048, 576, 6911), (2048, 1536, 576), (1024, 768, 10_736))
"""Tokens, width read, width written: the built-in host's MLP, the demo's gate and decoder, the benchmark's gate."""


def rows(*, device: torch.device, threads: int, runs: int, quick: bool) -> Iterator[Row]:
    """One row per shape; none where PyTorch was built without oneDNN or the device is not a CPU."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return
    for tokens, d_in, d_out in ((64, 32, 48),) if quick else SHAPES:
        generator = torch.Generator().manual_seed(0)
        x, weight = torch.randn(tokens, d_in, generator=generator), torch.randn(d_out, d_in, generator=generator)
        products = {
            "onednn": lambda x=x, w=weight: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], ""),
            "mkl": lambda x=x, w=weight: torch.nn.functional.linear(x, w),
        }
        exact = x.double() @ weight.double().T
        check = verify("both products and float64", max(relative_error(product(), exact) for product in products.values()), 1e-6)
        times = in_turns(products, runs=4 * runs, device=device, warm_up=4)
        work = 2e-6 * tokens * d_in * d_out
        yield row(
            "x @ weight.T",
            "MKL",
            device="cpu",
            shape={"tokens": tokens, "d_in": d_in, "d_out": d_out, "threads": threads},
            dtype="float32",
            ours_ms=times["onednn"],
            rival_ms=times["mkl"],
            check=check,
            runs=4 * runs,
            setting="oneDNN",
            ours_gflops=round(work / times["onednn"], 1),
            rival_gflops=round(work / times["mkl"], 1),
        )
