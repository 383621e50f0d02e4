"""Cross-entropy with the MLP swapped, and errors and firing on its output: perfect, zero, and by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mxd.evals import fidelity
from mxd.evals.fidelity import Constant, HeldOut, Swap, activation_statistics, recovered, swapped_losses
from mxd.host import Host
from mxd.layers import Code, SparseLayer, Transcoder, TranscoderConfig

from .hosts import random_layer, tiny_llama

HOOKPOINT = "layers.1.mlp"


@pytest.fixture(scope="module")
def host() -> Host:
    return tiny_llama()


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, 63, (7, 12), generator=torch.Generator().manual_seed(0))


class ZeroLayer(Transcoder):
    """A transcoder that returns exactly 0."""

    def __init__(self) -> None:
        super().__init__(TranscoderConfig(16, 16, 8, 2))
        nn.init.zeros_(self.W_dec)


class SAEOfNothing(nn.Module):
    """Hands the MLP's own output through."""

    reads = "output"

    def forward(self, y: Tensor) -> Tensor:
        return y


def test_a_perfect_layer_costs_exactly_nothing(host: Host, ids: Tensor) -> None:
    swaps = {"own": Swap(HOOKPOINT, host.mlp(HOOKPOINT)), "sae": Swap(HOOKPOINT, SAEOfNothing())}
    base, found = swapped_losses(host, ids, swaps)
    for losses in found.values():
        assert torch.equal(losses.ce, base.ce)
        assert torch.equal(losses.kl, torch.zeros(7, dtype=torch.float64))
        assert torch.equal(losses.top1, torch.ones(7, dtype=torch.float64))


def test_a_zero_layer_is_zero_ablation_and_not_the_host(host: Host, ids: Tensor) -> None:
    swaps = {"zero layer": Swap(HOOKPOINT, ZeroLayer()), "ablation": Swap(HOOKPOINT, Constant(torch.zeros(16)))}
    base, found = swapped_losses(host, ids, swaps)
    for mine, theirs in zip(found["zero layer"], found["ablation"], strict=True):
        assert torch.equal(mine, theirs)
    assert not torch.equal(found["ablation"].ce, base.ce)
    assert float(found["ablation"].kl.min()) > 1e-3


def test_losses_are_those_of_torch(host: Host, ids: Tensor) -> None:
    layer = random_layer("mxd")
    base, found = swapped_losses(host, ids, {"x": Swap(HOOKPOINT, layer)})
    own = host.logits(ids)[:, :-1].double().log_softmax(-1)
    with host.replace({HOOKPOINT: layer}):
        other = host.logits(ids)[:, :-1].double().log_softmax(-1)
    ce = -own.gather(-1, ids[:, 1:, None]).squeeze(-1).mean(1)
    torch.testing.assert_close(base.ce, ce, rtol=1e-6, atol=1e-6)
    ce = -other.gather(-1, ids[:, 1:, None]).squeeze(-1).mean(1)
    torch.testing.assert_close(found["x"].ce, ce, rtol=1e-6, atol=1e-6)
    kl = (own.exp() * (own - other)).sum(-1).mean(1)
    torch.testing.assert_close(found["x"].kl, kl, rtol=1e-5, atol=1e-6)
    same = (own.argmax(-1) == other.argmax(-1)).double().mean(1)
    torch.testing.assert_close(found["x"].top1, same)


