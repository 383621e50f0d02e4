"""The eager ops against their specification: outputs and every gradient, odd shapes, nothing of size tokens x N backward."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mxd.ops import expert_mix, topk_gate, using
from mxd.ops.expert_mix.naive import decoder_tensor, expert_mix_dense, mixture_of_decoders
from mxd.ops.rows import crowded
from mxd.ops.topk_gate.eager import _sum_scalars
from mxd.ops.topk_gate.naive import topk_gate_dense
from mxd.ops.transpose import Plan, by_unit

SHAPES = [(7, 5, 11, 3), (13, 3, 17, 1), (5, 4, 6, 6), (1, 2, 3, 2), (64, 31, 129, 16)]
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}


WAYS: dict[str, tuple[int, dict[str, object]]] = {
    "row by row": (0, {}),
    "crowded": (10**6, {}),
    "sliced": (0, {"scores_mib": 1e-4}),
    "screened": (0, {"gate": "screened", "scores_mib": 1e-3}),
}
"""Name -> from how many units for each active one rows are read one by one (`crowded.RATIO`), and the settings."""


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every way the eager ops can take; the tests' sizes alone would choose one."""
    ratio, settings = WAYS[request.param]
    monkeypatch.setattr(crowded, "RATIO", ratio)
    with using(backend="eager", **settings):
        yield request.param


def rms(found: torch.Tensor, right: torch.Tensor) -> float:
    """Relative root-mean-square error, NaN counting as infinite."""
    found, right = found.detach(), right.detach()
    error = (found.double() - right.double()).norm() / right.double().norm().clamp_min(1e-300)
    return float(error) if torch.isfinite(error) else float("inf")


