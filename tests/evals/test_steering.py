"""Steering: the stand-in against `Edited`, choice of units, effects by hand, planted units, nothing at λ = 0, and what is shown."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mxd.checkpoint import Run
from mxd.config import KINDS, EvalConfig
from mxd.errors import ConfigError
from mxd.evals import suite
from mxd.evals.parts import Shared, Subject, finite
from mxd.evals.steering import judge
from mxd.evals.steering import measure as steering
from mxd.evals.steering.layer import Firing, Steered, choose, divergence, firing, push_sizes, random_directions
from mxd.evals.steering.measure import measure, protocol
from mxd.evals.steering.show import show
from mxd.evals.steering.text import Sampling, changed, distinct, read, steered
from mxd.harvest import Batch
from mxd.host import Generated, Host
from mxd.layers import Edited, MixtureOfDecoders, SparseLayer, Transcoder
from mxd.recipes import published
from mxd.text import Corpus

from .hosts import random_layer, tiny_llama, write_run, write_text
from .test_judge import GOOD, KEY, Fake

pytestmark = pytest.mark.usefixtures("one_thread")

UNITS = [kind for kind in KINDS if kind != "dense"]
HOOK = "layers.1.mlp"
SMALL = EvalConfig(suite="full", bootstrap=50, steer_units=5, steer_samples=3)
HOW = Sampling("w1 w2", 8, 1.0, 0.9, 0.0)


class World:
    """Host, text and a run of every kind; `measured` measures each configuration once."""

    def __init__(self, folder: Path) -> None:
        self.host: Host = tiny_llama()
        self.text = write_text(folder / "text")
        self.corpus = Corpus(str(self.text))
        self.run: Run = write_run(folder / "run", self.text)
        self.shared = Shared()
        self._kept: dict[Any, dict[str, Any]] = {}

    def measured(self, kind: str, config: EvalConfig = SMALL) -> dict[str, Any]:
        if (kind, config) not in self._kept:
            self._kept[kind, config] = measure(self.subject(kind, config))
        return self._kept[kind, config]

    def subject(self, kind: str, config: EvalConfig = SMALL, layer: SparseLayer | None = None, told: list[Any] | None = None) -> Subject:
        record = next(r for r in self.run.students if r.kind == kind)
        said: list[Any] = [] if told is None else told
        own = layer or self.run.load(record.name)
        return Subject(self.run, record, own, self.host, self.corpus, config, self.shared, lambda s, n: said.append((s, n)))

    def student(self, kind: str, config: EvalConfig = SMALL) -> dict[str, Any]:
        record = next(r for r in self.run.students if r.kind == kind)
        return {**dataclasses.asdict(record), "steering": finite(self.measured(kind, config))}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def inputs(rows: int = 5, positions: int = 7) -> torch.Tensor:
    return torch.randn(rows, positions, 16, generator=torch.Generator().manual_seed(1))


# the stand-in


@pytest.mark.parametrize("kind", UNITS)
def test_every_row_is_the_edited_layer(kind: str) -> None:
    layer, x = random_layer(kind), inputs()
    units, added = [3, 24, 0, 3, 7], [2.0, -1.5, 40.0, 0.0, 0.1]
    y = Steered(layer, torch.tensor(units), torch.tensor(added))(x)
    for row, (unit, value) in enumerate(zip(units, added, strict=True)):
        expected = Edited(layer, add={unit: value})(x[row]).y
        assert torch.allclose(y[row], expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert torch.equal(y[3], layer(x[3]).y), "λ = 0 changes no bit"
    assert not torch.allclose(y[0], layer(x[0]).y)
    ablated = Edited(layer, scale={3: 0.0})
    twice = Steered(ablated, torch.tensor([3] * 5), torch.tensor([2.0] * 5))(x)
    assert torch.allclose(twice, Edited(layer, scale={3: 0.0}, add={3: 2.0})(x).y, rtol=1e-5, atol=1e-5)


def test_the_formulas_of_the_paper() -> None:
    x = inputs()
    unit, added = torch.tensor([4] * 5), torch.tensor([3.0] * 5)
    mxd = random_layer("mxd")
    assert isinstance(mxd, MixtureOfDecoders)
    out = mxd(x)
    assert out.code.hidden is not None
    assert torch.allclose(Steered(mxd, unit, added)(x), out.y + 3 * out.code.hidden @ mxd.expert(4), rtol=1e-4, atol=1e-4)
    transcoder = random_layer("transcoder")
    assert isinstance(transcoder, Transcoder)
    assert torch.allclose(Steered(transcoder, unit, added)(x), transcoder(x).y + 3 * transcoder.latent(4), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", UNITS)
def test_the_control_pushes_as_hard_in_one_direction(kind: str) -> None:
    layer, x = random_layer(kind), inputs()
    units, added, ways = torch.tensor([1, 2, 3, 4, 5]), torch.full((5,), 4.0), random_directions(5, 16, [7, 8, 9, 10, 11])
    own = Steered(layer, units, added)(x) - layer(x).y
    control = Steered(layer, units, added, ways)(x) - layer(x).y
    assert torch.allclose(own.norm(dim=-1), control.norm(dim=-1), rtol=1e-3)
    assert torch.allclose(control, control.norm(dim=-1, keepdim=True) * ways[:, None], rtol=1e-2, atol=1e-4)


def test_random_directions_depend_on_their_seed_only() -> None:
    ways = random_directions(3, 400, [5, 6, 5])
    assert torch.equal(ways[0], ways[2]) and not torch.equal(ways[0], ways[1])
    assert torch.allclose(ways.norm(dim=1), torch.ones(3)) and abs(float(ways[0] @ ways[1])) < 0.2


# which units, how hard


def one_hot_layer() -> Transcoder:
    """Unit n reads component n of x and writes along component n: a_n = x_n where it is among the four largest."""
    layer = random_layer("transcoder")
    assert isinstance(layer, Transcoder)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.W_enc[:16].copy_(torch.eye(16))
        layer.W_dec[:16].copy_(2 * torch.eye(16))
    return layer


def test_firing_and_push_by_hand() -> None:
    x = torch.zeros(6, 16)
    x[1, 0], x[2, 0], x[3, 5], x[0, 7] = 2.0, 4.0, 1.0, 9.0
    y = torch.full((6, 16), 0.25)
    batch = Batch(x, y, torch.tensor([True] + [False] * 5))
    found = firing(one_hot_layer(), batch)
    assert found.tokens == 5 and found.times[:8].tolist() == [2, 0, 0, 0, 0, 1, 0, 0] and int(found.times.sum()) == 3
    assert found.typical[:6].tolist() == [3.0, 0, 0, 0, 0, 1.0]
    assert push_sizes(one_hot_layer(), batch, [0, 9], [3.0, -0.5]).tolist() == pytest.approx([6.0, 1.0]), "2 |λ| / |y| with |y| = 1"


def test_units_come_from_every_stratum_of_frequency() -> None:
    times = torch.arange(100)
    found = Firing(times, torch.ones(100), 1000)
    for seed in range(5):
        chosen = choose(found, 12, "stratified", seed)
        assert chosen == sorted(chosen) and [(unit - 4) // 8 for unit in chosen] == list(range(12)), "96 live units in 12 groups of 8"
    assert len({tuple(choose(found, 12, "stratified", seed)) for seed in range(5)}) > 1
    assert choose(found, 12, "stratified", 3) == choose(found, 12, "stratified", 3)
    assert choose(found, 500, "stratified", 0) == list(range(4, 100)), "all of them, no dead one"
    assert choose(found, 7, "first", 0) == list(range(7)), "as published, firing or not"


def test_too_few_units() -> None:
    found = Firing(torch.tensor([9, 3, 0]), torch.ones(3), 1234)
    with pytest.raises(
        ConfigError, match=r"^too few units to steer \| expected at least 2 that fire 4 times or more in 1,234 tokens \| got 1"
    ):
        choose(found, 5, "stratified", 0)
    with pytest.raises(ConfigError, match=r"^too few units to steer \| expected at least 2 that fire .* \| got 0 "):
        choose(Firing(torch.zeros(3, dtype=torch.int64), torch.ones(3), 5), 5, "stratified", 0)


def test_divergence_is_that_of_the_edited_layer(world: World) -> None:
    layer, ids = random_layer("mxd"), torch.arange(3, 15)
    found = divergence(world.host, HOOK, layer, ids, 4, [2, 9, 5], [0.0, 3.0, -2.0])
    with world.host.replace({HOOK: layer}):
        plain = world.host.logits(ids[None])[0, 3:-1].double().log_softmax(-1)
    with world.host.replace({HOOK: Edited(layer, add={9: 3.0})}):
        other = world.host.logits(ids[None])[0, 3:-1].double().log_softmax(-1)
    expected = torch.nn.functional.kl_div(other, plain, log_target=True, reduction="none").sum(-1).mean()
    assert float(found[1]) == pytest.approx(float(expected), rel=1e-4) and float(found[1]) > 0.01
    assert float(found[0]) == pytest.approx(0, abs=1e-9)


# what is written


def test_read_by_hand_with_texts_of_several_lengths(world: World) -> None:
    host = world.host
    texts = [Generated([0, 5, 6], new, "") for new in ([7, 8, 9, 10], [11], [12, 13])]
    found = read(host, texts, "layers.0.mlp")
    for row, text in enumerate(texts):
        ids = torch.tensor([text.prompt_ids + text.new_ids])
        chances = host.logits(ids)[0].double().softmax(-1)
        losses = [-float(chances[2 + i, token].log()) for i, token in enumerate(text.new_ids)]
        assert found.loss[row] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        stream = host.read(ids, ["layers.0.mlp"])["layers.0.mlp"].x[0, 3:].double().mean(0)
        assert found.vectors[row] == pytest.approx(stream.numpy(), rel=1e-4, abs=1e-6)
    assert read(host, [], HOOK).vectors.shape == (0, 16)


def test_changed_and_distinct_by_hand() -> None:
    def text(*ids: int) -> Generated:
        return Generated([0], list(ids), "")

    assert changed([text(1, 2), text(3)], [text(1, 2), text(3)]) == (False, 0.0)
    assert changed([text(1, 9), text(3)], [text(1, 2), text(3, 4, 5)]) == (True, 3 / 5)
    assert distinct([text(1, 1, 1, 2), text(5)]) == 0.75


@pytest.mark.parametrize("kind", ["mxd", "topk-sae"])
def test_a_batch_of_units_writes_what_each_writes_alone(world: World, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, seeds = random_layer(kind), [5, 6]
    monkeypatch.setattr("mxd.evals.steering.text.ROWS", 4)
    told: list[float] = []
    made = steered(world.host, HOOK, layer, [1, 2, 3], [9.0, 0.0, -9.0], seeds, HOW, say=told.append)
    assert told == pytest.approx([2 / 3, 1.0])
    for unit, value, own in zip([1, 2, 3], [9.0, 0.0, -9.0], made, strict=True):
        with world.host.replace({HOOK: Edited(layer, add={unit: value})}):
            assert own == [HOW.write(world.host, [seed])[0] for seed in seeds]


# the whole measurement


@pytest.mark.parametrize("kind", UNITS)
def test_every_kind_is_measured_alike(world: World, kind: str) -> None:
    told: list[tuple[float, str]] = []
    before = world.host.mlp(HOOK)
    found = measure(world.subject(kind, told=told))
    assert world.host.model.get_submodule(world.host.site(HOOK).module) is before
    assert [s for s, _ in told] == sorted(s for s, _ in told) and told[0][0] == 0 and 0.9 < told[-1][0] <= 1
    json.dumps(found, allow_nan=False)
    assert len(found["units"]) == 5 == len({row["unit"] for row in found["units"]})
    for row in found["units"]:
        assert row["lambda"] == pytest.approx(10 * row["typical"]) and row["frequency"] > 0 and row["push"] > 0 and row["kl"] > 0
    for key, column in {"coherence": "coherence", "loss": "loss", "kl": "kl", "push": "push", "word_coherence": "word_coherence"}.items():
        assert found[key]["value"] == pytest.approx(float(np.mean([row[column] for row in found["units"]])), rel=1e-9), key
        assert found[key]["ci95"][0] <= found[key]["value"] <= found[key]["ci95"][1]
    over = found["coherence"]["value"] - found["random"]["coherence"]["value"]
    assert found["over_random"]["coherence"]["value"] == pytest.approx(over, abs=1e-12)
    assert "judges" not in found, "off by default"


def test_same_seed_same_bits(world: World) -> None:
    found = world.measured("mxd")
    assert measure(world.subject("mxd")) == found
    assert measure(world.subject("mxd", dataclasses.replace(SMALL, seed=1)))["examples"] != found["examples"]


def test_dense_has_no_units(world: World) -> None:
    assert measure(world.subject("dense")) == {"missing": "the dense control has no units"}


@pytest.mark.parametrize("kind", ["mxd"])
def test_nothing_is_added_and_nothing_changes(world: World, kind: str) -> None:
    found = world.measured(kind, dataclasses.replace(SMALL, steer_scale=0.0))
    for one in (found, found["random"]):
        assert (one["changed"]["value"], one["tokens_changed"]["value"]) == (0.0, 0.0)
        assert one["coherence"]["value"] == pytest.approx(0, abs=1e-9) and one["coherence"]["p"] == 1.0
    assert found["kl"]["value"] == pytest.approx(0, abs=1e-9) and found["push"]["value"] == 0.0
    assert found["over_random"]["loss"]["value"] == 0.0
    assert {text[0] for text in (one["texts"] for one in found["examples"]["units"])} == {found["examples"]["unsteered"]}


def test_options_do_something(world: World) -> None:
    few = world.measured("mxd")
    more = world.measured("mxd", dataclasses.replace(SMALL, steer_units=7, steer_samples=2))
    assert (len(few["units"]), len(more["units"])) == (5, 7) and more["protocol"]["samples"] == 2
    harder = world.measured("mxd", dataclasses.replace(SMALL, steer_scale=30.0))
    assert [row["lambda"] for row in harder["units"]] == pytest.approx([3 * row["lambda"] for row in few["units"]])
    assert harder["push"]["value"] == pytest.approx(3 * few["push"]["value"], rel=1e-4) and harder["kl"]["value"] > few["kl"]["value"]
    assert set(steering.PART.options) == {"steer_units", "steer_samples", "steer_scale", "judge_model"}


def test_the_published_protocol_to_the_letter(world: World) -> None:
    asked = protocol(EvalConfig(suite="paper"))
    assert asked[:6] == ("paper", 100, "first", 10, 100.0, False)
    assert asked.sampling == Sampling("Let's talk about ", 32, 1.0, 0.1, 1.0)
    found = measure(world.subject("transcoder", EvalConfig(suite="paper", bootstrap=20, steer_units=3, steer_samples=2, steer_scale=7.0)))
    assert [(row["unit"], row["lambda"]) for row in found["units"]] == [(0, 100.0), (1, 100.0), (2, 100.0)]
    assert protocol(EvalConfig(suite="full"))[:6] == ("ours", 24, "stratified", 4, 10.0, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steer_units": 1}, r"^--steer-units is too small \| expected at least 2 \| got 1$"),
        ({"steer_samples": 0}, r"^--steer-samples is too small \| expected at least 2 \| got 0$"),
        ({"steer_scale": float("nan")}, r"^--steer-scale is no number \| expected a finite one \| got nan$"),
    ],
)
def test_options_that_cannot_work(world: World, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        measure(world.subject("mxd", EvalConfig(**options)))


def test_planted_units_say_one_token_each(world: World) -> None:
    """Every unit pushes the residual stream so far towards one token that nothing else is ever said."""
    layer, host = one_hot_layer(), tiny_llama()
    head = host.model.lm_head.weight.mul_(20)  # so that the likeliest token has all of the probability
    gain = host.model.model.norm.weight
    with torch.no_grad():
        wins = [t for t in range(3, len(head)) if int((head @ (gain * head[t])).argmax()) == t][:16]
        assert len(wins) == 16
        for unit, token in enumerate(wins):
            layer.W_dec[unit] = 1e4 * head[token]
    made = steered(host, HOOK, layer, list(range(16)), [100.0] * 16, [1, 2, 3], HOW)
    for unit, token in enumerate(wins):
        assert all(set(text.new_ids) == {token} for text in made[unit])
    subject = world.subject("transcoder", dataclasses.replace(SMALL, steer_scale=1e4), layer)
    found = measure(dataclasses.replace(subject, host=host, shared=Shared()))
    assert found["changed"]["value"] == 1.0 and found["coherence"]["within"] == pytest.approx(1.0, abs=1e-6)
    assert found["word_coherence"]["value"] == pytest.approx(1.0, abs=1e-9), "all alike, nothing shared between units"
    assert found["coherence"]["p"] < 0.01 and found["coherence"]["ci95"][0] > 0.3
    assert found["distinct"]["value"] == pytest.approx(1 / 24), "and the repetition shows"
    assert found["random"]["word_coherence"]["value"] == pytest.approx(1.0, abs=1e-9), "a push that hard in any direction does the same"
    assert found["over_random"]["word_coherence"]["value"] == pytest.approx(0.0, abs=1e-9), "so that nothing is left over the control"


# judges


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(judge.time, "sleep", lambda _seconds: None)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    made = Fake()
    yield made
    made.close()


def test_two_judges_and_missing_verdicts(tmp_path: Path, world: World, fake: Fake) -> None:
    run = write_run(tmp_path / "run", world.text, kinds=("mxd",))
    config = dataclasses.replace(SMALL, parts=("steering",), judge_url=fake.url, judge_model=("wise", "wiser"))
    kept = suite.Kept(run, config, world.host.fingerprint)

    def go() -> dict[str, Any]:
        found = suite.measure(kept, run.students, lambda r: run.load(r.name), world.host, world.corpus, lambda _d, _n: None)
        return found["mxd-k4"]["steering"]

    fake.script = [GOOD, GOOD.replace("0.9", "0.5"), "nonsense"]
    found = go()
    one, other = found["judges"]
    assert (one["model"], one["missing"], other["missing"]) == ("wise", 3, 5) and found["incomplete"] is True
    assert one["coherence"]["value"] == pytest.approx(0.7), "of the two that were judged, not of five"
    assert one["fluency"]["value"] == pytest.approx(0.4) and "coherence" not in other
    assert [v is None for v in one["verdicts"]] == [False, False, True, True, True]
    section = show([{**dataclasses.asdict(run.students[0]), "steering": found}])[0]
    table = next(t for t in section.tables if "Verdicts" in t.caption)
    assert [row[-1] for row in table.rows] == ["2 of 5", "0 of 5"] and table.rows[1][2] == "–"
    assert any("Missing verdicts: judge wise gave no verdict" in note for note in section.notes)
    asked = len(fake.asked)
    fake.script = [GOOD]
    again = go()
    assert [j["missing"] for j in again["judges"]] == [0, 0] and again["incomplete"] is False
    assert len(fake.asked) - asked == 8, "what was judged is not paid for again"
    assert go() == again and len(fake.asked) - asked == 8
    assert len(show([{**dataclasses.asdict(run.students[0]), "steering": again}])[0].figures) == 3
    for file in run.path.rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), file


# what is shown


def test_the_section(world: World) -> None:
    students = [world.student(kind) for kind in ("mxd", "transcoder", "additive")]
    (section,) = show([*students, {"name": "dense", "kind": "dense", "steering": {"missing": "no units"}}])
    table = section.tables[0]
    assert len(table.rows) == 10 and {len(row) for row in table.rows} == {len(table.heads)}
    assert len(section.tables) == 1, "published figures belong to GPT-2 only"
    assert len(section.words) == 4 and all(re.search(r"\d+ % of the steered units change", words) for words in section.words[:3])
    svg = section.figures[0][1].svg()
    assert svg.count("<polyline") >= 3 and svg.count("<title>") == 1 + 15 and "line dash k-additive" in svg
    assert show([{"name": "dense", "kind": "dense", "steering": {"missing": "no units"}}]) == []


def test_published_means_beside_their_own_host(world: World) -> None:
    student = world.student("mxd")
    student["steering"] = {**student["steering"], "host": "openai-community/gpt2"}
    rows = show([student])[0].tables[1].rows
    assert ["MxD", "0.77", "0.56"] in [[c.replace("0.770", "0.77").replace("0.560", "0.56") for c in row] for row in rows]
    assert len(rows) == 4 == len(published()["steering_means_gpt2"]) - 1


def test_texts_are_escaped(world: World) -> None:
    student = world.student("mxd")
    examples = {"unsteered": "<script>alert(1)</script>", "units": [{"unit": 1, "texts": ["<b>&"]}]}
    student["steering"] = {**student["steering"], "examples": examples}
    html = show([student])[0].html
    assert "<script>" not in html and "&lt;script&gt;" in html and "&lt;b&gt;&amp;" in html


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(0.1, 0.3, "the direction matters"), (-0.1, 0.3, "is not shown"), (-0.3, -0.1, "less alike"), (None, None, "is not shown")],
)
def test_words_follow_the_interval(world: World, low: float | None, high: float | None, said: str) -> None:
    student = world.student("mxd")
    over = {**student["steering"]["over_random"], "coherence": {"value": 0.2, "ci95": [low, high]}}
    student["steering"] = {**student["steering"], "over_random": over}
    assert said in show([student])[0].words[0]


def test_the_share_that_changes_has_wilsons_interval(world: World) -> None:
    # By hand: n = 5, p = 1, z = 1.96: (p + z²/2n − z √(z²/4n²)) / (1 + z²/n) = 1 / (1 + z²/n); at p = 0 it is the mirror image.
    edge = 1 / (1 + 1.959964**2 / 5)
    assert steering.share_interval([True] * 5) == {"value": 1.0, "ci95": [pytest.approx(edge, rel=1e-6), 1.0]}
    assert steering.share_interval([False] * 5) == {"value": 0.0, "ci95": [0.0, pytest.approx(1 - edge, rel=1e-6)]}
    for found in (world.measured("mxd"), world.measured("mxd")["random"]):
        low, high = found["changed"]["ci95"]
        assert low <= found["changed"]["value"] <= high and high - low > 0.3
    section = show([world.student("mxd")])[0]
    assert "Wilson" in section.tables[0].caption and any("Wilson" in note for note in section.notes)


def test_figures_that_are_missing_are_shown_as_such(world: World) -> None:
    student = world.student("mxd")
    s = json.loads(json.dumps(student["steering"]))
    for found in (s, s["random"]):
        for key in ("coherence", "word_coherence", "loss", "changed", "tokens_changed"):
            found[key] = {**found[key], "value": None, "ci95": [None, None], "p": None}
    s["unsteered_loss"] = s["host_loss"] = s["kl"] = {"value": None, "ci95": [None, None]}
    s["units"] = [{**row, "coherence": None, "loss": None} for row in s["units"]]
    broken = {**student, "name": "broken", "steering": s}
    (section,) = show([broken, world.student("transcoder")])
    assert "no finite number" in section.words[0] and section.words[-1].startswith("Coherence has no value")
    assert "None" not in " ".join(cell for row in section.tables[0].rows for cell in row) + " ".join(section.words)
    assert show([world.student("transcoder"), broken])[0].figures[0][1].svg().count("<title>") == 1 + 5


@pytest.mark.parametrize("ends", [(None, 0.3), (0.1, None), (None, None)])
def test_an_interval_without_an_end_shows_no_difference(world: World, ends: tuple[float | None, float | None]) -> None:
    def at(value: float, ci95: tuple[float | None, float | None], kind: str) -> dict[str, Any]:
        student = world.student(kind)
        middle = {**student["steering"]["coherence"], "value": value, "ci95": list(ci95)}
        return {**student, "steering": {**student["steering"], "coherence": middle}}

    # A missing end as 0 would put the second below, or above, the first.
    for value, other in ((0.2, (0.8, 0.9)), (-0.5, (0.1, 0.2)), (0.2, (-0.9, -0.8))):
        words = show([at(value, ends, "mxd"), at(sum(other) / 2, other, "transcoder")])[0].words[-1]
        if None in ends and ((other[0] > 0 and ends[1] is None) or (other[1] < 0 and ends[0] is None)):
            assert "do not overlap" not in words and "has no interval" in words


def test_kinds_that_overlap_are_not_told_apart(world: World) -> None:
    def at(low: float, high: float, kind: str) -> dict[str, Any]:
        student = world.student(kind)
        middle = {**student["steering"]["coherence"], "value": (low + high) / 2, "ci95": [low, high]}
        return {**student, "steering": {**student["steering"], "coherence": middle}}

    overlapping = show([at(0.1, 0.3, "mxd"), at(0.2, 0.4, "transcoder")])[0].words[-1]
    assert "no difference between kinds is shown" in overlapping
    apart = show([at(0.1, 0.2, "mxd"), at(0.3, 0.4, "transcoder")])[0].words[-1]
    assert "Transcoder above MxD" in apart
