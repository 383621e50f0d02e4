"""Units taken out and replaced: known answers, and layers built to fool the test."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from mxd.evals.anatomy import causality
from mxd.evals.anatomy.causality import (
    discoveries,
    effects,
    exchanged,
    identity_fvu,
    identity_nats,
    p_values,
    replacements,
    summary,
)
from mxd.layers import LAYERS, SparseLayer
from mxd.written import Written, mean_activations

from .hosts import random_layer, tiny_llama
from .test_shares import inputs, mixture, of, tokens_of

KINDS = [kind for kind in LAYERS if kind != "dense"]


def told(layer: SparseLayer, tokens: causality.Tokens) -> dict[str, Any]:
    written = Written(layer, tokens.y if layer.reads == "output" else tokens.x)
    frequency = mean_activations(written, tokens.x, tokens.y)[1]
    return summary(effects(written, tokens, frequency, seed=0), resamples=50, seed=0)


@pytest.mark.parametrize("kind", KINDS)
def test_removal_and_replacement_are_what_the_layer_itself_gives(kind: str) -> None:
    layer = random_layer(kind)
    tokens = tokens_of(layer, 24, noise=0.5)
    read = tokens.y if layer.reads == "output" else tokens.x
    written = Written(layer, read)
    frequency = mean_activations(written, tokens.x, tokens.y)[1]
    found = effects(written, tokens, frequency, seed=0)
    others = replacements(frequency, count=causality.REPLACEMENTS, seed=0)
    code = layer.encode(read)
    own = (tokens.y - layer.decode(code, read).y).square().sum(1)
    unit = int(found.fired.sum(0).argmax())
    hit = (code.indices == unit) & (code.values > 0)
    assert float(found.fired[:, unit].sum()) == int(hit.sum())
    without = layer.decode(code._replace(values=code.values.masked_fill(hit, 0)), read).y
    rise = ((tokens.y - without).square().sum(1) - own).sum()
    assert float(found.removal[:, unit].sum()) == pytest.approx(float(rise), rel=1e-3, abs=1e-3)
    rises = [
        ((tokens.y - layer.decode(code._replace(indices=code.indices.where(~hit, other[unit])), read).y).square().sum(1) - own).sum()
        for other in others
    ]
    assert float(found.identity[:, unit].sum()) == pytest.approx(float(sum(rises)) / len(rises), rel=1e-3, abs=1e-3)


def test_identical_experts_have_no_identity_though_removing_them_hurts() -> None:
    # Decorative: δ is positive for every one of them, so δ alone would be fooled; κ is exactly 0.
    layer = mixture(torch.tensor([1.0, -2.0, 0.5]).expand(4, 3))
    found = told(layer, of(layer, inputs(4, 480)))
    assert found["tested"] == 4 and found["untested"] == 0
    assert found["identity"]["mean"]["value"] == 0 and found["identity"]["share_positive"] == found["identity"]["share_negative"] == 0
    assert found["removal"]["share_positive"] == 1 and found["difference"]["share_positive"] == 1
    assert found["removal"]["mean"]["value"] == pytest.approx(1, rel=0.05)


def test_experts_with_something_of_their_own_are_all_found() -> None:
    signs = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    layer = mixture(signs)
    found = told(layer, of(layer, inputs(4, 480)))
    # Another's signs are wrong for two of three outputs, each by 2h: 4 * 2/3 of what there is to explain; without, all of it is lost.
    assert found["identity"]["mean"]["value"] == pytest.approx(8 / 3, rel=0.1)
    assert found["removal"]["mean"]["value"] == pytest.approx(1, rel=0.05)
    assert found["identity"]["share_positive"] == 1
    assert found["difference"]["share_negative"] == 1 and found["difference"]["share_positive"] == 0


def test_units_that_say_nothing_of_y_are_not_taken_for_causal() -> None:
    # 60 experts with rows of their own, and a y that has nothing to do with them: no one is better than another.
    generator = torch.Generator().manual_seed(0)
    layer = mixture(torch.randn(60, 3, generator=generator).div(10))
    x = inputs(60, 7200)
    noise = torch.randn(len(x), 3, generator=generator) * 5
    found = told(layer, causality.Tokens(x, noise, torch.arange(len(x)) // 60 % 12))
    assert found["tested"] == 60
    assert found["identity"]["share_positive"] <= 0.05 and found["identity"]["share_negative"] <= 0.05


def test_units_in_few_documents_are_not_tested() -> None:
    layer = mixture(torch.eye(3).repeat(2, 1)[:4])
    tokens = of(layer, inputs(4, 240))
    found = told(layer, tokens._replace(documents=torch.arange(240) // 60))
    assert found["tested"] == 0 and found["untested"] == 4
    assert found["identity"]["share_positive"] is None and found["strongest"] == []
    assert found["removal"]["mean"]["value"] is not None


def test_p_values_are_those_of_a_t_test() -> None:
    sums = np.random.default_rng(0).normal(0.3, 1, (12, 4))
    sums[3:7, 1] = np.nan
    sums[:, 2] = 0
    sums[:, 3] = 2
    expected: list[Any] = [stats.ttest_1samp(column[np.isfinite(column)], 0) for column in sums[:, :2].T]
    assert p_values(sums) == pytest.approx([*(test.pvalue for test in expected), 1, 0])


def test_benjamini_and_hochberg_by_hand() -> None:
    # Of five at 5 %: the largest i with p_(i) <= i/100 is 3, so the three smallest go, .03 though it is above .02 among them.
    p = np.array([0.2, 0.03, 0.001, 0.025, 0.9])
    assert discoveries(p).tolist() == [False, True, True, True, False]
    assert not discoveries(np.array([0.06, 0.2])).any() and len(discoveries(np.array([]))) == 0


def test_replacements_are_of_like_frequency_and_never_oneself() -> None:
    frequency = torch.cat([torch.zeros(5), torch.arange(1.0, 65)])
    for permutation in (made := replacements(frequency, count=3, seed=0)):
        assert sorted(permutation.tolist()) == list(range(69))
        assert torch.equal(permutation[:5], torch.arange(5))
        assert (permutation[5:] != torch.arange(5, 69)).all()
        assert ((permutation[5:] - 5) // 16 == torch.arange(64) // 16).all()
    assert len({tuple(p.tolist()) for p in made}) == 3


def test_exchange_costs_nothing_where_experts_are_alike_and_much_where_they_are_not() -> None:
    signs = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    for c, expected in ((torch.ones(4, 3), 0.0), (signs, 2 / 3)):
        layer = mixture(c)
        tokens = of(layer, inputs(4, 4000))
        found = identity_fvu(exchanged(layer, tokens, seed=0), tokens, resamples=50, seed=0)
        assert found["value"] == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_identity_in_nats_is_the_rise_of_kl(kind: str) -> None:
    host, layer = tiny_llama(), random_layer(kind)
    ids = torch.randint(3, 60, (12, 10), generator=torch.Generator().manual_seed(0))
    x, y = (part.flatten(0, 1) for part in host.read(ids, [1])["layers.1.mlp"])
    module = exchanged(layer, causality.Tokens(x, y, torch.arange(len(x)) // 10), seed=0)
    found = identity_nats(host, "layers.1.mlp", module, ids, torch.arange(12) // 2, resamples=50, seed=0)
    host_p = host.logits(ids).log_softmax(-1)

    def kl(stand_in: torch.nn.Module) -> float:
        with host.replace({"layers.1.mlp": stand_in}):
            other = host.logits(ids).log_softmax(-1)
        return float((host_p.exp() * (host_p - other)).sum(-1)[:, :-1].mean())

    assert found["kl"] == pytest.approx(kl(layer), rel=1e-4)
    assert found["value"] == pytest.approx(kl(module) - kl(layer), rel=1e-3, abs=1e-5)
    assert found["sequences"] == 12 and found["ci95"][0] <= found["value"] <= found["ci95"][1]
