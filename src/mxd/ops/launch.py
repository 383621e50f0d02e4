"""Starting a Triton kernel: on the device of its tensors, and not at all where there is nothing to do."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor


def launch(kernel: Any, grid: tuple[int, ...], *args: Tensor | int, num_warps: int, **constants: Any) -> None:
    """Run `kernel` over `grid`. The first argument is a tensor; its device is made the current one, since Triton launches there.

    `constants` are the compile-time values: a set of them is compiled once, so nothing that changes from batch to batch may be among them.
    """
    if 0 in grid:
        return
    first = args[0]
    assert isinstance(first, Tensor)
    with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
        # A product and its sum in one rounding: said, since Triton's default is about to change (and 3.9 warns where it is not said).
        kernel[grid](*args, num_warps=num_warps, enable_fp_fusion=True, **constants)


def power_of_two(count: int) -> int:
    """The smallest power of two that is not below `count`: block sizes in Triton are powers of two."""
    return 1 << max(count - 1, 0).bit_length()
