"""Float32 products on this CPU: MKL (PyTorch's default on x86) against oneDNN (what mxd takes on AMD processors).

    python benchmarks/gemm.py

Checks both against float64, then times them in turn; writes benchmarks/results/gemm-cpu.json.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import torch
from machine import machine

SHAPES = [(1024, 576, 1536), (2048, 576, 6911), (2048, 1536, 576), (1024, 768, 10_736)]
"""Tokens, width read, width written: the built-in host's MLP, the demo's gate and decoder, the benchmark's gate."""


def main() -> None:
    rows = []
    for tokens, d_in, d_out in SHAPES:
        torch.manual_seed(0)
        x, weight = torch.randn(tokens, d_in), torch.randn(d_out, d_in)
        products = {
            "onednn": lambda x=x, w=weight: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], ""),
            "mkl": lambda x=x, w=weight: torch.nn.functional.linear(x, w),
        }
        exact = x.double() @ weight.double().T
        errors = {name: float((product() - exact).norm() / exact.norm()) for name, product in products.items()}
        if max(errors.values()) > 1e-6:
            raise SystemExit(f"a product is wrong ({errors}): nothing is timed")
        times: dict[str, list[float]] = {name: [] for name in products}
        for run in range(24):
            for name, product in products.items():
                began = time.perf_counter()
                product()
                if run >= 4:
                    times[name].append(1e3 * (time.perf_counter() - began))
        ours, rival = (statistics.median(times[name]) for name in ("onednn", "mkl"))
        rows.append(
            {
                "case": "x @ weight.T",
                "rival": "MKL",
                "device": "cpu",
                "shape": {"tokens": tokens, "d_in": d_in, "d_out": d_out, "threads": torch.get_num_threads()},
                "dtype": "float32",
                "ours_ms": round(ours, 2),
                "rival_ms": round(rival, 2),
                "time_ratio": round(ours / rival, 3),
                "ours_gflops": round(2e-6 * tokens * d_in * d_out / ours),
                "rival_gflops": round(2e-6 * tokens * d_in * d_out / rival),
                "verified": f"relative errors against float64: {errors['onednn']:.1e}, {errors['mkl']:.1e}",
                "runs": 20,
            }
        )
        print(rows[-1])
    out = Path(__file__).parent / "results" / "gemm-cpu.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
