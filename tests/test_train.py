"""The trainer: students keep to themselves, options do something, and trouble stops only who has it."""

from __future__ import annotations

import importlib
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mxd.layers import Code, Sizes
from mxd.layers.warm_start import fit_output, output_bias
from mxd.objectives import norm_weighted, objective, squared
from mxd.one_pass import train
from mxd.recipes import OURS, PAPER, RECIPES, Recipe
from mxd.tracking import FiringCounts, Metrics
from mxd.train import Student, StudentSpec


class Batch(NamedTuple):
    x: Tensor
    y: Tensor
    first: Tensor


class HostEncoder(NamedTuple):
    E: Tensor
    b_E: Tensor | None
    E_gate: Tensor | None
    b_gate: Tensor | None


SIZES = Sizes(d_in=8, d_out=8, n_units=25, k=4, d_hidden=12, rank=6)
FAST = Recipe("fast", learning_rate=1e-2, warmup_steps=0, schedule="constant")


def target(x: Tensor) -> Tensor:
    """A fixed small MLP."""
    generator = torch.Generator().manual_seed(9)
    first, second = torch.randn(8, 12, generator=generator), torch.randn(12, 8, generator=generator)
    return torch.nn.functional.gelu(x @ first) @ second + 1.0


def stream(steps: int, tokens: int = 64, seed: int = 0) -> Iterator[dict[str, Batch]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(tokens, 8, generator=generator) + 0.5
        first = torch.zeros(tokens, dtype=torch.bool)
        first[0] = True
        yield {"h": Batch(x, target(x), first)}


def student(kind: str = "mxd", recipe: Recipe = FAST, steps: int = 40, **changes: object) -> Student:
    spec = StudentSpec(f"{kind}-k4", "h", kind, SIZES, recipe)
    made = Student(replace(spec, **changes), total_steps=steps)  # pyright: ignore[reportArgumentType]
    made.start(next(stream(1, 512, seed=99))["h"], None)
    return made


def run(students: list[Student], path: Path, steps: int = 40, **options: object) -> list[dict[str, object]]:
    metrics = Metrics(path / "metrics.jsonl")
    train(students, stream(steps), metrics=metrics, log_every_steps=10, **options)  # pyright: ignore[reportArgumentType]
    metrics.close()
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", RECIPES["ours"])
def test_every_kind_learns(kind: str, tmp_path: Path) -> None:
    one = student(kind, steps=150)
    rows = run([one], tmp_path, steps=150)
    losses = [row["loss"] for row in rows]
    assert losses[-1] < 0.7 * losses[0]  # pyright: ignore[reportOperatorIssue]
    assert one.tokens == 150 * 64 and one.steps == 150


@pytest.mark.parametrize("kind", RECIPES["ours"])
def test_company_does_not_change_a_students_bits(kind: str, tmp_path: Path) -> None:
    alone = student(kind, random_k=True)
    run([alone], tmp_path)
    accompanied = student(kind, random_k=True)
    others = [student(other, random_k=True) for other in ("additive", "transcoder") if other != kind]
    run([others[0], accompanied, *others[1:]], tmp_path)
    for mine, same in zip(alone.layer.parameters(), accompanied.layer.parameters(), strict=True):
        assert torch.equal(mine, same)


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(tmp_path: Path) -> None:
    first, second, other = student(seed=1), student(seed=1), student(seed=2)
    for one in (first, second, other):
        run([one], tmp_path)
    assert torch.equal(first.layer.get_parameter("G"), second.layer.get_parameter("G"))
    assert not torch.equal(first.layer.get_parameter("G"), other.layer.get_parameter("G"))


def test_a_loss_that_is_not_finite_stops_only_that_student(tmp_path: Path) -> None:
    sick, well = student("transcoder"), student("mxd")
    with torch.no_grad():
        output_bias(sick.layer).fill_(math.inf)
    rows = run([sick, well], tmp_path)
    assert sick.stopped == "the loss became inf at step 1" and sick.steps == 0
    assert well.stopped is None and well.steps == 40
    assert any(row.get("stopped") for row in rows)
    assert all(torch.isfinite(p).all() for p in well.layer.parameters())


def test_when_all_have_stopped_the_stream_is_left(tmp_path: Path) -> None:
    sick = student("transcoder")
    with torch.no_grad():
        output_bias(sick.layer).fill_(math.nan)
    seen: list[int] = []
    run([sick], tmp_path, on_step=lambda step, students: seen.append(step))
    assert seen == [1]


def test_the_learning_rate_warms_up_and_decays() -> None:
    one = student(recipe=replace(FAST, learning_rate=1.0, warmup_steps=4, schedule="linear"), steps=12)
    rates: list[float] = []
    for batch in stream(12):
        rates.append(one.learning_rate())
        one.step(batch["h"])
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:] == pytest.approx([1 - i / 8 for i in range(8)])
    constant = student(recipe=replace(FAST, warmup_steps=0))
    constant.steps = 39
    assert constant.learning_rate() == FAST.learning_rate


