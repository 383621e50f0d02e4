"""The gate without TopK: every unit with a positive score, whatever the memory, and TopK again where K is smaller."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mxd.layers import Edited, Sizes, SparseLayer, build
from mxd.layers.active import active, relu_gate
from mxd.ops import topk_gate, using
from mxd.ops.transpose import Plan

pytestmark = pytest.mark.usefixtures("one_thread")

WITH_OWN_ROWS = ["mxd", "cp-mumoe", "mov", "transcoder", "skip-transcoder", "topk-sae", "additive"]


def gate(shift: float, n_units: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and a bias that leaves about half of the units active at 0, few at -3."""
    generator = torch.Generator().manual_seed(2)
    x, weight = (torch.randn(shape, 6, generator=generator, dtype=torch.float64) for shape in (30, n_units))
    return x, weight, torch.full((n_units,), shift, dtype=torch.float64)


def spread(values: Tensor, indices: Tensor, n_units: int) -> Tensor:
    return values.new_zeros(len(values), n_units).scatter_add(1, indices, values)


@pytest.mark.parametrize("shift", [0.0, -7.0, -1e3])
def test_all_positive_scores_are_active_with_the_gradients_of_relu(shift: float) -> None:
    x, weight, bias = gate(shift, n_units=200)
    for tensor in (x, weight, bias):
        tensor.requires_grad_()
    dense = (x @ weight.T + bias).relu()
    values, indices = relu_gate(x, weight, bias)
    most = max(1, int((dense > 0).sum(1).max()))
    assert values.shape[1] == (200 if 16 * most > 200 else most)
    found = spread(values, indices, 200)
    assert torch.allclose(found, dense, rtol=1e-13, atol=1e-13)
    assert all(len(set(row)) == len(row) for row in indices.tolist())
    upstream = torch.randn_like(dense)
    for mine, right in zip(
        torch.autograd.grad(found, (x, weight, bias), upstream), torch.autograd.grad(dense, (x, weight, bias), upstream), strict=True
    ):
        assert torch.allclose(mine, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shift", [0.0, -6.0])
def test_slices_of_tokens_give_the_same_code(shift: float) -> None:
    x, weight, bias = gate(shift, n_units=200)
    with torch.no_grad():
        whole = relu_gate(x, weight, bias)
        with using(scores_mib=0.004):  # five tokens at a time
            sliced = relu_gate(x, weight, bias)
    assert whole[0].shape == sliced[0].shape
    assert torch.allclose(spread(*sliced, 200), spread(*whole, 200), rtol=1e-13)
    assert all(len(set(row)) == len(row) for row in sliced[1].tolist())


def test_no_tokens_and_no_active_unit() -> None:
    x, weight, bias = gate(-1e3)
    values, indices = relu_gate(x[:0], weight, bias)
    assert len(values) == len(indices) == 0 and values.shape == indices.shape
    assert not relu_gate(x, weight, bias)[0].any()


def test_below_the_number_of_units_it_is_top_k() -> None:
    x, weight, bias = gate(0.0)
    mine, theirs = active(x, weight, bias, 5, Plan()), topk_gate(x, weight, bias, 5, Plan())
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert float((active(x, weight, bias, 64, Plan())[0] > 0).sum(1).double().mean()) > 20


def free_layer(kind: str, shift: float) -> SparseLayer:
    generator = torch.Generator().manual_seed(0)
    layer = build(kind, Sizes(6, 6, 64, 64, 9, rank=4), generator=generator)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        layer.gates()[0][1].fill_(shift)
    return layer.double()


@pytest.mark.parametrize("shift", [0.0, -6.0])
@pytest.mark.parametrize("kind", WITH_OWN_ROWS)
def test_every_kind_takes_a_gate_without_top_k(kind: str, shift: float) -> None:
    """Against TopK of all units by the ordinary operation, which is slow and the same function."""
    layer = free_layer(kind, shift)
    x = torch.randn(11, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    out = layer(x)
    weight, bias = layer.gates()[0]
    values, indices = topk_gate(layer.gate_input(x), weight, bias, 64, Plan())
    right = layer.decode(layer.encode(x)._replace(values=values, indices=indices), x).y
    assert torch.allclose(out.y, right, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(right)
    parameters = list(layer.parameters())
    mine, exact = (torch.autograd.grad(y, parameters, upstream) for y in (out.y, right))
    assert all(torch.allclose(a, b, rtol=1e-11, atol=1e-11) for a, b in zip(mine, exact, strict=True))
    assert layer.encode(x[None]).values.shape[:2] == (1, 11)


@pytest.mark.parametrize("kind", WITH_OWN_ROWS)
def test_a_gate_without_top_k_can_be_edited(kind: str) -> None:
    layer = free_layer(kind, -3.0)
    x = torch.randn(11, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    code = layer.encode(x)
    unit = int(code.indices[code.values > 0][0])
    edited = Edited(layer, scale={unit: 0.0})(x)
    ablated = layer.decode(code._replace(values=torch.where(code.indices == unit, 0.0, code.values)), x)
    assert torch.allclose(edited.y, ablated.y, rtol=1e-12, atol=1e-12) and not torch.allclose(edited.y, layer(x).y)
