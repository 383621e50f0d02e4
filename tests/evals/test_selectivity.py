"""Selectivity: planted units whose effect is known, both ways to be fooled, what is skipped, and what is said."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from mxd import labelled
from mxd.config import EvalConfig
from mxd.errors import ConfigError, TextError
from mxd.evals.bootstrap import interval_of_sums
from mxd.evals.figures import label
from mxd.evals.parts import Shared, Subject, finite
from mxd.evals.selectivity import measure as module
from mxd.evals.selectivity import texts as selectivity_texts
from mxd.evals.selectivity.rises import FLOOR, by_class, contrast, selectivity
from mxd.evals.selectivity.show import ratio_text, show
from mxd.evals.svg import escape
from mxd.host import Host
from mxd.labelled import Sample, Task
from mxd.layers import LAYERS, Edited, Sizes, SparseLayer, Transcoder, build
from mxd.text import Split

pytestmark = pytest.mark.usefixtures("one_thread")

HOOK = "layers.1.mlp"
LETTERS = {"a": "abcdefgh", "b": "ijklmnop"}
HOW = {"resamples": 200, "seed": 0}
CONFIG = EvalConfig(suite="full", bootstrap=200, selectivity_units=4, selectivity_documents=8)


def made_task(letters: dict[str, str] | None = None, *, number: int = 90, length: int = 70) -> Task:
    """Texts of random letters, each class with its own."""
    samples = [
        Sample(f"{name}/{i}", "".join(random.Random(f"{name}/{i}").choices(own, k=length)), name, f"{name}/{i}")
        for name, own in (letters or LETTERS).items()
        for i in range(number)
    ]
    return labelled.make("language", "made up", samples, list(letters or LETTERS))


@pytest.fixture(autouse=True)
def own_task(monkeypatch: pytest.MonkeyPatch) -> Callable[[Task], None]:
    def use(task: Task) -> None:
        monkeypatch.setattr(labelled, "task", lambda _name: task)

    monkeypatch.setattr(selectivity_texts, "CHOOSE", 16)
    use(made_task())
    return use


@pytest.fixture
def host(tiny_host: Any) -> Host:
    """Two classes of letters that the residual stream holds apart along its first axis: one sign each, and nothing at BOS."""
    made: Host = tiny_host("llama", layers=3, tie_word_embeddings=False)
    table = made.model.get_input_embeddings().weight
    with torch.no_grad():
        for sign, letters in ((1.0, LETTERS["a"]), (-1.0, LETTERS["b"])):
            table[made.encode(letters), 0] = 30 * sign
        table[256, 0] = 0
    return made


def subject(
    host: Host, layer: SparseLayer, config: EvalConfig = CONFIG, shared: Shared | None = None, told: list[Any] | None = None
) -> Subject:
    nothing = cast("Any", None)
    run = cast("Any", SimpleNamespace(info={"text": {"sources": [{"name": "made-up"}]}}))
    record = cast("Any", SimpleNamespace(hookpoint=HOOK, name="student"))
    heard: list[Any] = [] if told is None else told
    return Subject(run, record, layer, host, nothing, config, shared or Shared(), lambda share, note: heard.append((share, note)))


def measured(host: Host, layer: SparseLayer, config: EvalConfig = CONFIG) -> dict[str, Any]:
    """The figures as report.json holds them."""
    return json.loads(json.dumps(finite(module.measure(subject(host, layer, config))), allow_nan=False))


def planted(host: Host, *, both: bool = False) -> Transcoder:
    """Unit 0 fires on tokens of class a and nowhere else; the other units fire everywhere and write nothing. With `both`, unit 1
    does for b what 0 does for a. What they write is what the host's MLP writes, on average."""
    layer = build("transcoder", Sizes(32, 32, 25, 8, 48, "silu", True), generator=torch.Generator().manual_seed(0))
    assert isinstance(layer, Transcoder)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        first = float(host.read(torch.tensor([[256, *host.encode("abc")]]), [HOOK])[HOOK].x[0, 1, 0])
        sign, half = math.copysign(1.0, first), abs(first) / 2  # at BOS the first axis is far below half of what it is in a text
        layer.W_enc[0, 0] = sign
        layer.b_enc[0] = -half
        layer.b_enc[2:] = 1e-3  # alive, and harmless
        layer.W_dec[0] = torch.randn(32, generator=torch.Generator().manual_seed(1)) * 3
        if both:
            layer.W_enc[1, 0], layer.b_enc[1] = -sign, -half
            layer.W_dec[1] = torch.randn(32, generator=torch.Generator().manual_seed(2)) * 3
    return layer.eval().requires_grad_(False)


