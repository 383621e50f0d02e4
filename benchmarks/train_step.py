"""One MxD training step, ours against the dense reference maths, in one process with the two taken in turn.

    python benchmarks/train_step.py [--tokens 1024] [--n 10736] [--threads 2] [--runs 9]

The reference is plain PyTorch with autograd: dense scores, TopK scattered into a tokens x N matrix, full products, fused
Adam on both sides. Before anything is timed, both are checked to give the same loss and the same gradients. Writes
benchmarks/results/train_step-cpu.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import machine
from torch import Tensor

from mxd.layers import MxD, MxDConfig
from mxd.objectives import norm_weighted
from mxd.ops import gemm


def reference(layer: MxD, x: Tensor) -> Tensor:
    """The same function by full products."""
    z = torch.nn.functional.gelu(x @ layer.encoder.E + layer.encoder.b_E)
    scores = torch.relu(x @ layer.G.T + layer.b_G)
    top = scores.topk(layer.k, dim=1)
    a = torch.zeros_like(scores).scatter(1, top.indices, top.values)
    return (a @ layer.C) * (z @ layer.D) + layer.b


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d", type=int, default=768)
    parser.add_argument("--h", type=int, default=3072)
    parser.add_argument("--n", type=int, default=10_736)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "train_step-cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    ours, theirs = (_layer(args) for _ in range(2))
    torch.manual_seed(1)
    batches = [(torch.randn(args.tokens, args.d), torch.randn(args.tokens, args.d)) for _ in range(4)]
    error = _largest_gradient_error(ours, theirs, *batches[0])
    if not error < 1e-5:
        raise SystemExit(f"the two do not agree (relative gradient error {error:.2e}): nothing is timed")

    steps = {"ours": _step(ours, lambda x: ours(x).y), "reference": _step(theirs, lambda x: reference(theirs, x))}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for run in range(args.runs + 2):
        for name, step in steps.items():
            began = time.perf_counter()
            step(*batches[run % len(batches)])
            if run >= 2:  # the first two warm up
                times[name].append(1e3 * (time.perf_counter() - began))
    ours_ms, rival_ms = (statistics.median(times[name]) for name in ("ours", "reference"))
    row = {
        "case": "MxD train step: forward, backward, fused Adam",
        "rival": "dense reference maths in PyTorch",
        "device": "cpu",
        "shape": {"d": args.d, "h": args.h, "n": args.n, "k": args.k, "tokens": args.tokens, "threads": args.threads},
        "dtype": "float32",
        "ours_ms": round(ours_ms, 1),
        "rival_ms": round(rival_ms, 1),
        "time_ratio": round(ours_ms / rival_ms, 3),
        "gemm": "onednn" if gemm.uses_onednn() else "mkl",
        "verified": f"gradients agree to {error:.1e}",
        "runs": args.runs,
    }
    print(json.dumps(row, indent=1))
    known = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    rows = [r for r in known if (r["shape"], r["gemm"]) != (row["shape"], row["gemm"])] + [row]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


def _layer(args: argparse.Namespace) -> MxD:
    generator = torch.Generator().manual_seed(0)
    layer = MxD(MxDConfig(args.d, args.d, args.n, args.k, args.h), generator=generator)
    with torch.no_grad():
        layer.D.uniform_(-0.02, 0.02, generator=generator)  # at D = 0 most gradients vanish and nothing would be checked
    return layer


def _largest_gradient_error(ours: MxD, theirs: MxD, x: Tensor, y: Tensor) -> float:
    norm_weighted(ours(x).y, y).backward()
    norm_weighted(reference(theirs, x), y).backward()
    worst = 0.0
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert mine.grad is not None and other.grad is not None
        worst = max(worst, float((mine.grad - other.grad).norm() / other.grad.norm()))
        mine.grad = other.grad = None
    return worst


def _step(layer: MxD, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], None]:
    optimiser = torch.optim.Adam(layer.parameters(), lr=1e-4, fused=True)

    def step(x: Tensor, y: Tensor) -> None:
        optimiser.zero_grad(set_to_none=True)
        norm_weighted(forward(x), y).backward()
        optimiser.step()

    return step


if __name__ == "__main__":
    main()
