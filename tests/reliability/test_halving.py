"""Too little memory on a GPU: the step is taken in halves and comes to the same. Out of memory is simulated: this runs on any machine."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mxd.layers import Code
from mxd.recipes import Recipe
from mxd.slices import joined, slices
from mxd.train import Student, StudentSpec
from tests.test_train import SIZES, Batch, target

RECIPE = Recipe("fast", learning_rate=1e-2, warmup_steps=0, schedule="constant")
KINDS = ("mxd", "skip-transcoder", "topk-sae", "dense")
TOKENS = 64


def student(kind: str = "mxd", **changes: Any) -> Student:
    made = Student(replace(StudentSpec("a", "layers.1.mlp", kind, SIZES, RECIPE, random_k=True), **changes), total_steps=100)
    made.start(batch(0), None)
    made.careful = True
    return made


def batch(seed: int, tokens: int = TOKENS) -> Batch:
    x = torch.randn(tokens, 8, generator=torch.Generator().manual_seed(seed))
    return Batch(x, target(x), torch.zeros(tokens, dtype=torch.bool))


def state(of: Student) -> dict[str, Tensor]:
    """Everything of a student that a step changes."""
    return {name: tensor.clone() for name, tensor in of.state()[0].items()}


def unmoved(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """All but what a step that came to nothing may change: the loss that it found, the K that it drew."""
    passing = ("own.loss", "generator")
    return same(*({name: tensor for name, tensor in one.items() if name not in passing} for one in (a, b)))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def out_of_memory(of: Student, monkeypatch: pytest.MonkeyPatch, *, above: int, times: int = 10**9) -> list[int]:
    """From now on the layer has no memory for more than so many tokens, so many times; gives the sizes of its calls."""
    real, calls = of.layer.forward, list[int]()
    left = times

    def forward(x: Tensor, k: int | None = None) -> Any:
        nonlocal left
        calls.append(len(x))
        if len(x) > above and left:
            left -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(x, k)

    monkeypatch.setattr(of.layer, "forward", forward)
    return calls


@pytest.mark.parametrize(("tokens", "number", "lengths"), [(8, 2, [4, 4]), (9, 2, [5, 4]), (1, 2, [1]), (7, 3, [3, 2, 2]), (5, 1, [5])])
def test_slices_are_the_batch_in_order(tokens: int, number: int, lengths: list[int]) -> None:
    whole = batch(1, tokens)
    parts = list(slices(whole, number))
    assert [len(part.y) for part in parts] == lengths
    for i, tensor in enumerate(whole):
        assert torch.equal(torch.cat([part[i] for part in parts]), tensor)


def test_codes_are_joined_in_order() -> None:
    whole = Code(torch.rand(6, 2), torch.randint(0, 9, (6, 2)), None)
    again = joined([Code(whole.values[:4], whole.indices[:4], None), Code(whole.values[4:], whole.indices[4:], None)])
    assert torch.equal(again.values, whole.values) and torch.equal(again.indices, whole.indices)


@pytest.mark.parametrize("kind", KINDS)
def test_care_changes_no_bit(kind: str) -> None:
    """Gradients that wait for each other, and such that are used as they come."""
    careful, careless = student(kind), student(kind)
    careless.careful = False
    for seed in range(1, 9):
        careful.step(batch(seed))
        careless.step(batch(seed))
    assert same(state(careful), state(careless))


@pytest.mark.parametrize("kind", KINDS)
def test_halves_come_to_the_same(kind: str) -> None:
    whole, halved = student(kind), student(kind)
    halved.parts = 2
    for seed in range(1, 9):
        whole.step(batch(seed, 63))
        halved.step(batch(seed, 63))
    assert whole.last_loss == pytest.approx(halved.last_loss, rel=1e-4)
    a, b = whole.layer.state_dict(), halved.layer.state_dict()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)
    assert whole.counts.summary() == pytest.approx(halved.counts.summary(), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradients_of_halves_are_those_of_the_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam hides how large a gradient is; here it is looked at itself."""
    gradients: list[dict[str, Tensor]] = []
    for parts in (1, 2, 5):
        one = student(kind, random_k=False)
        one.parts = parts
        monkeypatch.setattr(type(one._adam), "release", lambda _: None)
        one.step(batch(1, 63))
        gradients.append({name: p.grad.double() for name, p in one.layer.named_parameters() if p.grad is not None})
    for other in gradients[1:]:
        assert other.keys() == gradients[0].keys() and other
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_without_memory_is_halved_once_and_said(
    kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    halved, poor = student(kind), student(kind)
    halved.parts = 2
    calls = out_of_memory(poor, monkeypatch, above=TOKENS // 2)
    with caplog.at_level(logging.WARNING):
        for seed in range(1, 5):
            poor.step(batch(seed))
            halved.step(batch(seed))
    assert calls == [64] + [32] * 8, "tried once in full"
    assert same(state(poor), state(halved)), "the bits of one that was halved from the start"
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == (
        "a: not enough memory for 64 tokens at a time, from here on 32; gradients are added up: the same result (CUDA out of memory)"
    )


@pytest.mark.parametrize("after", ["C", "encoder.E", "b_G"])
def test_memory_that_ends_in_the_backward_pass_leaves_no_weight_half_moved(after: str) -> None:
    halved, poor = student(), student()
    halved.parts = 2
    before, seen = state(poor), list[bool]()

    def fail(_: Tensor) -> None:
        if not seen:
            seen.append(unmoved(before, state(poor)))
            raise torch.OutOfMemoryError("CUDA out of memory.")

    poor.layer.get_parameter(after).register_post_accumulate_grad_hook(fail)
    poor.step(batch(1))
    halved.step(batch(1))
    assert seen == [True] and poor.parts == 2
    assert same(state(poor), state(halved))
    assert all(parameter.grad is None for parameter in poor.layer.parameters())


def test_where_half_does_not_fit_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    poor = student()
    out_of_memory(poor, monkeypatch, above=10)
    before = state(poor)
    with pytest.raises(torch.OutOfMemoryError):
        poor.step(batch(1))
    assert unmoved(before, state(poor))
    assert poor.in_step, "what lies in memory is not a state to go on from"


def test_a_larger_step_than_any_before_is_taken_with_care(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of a size that has fitted needs no room for all gradients at once; one of more units active does."""
    one = student(random_k=False)
    held: list[bool] = []
    real = type(one)._backward
    monkeypatch.setattr(Student, "_backward", lambda self, *args: (held.append(self._adam.holding), real(self, *args))[1])
    drawn = iter([4, 4, 3, 6, 5, 6])
    monkeypatch.setattr(Student, "_draw_k", lambda _: next(drawn))
    for seed in range(6):
        one.step(batch(seed))
    assert held == [True, True, False, True, False, False], "the first is without Adam's averages, the second the first with all"


def proven() -> Student:
    one = student(random_k=False)
    for seed in (1, 2, 3):
        one.step(batch(seed))
    assert one._adam is not None and not one._adam.holding
    return one


def test_memory_that_ends_later_before_a_weight_has_moved_is_met_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    poor, halved = proven(), proven()
    halved.parts = 2
    out_of_memory(poor, monkeypatch, above=TOKENS // 2)
    for seed in (4, 5):
        poor.step(batch(seed))
        halved.step(batch(seed))
    assert poor.parts == 2 and same(state(poor), state(halved))


def test_memory_that_ends_after_a_weight_has_moved_is_an_error_and_not_other_numbers() -> None:
    one = proven()

    def fail(_: Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    one.layer.get_parameter("encoder.E").register_post_accumulate_grad_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        one.step(batch(4))
    assert one.parts == 1 and one.in_step


def test_sizes_that_are_smaller_than_proven_ones_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    one = student(random_k=False)
    drawn = iter([6, 6, *range(1, 7)] * 3)
    monkeypatch.setattr(Student, "_draw_k", lambda _: next(drawn))
    for seed in range(16):
        one.step(batch(seed))
    assert one._proven == {(6, 0)}


def test_in_halves_a_loss_that_is_not_finite_stops_the_student_as_it_was() -> None:
    one = student()
    one.parts = 2
    one.step(batch(1))
    before = state(one)
    broken = batch(2)
    broken.y[-1] = torch.nan  # in the second half: the first has left its gradients
    one.step(broken)
    assert one.stopped == "the loss became nan at step 2"
    after = one.layer.state_dict()
    assert all(torch.equal(before[f"layer.{name}"], after[name]) for name in after)
    assert all(parameter.grad is None for parameter in one.layer.parameters())