def entry(name: str, kind: str, found: dict[str, Any], *, k: int = 4, recipe: str = "ours") -> dict[str, Any]:
    """A student as report.json holds it."""
    return {"name": name, "kind": kind, "k": k, "recipe": recipe, "selectivity": found}


# known answers


def test_a_unit_that_carries_one_class_alone(host: Host) -> None:
    layer = planted(host)
    config = dataclasses.replace(CONFIG, selectivity_units=1)
    found = measured(host, layer, config)
    texts = selectivity_texts.read_texts(host, config)
    code = layer.encode(host.read(texts.measure.ids, [HOOK])[HOOK].x)
    fires = ((code.values > 0) & (code.indices == 0)).any(-1)
    assert torch.equal(fires[:, 1:].all(1), texts.measure.labels == 0), "the plant itself: at every token of a"
    assert not fires[texts.measure.labels == 1].any(), "and at none of b, BOS included"
    main = found["by_class"]["a"]["tied"]["1"]
    assert main["units"] == [0]
    assert main["rises"]["b"] == [0.0, 0.0, 0.0], "exactly nothing on the other class"
    assert main["others"] == [0.0, 0.0, 0.0]
    assert main["own"][1] > 0.02 or main["own"][2] < -0.02, "what it writes matters"
    if main["own"][1] > 0:
        assert main["ratio"] is None and main["at_least"] == pytest.approx(main["own"][1] / FLOOR, rel=1e-9)
    assert all(unit != 0 for unit in found["by_class"]["b"]["tied"]["1"]["units"])


