"""Measures of routing on layers whose answers are known by hand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mxd.evals import routing
from mxd.evals.fidelity import HeldOut, activation_statistics
from mxd.evals.routing import Pairs, Parts
from mxd.layers import LAYERS, MxD, MxDConfig
from mxd.layers.controls import Dense, DenseConfig

from .hosts import random_layer

SIGNS = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
"""Rows: clusters (and their experts). Columns: outputs, three orthogonal patterns over the clusters, each with mean 0."""


def routed() -> MxD:
    """Expert n fires, with a = 1, on cluster n; z = h is the value; y = sign of the cluster and output * value."""
    layer = MxD(MxDConfig(d_in=7, d_out=3, n_units=4, k=1, d_hidden=3, activation="identity"))
    with torch.no_grad():
        layer.encoder.E.copy_(torch.cat([torch.zeros(4, 3), torch.eye(3)]))
        layer.G.copy_(torch.cat([torch.eye(4), torch.zeros(4, 3)], 1))
        layer.C.copy_(SIGNS)
        layer.D.copy_(torch.eye(3))
    return layer.eval()


def crossed(repeats: int = 4) -> Tensor:
    """Every cluster with every value in {±1}³: sign and value exactly uncorrelated. x = [cluster one-hot, value]."""
    values = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=3)))
    rows = [torch.cat([torch.eye(4)[n], v]) for n in range(4) for v in values]
    return torch.stack(rows).repeat(repeats, 1)


def pairs(layer: MxD, x: Tensor) -> Pairs:
    with torch.no_grad():
        return Pairs(x, layer(x).y)


def held(tokens: Pairs) -> HeldOut:
    n = len(tokens.x)
    return HeldOut(tokens.x, tokens.y, torch.zeros(n, dtype=torch.bool), torch.arange(n) * 4 // n)


def no_experts() -> Dense:
    """The dense control of `routed`: D = 0, so it always says 0 (the mean of y)."""
    return Dense(DenseConfig(d_in=7, d_out=3, d_hidden=3, activation="identity"))


def test_where_which_expert_fires_is_everything() -> None:
    layer = routed()
    tokens = pairs(layer, crossed())
    found = routing.measure(layer, tokens, tokens, held(tokens), dense=no_experts(), permutations=6, resamples=50, seed=0)
    assert found["fvu"] == 0
    # y is uncorrelated with z, so no constant modulation, no readout of z and no dense student explains any of it.
    for key in ("fvu_null", "fvu_dense", "fvu_best_constant", "fvu_mean_a"):
        assert found[key] == pytest.approx(1, abs=1e-6), key
    for key in ("n_r", "g_r", "r_c"):
        assert found[key]["value"] == pytest.approx(1, abs=1e-6), key
        assert found[key]["ci95"] == pytest.approx([1, 1], abs=1e-6), key
    # A 4-cycle of the experts turns one pattern of signs into its negative (undone by the refitted gain) and makes the other
    # two orthogonal to what they were: two of three outputs are lost.
    assert found["id"]["value"] == pytest.approx(2 / 3, abs=1e-6)
    assert found["experts_matter"] is True
    assert found["live_experts"] == 4 and found["notes"] == []
    assert found["modulation_cv"] is None  # the modulation's means are 0


def test_decorative_experts_change_nothing_whoever_fires() -> None:
    layer = routed()
    with torch.no_grad():
        layer.C.copy_(torch.tensor([2.0, -1.0, 0.5]).expand(4, 3))
    tokens = pairs(layer, crossed())
    noisy = Pairs(tokens.x, tokens.y + 0.3 * torch.randn(tokens.y.shape, generator=torch.Generator().manual_seed(0)))
    found = routing.measure(layer, noisy, noisy, held(noisy), dense=None, permutations=5, resamples=50, seed=0)
    # Fitted and measured on the same tokens, a refit can only help, and here only by the noise it fits.
    assert -0.01 < found["id"]["value"] <= 1e-6
    assert -0.01 < found["r_c"]["value"] <= 1e-6
    assert found["fvu_mean_a"] == pytest.approx(found["fvu"], rel=1e-5)
    assert found["modulation_cv"] == pytest.approx(0, abs=1e-6)
    assert abs(found["n_r"]["value"]) < 0.05


def test_constant_routing_needs_no_experts() -> None:
    # G = 0: the same experts with the same a on every token, each with a row of its own; only the constant Cᵀa counts.
    layer = routed()
    with torch.no_grad():
        layer.G.zero_()
        layer.b_G.copy_(torch.tensor([3.0, 1.0, 0.5, 0.2]))
        layer.C.copy_(torch.rand(4, 3, generator=torch.Generator().manual_seed(0)) + 0.5)
    tokens = pairs(layer, crossed())
    found = routing.measure(layer, tokens, tokens, held(tokens), dense=no_experts(), permutations=5, resamples=50, seed=0)
    # A single live expert cannot trade places with another, and the gain would undo it if it could.
    for key in ("id", "r_c"):
        assert found[key]["value"] == pytest.approx(0, abs=1e-6), key
    assert found["live_experts"] == 1
    assert found["fvu_mean_a"] == pytest.approx(0, abs=1e-6)


def test_a_perfect_readout_of_z_gives_finite_figures_and_a_note() -> None:
    torch.manual_seed(0)
    layer = random_layer("mxd")
    assert isinstance(layer, MxD)
    x = torch.randn(400, 16)
    with torch.no_grad():
        y = layer.encoder(x) @ torch.randn(24, 16)
    tokens = Pairs(x, y)
    found = routing.measure(layer, tokens, tokens, held(tokens), dense=random_layer("dense"), permutations=2, resamples=50, seed=0)
    assert found["fvu_null"] < 1e-8
    assert math.isfinite(found["n_r"]["value"]) and found["n_r"]["value"] < -1e6
    assert found["experts_matter"] is False
    assert "negative by construction" in found["notes"][0]


def test_without_a_dense_control_there_is_no_gain_and_no_verdict() -> None:
    layer = routed()
    tokens = pairs(layer, crossed())
    found = routing.measure(layer, tokens, tokens, held(tokens), dense=None, permutations=2, resamples=20, seed=0)
    assert found["g_r"]["value"] is None and found["g_r"]["ci95"] == [None, None]
    assert "no dense control" in found["g_r"]["reason"]
    assert found["fvu_dense"] is None and found["experts_matter"] is None


def test_the_best_rival_is_chosen_on_validation_text_and_measured_on_held_out() -> None:
    layer = routed()
    tokens = pairs(layer, crossed())
    near, far = no_experts(), no_experts()
    with torch.no_grad():
        near.b.fill_(0.1)
        far.b.fill_(1.0)
    # On validation text the far one is the better: it is taken, though the other is better where it is measured.
    lifted = Pairs(tokens.x, tokens.y + 1)
    how: dict[str, Any] = {"permutations": 2, "resamples": 20, "seed": 0}
    found = routing.measure(layer, tokens, lifted, held(tokens), dense=near, rivals={"far": far, "near": near}, **how)
    assert found["g_r_best"]["student"] == "far"
    assert found["g_r_best"]["fvu"] == pytest.approx(2, abs=1e-5) and found["fvu_dense"] == pytest.approx(1.01, abs=1e-5)
    # FVU(ŷ) = 0
    assert found["g_r_best"]["value"] == pytest.approx(1, abs=1e-6) and found["g_r"]["value"] == pytest.approx(1, abs=1e-6)
    without = routing.measure(layer, tokens, tokens, held(tokens), dense=near, **how)
    assert "g_r_best" not in without


def test_fvu_is_the_one_of_the_table_and_seeds_repeat() -> None:
    layer = random_layer("mxd")
    assert isinstance(layer, MxD)
    generator = torch.Generator().manual_seed(1)
    tokens = Pairs(torch.randn(300, 16, generator=generator), torch.randn(300, 16, generator=generator))
    twice = [
        routing.measure(layer, tokens, tokens, held(tokens), dense=random_layer("dense"), permutations=3, resamples=30, seed=5)
        for _ in range(2)
    ]
    assert twice[0] == twice[1]
    table = activation_statistics(layer, held(tokens), resamples=30, seed=5)
    assert twice[0]["fvu"] == pytest.approx(table["fvu"], rel=1e-5)
    dense = activation_statistics(random_layer("dense"), held(tokens), resamples=30, seed=5)
    assert twice[0]["fvu_dense"] == pytest.approx(dense["fvu"], rel=1e-6)
    assert twice[0]["g_r"]["value"] == pytest.approx(1 - table["fvu"] / dense["fvu"], rel=1e-5)


def test_ridge_is_least_squares_where_there_is_plenty_of_data() -> None:
    layer = random_layer("mxd")
    assert isinstance(layer, MxD)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(900, 16, generator=generator)
    with torch.no_grad():
        z = layer.encoder(x)
    y = z @ torch.randn(24, 16, generator=generator) + 1.5 + torch.randn(900, 16, generator=generator)
    fit, validation = Pairs(x[:600], y[:600]), Pairs(x[600:], y[600:])
    ridge = routing.fit_ridge(layer, fit, validation)
    design = torch.cat([z, torch.ones(900, 1)], 1).double()
    best = torch.linalg.lstsq(design[:600], y[:600].double()).solution
    expected = (y[600:] - design[600:] @ best).square().sum()
    assert float(routing.ridge_errors(layer, ridge, validation).sum()) <= float(expected) * 1.001
    torch.testing.assert_close(ridge.bias.double(), best[-1], rtol=0.05, atol=0.05)


def test_ridge_on_a_dead_encoder_is_the_mean() -> None:
    layer = random_layer("mxd")
    assert isinstance(layer, MxD)
    with torch.no_grad():
        for parameter in layer.encoder.parameters():
            parameter.zero_()
    tokens = Pairs(torch.randn(50, 16), torch.randn(50, 16))
    ridge = routing.fit_ridge(layer, tokens, tokens)
    assert ridge.penalty == math.inf and not ridge.weight.any()
    torch.testing.assert_close(ridge.bias, tokens.y.mean(0), rtol=1e-5, atol=1e-6)


def test_gain_and_bias_are_least_squares_and_zero_where_nothing_varies() -> None:
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(200, 3, generator=generator) + 5
    u[:, 2] = 7
    y = torch.randn(200, 3, generator=generator) + 2 * u
    gain, bias = routing.fit_affine(u, y)
    for o in range(2):
        design = torch.stack([u[:, o], torch.ones(200)], 1).double()
        expected = torch.linalg.lstsq(design, y[:, o : o + 1].double()).solution.squeeze(1)
        torch.testing.assert_close(torch.stack([gain[o], bias[o]]).double(), expected, rtol=1e-4, atol=1e-4)
    assert gain[2] == 0
    torch.testing.assert_close(bias[2], y[:, 2].mean(), rtol=1e-5, atol=1e-5)


def test_permutations_move_every_live_expert_within_its_stratum() -> None:
    # 64 experts live, expert n firing n + 1 times with activation 1; 6 more never fire.
    indices = torch.cat([torch.full((n + 1,), n) for n in range(64)])[:, None]
    parts = Parts(torch.ones(len(indices), 1), indices, torch.zeros(len(indices), 1))
    for permutation in (made := routing.expert_permutations(parts, 70, count=5, seed=0)):
        assert sorted(permutation.tolist()) == list(range(70))
        assert torch.equal(permutation[64:], torch.arange(64, 70))
        assert (permutation[:64] != torch.arange(64)).all()
        assert torch.equal(permutation[:64] // 16, torch.arange(64) // 16)  # four frequency groups of sixteen
    assert len({tuple(p.tolist()) for p in made}) == 5


def test_a_value_of_zero_is_not_firing() -> None:
    parts = Parts(torch.tensor([[1.0, 0.0]]), torch.tensor([[0, 1]]), torch.zeros(1, 1))
    (permutation,) = routing.expert_permutations(parts, 2, count=1, seed=0)
    assert permutation.tolist() == [0, 1]


def test_permuted_modulation_uses_the_other_rows() -> None:
    layer = routed()
    parts = routing.parts_of(layer, crossed(1))
    shift = torch.tensor([1, 2, 3, 0])
    expected = SIGNS[shift[parts.indices.squeeze(1)]]
    assert torch.equal(routing.modulation(layer, parts, shift), expected)
    torch.testing.assert_close(routing.mean_activation(parts, 4), torch.full((4,), 0.25))


def test_modulation_cv_by_hand() -> None:
    # Two outputs: (1, 3) has mean 2 and variance 1, (4, 4) mean 4 and variance 0: √(1 / (4 + 16)).
    assert routing.modulation_cv(torch.tensor([[1.0, 4.0], [3.0, 4.0]])) == pytest.approx(math.sqrt(1 / 20))
    assert math.isnan(routing.modulation_cv(torch.zeros(3, 2)))


def test_probe_tells_decoration_from_routing() -> None:
    layer = routed()
    tokens = pairs(layer, crossed())
    found = routing.probe(layer, *tokens)
    assert found["fvu"] == 0 and found["modulation_cv"] is None
    assert found["id"] == pytest.approx(2 / 3, abs=1e-6)
    assert found["fvu_best_constant"] == pytest.approx(1, abs=1e-6) and found["fvu_mean_a"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("kind", LAYERS)
def test_probe_of_every_kind_leaves_it_in_training(kind: str) -> None:
    layer = random_layer(kind).requires_grad_(True).train()
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 16, generator=generator), torch.randn(60, 16, generator=generator)
    found = routing.probe(layer, x, y)
    with torch.no_grad():
        output = layer((y if kind == "topk-sae" else x)[30:]).y
    expected = (y[30:] - output).square().sum() / (y[30:] - y[30:].mean(0)).square().sum()
    assert found["fvu"] == pytest.approx(float(expected), rel=1e-5)
    assert set(found) == {"fvu", *(("fvu_mean_a", "fvu_best_constant", "id", "modulation_cv") if kind in ("mxd", "mxd-pk") else ())}
    assert all(p.grad is None and p.requires_grad for p in layer.parameters()) and layer.training


def test_probe_of_an_untrained_layer_and_of_a_constant_y_is_defined_or_none() -> None:
    layer = MxD(MxDConfig(d_in=4, d_out=3, n_units=8, k=2, d_hidden=6))
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    found = routing.probe(layer, x, x[:, :3])
    # D = 0: every variant is a constant; refitted to the first half's mean it misses the second half's by a little.
    assert found["fvu_best_constant"] is not None and found["fvu_best_constant"] > 1
    assert routing.probe(layer, x, torch.zeros(40, 3))["fvu"] is None
