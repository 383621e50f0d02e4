"""Benefit and amplitude shares on layers whose answers are known by hand, and on layers built to fool them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mxd.evals.anatomy.shares import Benefits, Players, Tokens, amplitude, benefits, effective_number, players, summary
from mxd.layers import LAYERS, Edited, MxD, MxDConfig, SparseLayer, Transcoder, TranscoderConfig
from mxd.written import Written, mean_activations

from .hosts import random_layer

KINDS = [kind for kind in LAYERS if kind != "dense"]


def tokens_of(layer: SparseLayer, n: int = 60, *, noise: float = 0.0, seed: int = 0) -> Tokens:
    """Random inputs, and the layer's own output as y, or noise of this size with it; documents of six tokens."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, layer.d_in, generator=generator)
    y = layer(x).y if layer.reads == "input" else x
    return Tokens(x, y + noise * torch.randn(y.shape, generator=generator), torch.arange(n) // 6)


def shares_of(layer: SparseLayer, tokens: Tokens) -> tuple[Written, Players, Benefits]:
    written = Written(layer, tokens.y if layer.reads == "output" else tokens.x)
    known = players(written, tokens, mean_activations(written, tokens.x, tokens.y)[0])
    return written, known, benefits(written, tokens, known)


@pytest.mark.parametrize("kind", KINDS)
def test_benefits_add_up_to_what_the_layer_removes(kind: str) -> None:
    layer = random_layer(kind)
    tokens = tokens_of(layer, noise=0.5)
    _, known, found = shares_of(layer, tokens)
    output = layer(tokens.y if layer.reads == "output" else tokens.x).y
    before = (tokens.y - known.base).square().sum()
    after = (tokens.y - output).square().sum()
    assert float(found.before.sum()) == pytest.approx(float(before), rel=1e-5)
    assert float(found.after.sum()) == pytest.approx(float(after), rel=1e-5)
    assert float(found.phi.sum()) == pytest.approx(float(before - after), rel=1e-5, abs=1e-4 * float(before))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("edited", [False, True])
def test_contributions_add_up_to_the_output_of_every_kind(kind: str, edited: bool) -> None:
    layer = random_layer(kind)
    if edited:
        layer = Edited(layer, scale={1: 0.0, 2: 3.0}, add={3: 0.7})
    tokens = tokens_of(layer)
    written = Written(layer, tokens.y if layer.reads == "output" else tokens.x)
    assert (written.table is None) == (kind in ("cp-mumoe", "mov"))
    for chunk in written.chunks(tokens.x, tokens.y):
        parts = written.units(chunk)
        torch.testing.assert_close(chunk.rest + parts.sum(1), layer(chunk.x).y, rtol=1e-4, atol=1e-4)
        # one unit at a time, as kinds without a table are read
        table, written.table = written.table, None
        torch.testing.assert_close(written.units(chunk), parts, rtol=1e-4, atol=1e-4)
        activation = torch.rand(layer.n_units, generator=torch.Generator().manual_seed(1))
        slow = written.all_at(chunk, activation)
        written.table = table
        torch.testing.assert_close(written.all_at(chunk, activation), slow, rtol=1e-3, atol=1e-3)


def test_shapley_values_are_the_average_over_all_orders() -> None:
    layer = Transcoder(TranscoderConfig(d_in=5, d_out=3, n_units=3, k=3)).requires_grad_(False)
    tokens = tokens_of(layer, noise=1.0)
    written, known, found = shares_of(layer, tokens)
    made = torch.zeros(len(tokens.x), 3, 3)
    for chunk in written.chunks(tokens.x, tokens.y):
        made[chunk.rows].scatter_(1, chunk.code.indices[..., None].expand(-1, -1, 3), written.units(chunk))
    target = tokens.y - known.base

    def value(some: tuple[int, ...]) -> float:
        return float(target.square().sum() - (target - made[:, list(some)].sum(1)).square().sum())

    for n in range(3):
        rises = [value(order[: order.index(n) + 1]) - value(order[: order.index(n)]) for order in itertools.permutations(range(3))]
        assert float(found.phi[:, 1 + n].sum()) == pytest.approx(np.mean(rises), rel=1e-3, abs=1e-3)
    assert float(found.phi[:, 0].abs().sum()) == pytest.approx(0, abs=1e-6)


def mixture(c: Tensor, *, k: int = 1) -> MxD:
    """Expert n fires, with activation x_n, where x_n is positive; z is the last three inputs, h = z."""
    n = len(c)
    layer = MxD(MxDConfig(d_in=n + 3, d_out=3, n_units=n, k=k, d_hidden=3, activation="identity"))
    with torch.no_grad():
        layer.encoder.E.copy_(torch.cat([torch.zeros(n, 3), torch.eye(3)]))
        layer.G.copy_(torch.cat([torch.eye(n), torch.zeros(n, 3)], 1))
        layer.C.copy_(c)
        layer.D.copy_(torch.eye(3))
    return layer.eval().requires_grad_(False)


def inputs(n_units: int, n: int = 240, *, seed: int = 0, strength: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """One expert per token, in turn, with an activation drawn from this range; random values."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.zeros(n, n_units + 3)
    low, high = strength
    x[torch.arange(n), torch.arange(n) % n_units] = low + (high - low) * torch.rand(n, generator=generator)
    x[:, n_units:] = torch.randn(n, 3, generator=generator)
    return x


def of(layer: MxD, x: Tensor) -> Tokens:
    return Tokens(x, layer(x).y, torch.arange(len(x)) // 4 % 12)


def test_decorative_experts_earn_nothing_and_what_they_share_all() -> None:
    layer = mixture(torch.tensor([1.0, -2.0, 0.5]).expand(4, 3))
    found = shares_of(layer, of(layer, inputs(4, strength=(0.5, 2.0))))[2]
    told = summary(found, found, resamples=50, seed=0)
    assert told["explained"]["value"] == pytest.approx(1, abs=1e-6)
    assert told["shared_share"]["value"] == pytest.approx(1, abs=1e-6)
    assert told["shared_share"]["ci95"] == pytest.approx([1, 1], abs=1e-6)
    assert told["top1_share"]["value"] == pytest.approx(0, abs=1e-6)


def test_one_expert_that_matters_is_found() -> None:
    # Three experts write nothing: c̄ = c_0 / 4, and u_0 is what is left of it on all tokens.
    layer = mixture(torch.tensor([[2.0, 2.0, 2.0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]))
    validation, held = (shares_of(layer, of(layer, inputs(4, 4000, seed=seed)))[2] for seed in (1, 2))
    told = summary(validation, held, resamples=50, seed=0)
    # By hand with p = h² of one token: expert 0 fires on one token in four, y = 2h there. u_0 = h/2 everywhere, u_0th = 3h/2 and the
    # others −h/2. φ = ⟨u, 2y − p⟩ with p = y: ⟨u, y⟩: u_0 gives 1/4·(1/2·2), expert 0 1/4·(3/2·2), the others ⟨−h/2, 0⟩ = 0; sum 1.
    assert told["top1_unit"] == 0
    assert told["shared_share"]["value"] == pytest.approx(0.25, abs=0.01)
    assert told["top1_share"]["value"] == pytest.approx(0.75, abs=0.01)
    assert told["effective_units"]["value"] == pytest.approx(1, abs=1e-6)
    assert told["curve"][0] == [1, pytest.approx(1, abs=1e-6)]


def test_equal_experts_of_their_own_count_as_many() -> None:
    signs = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    layer = mixture(signs)
    found = shares_of(layer, of(layer, inputs(4, 4000)))[2]
    told = summary(found, found, resamples=50, seed=0)
    assert told["shared_share"]["value"] == pytest.approx(0, abs=1e-6)
    assert told["effective_units"]["value"] == pytest.approx(4, abs=0.02)
    assert told["harmful_units"] == 0


def test_a_layer_that_does_harm_has_no_shares() -> None:
    layer = mixture(torch.ones(4, 3))
    x = inputs(4)
    found = shares_of(layer, Tokens(x, -layer(x).y, torch.arange(len(x)) % 12))[2]
    told = summary(found, found, resamples=20, seed=0)
    assert told["shared_share"]["value"] is None and "removes nothing" in told["shared_share"]["reason"]
    assert told["explained"]["value"] == pytest.approx(-3, abs=1e-5)


def test_effective_units_of_thousands_of_noisy_units_have_no_interval() -> None:
    """A resample of noisy benefits is noisier than the sample, so a bootstrap's interval need not hold the value it is said to hold."""
    generator = torch.Generator().manual_seed(0)
    phi = torch.randn(40, 3001, generator=generator, dtype=torch.float64) + 0.05
    found = Benefits(phi, phi.sum(1).abs() + 1000.0, torch.zeros(40, dtype=torch.float64))
    told = summary(found, found, resamples=200, seed=0)["effective_units"]
    assert told == {"value": pytest.approx(float(effective_number(phi[:, 1:].sum(0).numpy())), rel=1e-12)}
    drawn = np.random.default_rng(0).multinomial(40, np.full(40, 1 / 40), size=100).astype(np.float64) @ phi[:, 1:].numpy()
    assert np.percentile(effective_number(drawn), 97.5) < told["value"], "why there is none"


def test_a_layer_of_nan_has_no_shares_and_no_error() -> None:
    layer = mixture(torch.ones(4, 3))
    nothing = torch.full((6, 5), math.nan, dtype=torch.float64)
    for found in (Benefits(nothing, nothing[:, 0], nothing[:, 0]), Benefits(nothing, torch.ones(6).double(), nothing[:, 0])):
        told = summary(found, found, resamples=20, seed=0)
        assert all(told[name]["value"] is None for name in ("explained", "shared_share", "top1_share", "effective_units"))
        assert told["curve"] == [] and told["harmful_units"] is None
        assert told.keys() == summary(*[shares_of(layer, of(layer, inputs(4)))[2]] * 2, resamples=5, seed=0).keys()


def test_effective_number_by_hand() -> None:
    shares = np.array([[1.0, 1.0, 0.0, -5.0], [3.0, 0.0, 0.0, 0.0], [-1.0, 0.0, 0.0, 0.0], [0.5, 0.25, 0.25, 0.0]])
    assert effective_number(shares)[[0, 1, 3]] == pytest.approx([2, 1, math.exp(1.5 * math.log(2))])
    assert math.isnan(effective_number(shares)[2])


def amplitude_of(layer: MxD, tokens: Tokens) -> dict[str, object]:
    written = Written(layer, tokens.x)
    return amplitude(written, tokens, mean_activations(written, tokens.x, tokens.y)[0], resamples=50, seed=0)


def test_a_gain_control_has_an_amplitude_share_of_one() -> None:
    # Built to fool N_r and R_c: the output needs the activations, but any expert would do.
    layer = mixture(torch.tensor([1.0, -2.0, 0.5]).expand(4, 3))
    found = amplitude_of(layer, of(layer, inputs(4, 4000, strength=(0.1, 4.0))))
    assert found["value"] == pytest.approx(1, abs=1e-5) and found["ci95"] == pytest.approx([1, 1], abs=1e-5)
    assert found["fvu"] == pytest.approx(0, abs=1e-9) and found["fvu_amplitude"] == pytest.approx(0, abs=1e-5)


def test_where_only_which_expert_counts_amplitude_has_no_share() -> None:
    signs = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    layer = mixture(signs)
    assert amplitude_of(layer, of(layer, inputs(4, 4000)))["value"] == pytest.approx(0, abs=1e-6)


def test_where_a_constant_code_is_as_good_there_is_no_amplitude_share() -> None:
    layer = mixture(torch.ones(4, 3))
    found = amplitude_of(layer, of(layer, inputs(4)))
    assert found["value"] is None and "constant code" in str(found["reason"])


def test_the_same_seed_gives_the_same_figures() -> None:
    layer = random_layer("mxd")
    tokens = tokens_of(layer, noise=0.3)
    twice = [summary(found, found, resamples=40, seed=3) for found in (shares_of(layer, tokens)[2] for _ in range(2))]
    assert twice[0] == twice[1]