def test_chunks_change_nothing_and_progress_is_told(host: Host, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    swaps = {"x": Swap(HOOKPOINT, random_layer("transcoder"))}
    whole = swapped_losses(host, ids, swaps)[1]["x"]
    monkeypatch.setattr(fidelity, "LOGIT_BYTES", 2 * 4 * ids.shape[1] * 63)
    told: list[int] = []
    parts = swapped_losses(host, ids, swaps, told.append)[1]["x"]
    assert told == [2, 4, 6, 7]
    torch.testing.assert_close(parts.ce, whole.ce, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(parts.kl, whole.kl, rtol=1e-4, atol=1e-6)


class TwoWordHost:
    """A host by hand: two words; the chance of word 1 is what the 'MLP' says, 1/2 by itself."""

    chance = 0.5

    def logits(self, ids: Tensor) -> Tensor:
        odds = math.log(self.chance / (1 - self.chance))
        return torch.tensor([0.0, odds]).expand(*ids.shape, 2).clone()

    @contextmanager
    def remember(self, keys: set[str]) -> Iterator[dict[str, Any]]:
        yield {}

    @contextmanager
    def resume(self, memory: dict[str, Any], key: str) -> Iterator[None]:
        yield

    @contextmanager
    def replace(self, modules: dict[str, Any]) -> Iterator[None]:
        (module,) = modules.values()
        self.chance = float(module(torch.zeros(1)))
        try:
            yield
        finally:
            self.chance = 0.5


def test_cross_entropy_kl_and_agreement_by_hand() -> None:
    ids = torch.tensor([[0, 1, 1], [1, 0, 1]])
    base, found = swapped_losses(TwoWordHost(), ids, {"sure": Swap("mlp", Constant(torch.tensor([0.75])))})  # type: ignore[arg-type]
    torch.testing.assert_close(base.ce, torch.full((2,), math.log(2), dtype=torch.float64), rtol=1e-6, atol=0)
    # Targets 1, 1 cost log 4/3 each; targets 0, 1 cost log 4 and log 4/3. The last position predicts nothing that is known.
    expected = torch.tensor([math.log(4 / 3), (math.log(4) + math.log(4 / 3)) / 2], dtype=torch.float64)
    torch.testing.assert_close(found["sure"].ce, expected, rtol=1e-6, atol=0)
    kl = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    torch.testing.assert_close(found["sure"].kl, torch.full((2,), kl, dtype=torch.float64), rtol=1e-6, atol=0)
    assert found["sure"].top1.tolist() == [0.0, 0.0]  # a tie goes to the first word, the replaced host says the second


def test_recovered_by_hand() -> None:
    assert recovered(3.0, 3.0, 5.0) == 1.0
    assert recovered(5.0, 3.0, 5.0) == 0.0
    assert recovered(3.5, 3.0, 5.0) == 0.75
    assert recovered(6.0, 3.0, 5.0) == -0.5
    assert math.isnan(recovered(3.0, 3.0, 3.0))


class ByHand(SparseLayer):
    """Returns x; fires unit 0 everywhere, unit 1 where x₀ > 0 and, with value 0, unit 2."""

    kind = "transcoder"

    def __init__(self) -> None:
        super().__init__()
        self.d_in = self.d_out = 2
        self.n_units, self.k = 4, 3

    def _select(self, x: Tensor, k: int, plan: Any) -> tuple[Tensor, Tensor]:
        one = torch.ones(len(x))
        return torch.stack([one, (x[:, 0] > 0).float(), 0 * one], 1), torch.arange(3).expand(len(x), 3)

    def _decode(self, code: Code, x: Tensor | None, plan: Any) -> Tensor:
        assert x is not None
        return x


def by_hand() -> HeldOut:
    y = torch.tensor([[100.0, 0.0], [3.0, 4.0], [0.0, 2.0], [0.0, 50.0], [6.0, 8.0], [3.0, 2.0]])
    error = torch.tensor([[10.0, 0.0], [1.0, 0.0], [0.0, 2.0], [0.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    first = torch.tensor([True, False, False, True, False, False])
    return HeldOut(y + error, y, first, torch.tensor([0, 0, 0, 1, 1, 1]))


def test_errors_and_firing_by_hand() -> None:
    found = activation_statistics(ByHand(), by_hand(), resamples=400, seed=0)
    # Without first positions: errors 1, 4, 1, 0; y = (3,4) (0,2) (6,8) (3,2), mean (3,4), spread 0 + 13 + 25 + 4.
    assert found["fvu"] == pytest.approx(6 / 42, rel=1e-6)
    assert found["fvu_ci95"] == pytest.approx([1 / 29, 5 / 13], rel=1e-6)  # one document twice, or the other
    assert found["nmse"] == pytest.approx(6 / (25 + 4 + 100 + 13), rel=1e-6)
    assert found["norm_weighted_error"] == pytest.approx((1 / 5 + 4 / 2 + 1 / 10 + 0) / 4, rel=1e-6)
    assert found["nmse_all"] == pytest.approx(106 / (142 + 10000 + 2500), rel=1e-6)
    y = by_hand().y
    assert found["fvu_all"] == pytest.approx(106 / float((y - y.mean(0)).square().sum()), rel=1e-5)
    # Unit 1 fires where x₀ > 0: tokens 0, 1, 4, 5. Unit 2 has value 0, unit 3 is never chosen.
    assert found["l0"] == pytest.approx(10 / 6)
    assert found["dead_fraction"] == 0.5
    assert found["max_firing_frequency"] == 1.0
    assert found["n_units_above_half"] == 2
    units = found["firing_histogram"]["units"]
    assert sum(units) == 2 and units[-1] == 2  # log10(2/3) = −0.18 and 0 both lie in the last quarter decade


def test_firing_bins_hold_their_lower_edge() -> None:
    # Frequencies of 1/100 and 1: log10 −2 opens the bin from −2 to −1.75.
    found = fidelity._firing(torch.ones(100, dtype=torch.int64), torch.tensor([1, 100, 0]))
    units, edges = found["firing_histogram"]["units"], found["firing_histogram"]["log10_edges"]
    assert [edges[i] for i, n in enumerate(units) if n] == [-2.0, -0.25]
    assert found["n_units_above_half"] == 1 and found["dead_fraction"] == pytest.approx(1 / 3)


def test_exactly_half_of_the_tokens_is_not_more_than_half() -> None:
    assert fidelity._firing(torch.ones(4, dtype=torch.int64), torch.tensor([2, 3]))["n_units_above_half"] == 1


def test_dense_control_has_no_units_and_an_sae_reads_y() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(40, 16), torch.randn(40, 16)
    held_out = HeldOut(x, y, torch.zeros(40, dtype=torch.bool), torch.arange(40) // 8)
    dense = activation_statistics(random_layer("dense"), held_out, resamples=20, seed=0)
    assert [dense[name] for name in ("l0", "dead_fraction", "max_firing_frequency", "n_units_above_half", "firing_histogram")] == [None] * 5
    sae = random_layer("topk-sae")
    found = activation_statistics(sae, held_out, resamples=20, seed=0)
    expected = (y - sae(y).y).square().sum() / (y - y.mean(0)).square().sum()
    assert found["fvu"] == pytest.approx(float(expected), rel=1e-5)
    assert found["l0"] <= 4


def test_many_tokens_at_once_or_few_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    held_out = HeldOut(torch.randn(50, 16), torch.randn(50, 16), torch.arange(50) % 10 == 0, torch.arange(50) // 10)
    layer = random_layer("mxd")
    whole = activation_statistics(layer, held_out, resamples=20, seed=0)
    monkeypatch.setattr(fidelity, "TOKENS_AT_ONCE", 7)
    parts = activation_statistics(layer, held_out, resamples=20, seed=0)
    assert parts.pop("firing_histogram") == whole.pop("firing_histogram")
    assert parts.pop("fvu_ci95") == pytest.approx(whole.pop("fvu_ci95"), rel=1e-5)
    assert parts == pytest.approx(whole, rel=1e-5)
