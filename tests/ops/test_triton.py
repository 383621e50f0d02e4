"""The Triton ops against their specification: outputs and every gradient, under Triton's interpreter where there is no GPU.

Every buffer that the code takes uninitialised is filled with NaN (floats) or -1 (integers) first.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from mxd.ops.expert_mix.naive import expert_mix_dense
from mxd.ops.expert_mix.triton import expert_mix
from mxd.ops.largest import triton as largest
from mxd.ops.launch import launch, power_of_two
from mxd.ops.rows import triton as rows
from mxd.ops.settings import using
from mxd.ops.topk_gate import screen
from mxd.ops.topk_gate.naive import topk_gate_dense
from mxd.ops.topk_gate.triton import topk_gate
from mxd.ops.transpose import Plan, by_unit

SHAPES = [(7, 5, 11, 3), (13, 3, 17, 1), (5, 4, 6, 6), (1, 2, 3, 2), (11, 31, 129, 16)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EMPTY = torch.empty
Record = list[tuple[str, dict[str, Any]]]


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(*sizes: Any, **options: Any) -> torch.Tensor:
        made = EMPTY(*sizes, **options)
        return made.fill_(float("nan") if made.is_floating_point() else -1)

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(autouse=True)
def exact_products() -> Any:
    """A GPU's own default would compare bfloat16 products with float64 ones."""
    with using(precision="fp32"):
        yield


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Record:
    """The name and the compile-time values of every kernel started."""
    seen: Record = []

    def recorded(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        seen.append((kernel.fn.__name__, options))
        launch(kernel, grid, *args, **options)

    for module in (largest, rows):
        monkeypatch.setattr(module, "launch", recorded)
    return seen


def rms(found: torch.Tensor | None, right: torch.Tensor | None) -> float:
    """Relative root-mean-square error, NaN counting as infinite."""
    assert found is not None and right is not None and found.shape == right.shape
    found, right = found.detach().double(), right.detach().double()
    error = (found - right).norm() / right.norm().clamp_min(1e-300)
    return float(error) if torch.isfinite(error) else float("inf")


def scatter(values: torch.Tensor, indices: torch.Tensor, n: int) -> torch.Tensor:
    return torch.zeros(len(values), n, dtype=values.dtype, device=values.device).scatter_add(1, indices, values)


def first_k(scores: torch.Tensor, k: int) -> torch.Tensor:
    """The units of the k largest, the lowest of equal ones, in ascending order."""
    return torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :k].sort(1).values


def random(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*sizes).to(DEVICE, dtype).requires_grad_()


