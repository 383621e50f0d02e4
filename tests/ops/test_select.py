"""Selection: by groups it finds what an ordinary TopK finds; behind a bfloat16 screen, what float32 scores give, proved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mxd.ops import gemm, using
from mxd.ops.largest import eager as select
from mxd.ops.topk_gate import screen, topk_gate


def same_values(found: Tensor, right: Tensor) -> bool:
    return torch.equal(found.sort(1).values, right.sort(1).values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("n", "k"), [(32, 1), (33, 1), (1009, 7), (4096, 31), (5000, 5000), (777, 200), (8, 1), (70_001, 32)])
def test_the_largest_by_groups_are_the_largest(n: int, k: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "WORTH", 0)
    torch.manual_seed(n + k)
    scores = torch.randn(9, n).to(dtype)
    values, indices = select.largest(scores, k)
    assert same_values(values, scores.topk(k, dim=1).values)
    assert torch.equal(scores.gather(1, indices), values)
    assert all(len(set(row)) == k for row in indices.tolist()), "no unit twice"


def test_groups_are_used_where_they_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []
    topk = Tensor.topk

    def spy(self: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        widths.append(self.shape[1])
        return topk(self, *args, **options)

    monkeypatch.setattr(Tensor, "topk", spy)
    select.largest(torch.randn(256, 20_000), 32)
    assert max(widths) < 700, "no ordinary TopK over a whole row"


@pytest.mark.parametrize("row", [torch.zeros(999), torch.full((999,), -torch.inf), torch.arange(999.0), -torch.arange(999.0)])
def test_equal_infinite_and_sorted_scores(row: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "WORTH", 0)
    values, indices = select.largest(row.expand(3, -1), 20)
    assert torch.equal(values.sort(1).values, row.expand(3, -1).topk(20, dim=1).values.sort(1).values)
    assert all(len(set(found)) == 20 for found in indices.tolist())


def gate_inputs(case: str, d: int = 48, n: int = 3000, tokens: int = 70) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(7)
    x, weight, bias = torch.randn(tokens, d), torch.randn(n, d) / d**0.5, 0.1 * torch.randn(n)
    if case == "norms of every size":
        weight *= torch.logspace(-3, 2, n)[:, None]
        x *= torch.logspace(-2, 3, tokens)[:, None]
    if case == "nearly equal units":
        weight = weight[:1] + 1e-4 * torch.randn(n, d)
    if case == "large bias":
        bias = 1000 + 0.01 * torch.randn(n)
    if case == "all negative":
        bias -= 100
    return x, weight, bias


CASES = ("ordinary", "norms of every size", "nearly equal units", "large bias", "all negative")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("k", [1, 16])
def test_the_screen_keeps_the_units_of_float32_scores(case: str, k: int) -> None:
    x, weight, bias = gate_inputs(case)
    exact = x.double() @ weight.double().t() + bias.double()
    values, indices = screen.topk(x, weight, bias, k, 32)
    right = exact.topk(k, dim=1)
    # Float32 cannot tell scores apart that differ by less than its own rounding: compare the scores, not the numbers of the units.
    slack = 1e-5 * (x.double().norm(dim=1) * weight.double().norm(dim=1).max() + bias.abs().max())
    assert ((exact.gather(1, indices).sort(1).values - right.values.sort(1).values).abs() <= slack[:, None]).all()
    assert ((values.double() - exact.gather(1, indices)).abs() <= slack[:, None]).all()
    if case == "ordinary":
        assert torch.equal(indices.sort(1).values, right.indices.sort(1).values)


@pytest.mark.parametrize("case", CASES)
def test_the_bounds_of_the_screen_bound(case: str) -> None:
    x, weight, bias = gate_inputs(case)
    exact = x.double() @ weight.double().t() + bias.double()
    bounding = screen._bounding_weights(weight, bias)
    bounds = (screen._bounding_inputs(x, bounding.shape[1]) @ bounding.t()).double()
    assert (bounds + 2 * screen.UNIT * bounds.abs() >= exact).all()
    if case == "ordinary":
        assert (bounds - exact).mean() < 0.2 * exact.std(), "a bound so loose would settle nothing"


def test_full_scores_are_computed_where_the_bound_settles_nothing_and_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    product = gemm.forward
    monkeypatch.setattr(gemm, "forward", lambda x, *rest: (rows.append(len(x)), product(x, *rest))[1])
    screen.topk(*gate_inputs("ordinary"), 16, 32)
    assert sum(rows) <= 7, "at most one token in ten"
    rows.clear()
    screen.topk(*gate_inputs("nearly equal units"), 16, 32)
    assert 50 <= sum(rows) <= 70


def test_the_setting_chooses_the_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    made = screen.topk
    monkeypatch.setattr(screen, "topk", lambda *args: (calls.append(1), made(*args))[1])
    x, weight, bias = gate_inputs("ordinary")
    with using(backend="eager", gate="full"):
        full = topk_gate(x, weight, bias, 16)
    assert not calls
    with using(backend="eager", gate="screened"):
        screened = topk_gate(x, weight, bias, 16)
    assert calls
    assert torch.equal(full[1].sort(1).values, screened[1].sort(1).values)
