"""Anatomy: planted frequencies, pairs, token types, ranks and shared experts; and the whole part on a tiny host."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from mxd.config import EvalConfig
from mxd.errors import ConfigError
from mxd.evals.anatomy import firing as anatomy_firing
from mxd.evals.anatomy import measure as anatomy
from mxd.evals.anatomy import weights as anatomy_weights
from mxd.evals.anatomy.firing import Window, coactivation, firing, look, token_types
from mxd.evals.parts import Shared, Subject, finite
from mxd.evals.sections import html, markdown
from mxd.host import Host
from mxd.layers import LAYERS, Edited, MxD, SparseLayer
from mxd.text import Corpus

from .hosts import LENGTH, random_layer, tiny_llama, write_run, write_text
from .test_shares import inputs, mixture

SMALL = EvalConfig(sequences=24, bootstrap=50, anatomy_tokens=44 * LENGTH, jacobian_tokens=10)


def window(indices: torch.Tensor, n_units: int) -> Window:
    counts = torch.bincount(indices.flatten(), minlength=n_units + 1)[:-1]
    return Window(indices, counts, torch.ones(n_units, dtype=torch.float64), False)


def test_frequencies_and_dead_units_by_hand() -> None:
    # Expert n of four fires on every fourth token; two more never do; the last on all, with activation 3.
    layer = mixture(torch.ones(7, 3), k=2)
    x = torch.zeros(40, 10)
    x[torch.arange(40), torch.arange(40) % 4] = 1
    x[:, 6] = 3
    found = firing(look(layer, x))
    assert found["tokens"] == 40 and found["l0"] == 2 and found["max_frequency"] == 1
    assert found["dead_fraction"] == pytest.approx(2 / 7)
    assert found["n_above_half"] == 1 and found["above_half"] == [{"unit": 6, "frequency": 1.0, "strength": 3.0}]
    assert sum(found["histogram"]["units"]) == 5 and found["histogram"]["units"][-1] == 1
    assert found["median_frequency"] == 0.25


def test_a_gate_without_topk_is_counted_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anatomy_firing, "TOKENS_AT_ONCE", 16)
    layer = mixture(torch.ones(5, 3), k=5)  # all units may be active
    x = inputs(5, 64)
    x[:3, :5] = 1
    found = look(layer, x)
    expected = (x[:, :5] > 0).sum(0)
    assert torch.equal(found.counts, expected) and not found.truncated
    assert torch.equal(torch.bincount(found.indices.flatten(), minlength=6)[:5], expected)
    monkeypatch.setattr(anatomy_firing, "MOST_PER_TOKEN", 2)
    few = look(layer, x)
    assert few.truncated and few.indices.shape[1] == 2 and torch.equal(few.counts, expected)


def random_window(n: int = 4000, n_units: int = 30, k: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(n_units - 2, generator=generator)[:k] for _ in range(n)])


def test_a_planted_pair_is_found_and_chance_is_not() -> None:
    # Units 28 and 29 fire together on one token in ten; all others by chance.
    indices = torch.cat([random_window(), torch.full((4000, 2), 30)], 1)
    together = torch.rand(4000, generator=torch.Generator().manual_seed(1)) < 0.1
    indices[together, 3:] = torch.tensor([28, 29])
    found = coactivation(window(indices, 30), torch.ones(4000, dtype=torch.bool), 10)
    assert sorted(found["top"][0]["units"]) == [28, 29]
    assert found["top"][0]["phi"] == pytest.approx(1, abs=1e-5)
    assert found["top"][0]["tokens"] == int(together.sum())
    assert found["top"][0]["lift"] == pytest.approx(4000 / int(together.sum()), rel=1e-5)
    assert found["units"] == 30 and found["pairs"] == 30 * 29 // 2
    assert found["share_above_chance"] == pytest.approx(1 / found["pairs"])
    assert found["share_shifted"] == 0
    assert found["share_with_partner"] == pytest.approx(2 / 30)


def test_phi_is_the_correlation_of_the_indicators() -> None:
    indices = random_window()
    found = coactivation(window(indices, 30), torch.ones(4000, dtype=torch.bool), 10)
    i, j = found["top"][0]["units"]
    fired = torch.stack([(indices == unit).any(1) for unit in (i, j)]).double()
    assert found["top"][0]["phi"] == pytest.approx(float(torch.corrcoef(fired)[0, 1]), abs=1e-5)
    assert found["share_above_chance"] == 0


def test_too_few_units_make_no_pairs() -> None:
    found = coactivation(window(torch.zeros(100, 1, dtype=torch.int64), 3), torch.ones(100, dtype=torch.bool), 10)
    assert found["units"] == 1 and found["pairs"] == 0 and found["share_above_chance"] is None and found["top"] == []


def test_units_that_follow_the_token_are_told_from_those_that_do_not() -> None:
    ids = torch.arange(50).repeat(40)
    keep = torch.ones(2000, dtype=torch.bool)
    own = token_types(window(ids[:, None] * 2 + torch.arange(2), 100), ids, keep, seed=0)
    assert own["types"] == 50 and own["distinct"]["median"] == 2 and own["effective"]["median"] == pytest.approx(2)
    assert own["any_distinct"] > 25
    assert own["examples"][0]["occurrences"] == 40 and own["examples"][0]["distinct"] == 2
    other = torch.randint(0, 100, (2000, 2), generator=torch.Generator().manual_seed(0))
    none = token_types(window(other, 100), ids, keep, seed=0)
    assert none["distinct"]["median"] == pytest.approx(none["any_distinct"], rel=0.06)
    # 19 occurrences are too few.
    assert token_types(window(other[:950], 100), ids[:950], keep[:950], seed=0)["types"] == 0


def test_ranks_by_hand() -> None:
    values = torch.tensor([[2.0, 2, 2, 2], [3, 0, 0, 0], [0, 0, 0, 0], [4, 2, 1, 1]], dtype=torch.float64)
    found = anatomy_weights.ranks(values, (6, 4))
    assert found["rank"].tolist() == [4, 1, 0, 4]
    assert found["effective"].tolist() == pytest.approx([4, 1, 0, 2**1.75])
    assert found["stable"].tolist() == pytest.approx([4, 1, 0, 22 / 16])


@pytest.mark.parametrize("kind", ["mxd", "mxd-pk", "cp-mumoe", "mov"])
def test_ranks_are_those_of_the_experts_themselves(kind: str) -> None:
    layer = random_layer(kind)
    found = anatomy_weights.expert_ranks(Edited(layer, scale={0: 2.0}), range(20), lambda _: None)
    assert found is not None and found["experts"] == 20
    maps = torch.stack([layer.expert(n) for n in range(20)])  # type: ignore[operator]
    assert found["full"] == min(maps.shape[1:])
    assert found["rank"]["mean"] == pytest.approx(float(torch.linalg.matrix_rank(maps).double().mean()) / found["full"])
    sigma = torch.linalg.svdvals(maps.double())
    assert found["stable"]["mean"] == pytest.approx(float((sigma**2).sum(1).div(sigma[:, 0] ** 2).mean()) / found["full"], rel=1e-6)
    assert sum(found["histogram"]) == 20


def test_lemma_1_and_where_it_does_not_hold() -> None:
    layer = random_layer("mxd")
    assert isinstance(layer, MxD)
    with torch.no_grad():
        layer.D[:, 4:] = layer.D[:, :1]  # rank 4
        layer.C[0, :3] = 0
    found = anatomy_weights.expert_ranks(layer, [1, 2, 3], lambda _: None)
    assert found is not None and found["rank_D"] == 4 / 16 and found["zeros_in_c"] == 0
    assert found["rank"]["low"] == found["rank"]["high"] == 4 / 16
    fewer = anatomy_weights.expert_ranks(layer, [0], lambda _: None)
    assert fewer is not None and fewer["zeros_in_c"] == 1 and fewer["rank"]["mean"] == 2 / 16
    assert anatomy_weights.expert_ranks(random_layer("transcoder"), [0], lambda _: None) is None
    assert anatomy_weights.expert_ranks(layer, [], lambda _: None) is None


def test_a_planted_shared_expert_is_the_hosts_decoder() -> None:
    host, layer = tiny_llama(), random_layer("mxd")
    assert isinstance(layer, MxD)
    decoder = host.weights("layers.1.mlp").D
    with torch.no_grad():
        layer.D.copy_(decoder)
        layer.C[3] = 2.0
    found = anatomy_weights.distances(layer, decoder, 3, 0.5)
    assert found is not None
    assert found["D"] == 0 and found["D_scaled"] == pytest.approx(0, abs=1e-6)
    assert found["expert"] == pytest.approx(float(decoder.norm()), rel=1e-6)
    assert found["expert_scaled"] == pytest.approx(0, abs=1e-5) and found["expert_as_used"] == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        layer.D.zero_()
    nothing = anatomy_weights.distances(layer, decoder, 3, 0.5)
    assert nothing is not None and nothing["D_scaled"] == nothing["D"] == nothing["host"]
    assert anatomy_weights.distances(layer, decoder[:5], 3, 0.5) is None
    assert anatomy_weights.distances(random_layer("transcoder"), decoder, 3, 0.5) is None


def test_the_busiest_unit_of_a_layer_with_a_planted_shared_expert_is_that_expert() -> None:
    """Expert 4 fires on all tokens with activation 3 and is D* itself; each of the others on one token in four."""
    layer = mixture(torch.full((5, 3), 2.0), k=2)
    decoder = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.D.copy_(decoder)
        layer.C[4] = 1.0
    x = torch.zeros(40, 8)
    x[torch.arange(40), torch.arange(40) % 4] = 1
    x[:, 4] = 3
    subject = cast(Any, SimpleNamespace(layer=layer, hookpoint="m", host=SimpleNamespace(weights=lambda _: SimpleNamespace(D=decoder))))
    seen = look(layer, x)
    found = anatomy._shared(subject, firing(seen), seen)
    assert (found["found"], found["unit"], found["frequency"], found["strength"]) == (True, 4, 1.0, 3.0)
    distances = found["distances"]
    assert distances["expert"] == distances["D"] == pytest.approx(0, abs=1e-6)
    assert distances["expert_as_used"] == pytest.approx(2 * float(decoder.norm()), rel=1e-6), "3 W − D* = 2 D*"
    x[1:, 4] = 0
    seen = look(layer, x)
    none = anatomy._shared(subject, firing(seen), seen)
    assert none["found"] is False and none["unit"] != 4 and none["frequency"] == 0.25


class World:
    """Host, text, a run with every kind, and its anatomy."""

    def __init__(self, folder: Path) -> None:
        self.host: Host = tiny_llama()
        text = write_text(folder / "text")
        self.corpus = Corpus(str(text))
        self.run = write_run(folder / "run", text)
        shared = Shared()
        self.told: list[float] = []
        self.students = [self.student(record.name, SMALL, shared) for record in self.run.students]

    def student(
        self, name: str, config: EvalConfig, shared: Shared | None = None, layer: SparseLayer | None = None, recipe: str | None = None
    ) -> dict[str, Any]:
        record = self.run.student(name)
        record = record if recipe is None else dataclasses.replace(record, recipe=recipe)

        def say(done: float, _: str) -> None:
            self.told.append(done)

        own = layer or self.run.load(name)
        subject = Subject(self.run, record, own, self.host, self.corpus, config, shared or Shared(), say)
        about = {field: getattr(record, field) for field in ("name", "kind", "k", "n_units", "recipe", "hookpoint")}
        return {**about, "anatomy": finite(anatomy.measure(subject))}

    def of(self, kind: str) -> dict[str, Any]:
        return next(s["anatomy"] for s in self.students if s["kind"] == kind)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("kind", LAYERS)
def test_every_kind_has_what_it_can_have(world: World, kind: str) -> None:
    found = world.of(kind)
    json.dumps(found, allow_nan=False)
    jacobian = found["routing"]["jacobian"]
    assert -1 <= jacobian["cosine"]["value"] <= 1 and jacobian["tokens"] == 10
    assert ("firing" in found) == (kind != "dense")
    if kind == "dense":
        assert set(found["routing"]) == {"jacobian"}
        return
    assert found["firing"]["tokens"] == found["window_tokens"] == 44 * LENGTH
    assert found["tokens"] == (24 * (LENGTH - 1))
    assert (found["rank"] is not None) == (kind in ("mxd", "mxd-pk", "cp-mumoe", "mov"))
    assert (found["shared"]["distances"] is not None) == (kind in ("mxd", "mxd-pk"))
    assert set(found["routing"]) == {"tokens", "benefit", "amplitude", "causality", "identity", "jacobian"}
    assert found["routing"]["identity"]["nats"]["sequences"] == 40
    assert math.isfinite(found["routing"]["benefit"]["explained"]["value"])


def test_progress_runs_from_0_to_1(world: World) -> None:
    assert min(world.told) >= 0 and max(world.told) == 1
    first = world.told[: world.told.index(1) + 1]
    assert first == sorted(first)


def test_the_report_shows_every_student_and_says_what_does_not_follow(world: World) -> None:
    sections = anatomy.show(world.students)
    assert [s.title for s in sections] == ["When units fire", "What the experts are made of", "What each unit does", "Jacobians"]
    for section in sections:
        lines = "\n".join(markdown(section, str))
        assert "nan" not in lines.lower().replace("nanosecond", "") and "None" not in lines
        assert "<script" not in html(section)
        for table in section.tables:
            assert all(len(row) == len(table.heads) for row in table.rows), table.caption
    assert len(sections[0].tables[0].rows) == len(LAYERS) - 1 and len(sections[3].tables[0].rows) == len(LAYERS)
    assert "nothing of what they are used for" in sections[1].words[0]
    assert anatomy.show([{"name": "x", "anatomy": {"missing": "no text"}}]) == []


def test_tokens_of_a_text_cannot_write_into_the_page(world: World) -> None:
    student = json.loads(json.dumps(world.students[0]))
    student["anatomy"]["token_types"]["examples"] = [{"id": 1, "occurrences": 20, "distinct": 3, "effective": 2.0, "token": "<b>x"}]
    assert "&lt;b&gt;x" in html(anatomy.show([student])[0]) and "<b>" not in html(anatomy.show([student])[0])


def test_options_do_what_they_say(world: World) -> None:
    found = world.student("mxd-k4", dataclasses.replace(SMALL, anatomy_tokens=30 * LENGTH, jacobian_tokens=3))["anatomy"]
    assert found["firing"]["tokens"] == 30 * LENGTH and found["routing"]["jacobian"]["tokens"] == 3
    # More than there is: all of it.
    all_there_is = world.student("dense", dataclasses.replace(SMALL, anatomy_tokens=10_000_000, jacobian_tokens=3))["anatomy"]
    assert found["window_tokens"] < all_there_is["window_tokens"] < 10_000_000


def test_the_paper_suite_takes_the_first_experts_dead_or_not(world: World) -> None:
    counts = torch.tensor([0, 5, 0, 2])
    assert list(anatomy._ranked(counts, True, 0)) == [0, 1, 2, 3]
    assert anatomy._ranked(counts, False, 0) == [1, 3]
    assert len(anatomy._ranked(torch.ones(5000), True, 0)) == 2000 and len(anatomy._ranked(torch.ones(5000), False, 0)) == 128


@pytest.mark.parametrize(("option", "value"), [("anatomy_tokens", LENGTH - 1), ("jacobian_tokens", 0)])
def test_sizes_that_make_no_sense_are_refused(world: World, option: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"--{option.replace('_', '-')} is too small"):
        world.student("dense", dataclasses.replace(SMALL, **{option: value}))


@pytest.mark.parametrize(
    ("recipe", "asked", "expected"),
    [("ours", False, False), ("ours+random-k", False, True), ("ours", True, True), ("from elsewhere", False, False),
     ("from elsewhere", True, True), ("ours+l1=1", True, False)],
)  # fmt: skip
def test_random_k_is_that_of_the_student(world: World, recipe: str, asked: bool, expected: bool) -> None:
    run = SimpleNamespace(info={"config": {"random_k": asked}})
    subject = cast(Any, SimpleNamespace(run=run, record=SimpleNamespace(recipe=recipe, kind="transcoder")))
    assert anatomy._random_k(subject) is expected
    if not asked:
        assert world.student("transcoder-k4", SMALL, recipe=recipe)["anatomy"]["random_k"] is expected


def test_the_cell_of_effective_units_has_no_bracket_and_tokens_are_named(world: World) -> None:
    table = anatomy.show(world.students)[2].tables[0]
    for row in table.rows:
        cells = dict(zip(table.heads, row, strict=True))
        assert float(cells["effective units"].replace(",", "")) >= 1
        assert "[" in cells["ID, FVU"], "others have one"
    student = next(s for s in world.students if s["kind"] == "mov")
    student = {**student, "anatomy": {**student["anatomy"], "routing": {**student["anatomy"]["routing"], "tokens": 4096}}}
    table = anatomy.show([student])[2].tables[0]
    assert table.rows[0][table.heads.index("tokens")] == "4,096"
    assert any("Noise makes it larger" in note and "no interval" in note for note in anatomy.show([student])[2].notes)


def test_a_student_of_nan_is_shown_without_figures(world: World) -> None:
    layer = random_layer("mxd")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(math.nan)
    student = world.student("mxd-k4", SMALL, layer=layer)
    json.dumps(student["anatomy"], allow_nan=False)
    assert student["anatomy"]["routing"]["benefit"]["shared_share"]["value"] is None
    assert "nan" not in "\n".join(line for section in anatomy.show([student]) for line in markdown(section, str))


def test_the_same_seed_gives_the_same_figures(world: World) -> None:
    assert world.student("mxd-k4", SMALL) == next(s for s in world.students if s["name"] == "mxd-k4")


def test_jacobian_tokens_are_never_first_and_never_twice(world: World) -> None:
    shared = Shared()
    world.student("dense", SMALL, shared)
    texts = shared.get("texts", lambda: pytest.fail("not made"))
    seen = shared.get(("seen", "layers.1.mlp"), lambda: pytest.fail("not made"))
    marked = seen._replace(x=torch.arange(len(seen.x), dtype=torch.float32)[:, None])
    x, documents = anatomy._spread_out(texts.window, marked, 10_000, 0)
    at = x.flatten().long()
    assert len(at) == len(at.unique()) == 44 * (LENGTH - 1) and not seen.first[at].any()
    assert torch.equal(documents, texts.window.documents[at // LENGTH])