# ---- topk_gate and expert_mix against the specification


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gate_equals_the_dense_formula_in_output_and_gradients(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    tokens, d_in, n, k = shape
    torch.manual_seed(0)
    leaves = [random(*s, dtype=dtype) for s in ((tokens, d_in), (n, d_in), (n,))]
    twins = [t.detach().double().requires_grad_() for t in leaves]
    weights = torch.randn(tokens, n, dtype=torch.float64, device=DEVICE)

    values, indices = topk_gate(leaves[0], leaves[1], leaves[2], k)
    assert values.shape == indices.shape == (tokens, k) and values.dtype == dtype and indices.dtype == torch.int64
    assert (values >= 0).all()
    dense = topk_gate_dense(twins[0], twins[1], twins[2], k)
    assert rms(scatter(values, indices, n), dense) < LIMITS[dtype]

    (scatter(values, indices, n).double() * weights).sum().backward()
    (dense * weights).sum().backward()
    for leaf, twin in zip(leaves, twins, strict=True):
        assert leaf.grad is not None and leaf.grad.dtype == dtype
        assert rms(leaf.grad, twin.grad) < LIMITS[dtype]


MIXED = [(d, d) for d in DTYPES] + [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]


@pytest.mark.parametrize(("of_values", "of_table"), MIXED, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mix_equals_the_dense_product_in_output_and_gradients(
    shape: tuple[int, int, int, int], of_values: torch.dtype, of_table: torch.dtype
) -> None:
    tokens, d_out, n, k = shape
    torch.manual_seed(1)
    indices = torch.stack([torch.randperm(n)[:k] for _ in range(tokens)]).to(DEVICE)
    values, table = random(tokens, k, dtype=of_values), random(n, d_out, dtype=of_table)
    wider = torch.promote_types(of_values, of_table)
    upstream = torch.randn(tokens, d_out).to(DEVICE, wider)
    exact_values, exact_table = (t.detach().double().requires_grad_() for t in (values, table))

    out = expert_mix(values, indices, table)
    assert out.dtype == wider
    right = expert_mix_dense(scatter(exact_values, indices, n), exact_table)
    assert rms(out, right) < LIMITS[wider]
    out.backward(upstream)
    right.backward(upstream.double())
    for leaf, twin in ((values, exact_values), (table, exact_table)):
        assert leaf.grad is not None and leaf.grad.dtype == leaf.dtype
        assert rms(leaf.grad, twin.grad) < LIMITS[leaf.dtype]


def test_rows_wider_than_one_program_and_not_contiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "COLUMNS", 16)
    torch.manual_seed(2)
    indices = torch.randint(0, 9, (5, 11), device=DEVICE)  # units may stand twice
    values, table = random(11, 5), random(37, 9)
    twins = [t.detach().double().requires_grad_() for t in (values, table)]
    out, right = expert_mix(values.t(), indices, table.t()), expert_mix_dense(scatter(twins[0].t(), indices, 9), twins[1].t())
    upstream = torch.randn(37, 5, device=DEVICE).t()
    out.backward(upstream)
    right.backward(upstream.double())
    assert max(rms(out, right), rms(values.grad, twins[0].grad), rms(table.grad, twins[1].grad)) < 1e-6


def test_no_tokens_give_empty_outputs_and_zero_gradients() -> None:
    x, weight, bias, table = random(0, 3), random(5, 3), random(5), random(5, 4)
    values, indices = topk_gate(x, weight, bias, 2)
    out = expert_mix(values, indices, table)
    assert out.shape == (0, 4)
    out.sum().backward()
    assert x.grad is not None and x.grad.shape == (0, 3)
    for leaf in (weight, bias, table):
        assert leaf.grad is not None and torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_fewer_than_k_positive_scores_leave_zeros_without_gradient() -> None:
    x, bias = torch.ones(2, 1, device=DEVICE), torch.zeros(4, device=DEVICE, requires_grad=True)
    weight = torch.tensor([[-1.0], [2.0], [-3.0], [-2.0]], device=DEVICE, requires_grad=True)
    values, indices = topk_gate(x, weight, bias, 3)
    assert indices.tolist() == [[0, 1, 3]] * 2 and values.tolist() == [[0.0, 2.0, 0.0]] * 2
    values.sum().backward()
    assert weight.grad is not None and weight.grad.flatten().tolist() == [0.0, 2.0, 0.0, 0.0]
    assert bias.grad is not None and bias.grad.tolist() == [0.0, 2.0, 0.0, 0.0]


def test_without_gradients_the_same_values_come_out() -> None:
    torch.manual_seed(3)
    x, weight, bias, table = random(6, 5), random(9, 5), random(9), random(9, 7)
    with torch.no_grad():
        values, indices = topk_gate(x, weight, bias, 3)
        out = expert_mix(values, indices, table)
    assert not values.requires_grad and not out.requires_grad
    tracked, tracked_indices = topk_gate(x, weight, bias, 3)
    assert tracked.requires_grad and torch.equal(tracked, values) and torch.equal(tracked_indices, indices)
    assert torch.equal(expert_mix(tracked, indices, table), out)


def test_slices_of_tokens_give_the_same(launched: Record) -> None:
    torch.manual_seed(4)
    x, weight, bias = (t.detach() for t in (random(7, 5), random(64, 5), random(64)))
    whole = topk_gate(x, weight, bias, 5)
    assert len(launched) == 1
    with using(scores_mib=2 * 64 * 4 / 2**20):
        sliced = topk_gate(x, weight, bias, 5)
    assert len(launched) == 1 + 4
    # The product of two tokens may sum in another order than that of seven.
    assert torch.equal(whole[1], sliced[1]) and rms(sliced[0], whole[0]) < 1e-6


def test_bf16_precision_rounds_the_operands() -> None:
    torch.manual_seed(5)
    x, weight, bias = (t.detach() for t in (random(7, 5), random(64, 5), random(64)))
    with using(precision="bf16"):
        values, indices = topk_gate(x, weight, bias, 5)
    scores = x.bfloat16().double() @ weight.bfloat16().double().t() + bias
    assert values.dtype == torch.float32
    assert torch.equal(indices, first_k(scores, 5))
    assert rms(values, scores.gather(1, indices).relu()) < 1e-6
    assert rms(values, (x.double() @ weight.double().t() + bias).gather(1, indices).relu()) > 1e-4


def test_the_screened_gate_is_used_and_finds_the_same_units(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    topk = screen.topk
    monkeypatch.setattr(screen, "topk", lambda *args: (calls.append(1), topk(*args))[1])
    torch.manual_seed(6)
    x, weight, bias = (t.detach() for t in (random(7, 16), random(64, 16), random(64)))
    full = scatter(*topk_gate(x, weight, bias, 4), 64)
    assert not calls
    with using(gate="screened"):
        screened = scatter(*topk_gate(x, weight, bias, 4), 64)
    assert calls and rms(screened, full) < 1e-6


# ---- selection


@pytest.mark.parametrize(("tokens", "n", "k"), [(1, 1, 1), (3, 31, 31), (5, 100, 7), (200, 2311, 7), (3, 5003, 1), (2, 100_003, 64)])
def test_selection_equals_topk(tokens: int, n: int, k: int) -> None:
    torch.manual_seed(n)
    scores, bias = torch.randn(tokens, n, device=DEVICE) - 1, torch.randn(n, device=DEVICE)
    for added in (None, bias) if tokens < 100 else (None,):
        total = scores if added is None else scores + added
        values, indices = largest.top(scores, k, added)
        right = torch.topk(total, k, dim=1)
        assert torch.equal(indices, right.indices.sort(1).values)
        assert torch.equal(values, total.gather(1, indices).relu())


@pytest.mark.parametrize("n", [63, 3001])
def test_a_row_ends_where_it_ends(n: int) -> None:
    scores = torch.rand(3, n, device=DEVICE) + torch.tensor([[0.0], [10.0], [20.0]], device=DEVICE)
    scores[:, -1] += 5  # in the last block, which is not full: behind it lies the next row, all of it larger
    _, indices = largest.top(scores, 4)
    assert torch.equal(indices, first_k(scores, 4)) and (indices[:, -1] == n - 1).all()


@pytest.mark.parametrize("k", [1, 2, 9, 40])
@pytest.mark.parametrize("n", [41, 257, 1000, 4099])
def test_of_equal_scores_the_lowest_units_win_at_every_level(n: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(largest, "NARROW", 64)  # so that short rows take two levels, and long ones three
    torch.manual_seed(n + k)
    scores = torch.randint(-3, 3, (4, n), device=DEVICE).float()
    scores[0] = 1.0
    scores[1] = -1.0
    values, indices = largest.top(scores, k)
    assert torch.equal(indices, first_k(scores, k))
    assert torch.equal(values, scores.gather(1, indices).relu())


def test_levels_are_as_many_as_the_row_needs(launched: Record) -> None:
    for n, k, passes in ((2048, 8, 0), (21_490, 32, 1), (100_003, 64, 2)):
        launched.clear()
        largest.top(torch.randn(1, n, device=DEVICE), k)
        names = [name for name, _ in launched]
        assert names.count("_block_max") == passes and names.count("_select") == passes + 1


@pytest.mark.parametrize("n", [5, 3001])
def test_infinities_zeros_subnormals_and_nan_have_their_order(n: int) -> None:
    scores = torch.full((4, n), -float("inf"), device=DEVICE)
    scores[0, 3], scores[0, 4] = -1e-42, 1e-42
    scores[1, 2], scores[1, 4] = float("nan"), float("inf")
    scores[2, 1], scores[2, 2] = -3.0, -0.0
    scores[3, 0], scores[3, 4] = -float("nan"), -3.4e38
    values, indices = largest.top(scores, 2)
    assert indices.tolist() == [[3, 4], [2, 4], [1, 2], [0, 4]]
    assert values[0].tolist() == [0.0, scores[0, 4].item()] and values[0, 1] > 0
    assert values[1].isnan().tolist() == [True, False] and values[1, 1] == float("inf")
    assert values[2].tolist() == [0.0, 0.0] and values[3].isnan().tolist() == [True, False] and values[3, 1] == 0


def test_rows_too_wide_for_one_program_with_many_active_fall_back(monkeypatch: pytest.MonkeyPatch, launched: Record) -> None:
    monkeypatch.setattr(largest, "WIDEST", 64)
    scores, bias = torch.randn(3, 100, device=DEVICE), torch.randn(100, device=DEVICE)
    values, indices = largest.top(scores, 90, bias)
    assert not launched
    right = (scores + bias).topk(90)
    assert torch.equal(scatter(values, indices, 100), scatter(right.values.relu(), right.indices, 100))


def test_block_sizes_keep_every_step_within_one_program() -> None:
    for n in (2049, 4096, 10_736, 21_490, 100_003, 2**20, 2**22):
        for k in (1, 2, 8, 32, 64, 256, 512, 1024, 2048):
            block = largest.block_size(n, k)
            if block is not None:
                assert power_of_two(block) == block and k * block <= largest.WIDEST and -(-n // block) >= k
            else:
                assert n <= largest.WIDEST, (n, k)
    assert largest.block_size(21_490, 32) == 32 and largest.block_size(21_490, 4096) is None
    assert [power_of_two(n) for n in (1, 2, 3, 64, 65)] == [1, 2, 4, 64, 128]


# ---- sums by unit


def crowd() -> tuple[torch.Tensor, int]:
    """Indices on which unit 3 fires on every token, 5 on 16, 6 on 17 and 9 on 33 of them, others once, some never."""
    tokens, n = 35, 41
    indices = torch.arange(tokens)[:, None].expand(tokens, 3) % 9 + torch.tensor([10, 20, 30])
    indices = torch.cat([torch.full((tokens, 1), 3), indices], 1)
    indices[:16, 1], indices[16:33, 1], indices[:33, 2] = 5, 6, 9
    return indices.to(DEVICE), n


@pytest.mark.parametrize("window", [3, 16, 128])
def test_deterministic_and_atomic_sums_by_unit_agree_with_float64(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "WINDOW", window)
    torch.manual_seed(7)
    indices, n = crowd()
    x, weights = random(len(indices), 21).detach(), random(*indices.shape).detach()
    plan = by_unit(indices, n)
    right = scatter(weights.double(), indices, n).t() @ x.double()
    counts = plan.end - plan.start
    assert counts[3] == 35 and counts[5] == 16 and counts[6] == 17 and counts[0] == 0
    for deterministic in (True, False):
        found = rows.sum_by_unit(x, weights, plan, torch.float32, deterministic)
        assert rms(found, right) < 1e-6
        assert not found[counts == 0].any()
        low = rows.sum_by_unit(x.bfloat16(), weights.bfloat16(), plan, torch.bfloat16, deterministic)
        assert low.dtype == torch.bfloat16 and rms(low, right) < 1e-2
    assert rms(rows.scalars_by_unit(weights, plan, torch.float32), scatter(weights.double(), indices, n).sum(0)) < 1e-6


def test_the_forward_pass_decides_whether_additions_are_atomic(launched: Record) -> None:
    x, weight, bias, table = random(6, 5), random(9, 5), random(9), random(9, 7)
    for wish in (True, False):
        with using(deterministic=wish):
            values, indices = topk_gate(x, weight, bias, 3)
            out = expert_mix(values, indices, table)
        launched.clear()
        with using(deterministic=not wish):
            out.sum().backward()
        assert [options["ATOMIC"] for name, options in launched if name == "_windows"] == [not wish] * 2


def test_a_plan_sorts_once_for_all_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    sort = torch.sort
    monkeypatch.setattr(torch, "sort", lambda *a, **kw: (calls.append(1), sort(*a, **kw))[1])
    plan = Plan()
    weight, table, bias = random(6, 3), random(6, 4), random(6)
    values, indices = topk_gate(random(5, 3), weight, bias, 2, plan)
    expert_mix(values, indices, table, plan).sum().backward()
    assert weight.grad is not None and table.grad is not None and bias.grad is not None
    assert len(calls) == 1


def test_nothing_compiled_depends_on_the_number_of_tokens(launched: Record) -> None:
    seen: list[Record] = []
    for tokens in (2, 3, 16):
        values, indices = topk_gate(random(tokens, 5), random(9, 5), random(9), 3)
        expert_mix(values, indices, random(9, 7)).sum().backward()
        seen.append(list(launched))
        launched.clear()
    assert len(seen[0]) == 9 and seen[0] == seen[1] == seen[2]


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler for NVIDIA GPUs comes with its Linux packages")
def test_every_kernel_compiles_for_a_gpu(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "error", str(Path(__file__).with_name("gpu_compiler.py"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = {line.split()[0] for line in done.stdout.splitlines()}
    assert kernels == {"_block_max", "_select", "_gather_sum", "_dots", "_by_unit", "_windows", "_scalars_by_unit"}
