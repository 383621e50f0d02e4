"""How far a top-K can go below N·d products per token, on a trained gate and the activations it sees.

    python tools/gate_study.py --run runs/demo --student mxd-k32 --activations runs/cache [--tokens 2048]

Exact methods must settle every token: what counts is the share of the full gate's products left. They are given the best case,
the true K-th score as their threshold. Approximate methods are counted by recall: the share of the true K units (those with a
positive score) that they find. Prints a table and writes benchmarks/results/gate_study-cpu.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mxd.bench.machine import machine, versions
from mxd.cache import Cache
from mxd.checkpoint import Run
from mxd.ops.topk_gate import screen

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--student", default="mxd-k32")
    parser.add_argument("--activations", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gate_study-cpu.json"))
    args = parser.parse_args()
    run = Run.open(args.run)
    record = run.student(args.student)
    layer = run.load(args.student)
    units = layer.units()
    validation = Cache.open(args.activations).validation([record.hookpoint])
    if units is None or validation is None:
        raise SystemExit("the student needs a gate with one row a unit, and the cache validation text")
    batch = validation[record.hookpoint]
    x = layer.gate_input(batch.x[~batch.first][: args.tokens])
    rows = list(study(x, units.weight, units.bias, layer.k))
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    about = {"student": args.student, "n": layer.n_units, "d": layer.d_in, "k": layer.k, "tokens": len(x)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    made = {"machine": machine(torch.device("cpu")), "versions": versions(), "about": about, "rows": rows}
    args.out.write_text(json.dumps(made, indent=1) + "\n")


def study(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> Iterator[Row]:
    """One row per method and setting; ``products_share`` 1 is the full gate."""
    scores = x @ weight.t() + bias
    top = scores.topk(k, dim=1)
    wanted = torch.zeros_like(scores, dtype=torch.bool).scatter(1, top.indices, top.values > 0)
    threshold = top.values.amin(1, keepdim=True)
    yield from low_precision(x, weight, bias, top.values, k)
    yield from leading_directions(x, weight, bias, threshold, wanted, k)
    yield from clusters(x, weight, bias, threshold, wanted)


def low_precision(x: Tensor, weight: Tensor, bias: Tensor, top: Tensor, k: int) -> Iterator[Row]:
    """Upper bounds from rounded operands: the share of tokens they settle with `candidates` scored again."""
    n = len(weight)
    full = screen._bounding_weights(weight, bias)  # pyright: ignore[reportPrivateUsage]
    bf16 = (screen._bounding_inputs(x, full.shape[1]) @ full.t()).float()  # pyright: ignore[reportPrivateUsage]
    (x8, x_error), (w8, w_error) = _int8(x), _int8(weight)
    size = weight.norm(dim=1)
    int8 = x8 @ w8.t() + bias + x_error[:, None] * size + x8.norm(dim=1)[:, None] * w_error
    for name, bounds in (("bfloat16 bound", bf16 + 2 * screen.UNIT * bf16.abs()), ("int8 bound, a scale a row", int8)):
        for candidates in (2 * k, 4 * k, 16 * k):
            settled = bounds.topk(candidates, dim=1).values.amin(1) <= top.amin(1)
            share = f"1 in {name.split()[0]}, {candidates / n + float((~settled).float().mean()):.3f} in float32"
            yield {"method": name, "candidates": candidates, "settled": round(float(settled.float().mean()), 4), "products_share": share}


def _int8(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Rows rounded to 255 levels, and the norm of what was lost of each."""
    scale = matrix.abs().amax(1, keepdim=True) / 127
    rounded = (matrix / scale).round() * scale
    return rounded, (matrix - rounded).norm(dim=1)


def leading_directions(x: Tensor, weight: Tensor, bias: Tensor, threshold: Tensor, wanted: Tensor, k: int) -> Iterator[Row]:
    """Scores in the first r principal directions of x: the rest bounded by Cauchy-Schwarz (exact), or ignored (approximate)."""
    mean = x.mean(0)
    centred, bias = x - mean, bias + weight @ mean
    basis = torch.linalg.eigh(centred.t() @ centred).eigenvectors.flip(1)
    x, weight = centred @ basis, weight @ basis
    n, d = weight.shape
    for r in (d // 8, d // 4, d // 2, 3 * d // 4):
        partial = x[:, :r] @ weight[:, :r].t() + bias
        bound = partial + x[:, r:].norm(dim=1)[:, None] * weight[:, r:].norm(dim=1)
        left = float((bound >= threshold).float().mean())
        yield {
            "method": "principal directions, bounded",
            "directions": r,
            "products_share": round(r / d + left * (1 - r / d), 3),
            "recall": 1,
        }
        found = torch.zeros_like(wanted).scatter(1, partial.topk(4 * k, dim=1).indices, True)
        yield {
            "method": "principal directions, 4K scored again",
            "directions": r,
            "products_share": round(r / d + 4 * k / n, 3),
            "recall": _recall(found, wanted),
        }


def clusters(x: Tensor, weight: Tensor, bias: Tensor, threshold: Tensor, wanted: Tensor) -> Iterator[Row]:
    """√N clusters of the gate's rows: whole clusters bounded by their radius (exact), or only the best few looked at (two levels)."""
    n, _ = weight.shape
    number = int(n**0.5)
    centres, member = _k_means(torch.cat([weight, bias[:, None]], 1), number)
    one = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    rows = torch.cat([weight, bias[:, None]], 1)
    radius = torch.zeros(number).scatter_reduce(0, member, (rows - centres[member]).norm(dim=1), "amax")
    to_centres = one @ centres.t()
    bound = to_centres + one.norm(dim=1)[:, None] * radius
    left = float((bound >= threshold)[:, member].float().mean())
    yield {"method": "clusters, bounded", "clusters": number, "products_share": round(number / n + left, 3), "recall": 1}
    for share in (0.05, 0.1, 0.25, 0.5):
        best = torch.zeros_like(to_centres, dtype=torch.bool).scatter(1, to_centres.topk(int(share * number), dim=1).indices, True)
        found = best[:, member]
        cost = number / n + float(found.float().mean())
        yield {"method": "clusters, the best few", "clusters": number, "products_share": round(cost, 3), "recall": _recall(found, wanted)}


def _k_means(rows: Tensor, number: int, rounds: int = 15) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    centres = rows[torch.randperm(len(rows), generator=generator)[:number]].clone()
    member = torch.zeros(len(rows), dtype=torch.int64)
    for _ in range(rounds):
        member = torch.cdist(rows, centres).argmin(1)
        sums = torch.zeros_like(centres).index_add_(0, member, rows)
        counts = torch.bincount(member, minlength=number)[:, None]
        centres = torch.where(counts > 0, sums / counts.clamp_min(1), centres)
    return centres, member


def _recall(found: Tensor, wanted: Tensor) -> float:
    return round(float((found & wanted).sum() / wanted.sum()), 4)


if __name__ == "__main__":
    main()
