"""Compiles every kernel for an NVIDIA GPU without one: run as a program, since Triton's interpreter must not be on.

Prints one line per compiled variant.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mxd.ops.largest import triton as largest
from mxd.ops.rows import triton as rows
from mxd.ops.transpose import by_unit

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float64: "*fp64", torch.int64: "*i64", torch.int32: "*i32"}
compiled: set[str] = set()


def compile_only(kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, **constants: Any) -> None:
    """Stands in for `launch`: what Triton would compile for these arguments on a Hopper GPU, with its special cases."""
    names = kernel.arg_names
    given = dict(zip(names, args, strict=False))
    signature = {n: TYPES[a.dtype] if isinstance(a, torch.Tensor) else "constexpr" if a == 1 else "i32" for n, a in given.items()}
    signature |= dict.fromkeys(constants, "constexpr")
    fixed = {(names.index(n),): v for n, v in {**given, **constants}.items() if signature[n] == "constexpr"}
    even = [j for j, a in enumerate(args) if isinstance(a, torch.Tensor) or (a != 1 and a % 16 == 0)]
    name = f"{kernel.__name__} {signature} {fixed} {even}"
    if name in compiled:
        return
    compiled.add(name)
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs={(j,): [["tt.divisibility", 16]] for j in even})
    options = {"num_warps": num_warps, "enable_fp_fusion": True}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert made.asm["cubin"] and made.metadata.shared <= 227 * 1024
    print(kernel.__name__, "compiled")


def main() -> None:
    largest.launch = rows.launch = compile_only
    # The paper's size and the largest that one program ranks; one unit, one active.
    for n, k in ((21_490, 32), (1_000_000, 512), (1, 1)):
        largest.top(torch.zeros(2, n), k, torch.zeros(n))
    for tokens, k, d, dtype in ((9, 32, 768, torch.float32), (9, 32, 768, torch.bfloat16), (1, 1, 1, torch.float32)):
        indices, weights = torch.zeros(tokens, k, dtype=torch.int64), torch.zeros(tokens, k, dtype=dtype)
        table, x, plan = torch.zeros(50, d, dtype=dtype), torch.zeros(tokens, d, dtype=dtype), by_unit(indices, 50)
        rows.gather_sum(weights, indices, table, dtype)
        rows.dots(x, indices, table, dtype)
        for deterministic in (True, False):
            rows.sum_by_unit(x, weights, plan, dtype, deterministic)
        rows.scalars_by_unit(weights, plan, dtype)


if __name__ == "__main__":
    main()
