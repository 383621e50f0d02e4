"""`mxd bench`: every figure about speed, measured in one process with the rivals taken in turn, each result verified before it is timed.

A benchmark is a module here with one function ``rows(**options) -> Iterable[row]``; of the options that `mxd.bench.run.run` offers
it takes those it names. What a row holds says `mxd.bench.rows`. Light on purpose: no torch here.
"""

from __future__ import annotations

BENCHMARKS: dict[str, str] = {
    "gemm": "float32 products on a CPU: MKL (PyTorch's) against oneDNN (what mxd takes on AMD processors)",
    "ops": "topk_gate and expert_mix, forward and with gradients, against the dense maths; the selection against torch.topk",
    "train_step": "one MxD training step against the dense reference maths, in time and in peak memory",
    "scaling": "cost of a step against the number of experts, K, students and tokens; exponents",
    "gate": "the cheaper gate against full scores",
    "frontier": "15 students in one pass of the host against 15 runs",
    "cache": "training from cached activations against streaming from the host",
    "whole": "whole training at GPT-2's size, host included: tokens per second",
    "generation": "generation by the replaced host against the host itself",
    "peers": "one training step of sparsify and of SAELens against ours, where they are installed (`make bench-peers`)",
}
"""Name -> what it measures, in the order in which ``mxd bench`` runs them."""