def test_the_output_bias_starts_at_the_mean_of_y() -> None:
    sample = next(stream(1, 512, seed=99))["h"]
    assert torch.allclose(output_bias(student(recipe=PAPER).layer), sample.y.mean(0), atol=1e-6)
    without_first = sample.y[1:].mean(0)
    assert torch.allclose(output_bias(student(recipe=replace(FAST, centre=True)).layer), without_first, atol=1e-6)


@pytest.mark.parametrize("kind", ["mxd", "transcoder", "topk-sae"])
def test_a_centred_gate_starts_with_scores_of_mean_zero(kind: str) -> None:
    sample = next(stream(1, 512, seed=99))["h"]
    means = {}
    for centre in (False, True):
        one = student(kind, replace(FAST, centre=centre))
        found = one.layer.units()
        assert found is not None
        inputs = one.inputs(sample)[1:]
        if kind == "topk-sae":
            inputs = inputs - output_bias(one.layer)
        means[centre] = float((inputs @ found[0].t() + found[1]).mean(0).abs().max().detach())
    assert means[True] < 1e-5
    assert means[False] > 0.05 or kind == "topk-sae"  # an SAE's input is centred by its own output bias


def test_positive_c_starts_the_modulation_near_one() -> None:
    sample = next(stream(1, 512, seed=99))["h"]
    means: list[float] = []
    for positive in (True, False):
        layer = student(recipe=replace(FAST, positive_c=positive)).layer
        with torch.no_grad():
            code = layer.encode(sample.x)
            means.append(float(torch.einsum("tk,tko->to", code.values, layer.get_parameter("C")[code.indices]).mean()))
    assert means[0] == pytest.approx(1.0, abs=0.15)
    assert abs(means[1]) < 0.3


@pytest.mark.parametrize("kind", RECIPES["ours"])
def test_a_warm_start_lowers_the_first_loss(kind: str) -> None:
    sample = next(stream(1, 512, seed=99))["h"]
    losses: list[float] = []
    for steps in (0, 20):
        one = student(kind, replace(OURS, positive_c=True, warm_start_steps=steps))
        losses.append(float(norm_weighted(one.layer(one.inputs(sample)).y, sample.y).detach()))
    assert losses[1] < 0.9 * losses[0]


def test_the_fit_never_gets_worse_and_reaches_least_squares() -> None:
    sample = next(stream(1, 512, seed=99))["h"]
    layer = student("dense").layer.double()
    x, y = sample.x.double(), sample.y.double()
    history = fit_output(layer, x, y, steps=60)
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in itertools.pairwise(history))
    code = layer.encode(x)
    assert code.hidden is not None
    weights = y.norm(dim=-1, keepdim=True).rsqrt()
    exact = torch.linalg.lstsq(weights * code.hidden, weights * (y - layer.get_parameter("b"))).solution
    assert torch.allclose(layer.get_parameter("D"), exact, rtol=1e-6, atol=1e-8)


def test_the_host_encoder_is_copied_and_can_be_frozen(tmp_path: Path) -> None:
    E = torch.randn(8, 12)
    sample = next(stream(1, 512, seed=99))["h"]
    after: dict[str, Tensor] = {}
    for mode in ("host", "host-frozen"):
        one = Student(StudentSpec("mxd-k4", "h", "mxd", SIZES, replace(FAST, encoder=mode)), total_steps=40)
        one.start(sample, HostEncoder(E, None, None, None))
        assert torch.equal(one.layer.get_parameter("encoder.E"), E)
        run([one], tmp_path)
        after[mode] = one.layer.get_parameter("encoder.E").detach()
    assert torch.equal(after["host-frozen"], E)
    assert not torch.equal(after["host"], E)


def test_balance_brings_back_a_silent_unit_and_lowers_a_loud_one() -> None:
    moved: dict[bool, Tensor] = {}
    for balance in (False, True):
        one = student(recipe=replace(FAST, learning_rate=0.0, balance=balance))
        found = one.layer.units()
        assert found is not None
        with torch.no_grad():
            found[1][0], found[1][1] = -100.0, 100.0
        for batch in stream(20):
            one.step(batch["h"])
        moved[balance] = found[1].detach().clone()
    assert moved[False][0] == -100 and moved[False][1] == 100
    assert moved[True][0] > -100 and moved[True][1] < 100


