"""Numbers under stress: inputs that leave a layer or a loss little to go by give no NaN, nothing enormous, no silent nonsense."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mxd.errors import MxdError
from mxd.layers import Sizes, build
from mxd.objectives import norm_weighted, squared
from mxd.ops import topk_gate, using
from mxd.recipes import RECIPES, recipe
from mxd.train import Student, StudentSpec
from tests.test_train import SIZES, Batch, target

STEPS = 30


def inputs(tokens: int = 64) -> Tensor:
    return torch.randn(tokens, 8, generator=torch.Generator().manual_seed(0)) + 0.5


def alike() -> tuple[Tensor, Tensor]:
    x = inputs()[:1].expand(64, 8).clone()
    return x, target(x)


def nothing_in() -> tuple[Tensor, Tensor]:
    x = torch.zeros(64, 8)
    return x, target(x)


def nothing_out() -> tuple[Tensor, Tensor]:
    return inputs(), torch.zeros(64, 8)


def one_without_output() -> tuple[Tensor, Tensor]:
    x = inputs()
    y = target(x)
    y[3] = 0.0
    return x, y


def first_position_enormous() -> tuple[Tensor, Tensor]:
    x = inputs()
    x[0] *= 1e4
    return x, target(x)


def one_output_enormous() -> tuple[Tensor, Tensor]:
    x = inputs()
    y = target(x)
    y[0] *= 1e6
    return x, y


def one_token() -> tuple[Tensor, Tensor]:
    x = inputs(1)
    return x, target(x)


def train(kind: str, base: str, x: Tensor, y: Tensor, sizes: Sizes = SIZES, steps: int = STEPS) -> tuple[Student, list[float]]:
    first = torch.zeros(len(x), dtype=torch.bool)
    first[: len(x) > 1] = True
    student = Student(StudentSpec("student", "h", kind, sizes, recipe(base, kind)), total_steps=steps)
    student.start(Batch(x, y, first), None)
    losses: list[float] = []
    for _ in range(steps):
        student.step(Batch(x, y, first))
        losses.append(student.last_loss)
    return student, losses


@pytest.mark.parametrize(
    "data", [alike, nothing_in, nothing_out, one_without_output, first_position_enormous, one_output_enormous, one_token]
)
@pytest.mark.parametrize("base", ["paper", "ours", "ours+positive-c"])
@pytest.mark.parametrize("kind", RECIPES["ours"])
def test_training_stays_finite_and_of_the_size_of_its_data(kind: str, base: str, data: Callable[[], tuple[Tensor, Tensor]]) -> None:
    x, y = data()
    student, losses = train(kind, base, x, y)
    assert student.stopped is None
    assert all(p.isfinite().all() for p in student.layer.parameters())
    # Adam moves a weight by its rate a step; what starts from data is of the data's size.
    largest = max(float(p.detach().abs().max()) for p in student.layer.parameters())
    assert largest < 100 * max(1.0, float(x.abs().max()), float(y.abs().max()))
    assert torch.tensor(losses).isfinite().all() and losses[-1] < 2 * losses[0] + 1e-3


def test_a_token_without_output_weighs_nothing_and_the_others_what_they_did() -> None:
    y, y_hat = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-9, 0.0]]), torch.tensor([[3.0, 3.0], [7.0, 0.0], [5.0, 5.0]])
    y_hat.requires_grad_(True)
    loss = norm_weighted(y_hat, y)
    loss.backward()  # pyright: ignore[reportUnknownMemberType]
    assert float(loss.detach()) == pytest.approx((1 / 5) / 3)
    assert y_hat.grad is not None and y_hat.grad[1:].eq(0).all() and y_hat.grad[0].ne(0).any()
    assert float(norm_weighted(torch.ones(2, 3), torch.zeros(2, 3))) == 0.0
    assert norm_weighted(torch.ones(2, 2), torch.tensor([[1.0, torch.nan], [1.0, 1.0]])).isnan(), "what is broken shows"
    assert float(squared(torch.ones(1, 2), torch.zeros(1, 2))) == 2.0


@pytest.mark.parametrize("kind", [kind for kind in RECIPES["ours"] if kind != "dense"])
@pytest.mark.parametrize(("n_units", "k"), [(16, 16), (1, 1), (16, 1)])
def test_all_experts_active_and_a_single_one(kind: str, n_units: int, k: int) -> None:
    sizes = SIZES._replace(n_units=n_units, k=k)
    x = inputs()
    student, losses = train(kind, "ours", x, target(x), sizes, steps=60)
    assert student.stopped is None and losses[-1] < losses[0]
    code = student.layer.encode(x)
    assert code.indices.shape == (64, k) and int(code.indices.max()) < n_units
    assert all(len(set(row)) == k for row in code.indices.tolist()), "every unit once"


@pytest.mark.parametrize(("n_units", "k"), [(4, 5), (0, 1), (4, 0)])
def test_more_active_experts_than_there_are_is_refused(n_units: int, k: int) -> None:
    with pytest.raises(MxdError, match="expected"):
        build("mxd", SIZES._replace(n_units=n_units, k=k))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("k", [1, 3, 7, 8])
def test_ties_still_give_k_different_units(precision: str, k: int) -> None:
    """Eight units with the same row: whichever are taken, they are k, different, and of the same activation."""
    row = torch.randn(1, 8, generator=torch.Generator().manual_seed(1))
    x = row.expand(5, 8) + 1e-3 * torch.arange(5.0)[:, None]
    with using(precision=precision):
        values, indices = topk_gate(x, row.expand(8, 8).clone(), torch.zeros(8), k)
    assert all(len(set(chosen)) == k for chosen in indices.tolist())
    assert (values > 0).all() and torch.equal(values, values[:, :1].expand(5, k))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 1e30])
@pytest.mark.parametrize("loss", [norm_weighted, squared])
def test_an_output_that_is_not_finite_shows_in_the_loss(loss: Callable[[Tensor, Tensor], Tensor], value: float) -> None:
    """1e30 has no finite square in float32: an overflow is no perfect fit either."""
    y = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    y[3, 2] = value
    assert not loss(torch.zeros_like(y), y).isfinite()
