"""The auxiliary loss of dead units: its gradient is that of the dense formula, in gate and table, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mxd.layers import LAYERS, Sizes, SparseLayer, aux_output, build
from mxd.objectives import norm_weighted
from mxd.ops.rows import crowded

SIZES = Sizes(d_in=7, d_out=7, n_units=40, k=3, d_hidden=11)
WITH_UNITS = [kind for kind in LAYERS if build(kind, SIZES._replace(n_units=36)).units() is not None]
DEAD = torch.tensor([1, 4, 5, 17, 18, 30, 31, 33, 39])


def layer_of(kind: str) -> SparseLayer:
    generator = torch.Generator().manual_seed(3)
    layer = build(kind, SIZES, generator=generator).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-1, 1, generator=generator)
    return layer


def dense_aux(layer: SparseLayer, x: Tensor, k: int) -> Tensor:
    """ê in full matrices: scores of all units, those of the living masked out, the k largest kept, times the whole table."""
    units = layer.units()
    assert units is not None
    scores = layer.gate_input(x).detach() @ units.weight.T + units.bias
    alive = torch.ones(layer.n_units, dtype=torch.bool)
    alive[DEAD] = False
    scores = torch.relu(scores.masked_fill(alive, -torch.inf))
    kept = torch.zeros_like(scores).scatter(1, scores.topk(k, dim=1).indices, 1.0)
    mix = torch.where(kept.bool(), scores, torch.zeros_like(scores)) @ units.table
    if kind_is_product(layer):
        z = layer.encode(x).hidden
        assert z is not None
        mix = mix * (z @ layer.get_parameter("D")).detach()
    return mix


def kind_is_product(layer: SparseLayer) -> bool:
    return layer.kind == "mxd"


@pytest.mark.parametrize("ratio", [0, 10**6], ids=["row by row", "crowded"])
@pytest.mark.parametrize("k", [2, 9])
@pytest.mark.parametrize("kind", WITH_UNITS)
def test_gradient_equals_that_of_the_dense_formula(kind: str, k: int, ratio: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crowded, "RATIO", ratio)
    torch.manual_seed(0)
    layer, x, y = layer_of(kind), torch.randn(23, 7, dtype=torch.float64), torch.randn(23, 7, dtype=torch.float64)
    output = layer(x)

    found = norm_weighted(output.y.detach() + aux_output(layer, x, output.code, DEAD, k), y)
    residual = y - output.y.detach()
    right = ((residual - dense_aux(layer, x, k)).square().sum(-1) / y.norm(dim=-1)).mean()
    assert float(found.detach()) == pytest.approx(float(right.detach()), rel=1e-12)

    parameters = dict(layer.named_parameters())
    mine = torch.autograd.grad(found, list(parameters.values()), allow_unused=True)
    theirs = torch.autograd.grad(right, list(parameters.values()), allow_unused=True)
    units = layer.units()
    assert units is not None
    for (name, parameter), one, other in zip(parameters.items(), mine, theirs, strict=True):
        if not any(parameter is row for row in units):
            assert one is None, f"{name} is shared by all units and stays as it is"
            continue
        assert one is not None and other is not None
        assert (one - other).norm() / other.norm() < 1e-12, name
        rows = one.flatten(1).norm(dim=1) if one.dim() > 1 else one.abs()
        assert rows[DEAD].any(), "the dead units learn"
        assert rows.sum() == pytest.approx(float(rows[DEAD].sum())), "and no other"


def test_no_more_units_are_used_than_are_dead() -> None:
    layer, x = layer_of("transcoder"), torch.randn(5, 7, dtype=torch.float64)
    code = layer.encode(x)
    assert torch.equal(aux_output(layer, x, code, DEAD, 500), aux_output(layer, x, code, DEAD, len(DEAD)))


def test_one_dead_unit_by_hand() -> None:
    layer = layer_of("transcoder")
    x = torch.randn(4, 7, dtype=torch.float64)
    units = layer.units()
    assert units is not None
    expected = torch.relu(x @ units.weight[4] + units.bias[4])[:, None] * units.table[4]
    assert torch.allclose(aux_output(layer, x, layer.encode(x), torch.tensor([4]), 8), expected, rtol=1e-12)