def test_muon_takes_the_dense_matrices_and_trains_them_otherwise(tmp_path: Path) -> None:
    adam, muon = student(), student(recipe=replace(FAST, optimiser="muon"))
    run([adam], tmp_path)
    run([muon], tmp_path)
    assert not torch.equal(adam.layer.get_parameter("D"), muon.layer.get_parameter("D"))
    assert muon.last_loss < 20


def test_random_k_draws_the_whole_range_and_nothing_else() -> None:
    one = student(random_k=True)
    drawn = {one._draw_k() for _ in range(300)}
    assert drawn == {2, 3, 4, 5, 6}
    assert student()._draw_k() is None


def test_losses_by_hand() -> None:
    y, y_hat = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[3.0, 3.0], [0.0, 0.0]])
    assert float(norm_weighted(y_hat, y)) == pytest.approx((1 / 5 + 4 / 2) / 2)
    assert float(squared(y_hat, y)) == pytest.approx(2.5)
    assert math.isfinite(float(norm_weighted(torch.zeros(1, 2), torch.zeros(1, 2))))
    assert objective("squared") is squared


def test_firing_counts_by_hand() -> None:
    from mxd.layers import Code

    counts = FiringCounts(3, torch.device("cpu"))
    counts.add(Code(torch.tensor([[1.0, 0.0], [2.0, 3.0]]), torch.tensor([[0, 1], [0, 2]]), None))
    assert counts.total.tolist() == [2, 0, 1] and counts.tokens == 2
    assert counts.frequency.tolist() == pytest.approx([1.0, 0.0, 0.5])
    assert counts.summary() == pytest.approx({"not_fired_yet": 1 / 3, "max_firing_frequency": 1.0})


def test_probes_are_taken_and_written(tmp_path: Path) -> None:
    rows = run([student()], tmp_path, probe=lambda s: {"fvu": math.nan, "steps": s.steps}, probe_every_steps=20)
    assert [row["probe"] for row in rows if "probe" in row] == [{"fvu": None, "steps": s} for s in (1, 20, 40)]


def test_the_auxiliary_loss_revives_dead_units(tmp_path: Path) -> None:
    shares: dict[float, float] = {}
    for weight in (0.0, 1 / 32):
        one = student("transcoder", steps=300, aux_weight=weight, aux_k=4, dead_after_tokens=640)
        with torch.no_grad():
            one.layer.get_parameter("b_enc")[:12].sub_(2.5)  # half of the latents hardly win a comparison any more
        run([one], tmp_path, steps=300)
        shares[weight] = len(one.counts.dead(640)) / one.layer.n_units
    assert shares[0.0] > 0.4
    assert shares[1 / 32] < shares[0.0]


def test_without_dead_units_the_auxiliary_loss_changes_nothing(tmp_path: Path) -> None:
    plain, armed = student(), student(aux_weight=1.0, aux_k=4, dead_after_tokens=10**9)
    for one in (plain, armed):
        run([one], tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(plain.layer.parameters(), armed.layer.parameters(), strict=True))


def test_the_options_of_the_auxiliary_loss_do_something(tmp_path: Path) -> None:
    def weights(**changes: float) -> Tensor:
        options: dict[str, Any] = {"aux_weight": 0.1, "aux_k": 4, "dead_after_tokens": 64, **changes}
        one = student("transcoder", **options)
        with torch.no_grad():
            one.layer.get_parameter("b_enc")[:12].sub_(2.5)
        run([one], tmp_path)
        return one.layer.get_parameter("W_dec").detach()

    base = weights()
    assert torch.equal(base, weights())
    for change in ({"aux_weight": 0.2}, {"aux_k": 2}, {"dead_after_tokens": 640}):
        assert not torch.equal(base, weights(**change)), change


def test_units_are_dead_after_so_many_silent_tokens() -> None:
    counts = FiringCounts(3, torch.device("cpu"))
    fires = Code(torch.tensor([[1.0, 0.0], [2.0, 1.0]]), torch.tensor([[0, 1], [0, 2]]), None)
    counts.add(fires)
    assert counts.total.tolist() == [2, 0, 1]
    counts.add(Code(torch.tensor([[1.0]]), torch.tensor([[2]]), None))
    assert counts.silent.tolist() == [1, 3, 0]
    assert counts.dead(1).tolist() == [0, 1] and counts.dead(2).tolist() == [1] and counts.dead(4).tolist() == []


