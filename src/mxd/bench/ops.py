"""The two sparse operations by themselves against the dense maths, forward and with all gradients, and the selection against torch.topk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from ..ops import expert_mix, gemm, topk_gate
from ..ops.largest.eager import largest
from ..ops.settings import using
from . import dense
from .rows import Row, row
from .timing import in_turns, relative_error, verify


def shapes(device: torch.device, quick: bool) -> list[dict[str, int]]:
    """GPT-2's size of the paper; fewer tokens on a CPU."""
    if quick:
        return [{"d": 16, "n": 96, "k": 4, "tokens": 32}]
    return [{"d": 768, "n": 21_490, "k": 32, "tokens": 4096 if device.type == "cuda" else 1024}]


def rows(*, device: torch.device, threads: int, runs: int, quick: bool) -> Iterator[Row]:
    """Five rows a shape: each operation forward, then forward and backward, and the selection alone."""
    for shape in shapes(device, quick):
        said = {**shape, "threads": threads} if device.type == "cpu" else shape
        for case, rival, check, calls in _cases(device, **shape):
            times = in_turns(calls, runs=runs, device=device)
            yield row(
                case,
                rival,
                device=device.type,
                shape=said,
                dtype="float32" if device.type == "cpu" else "float32, products in the default precision",
                ours_ms=times["ours"],
                rival_ms=times["rival"],
                check=check,
                runs=runs,
            )


Calls = Mapping[str, Callable[[], object]]


def _cases(device: torch.device, *, d: int, n: int, k: int, tokens: int) -> Iterator[tuple[str, str, str, Calls]]:
    layer = dense.make(device, d=d, h=1, n=n, k=k)
    x, grad = dense.batch(device, d=d, tokens=tokens)
    with torch.no_grad(), using(precision="fp32"):
        given, indices = topk_gate(x, layer.G, layer.b_G, k)
    given.requires_grad_()

    def gate(gradients: bool = True) -> list[Tensor]:
        values, _ = topk_gate(x, layer.G, layer.b_G, k)
        return _gradients(values * values.detach(), layer.G, layer.b_G) if gradients else [values]

    def dense_gate(gradients: bool = True) -> list[Tensor]:
        a = dense.topk(torch.relu(x @ layer.G.T + layer.b_G), k)
        return _gradients(a * a.detach(), layer.G, layer.b_G) if gradients else [a]

    def mix(gradients: bool = True) -> list[Tensor]:
        y = expert_mix(given, indices, layer.C)
        return _gradients(y * grad, given, layer.C) if gradients else [y]

    def dense_mix(gradients: bool = True) -> list[Tensor]:
        y = torch.zeros(tokens, n, device=device).scatter_(1, indices, given) @ layer.C
        return _gradients(y * grad, given, layer.C) if gradients else [y]

    for name, ours, rival in (("topk_gate", gate, dense_gate), ("expert_mix", mix, dense_mix)):
        with using(precision="fp32"):
            check = verify("gradients in float32", _worst(ours(), rival()), 1e-5)
        yield f"{name}, forward", "dense maths", check, {"ours": _forward(ours), "rival": _forward(rival)}
        yield f"{name}, forward and backward", "dense maths", check, {"ours": ours, "rival": rival}
    scores = gemm.linear(x, layer.G.detach(), layer.b_G.detach())
    calls = {"ours": lambda: largest(scores, k), "rival": lambda: scores.topk(k, dim=1, sorted=False)}
    found, expected = (torch.sort(call()[0], dim=1).values for call in calls.values())
    yield "the K largest of given scores", "torch.topk", verify("the values", relative_error(found, expected), 0.0), calls


def _forward(call: Callable[[bool], object]) -> Callable[[], None]:
    def forward() -> None:
        with torch.no_grad():
            call(False)

    return forward


def _gradients(product: Tensor, *of: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(product.sum(), of))


def _worst(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(relative_error(mine, other) for mine, other in zip(found, expected, strict=True))
