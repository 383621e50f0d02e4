"""A student whose state is taken and put into a new one goes on with the same bits, whatever it is and however it is trained."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from mxd.config import KINDS
from mxd.harvest import Batch
from mxd.layers import Sizes
from mxd.recipes import recipe
from mxd.sites import MLPWeights
from mxd.train import Student, StudentSpec

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = Sizes(d_in=12, d_out=12, n_units=36, k=4, d_hidden=8, activation="silu", glu=True, rank=6)
BEFORE, BEHIND = 7, 9


def batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(64, 12, generator=generator)
    return Batch(x, torch.tanh(x @ torch.randn(12, 12, generator=torch.Generator().manual_seed(0))) + 0.1, torch.arange(64) % 16 == 0)


def host() -> MLPWeights:
    generator = torch.Generator().manual_seed(5)
    e, gate, d = (torch.randn(shape, generator=generator) for shape in ((12, 8), (12, 8), (8, 12)))
    return MLPWeights(e, None, gate, None, d, None)


def student(spec: StudentSpec, steps: int, *, start: bool = True) -> Student:
    made = Student(spec, total_steps=BEFORE + BEHIND)
    if start:
        made.start(batch(-1), host() if spec.recipe.encoder != "fresh" else None)
    for step in range(steps):
        made.step(batch(step))
    return made


def through_a_file(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return load(save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def spec_of(kind: str, name: str, options: dict[str, Any]) -> StudentSpec:
    own: dict[str, Any] = {"sizes": SIZES, "recipe": recipe(name, kind), **options}
    return StudentSpec("s", "layers.0.mlp", kind, **own)


CASES: list[tuple[str, str, dict[str, Any]]] = [
    *((kind, "ours", {}) for kind in KINDS),
    ("mxd", "paper", {}),
    ("mxd", "host-encoder", {}),
    ("mxd", "ours+muon", {}),
    ("mxd", "ours+positive-c+lr-c=4", {}),
    ("mxd", "ours", {"random_k": True}),
    ("transcoder", "ours", {"aux_weight": 0.1, "aux_k": 4, "dead_after_tokens": 128, "sizes": SIZES._replace(k=1)}),
    ("transcoder", "ours+l1=0.1", {"sizes": SIZES._replace(k=36)}),
]


@pytest.mark.parametrize(("kind", "name", "options"), CASES)
def test_the_rest_of_the_steps_gives_the_same_bits(kind: str, name: str, options: dict[str, Any]) -> None:
    spec = spec_of(kind, name, options)
    whole = student(spec, BEFORE + BEHIND)
    tensors, numbers = student(spec, BEFORE).state()
    again = student(replace(spec), 0, start=False)
    again.restore(through_a_file(tensors), numbers)
    for step in range(BEFORE, BEFORE + BEHIND):
        again.step(batch(step))
    expected, _ = whole.state()
    got, _ = again.state()
    assert set(got) == set(expected)
    for key, tensor in expected.items():
        assert torch.equal(got[key], tensor), key
    assert (again.steps, again.tokens, again.learning_rate()) == (whole.steps, whole.tokens, whole.learning_rate())
    assert [p.requires_grad for p in again.layer.parameters()] == [p.requires_grad for p in whole.layer.parameters()]


@pytest.mark.parametrize(
    ("left_out", "kind", "name", "options"),
    [
        ("optimiser.", "mxd", "ours", {}),
        ("generator", "mxd", "ours", {"random_k": True}),
        ("counts.recent", "transcoder", "ours", {}),
        ("counts.silent", "transcoder", "ours", {"aux_weight": 0.1, "aux_k": 4, "dead_after_tokens": 128, "sizes": SIZES._replace(k=1)}),
    ],
)
def test_no_part_of_the_state_is_idle(left_out: str, kind: str, name: str, options: dict[str, Any]) -> None:
    """With a part put back to what a new student has, the bits differ: the test above would notice if it were not kept."""
    spec = spec_of(kind, name, options)
    whole = student(spec, BEFORE + BEHIND)
    tensors, numbers = student(spec, BEFORE).state()
    fresh, _ = student(spec, 0).state()
    mixed = {key: fresh.get(key) if key.startswith(left_out) else tensor for key, tensor in tensors.items()}
    again = student(spec, 0, start=False)
    again.restore({key: tensor for key, tensor in mixed.items() if tensor is not None}, numbers)
    for step in range(BEFORE, BEFORE + BEHIND):
        again.step(batch(step))
    layer = whole.state()[0]
    assert any(not torch.equal(tensor, layer[key]) for key, tensor in again.state()[0].items() if key.startswith("layer."))


def test_a_stopped_student_stays_stopped() -> None:
    spec = StudentSpec("s", "layers.0.mlp", "transcoder", SIZES, recipe("ours", "transcoder"))
    made = student(spec, 3)
    made.step(batch(0)._replace(y=torch.full((64, 12), torch.inf)))
    assert made.stopped
    again = student(spec, 0, start=False)
    again.restore(*made.state())
    assert again.stopped == made.stopped and again.steps == 3