def scatter(values: torch.Tensor, indices: torch.Tensor, n: int) -> torch.Tensor:
    return torch.zeros(len(values), n, dtype=values.dtype).scatter_add(1, indices, values)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_gate_equals_the_dense_formula_in_output_and_gradients(way: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    tokens, d_in, n, k = shape
    torch.manual_seed(0)
    leaves = [torch.randn(*s, dtype=dtype, requires_grad=True) for s in ((tokens, d_in), (n, d_in), (n,))]
    twins = [t.detach().double().requires_grad_() for t in leaves]
    weights = torch.randn(tokens, n, dtype=torch.float64)

    values, indices = topk_gate(leaves[0], leaves[1], leaves[2], k)
    assert values.shape == indices.shape == (tokens, k)
    assert (values >= 0).all()
    dense = topk_gate_dense(twins[0], twins[1], twins[2], k)
    assert rms(scatter(values, indices, n), dense) < LIMITS[dtype]

    (scatter(values, indices, n) * weights.to(dtype)).sum().backward()
    (dense * weights).sum().backward()
    for leaf, twin in zip(leaves, twins, strict=True):
        assert leaf.grad is not None and twin.grad is not None
        assert rms(leaf.grad, twin.grad) < LIMITS[dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_mix_equals_the_dense_product_in_output_and_gradients(way: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    tokens, d_out, n, k = shape
    torch.manual_seed(1)
    indices = torch.stack([torch.randperm(n)[:k] for _ in range(tokens)])
    values = torch.rand(tokens, k).to(dtype).requires_grad_()
    table = torch.randn(n, d_out).to(dtype).requires_grad_()
    upstream = torch.randn(tokens, d_out).to(dtype)
    exact_values, exact_table = (t.detach().double().requires_grad_() for t in (values, table))

    out = expert_mix(values, indices, table)
    right = expert_mix_dense(scatter(exact_values, indices, n), exact_table)
    assert rms(out, right) < LIMITS[dtype]
    out.backward(upstream)
    right.backward(upstream.double())
    for leaf, twin in ((values, exact_values), (table, exact_table)):
        assert leaf.grad is not None and twin.grad is not None
        assert rms(leaf.grad, twin.grad) < LIMITS[dtype]


def test_no_tokens_give_empty_outputs_and_zero_gradients(way: str) -> None:
    weight, bias, table = torch.randn(5, 3, requires_grad=True), torch.zeros(5, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    values, indices = topk_gate(torch.empty(0, 3), weight, bias, 2)
    out = expert_mix(values, indices, table)
    assert out.shape == (0, 4)
    out.sum().backward()
    assert weight.grad is not None and table.grad is not None
    assert not weight.grad.any() and not table.grad.any()


def test_scores_that_are_all_negative_give_zero_values_and_zero_gradient(way: str) -> None:
    x, weight = torch.ones(2, 3), -torch.ones(4, 3)
    weight.requires_grad_()
    values, _ = topk_gate(x, weight, torch.zeros(4), 2)
    assert not values.any()
    values.sum().backward()
    assert weight.grad is not None and not weight.grad.any()


def test_lemma_2_the_mixture_of_written_out_decoders_equals_the_product_of_two_sums() -> None:
    torch.manual_seed(2)
    a, z = torch.rand(3, 5, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    C, D = torch.randn(5, 2, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)
    assert rms((a @ C) * (z @ D), mixture_of_decoders(a, z, C, D)) < 1e-12
    assert torch.equal(decoder_tensor(C, D)[3], D @ torch.diag(C[3]))


def test_the_transposed_index_by_hand() -> None:
    made = by_unit(torch.tensor([[2, 0], [2, 3]]), 5)
    assert made.start.tolist() == [0, 1, 1, 3, 4]
    assert made.token.tolist() == [0, 0, 1, 1]
    assert made.pair.tolist() == [1, 0, 2, 3]


def test_a_plan_sorts_once_for_all_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    sort = torch.sort
    monkeypatch.setattr(torch, "sort", lambda *a, **kw: (calls.append(1), sort(*a, **kw))[1])
    monkeypatch.setattr(crowded, "RATIO", 0)
    plan = Plan()
    weight, table = torch.randn(6, 3, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    values, indices = topk_gate(torch.randn(5, 3), weight, torch.zeros(6), 2, plan)
    expert_mix(values, indices, table, plan).sum().backward()
    assert weight.grad is not None and table.grad is not None
    assert len(calls) == 1


def test_backward_makes_no_tokens_by_units_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, d, n, k = 64, 8, 4096, 4
    weight, table = torch.randn(n, d, requires_grad=True), torch.randn(n, d, requires_grad=True)
    x = torch.randn(tokens, d)
    values, indices = topk_gate(x, weight, torch.zeros(n), k)
    out = expert_mix(values, indices, table)
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        out.sum().backward()
    largest = max(event.cpu_memory_usage for event in seen.events() or [] if event.name.startswith("aten::empty"))
    assert largest <= 4 * n * d, "the largest allocation may be a gradient of the weights, never tokens x units"
    assert 4 * tokens * n > 4 * n * d  # so that the line above can fail


def test_forward_holds_no_more_scores_than_it_may() -> None:
    tokens, n = 512, 1024
    x, weight = torch.randn(tokens, 8), torch.randn(n, 8)
    from torch.profiler import ProfilerActivity, profile

    held: dict[float, int] = {}
    for mib in (0.25, 32.0):
        with using(backend="eager", scores_mib=mib), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            topk_gate(x, weight, torch.zeros(n), 4)
        held[mib] = max(event.cpu_memory_usage for event in seen.events() or [])
    assert held[0.25] <= 2**18 < 4 * tokens * n <= held[32.0]


def test_a_unit_that_stands_twice_counts_twice(way: str) -> None:
    table = torch.arange(12.0).view(6, 2)
    out = expert_mix(torch.tensor([[1.0, 2.0]]), torch.tensor([[3, 3]]), table)
    assert torch.equal(out, 3 * table[3:4])


def test_the_repeatable_sum_of_the_bias_gradient_is_the_same_sum() -> None:
    """As on a GPU with `Settings.deterministic`."""
    grad, indices = torch.randn(50, 4, dtype=torch.float64), torch.randint(0, 9, (50, 4))
    free, fixed = (_sum_scalars(grad, indices, 11, plan) for plan in (None, Plan()))
    assert rms(fixed, free) < 1e-12
    assert not fixed[9:].any()