def test_a_broken_loss_seen_late_has_changed_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the loss is looked at every few steps."""
    monkeypatch.setattr(Student, "_looks", lambda self: self.steps % 16 == 0)
    one, twin = student(recipe=replace(FAST, balance=True)), student(recipe=replace(FAST, balance=True))
    batches = [batch["h"] for batch in stream(20)]
    for batch in batches[:5]:
        one.step(batch)
        twin.step(batch)
    for batch in batches[5:]:
        one.step(Batch(batch.x, batch.y * math.nan, batch.first))
        if one.stopped:
            break
    assert one.stopped is not None and one.stopped.startswith("the loss became nan")
    assert all(torch.equal(a, b) for a, b in zip(one.layer.parameters(), twin.layer.parameters(), strict=True))


def test_an_auxiliary_loss_that_is_not_finite_stops_the_student_too(monkeypatch: pytest.MonkeyPatch) -> None:
    one = student("transcoder", aux_weight=0.1, aux_k=4, dead_after_tokens=1)
    monkeypatch.setattr(importlib.import_module("mxd.train"), "aux_output", lambda layer, x, *rest: x * math.inf)
    before = one.layer.get_parameter("W_enc").clone()
    monkeypatch.setattr(one.counts, "dead", lambda after: torch.tensor([0]))
    one.step(next(stream(1))["h"])
    assert one.stopped is not None and math.isfinite(one.last_loss)
    assert torch.equal(one.layer.get_parameter("W_enc"), before)


def test_l1_makes_a_gate_without_top_k_sparse(tmp_path: Path) -> None:
    free = SIZES._replace(k=SIZES.n_units)
    active: list[float] = []
    for weight in (0.0, 0.05, 0.5):
        one = student("transcoder", replace(FAST, l1=weight), steps=150, sizes=free)
        run([one], tmp_path, steps=150)
        active.append(float((one.layer.encode(next(stream(1))["h"].x).values > 0).sum(1).float().mean()))
    assert active[0] > 8 and active[0] > active[1] + 1 > active[2] + 2


def test_the_penalty_is_the_mean_sum_of_a_and_rises_over_a_tenth_of_the_steps() -> None:
    one = student("mxd", replace(FAST, l1=0.5), steps=100, sizes=SIZES._replace(k=SIZES.n_units))
    output = one.layer(next(stream(1))["h"].x)
    full = 0.5 * output.code.values.sum(1).mean()
    for steps, share in ((0, 0.1), (4, 0.5), (9, 1.0), (99, 1.0)):
        one.steps = steps
        assert torch.allclose(torch.as_tensor(one._penalty(output)), share * full)
    assert student("mxd")._penalty(output) == 0.0


@pytest.mark.parametrize(("field", "moves"), [("gate_rate", {"C"}), ("table_rate", {"G", "b_G"})])
def test_the_learning_rates_of_the_gate_and_of_c_are_their_own(field: str, moves: set[str]) -> None:
    one = student(recipe=replace(FAST, **{field: 0.0}))
    with torch.no_grad():
        one.layer.get_parameter("D").normal_()
    before = {name: parameter.detach().clone() for name, parameter in one.layer.named_parameters()}
    for batch in stream(3):
        one.step(batch["h"])
    changed = {name for name in ("G", "b_G", "C") if not torch.equal(before[name], one.layer.get_parameter(name))}
    assert changed == moves
    assert not torch.equal(before["D"], one.layer.get_parameter("D"))


def test_a_factor_on_the_learning_rate_is_that_factor() -> None:
    half, same = student(recipe=replace(FAST, table_rate=0.5)), student(recipe=FAST)
    before = half.layer.get_parameter("C").detach().clone()
    for one in (half, same):
        with torch.no_grad():
            one.layer.get_parameter("D").fill_(0.1)
        one.step(next(stream(1))["h"])
    moved = [one.layer.get_parameter("C").detach() - before for one in (half, same)]
    assert torch.allclose(2 * moved[0], moved[1], rtol=1e-3, atol=1e-7) and moved[1].abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["cp-mumoe", "mov"])
def test_kinds_without_a_table_are_balanced_and_have_no_auxiliary_loss(kind: str) -> None:
    one = student(kind, replace(FAST, learning_rate=0.0, balance=True), aux_weight=1.0, dead_after_tokens=1)
    bias = one.layer.get_parameter("b_G")
    with torch.no_grad():
        bias[0], bias[1] = -100.0, 100.0
    for batch in stream(20):
        one.step(batch["h"])
    assert bias[0] > -100 and bias[1] < 100
    output = one.layer(next(stream(1))["h"].x)
    assert one._auxiliary(next(stream(1))["h"].x, output, output.y) == 0.0


@pytest.mark.parametrize("kind", ["mxd", "mxd-pk", "cp-mumoe", "mov", "dense", "additive", "skip-transcoder"])
def test_muon_trains_every_kind_that_has_a_dense_matrix(kind: str, tmp_path: Path) -> None:
    one = student(kind, replace(FAST, optimiser="muon"), steps=100)
    assert one._muon is not None
    losses = [row["loss"] for row in run([one], tmp_path, steps=100)]
    assert losses[-1] < 0.9 * losses[0]  # pyright: ignore[reportOperatorIssue]