def test_a_host_that_needs_the_unit_is_hurt_by_its_ablation(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a loss that counts how far the stand-in's output is from having unit 0 in it, the rise is known to the digit."""
    layer = planted(host)

    def losses(host: Host, hookpoint: str, ids: Tensor, modules: dict[str, Any], progress: object = None) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, stand_in in {"": host.mlp(hookpoint), **modules}.items():
            with host.replace({hookpoint: stand_in}):
                x, y = host.read(ids, [hookpoint])[hookpoint]
            found[name] = (y.double() - layer(x).y.double()).square().sum(-1).mean(1)
        return found

    monkeypatch.setattr(module, "text_losses", losses)
    config = dataclasses.replace(CONFIG, selectivity_units=1)
    found = measured(host, layer, config)
    main = found["by_class"]["a"]["tied"]["1"]
    texts = selectivity_texts.read_texts(host, config)
    x = host.read(texts.measure.ids[texts.measure.labels == 0], [HOOK])[HOOK].x
    code = layer.encode(x)
    a = (code.values * (code.indices == 0)).sum(-1).double()
    expected = float(a.square().mean() * layer.W_dec[0].double().square().sum())
    assert main["own"][0] == pytest.approx(expected, rel=1e-5)
    assert main["others"] == [0.0, 0.0, 0.0] and main["ratio"] is None
    assert main["at_least"] == pytest.approx(main["own"][1] / FLOOR, rel=1e-9) and ratio_text(main).startswith("≥ ")
    assert found["by_class"]["a"]["against"]["random"]["rise"][1] > 0
    student = entry("planted", "transcoder", found)
    words = " ".join(show([student])[0].words)
    assert "a: +" in words and "selectivity ≥ " in words and "b: no rise of its loss is shown" in words
    assert "Selectivity 5 or more with the whole interval: a." in words


def test_ablating_nothing_is_exactly_nothing(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "rank", lambda means, labels, own: [])
    monkeypatch.setattr(module, "most_active", lambda means, labels, units: [])
    found = measured(host, planted(host))
    for name in LETTERS:
        for ablation in [*found["by_class"][name]["tied"].values(), found["by_class"][name]["active"], found["by_class"][name]["neurons"]]:
            assert ablation["own"] == ablation["others"] == ablation["contrast"] == [0.0, 0.0, 0.0]
            assert ablation["ratio"] is None and ablation["at_least"] is None and ratio_text(ablation) == "–"


def test_units_that_write_nothing_cost_nothing(host: Host) -> None:
    layer = planted(host)
    with torch.no_grad():
        layer.W_dec.zero_()
    found = measured(host, layer)
    assert all(len(set(units)) == 4 for units in found["random"]["units"]) and len(found["random"]["units"]) == module.DRAWS
    assert found["random"]["rises"] == found["active"]["rises"] == {"a": [0.0, 0.0, 0.0], "b": [0.0, 0.0, 0.0]}
    assert found["by_class"]["a"]["neurons"]["rises"] != found["random"]["rises"]


def test_random_units_of_a_symmetric_layer_are_not_selective() -> None:
    """Adversarial: rises that are large and the same for every class by construction give selectivity 1, and no contrast."""
    rng = np.random.default_rng(0)
    labels = torch.arange(3).repeat_interleave(200)
    rise = torch.from_numpy(rng.normal(0.5, 0.1, 600))
    for own in range(3):
        found = selectivity(rise, labels, own, **HOW)
        value, low, high = found["ratio"]
        assert value == pytest.approx(1, abs=0.05) and low < 1.03 and high > 0.97 and high - low < 0.12
        assert found["contrast"][1] < 0.02 and found["contrast"][2] > -0.02 and found["at_least"] < 5


def test_selectivity_by_hand() -> None:
    rise = torch.tensor([1.0, 3.0, 0.2, 0.2, 0.1, 0.3], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    found = selectivity(rise, labels, 0, **HOW)
    assert [found[key][0] for key in ("own", "others", "contrast", "ratio")] == pytest.approx([2.0, 0.2, 1.8, 10.0], rel=1e-12)
    other = selectivity(rise, labels, 1, **HOW)
    assert other["own"][0] == pytest.approx(0.2) and other["others"][0] == pytest.approx((2.0 + 0.2) / 2)
    assert contrast(rise, labels, 0, **HOW)[0] == pytest.approx(1.8)
    assert by_class(rise, labels, ("x", "y", "z"), **HOW)["y"] == pytest.approx([0.2, 0.2, 0.2])


def test_classes_of_different_sizes_weigh_the_same() -> None:
    rise = torch.tensor([1.0] * 4 + [0.1] * 30 + [0.3] * 2, dtype=torch.float64)
    labels = torch.tensor([0] * 4 + [1] * 30 + [2] * 2)
    assert selectivity(rise, labels, 0, **HOW)["others"][0] == pytest.approx(0.2)


@pytest.mark.parametrize(("other", "text"), [(-0.4, "≥"), (0.0, "≥"), (1e-4, "≥"), (0.1, "10")])
def test_a_denominator_near_or_below_nothing_gives_a_lower_bound(other: float, text: str) -> None:
    rise = torch.tensor([1.0] * 10 + [other] * 10, dtype=torch.float64)
    labels = torch.tensor([0] * 10 + [1] * 10)
    found = selectivity(rise, labels, 0, **HOW)
    assert ratio_text(found).startswith(text)
    assert (found["ratio"] is None) == (text == "≥") and found["at_least"] == pytest.approx(1.0 / max(other, FLOOR))


def test_a_rise_that_is_not_shown_has_no_selectivity() -> None:
    rng = np.random.default_rng(1)
    rise = torch.from_numpy(np.concatenate([rng.normal(0.0, 1.0, 20), np.full(20, 1e-6)]))
    found = selectivity(rise, torch.arange(2).repeat_interleave(20), 0, **HOW)
    assert found["own"][1] < 0 < found["own"][2] and found["at_least"] is None and ratio_text(found) == "–"


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    labels = torch.arange(2).repeat_interleave(40)
    inside = 0
    for seed in range(100):
        rise = torch.from_numpy(np.concatenate([rng.normal(1.0, 0.5, 40), rng.normal(0.2, 0.2, 40)]))
        _, low, high = selectivity(rise, labels, 0, resamples=200, seed=seed)["ratio"]
        inside += low <= 5.0 <= high
    assert 86 <= inside <= 100


def test_a_class_that_a_resample_misses_does_not_count() -> None:
    found = interval_of_sums(np.array([[1.0, 0, 1, 0], [0, 1.0, 0, 1]]), lambda s: np.divide(s[..., 0], s[..., 2]), **HOW)
    assert found.value == 1.0 and found.low == found.high == 1.0
    both = selectivity(torch.tensor([1.0, 0.5]).double(), torch.tensor([0, 1]), 0, **HOW)
    assert both["ratio"] == pytest.approx([2.0, 2.0, 2.0])


# choosing


def test_rank_by_hand() -> None:
    """Units: exclusive to the class, noisy, the same everywhere, only outside, dead."""
    means = torch.tensor(
        [[1.0, 3.0, 2.0, 0.0, 0.0], [1.2, 0.0, 2.0, 0.0, 0.0], [0.0, 1.0, 2.0, 4.0, 0.0], [0.1, 0.0, 2.0, 5.0, 0.0]], dtype=torch.float64
    )
    labels = torch.tensor([1, 1, 0, 0])
    assert module.rank(means, labels, 1) == [0, 1]
    assert module.rank(means, labels, 0) == [3]
    assert module.most_active(means, labels, 3) == [3, 2, 1]
    assert module.most_active(means, labels, 5) == [3, 2, 1, 0], "dead units are not active"


def test_a_unit_that_two_classes_share_is_tied_to_neither() -> None:
    """Units: shared by classes 0 and 1, more in 0; a little more in 0 than in both; only in 2. Worked by hand: unit 1 leads for class 0."""
    means = torch.tensor(
        [[5.0, 1.2, 0.0], [5.2, 1.0, 0.0], [5.0, 0.2, 0.0], [5.2, 0.0, 0.0], [0.0, 0.2, 1.0], [0.2, 0.0, 1.2]], dtype=torch.float64
    )
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    assert module.rank(means, labels, 0) == [1], "unit 0 differs from class 2 alone"
    assert module.rank(means, labels, 1) == []
    assert module.rank(means, labels, 2) == [2]


def test_mean_activations_leave_out_the_first_position() -> None:
    layer = planted_layer = build("transcoder", Sizes(6, 6, 9, 3, 8, "silu", True), generator=torch.Generator().manual_seed(0))
    x = torch.randn(20, 5, 6, generator=torch.Generator().manual_seed(1))
    code = planted_layer.encode(x)
    dense = torch.zeros(20, 5, 9).scatter_add_(2, code.indices, code.values.detach())
    torch.testing.assert_close(module.mean_activations(layer, x), dense[:, 1:].double().mean(1), rtol=1e-6, atol=1e-7)


def test_units_are_chosen_without_the_measured_texts(host: Host, own_task: Callable[[Task], None]) -> None:
    """Other test texts, and garbled ones: the very same units."""
    layer, task = planted(host, both=True), made_task()
    before = measured(host, layer)
    garbled = tuple(
        s._replace(text=s.text[::-1], label="b" if s.label == "a" else "a") if labelled.split_of(s) == "test" else s for s in task.samples
    )
    own_task(dataclasses.replace(task, samples=garbled))
    after = measured(host, layer)

    def chosen(found: dict[str, Any]) -> list[Any]:
        return [ablation["units"] for name in LETTERS for ablation in found["by_class"][name]["tied"].values()] + [found["random"]["units"]]

    assert chosen(before) == chosen(after)
    assert before["ce"] != after["ce"]


def test_on_validation_text_units_are_chosen_on_training_text(host: Host) -> None:
    task = made_task()
    splits: tuple[Split, ...] = ("test", "validation")
    for split in splits:
        texts = selectivity_texts.read_texts(host, dataclasses.replace(CONFIG, split=split))
        wanted = {tuple([256, *host.encode(s.text)][:64]) for s in task.split(split)}
        assert {tuple(row) for row in texts.measure.ids.tolist()} <= wanted
        chosen = {tuple(row) for row in texts.choose.ids.tolist()}
        assert not chosen & wanted
        if split == "validation":
            tests = {tuple([256, *host.encode(s.text)][:64]) for s in task.split("test")}
            assert not chosen & tests


# every kind, the host's neurons, options


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind != "dense"])
def test_every_kind_is_measured_and_the_host_is_left_as_it_was(host: Host, kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = build(kind, Sizes(32, 32, 100, 6, 48, "silu", True), generator=generator)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    layer.eval().requires_grad_(False)
    ids = torch.randint(0, 256, (1, 12), generator=generator)
    own, told = host.logits(ids), list[Any]()
    config = dataclasses.replace(CONFIG, bootstrap=20)
    found = json.loads(json.dumps(finite(module.measure(subject(host, layer, config, told=told))), allow_nan=False))
    assert torch.equal(host.logits(ids), own)
    assert found == json.loads(json.dumps(finite(module.measure(subject(host, layer, config))))), "same seed, same bits"
    assert list(found["by_class"]["a"]["tied"]) == ["1", "4", "16"]
    assert [share for share, _ in told] == sorted(share for share, _ in told) and told[-1][0] < 1
    # The figures are those of the ablated layer in the host.
    units = found["by_class"]["a"]["tied"]["4"]["units"]
    texts = selectivity_texts.read_texts(host, config)
    losses: list[Tensor] = []
    for one in (layer, Edited(layer, scale=dict.fromkeys(units, 0.0))):
        with host.replace({HOOK: one}):
            logits = host.logits(texts.measure.ids)[:, :-1].double().log_softmax(-1)
        losses.append(-logits.gather(2, texts.measure.ids[:, 1:, None]).squeeze(2).mean(1))
    for number, name in enumerate(("a", "b")):
        rise = float((losses[1] - losses[0])[texts.measure.labels == number].mean())
        assert found["by_class"]["a"]["tied"]["4"]["rises"][name][0] == pytest.approx(rise, abs=2e-6)
    section = show([entry("s", kind, found)])[0]
    assert len(section.tables) == 2 and section.figures[0][1].svg().startswith("<svg")
    assert all(len(row) == len(table.heads) for table in section.tables for row in table.rows)


def test_the_dense_control_has_nothing_to_ablate(host: Host) -> None:
    layer = build("dense", Sizes(32, 32, 10, 4, 48, "silu", True))
    assert module.measure(subject(host, layer)) == {"missing": "the dense control has no units"}
    assert show([{"name": "dense", "kind": "dense", "selectivity": {"missing": "the dense control has no units"}}]) == []


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_neurons_of_the_host(tiny_host: Any, family: str) -> None:
    made: Host = tiny_host(family)
    key = made.sites[1].hookpoint
    x = made.read(torch.randint(0, 256, (2, 10), generator=torch.Generator().manual_seed(0)), [key])[key].x
    own, width = made.mlp(key)(x), made.site(key).d_hidden
    assert torch.equal(module.WithoutNeurons(made, key, [])(x), own)
    weights = made.weights(key)
    bias = torch.zeros(32) if weights.b_D is None else weights.b_D
    torch.testing.assert_close(module.WithoutNeurons(made, key, range(width))(x), bias.expand_as(own), rtol=0, atol=2e-5)
    some = module.WithoutNeurons(made, key, [3, 5])
    whole = module.WithoutNeurons(made, key, range(width)).hidden(x)
    torch.testing.assert_close(own - some(x), whole[..., [3, 5]] @ weights.D[[3, 5]], rtol=0, atol=2e-5)


def test_what_students_share_is_made_once(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("_neurons", "_activations", "read_texts"):
        inner = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, inner=inner, name=name: (calls.append(name), inner(*args))[1])
    shared = Shared()
    first = module.measure(subject(host, planted(host), shared=shared))
    second = module.measure(subject(host, planted(host), shared=shared))
    assert sorted(calls) == ["_activations", "_neurons", "read_texts"] and first == second


def test_the_options_do_something(host: Host) -> None:
    assert module.doses(16) == [4, 16, 64] and module.doses(1) == [1, 4] and module.doses(2) == [1, 2, 8]
    found = measured(host, planted(host), dataclasses.replace(CONFIG, selectivity_units=2, selectivity_documents=10))
    assert found["units"] == 2 and list(found["by_class"]["a"]["tied"]) == ["1", "2", "8"]
    assert {name: n["measure"] for name, n in found["documents"].items()} == {"a": 10, "b": 10}
    assert len(found["random"]["units"][0]) == 2 and len(found["by_class"]["a"]["neurons"]["units"]) <= 2
    assert set(module.PART.options) == {"selectivity_units", "selectivity_documents"}


@pytest.mark.parametrize("changes", [{"selectivity_units": 0}, {"selectivity_documents": 7}])
def test_options_that_are_too_small(host: Host, changes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"too small for selectivity \| expected --selectivity-units of at least 1"):
        module.measure(subject(host, planted(host), dataclasses.replace(CONFIG, **changes)))


# bad input


def test_a_class_with_too_few_texts_is_left_out_and_said(host: Host, own_task: Callable[[Task], None]) -> None:
    task = made_task()
    few = [Sample(f"c/{i}", "q" * 70 + str(i), "c", f"c/{i}") for i in range(6)]
    short = [Sample(f"d/{i}", f"short {i}", "d", f"d/{i}") for i in range(90)]
    own_task(dataclasses.replace(task, classes=("a", "b", "c", "d"), samples=(*task.samples, *few, *short)))
    found = measured(host, planted(host))
    assert found["classes"] == ["a", "b"] and set(found["skipped"]) == {"c", "d"}
    assert found["skipped"]["d"] == "0 texts of 64 tokens to choose on, 0 to measure on; 8 of each are needed"
    notes = " ".join(show([entry("s", "transcoder", found)])[0].notes)
    assert "Left out: c (" in notes and "Left out: d (0 texts of 64 tokens" in notes


def test_fewer_than_two_classes(host: Host, own_task: Callable[[Task], None]) -> None:
    own_task(made_task({"a": "abc"}))
    with pytest.raises(TextError, match=r"too few texts for selectivity \| expected two classes or more \| got no classes"):
        selectivity_texts.read_texts(host, CONFIG)
    own_task(made_task({"a": "abc", "b": "def"}, number=12))
    with pytest.raises(TextError, match=r"a: .* to choose on, .* to measure on; 8 of each are needed; b: "):
        selectivity_texts.read_texts(host, CONFIG)


def test_part_through_the_suite(tmp_path: Path, host: Host) -> None:
    """What is kept as JSON is what the report is made of."""
    path = tmp_path / "kept.json"
    path.write_text(json.dumps(finite(module.measure(subject(host, planted(host, both=True)))), allow_nan=False))
    students = [entry(name, kind, json.loads(path.read_text())) for name, kind in (("m", "mxd"), ("t", "transcoder"))]
    (section,) = module.PART.show(students)
    assert len(section.words) == 3 and "no difference between kinds is shown" in section.words[-1]
    assert [row[:2] for row in section.tables[0].rows] == [["m", "a"], ["m", "b"], ["t", "a"], ["t", "b"]]
    assert "made-up" in " ".join(section.notes)


def test_rows_of_several_recipes_and_k_can_be_told_apart(host: Host) -> None:
    found = measured(host, planted(host))
    students = [
        entry("a", "transcoder", found), entry("b", "transcoder", found, recipe="host-encoder"), entry("c", "transcoder", found, k=8),
        entry("d", "topk-sae", found),
    ]  # fmt: skip
    drawn = show(students)[0].figures[0][1].svg()
    for student in students:
        assert drawn.count(f">{escape(label(student, students))}</text>") == 2, "once for each language"
    assert len({label(student, students) for student in students}) == 4


@pytest.mark.parametrize(
    ("names", "said", "unsaid"),
    [
        (["sotu", "wiki-en"], "Most of the measured Wikipedia leads in English were training texts", "leads in English and"),
        (["wiki-en", "wiki-fr", "wiki-es"], "leads in English, French and Spanish were training texts", "were not training text"),
        (["wiki-fr", "mine"], "leads in French were training texts", "leads in English"),
        (["wiki-fr"], "The corpora in English and Spanish were not training text.", "None of"),
        (["sotu"], "None of the built-in Wikipedia corpora was training text.", "Most of"),
        ([], "What the students were trained on is not known", "Most of"),
    ],
)
def test_the_note_names_the_languages_that_were_trained_on(host: Host, names: list[str], said: str, unsaid: str) -> None:
    one = subject(host, planted(host))
    one.run.info["text"]["sources"] = [{"name": name} for name in names]
    found = json.loads(json.dumps(finite(module.measure(one))))
    notes = " ".join(show([entry("s", "transcoder", found)])[0].notes)
    assert said in notes and unsaid not in notes
    assert f"training text: {', '.join(names) or 'unknown'}." in notes
