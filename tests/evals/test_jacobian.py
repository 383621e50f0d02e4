"""Jacobians: those of maps known by hand, and the two parts of a stand-in's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from mxd.evals.anatomy import jacobian
from mxd.layers import LAYERS, MxD, SparseLayer
from mxd.layers.controls import Dense, DenseConfig

from .hosts import random_layer, tiny_llama

HOOKPOINT = "layers.1.mlp"


def told(layer: SparseLayer, x: torch.Tensor) -> dict[str, Any]:
    found = jacobian.products(layer, tiny_llama(), HOOKPOINT, x, lambda _: None)
    return jacobian.summary(found, torch.arange(len(x)) // 2, resamples=50, seed=0)


def some(n: int = 6) -> torch.Tensor:
    return torch.randn(n, 16, generator=torch.Generator().manual_seed(0))


def test_that_of_a_linear_map_is_its_matrix() -> None:
    matrix = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    found = jacobian.of_mlp(lambda x: x @ matrix, torch.randn(4, 5))
    torch.testing.assert_close(found, matrix.t().expand(4, 3, 5))


def test_that_of_a_constant_is_zero() -> None:
    assert not jacobian.of_mlp(lambda x: torch.ones(len(x), 3), torch.randn(4, 5)).any()
    assert not jacobian.jacobian(torch.ones(4, 3), torch.randn(4, 5)).any()


@pytest.mark.parametrize("kind", LAYERS)
def test_the_parts_add_up_to_the_whole_for_every_kind(kind: str) -> None:
    layer, host, x = random_layer(kind), tiny_llama(), some(4)
    mlp = jacobian.mlp_of(host, HOOKPOINT)
    dense, routing = jacobian.split(layer, mlp, x)
    whole = torch.autograd.functional.jacobian(lambda x: layer(mlp(x) if layer.reads == "output" else x).y, x)
    assert isinstance(whole, torch.Tensor)
    each = torch.stack([whole[t, :, t] for t in range(len(x))])
    torch.testing.assert_close(dense + routing, each, rtol=1e-4, atol=1e-4)
    assert routing.any() == (kind != "dense")
    assert dense.any() == (kind not in ("transcoder", "topk-sae"))


def test_the_parts_of_an_mxd_by_their_formulas() -> None:
    layer, x = random_layer("mxd"), some(3)
    assert isinstance(layer, MxD)
    dense, routing = jacobian.split(layer, lambda x: x, x)
    encoder = layer.encoder
    assert encoder.E_gate is not None and encoder.b_gate is not None
    up, gate = x @ encoder.E + encoder.b_E, x @ encoder.E_gate + encoder.b_gate
    sigma = torch.sigmoid(gate)
    slope = sigma * (1 + gate * (1 - sigma))
    code = layer.encode(x)
    for t in range(len(x)):
        a = torch.zeros(layer.n_units)
        a[code.indices[t]] = code.values[t]
        dz = (slope[t] * up[t])[:, None] * encoder.E_gate.T + F.silu(gate[t])[:, None] * encoder.E.T
        torch.testing.assert_close(dense[t], (a @ layer.C)[:, None] * (layer.D.T @ dz), rtol=1e-4, atol=1e-4)
        h = (F.silu(gate[t]) * up[t]) @ layer.D
        torch.testing.assert_close(routing[t], h[:, None] * (layer.C.T @ ((a > 0)[:, None] * layer.G)), rtol=1e-4, atol=1e-4)


def perfect() -> Dense:
    """The host's own MLP as a dense layer."""
    weights = tiny_llama().weights(HOOKPOINT)
    layer = Dense(DenseConfig(d_in=16, d_out=16, d_hidden=24, activation="silu", glu=True))
    assert weights.E_gate is not None and layer.encoder.E_gate is not None
    with torch.no_grad():
        layer.encoder.E.copy_(weights.E)
        layer.encoder.E_gate.copy_(weights.E_gate)
        layer.D.copy_(weights.D)
    return layer.requires_grad_(False)


def test_a_perfect_layer_has_cosine_one_and_no_error() -> None:
    found = told(perfect(), some())
    for key in ("cosine", "cosine_dense"):
        assert found[key]["value"] == pytest.approx(1, abs=1e-6) and found[key]["ci95"] == pytest.approx([1, 1], abs=1e-6)
    assert found["relative_error"]["value"] == pytest.approx(0, abs=1e-5)
    assert found["routing_norm"]["value"] == 0
    assert found["tokens"] == 6 and found["documents"] == 3


def test_scale_does_not_move_the_cosine_but_the_error() -> None:
    layer = perfect()
    with torch.no_grad():
        layer.D.mul_(-2)
    found = told(layer, some())
    assert found["cosine"]["value"] == pytest.approx(-1, abs=1e-6)
    assert found["relative_error"]["value"] == pytest.approx(3, abs=1e-5)


def test_a_layer_that_is_constant_has_cosine_zero() -> None:
    layer = perfect()
    with torch.no_grad():
        layer.D.zero_()
    found = told(layer, some())
    assert found["cosine"]["value"] == 0 and found["relative_error"]["value"] == pytest.approx(1)


def test_decorative_experts_move_nothing() -> None:
    # One expert always on, with a bias far above what the input moves: the routing part is nearly nothing.
    weights = tiny_llama().weights(HOOKPOINT)
    layer = random_layer("mxd")
    assert isinstance(layer, MxD) and weights.E_gate is not None and layer.encoder.E_gate is not None
    with torch.no_grad():
        layer.encoder.E.copy_(weights.E)
        layer.encoder.b_E.zero_()
        layer.encoder.E_gate.copy_(weights.E_gate)
        assert layer.encoder.b_gate is not None
        layer.encoder.b_gate.zero_()
        layer.D.copy_(weights.D)
        layer.C.fill_(1e-4 / 4)
        layer.b_G.fill_(1e4)
    found = told(layer, some())
    assert found["cosine"]["value"] == pytest.approx(1, abs=1e-3)
    assert found["cosine_dense"]["value"] == pytest.approx(found["cosine"]["value"], abs=1e-3)
    assert found["routing_norm"]["value"] < 0.01


def test_in_pieces_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = random_layer("skip-transcoder"), some()
    whole = told(layer, x)
    monkeypatch.setattr(jacobian, "NUMBERS_AT_ONCE", 2 * 16 * 16)
    pieces = told(layer, x)
    assert pieces["cosine"]["value"] == pytest.approx(whole["cosine"]["value"], rel=1e-6)
