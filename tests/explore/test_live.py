"""The live model: sentences, lanes, doses and ablations against what the host and the layers say by themselves."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import mxd
from mxd.errors import HostError
from mxd.explore import asks, lanes, live, model, reads, trials
from mxd.explore.asks import Change, Generation
from mxd.explore.controls import control_units
from mxd.explore.live import Cancelled, Job, Worker
from mxd.explore.model import Model
from mxd.explore.replies import Refusal
from mxd.explore.shelf import Shelf
from mxd.explore.spans import utf16
from mxd.host import Host
from mxd.layers import Code, Edited, SparseLayer
from mxd.ops.transpose import Plan
from tests.small import small_run

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = "law people congress house"
TEXT = "the treaty of peace\n日🙂 and <eos>"
KINDS = ("mxd", "transcoder", "topk-sae", "dense", "cp-mumoe")
WITH_UNITS = ("mxd-k2", "transcoder-k2", "topk-sae-k2", "cp-mumoe-k2")
HOOKPOINT = "layers.1.mlp"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> mxd.Run:
    torch.set_num_threads(1)
    config = small_run(tmp_path_factory.mktemp("live"), kinds=KINDS, layers_of_host=3, number=60, tokens=1024, budget="8x")
    return mxd.train(config, quiet=True)


@pytest.fixture(scope="module")
def opened(run: mxd.Run) -> Iterator[Model]:
    shelf = Shelf(run.path)
    yield Model.load(shelf, "cpu")
    shelf.close()


@pytest.fixture
def tiny(opened: Model) -> Model:
    return opened


def job(*, long: bool = True) -> Job:
    return Job("test", lambda _model, _job: None, long=long)


def asked(**changes: Any) -> Generation:
    usual: dict[str, Any] = {"student": "mxd-k2", "prompt": PROMPT, "edits": (), "lanes": asks.LANES, "temperature": 0.0}
    usual |= {"top_p": 1.0, "seed": 0, "tokens": 12, "special": False, **changes}
    return Generation(**usual)


class Heard:
    """The events of a generation."""

    def __init__(
        self, tiny: Model, ask: Generation, on: Callable[[str, dict[str, Any]], None] | None = None, own: Job | None = None
    ) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

        def tell(name: str, data: dict[str, Any]) -> None:
            self.events.append((name, data))
            if on:
                on(name, data)

        lanes.generate(tiny, ask, own or job(), tell)
        self.done: dict[str, Any] = self.events[-1][1]["lanes"]

    def tokens(self, lane: str) -> list[dict[str, Any]]:
        return [data for name, data in self.events if name == "token" and data["lane"] == lane]

    def ids(self, lane: str) -> list[int]:
        return [token["id"] for token in self.tokens(lane)]


# ---- lanes ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "top_p", "seed"), [(0.0, 1.0, 0), (0.9, 1.0, 3), (1.3, 0.8, 4)])
def test_each_lane_is_what_the_host_generates_alone(tiny: Model, temperature: float, top_p: float, seed: int) -> None:
    edits = (Change(1, "add", 3.0, "all"), Change(4, "scale", 2.0, "all"))
    heard = Heard(tiny, asked(temperature=temperature, top_p=top_p, seed=seed, edits=edits))
    layer = tiny.layer("mxd-k2")
    other = control_units(tiny, tiny.student("mxd-k2"), layer, [1, 4])
    alone: dict[str, SparseLayer | None] = {
        "host": None,
        "replaced": layer,
        "steered": Edited(layer, add={1: 3.0}, scale={4: 2.0}),
        "control": Edited(layer, add={other[1]: 3.0}, scale={other[4]: 2.0}),
    }
    for name, module in alone.items():
        how: dict[str, Any] = {"new_tokens": 12, "temperature": temperature, "seed": seed, "top_p": top_p}
        with tiny.host.replace({HOOKPOINT: module} if module is not None else {}):
            expected = tiny.host.generate_batch([PROMPT], **how)[0]
        assert heard.ids(name) == expected.new_ids, name
        assert heard.done[name]["text"] == expected.text
        assert "".join(token["text"] for token in heard.tokens(name)).rstrip("\ufffd") == expected.text.rstrip("\ufffd")
    assert heard.events[0][1]["prompt_tokens"] == 1 + len(PROMPT)


@pytest.mark.parametrize("student", WITH_UNITS)
def test_replaced_is_the_student_in_place_for_every_kind(tiny: Model, student: str) -> None:
    heard = Heard(tiny, asked(student=student, edits=(Change(0, "add", 2.0, "all"),)))
    layer = tiny.layer(student)
    for name, module in (("replaced", layer), ("steered", Edited(layer, add={0: 2.0}))):
        with tiny.host.replace({HOOKPOINT: module}):
            assert heard.ids(name) == tiny.host.generate(PROMPT, new_tokens=12).new_ids, name


def test_every_token_is_judged_by_the_host_on_the_lanes_own_text(tiny: Model) -> None:
    heard = Heard(tiny, asked(temperature=1.0, edits=(Change(3, "add", 40.0, "generated"),)))
    prompt = tiny.ids(PROMPT, special=False)
    for name in asks.LANES:
        ids = heard.ids(name)
        scores = tiny.host.logits(torch.tensor([prompt + ids]))[0].log_softmax(-1)
        expected = [-float(scores[len(prompt) - 1 + i, token]) for i, token in enumerate(ids)]
        got = [token["host_loss"] for token in heard.tokens(name)]
        assert got == pytest.approx(expected, rel=1e-3, abs=1e-4), name
        assert heard.done[name]["nats_per_token"] == pytest.approx(sum(expected) / len(expected), rel=1e-3)
    for token in heard.tokens("host"):
        assert token["p"] == pytest.approx(2.718281828 ** -token["host_loss"], rel=1e-2)
        assert [p for _, p in token["top"]] == sorted((p for _, p in token["top"]), reverse=True) and len(token["top"]) == 5


@pytest.mark.parametrize("at", asks.WHERE)
def test_strength_0_is_no_edit_and_prompts_are_edited_only_where_asked(tiny: Model, at: str) -> None:
    nothing = Heard(tiny, asked(temperature=1.0, edits=(Change(1, "add", 0.0, at), Change(2, "scale", 1.0, at))))
    assert [t["p"] for t in nothing.tokens("steered")] == [t["p"] for t in nothing.tokens("replaced")]
    strong = Heard(tiny, asked(temperature=1.0, edits=(Change(1, "add", 30.0, at),)))
    first, plain = strong.tokens("steered")[0], strong.tokens("replaced")[0]
    assert (first["top"] == plain["top"]) is (at == "generated")
    assert [t["top"] for t in strong.tokens("steered")][1:] != [t["top"] for t in strong.tokens("replaced")][1:]


def test_operations_do_what_they_say(tiny: Model) -> None:
    edits = (Change(0, "add", 2.0, "all"), Change(1, "set", 3.0, "all"), Change(2, "scale", -1.5, "all"), Change(3, "remove", 0.0, "all"))
    scale, add = asks.factors(edits)
    x = torch.randn(9, 16, generator=torch.Generator().manual_seed(0))
    layer = tiny.layer("cp-mumoe-k2")
    n = layer.n_units

    def dense(code: Code) -> Tensor:
        return torch.zeros(9, n).scatter_add(1, code.indices, code.values)

    plain, edited = dense(layer.encode(x, k=n)), dense(Edited(layer, scale=scale, add=add).encode(x, k=n))
    assert torch.allclose(edited[:, 0], plain[:, 0] + 2)
    assert torch.allclose(edited[:, 1], torch.full((9,), 3.0))
    assert torch.allclose(edited[:, 2], -1.5 * plain[:, 2])
    assert not edited[:, 3].any() and torch.equal(edited[:, 4:], plain[:, 4:])


def test_the_same_request_gives_the_same_events(tiny: Model) -> None:
    ask = asked(temperature=1.0, top_p=0.9, seed=7, edits=(Change(1, "add", 5.0, "generated"),))
    first, second, other = Heard(tiny, ask), Heard(tiny, ask), Heard(tiny, asked(temperature=1.0, top_p=0.9, seed=8))
    assert [e for e in first.events if e[0] == "token"] == [e for e in second.events if e[0] == "token"]
    assert first.ids("host") != other.ids("host")


def test_what_a_lane_came_to(tiny: Model) -> None:
    heard = Heard(tiny, asked(edits=(Change(1, "add", 200.0, "generated"),), tokens=20))
    for name in asks.LANES:
        ids, host = heard.ids(name), heard.ids("host")
        triples = list(zip(ids, ids[1:], ids[2:], strict=False))
        stats = heard.done[name]
        assert stats["tokens"] == len(ids)
        assert stats["repeats"] == pytest.approx(1 - len(set(triples)) / len(triples), abs=1e-3)
        longer = range(max(len(ids), len(host)))
        assert stats["splits_at"] == next((i for i in longer if ids[i : i + 1] != host[i : i + 1]), None)
    alone = Heard(tiny, asked(lanes=("steered",), edits=(Change(1, "add", 200.0, "generated"),), tokens=20))
    assert alone.ids("steered") == heard.ids("steered") and alone.done["steered"]["splits_at"] is None


def test_a_lane_ends_at_the_end_of_a_text_and_the_others_go_on(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    free = Heard(tiny, asked(temperature=1.0, seed=1))
    end = free.ids("host")[4]
    monkeypatch.setattr(tiny.host, "end_ids", lambda: {end})
    heard = Heard(tiny, asked(temperature=1.0, seed=1))
    for name in asks.LANES:
        expected = free.ids(name)[: free.ids(name).index(end) + 1] if end in free.ids(name) else free.ids(name)
        assert heard.ids(name) == expected
        assert heard.done[name]["stopped"] == ("end of text" if end in expected else None)


def test_scores_that_are_no_numbers_end_a_lane_with_a_word(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = mxd.Run.open(tiny.shelf.path).load("mxd-k2")
    assert isinstance(broken, mxd.MxD)
    active = read(tiny, "mxd-k2", text=PROMPT)["students"][0]["units"]["unit"]
    unit = next(unit for unit in range(broken.n_units) if unit not in active)
    broken.C.data[unit] = torch.inf
    monkeypatch.setattr(tiny, "layer", lambda _name: broken)
    heard = Heard(tiny, asked(edits=(Change(unit, "add", 1.0, "generated"),), lanes=("host", "steered")))
    assert heard.done["steered"]["stopped"].startswith("its scores are no numbers")
    assert len(heard.ids("steered")) == 1 and len(heard.ids("host")) == 12


def test_a_generation_stops_within_a_token(tiny: Model) -> None:
    own = job()
    heard = Heard(tiny, asked(), lambda name, data: own.cancel() if name == "token" and data["i"] == 3 else None, own)
    assert all(len(heard.ids(name)) == 4 and heard.done[name]["stopped"] == "cancelled" for name in asks.LANES)
    late = job()
    late.deadline = time.monotonic()
    assert (
        Heard(tiny, asked(), own=late).done["host"] | {"tokens": 1, "stopped": "time is up"} == Heard(tiny, asked(), own=late).done["host"]
    )


def test_the_host_is_as_it_was_between_two_tokens(tiny: Model) -> None:
    own, before = job(), tiny.host.mlp(HOOKPOINT)
    seen: list[Any] = []
    own.between = lambda: seen.append(tiny.host.model.get_submodule(tiny.host.site(HOOKPOINT).module))
    Heard(tiny, asked(tokens=4), own=own)
    assert len(seen) == 3 and all(module is before for module in seen)


def test_the_control_is_alike_in_frequency_and_norm(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = tiny.layer("transcoder-k2")
    units = layer.units()
    assert units is not None
    norms = units.table.detach().norm(dim=1)
    distance = (norms.log() - norms.log()[7]).abs()
    distance[7] = torch.inf
    found = control_units(tiny, tiny.student("transcoder-k2"), layer, [7])
    assert found == {7: int(distance.argmin())}, "nothing was collected: the norm alone decides"

    fires = torch.where(torch.arange(layer.n_units) % 3 == 1, 50.0, 0.0).numpy()
    monkeypatch.setattr(tiny.shelf, "units", lambda _name: SimpleNamespace(firing={"fires": fires}))
    found = control_units(tiny, tiny.student("transcoder-k2"), layer, [7, 10])
    assert set(found) == {7, 10} and all(unit % 3 == 1 for unit in found.values())
    assert len({*found.values(), 7, 10}) == 4


def test_what_is_too_long_is_refused_before_anything_runs(tiny: Model) -> None:
    with pytest.raises(Refusal, match="the text is too long"):
        Heard(tiny, asked(prompt="a" * 512))
    with pytest.raises(Refusal, match="longer than the host can read"):
        Heard(tiny, asked(prompt="a" * 300, tokens=256))


def test_memory_is_asked_for_before(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "free_bytes", lambda _device: 1000)
    for work in (
        lambda: Heard(tiny, asked()),
        lambda: reads.sentence(tiny, reads.Tokens(None, TEXT), ["mxd-k2"], job()),
        lambda: trials.dose(tiny, asks.Dose("mxd-k2", PROMPT, 0, "all", 1.0, False), job()),
    ):
        with pytest.raises(Refusal, match="too little memory"):
            work()
    free = model.free_bytes
    monkeypatch.undo()
    assert free(torch.device("cpu")) == 1000 and (model.free_bytes(torch.device("cpu")) or 2**20) >= 2**20


# ---- sentences --------------------------------------------------------------------------------------------------------------


def read(tiny: Model, *students: str, text: str = TEXT) -> dict[str, Any]:
    return reads.sentence(tiny, reads.Tokens(None, text), students, job())


def test_tokens_are_spans_of_the_text(tiny: Model) -> None:
    tokens = read(tiny)["tokens"]
    assert tokens["text"] == TEXT and tokens["cuts"][-1] == utf16(TEXT) and len(tokens["cuts"]) == len(tokens["ids"]) + 1
    assert tokens["special"] == [0] and tokens["names"] == {"0": "<bos>"}, "names of special tokens are plain text"
    ticked = tiny.read_again(tiny.ids(TEXT, special=True))
    assert len(ticked["special"]) == 2 and ticked["ids"][-1] == tiny.host.tokenizer.eos_token_id


@pytest.mark.parametrize("student", [*WITH_UNITS, "dense"])
def test_losses_are_those_of_the_host_with_the_student_in_place(tiny: Model, student: str) -> None:
    found = read(tiny, student)
    ids = torch.tensor([found["tokens"]["ids"]])
    own = tiny.host.logits(ids)[0].log_softmax(-1)
    with tiny.host.replace({HOOKPOINT: tiny.layer(student)}):
        theirs = tiny.host.logits(ids)[0].log_softmax(-1)
    for answer, scores in ((found["host"], own), (found["students"][0], theirs)):
        expected = -scores[:-1].gather(-1, ids[0, 1:, None])[:, 0]
        assert answer["loss"][0] is None and answer["p"][0] is None
        assert answer["loss"][1:] == pytest.approx(expected.tolist(), rel=1e-3)
        assert answer["p"][1:] == pytest.approx(expected.neg().exp().tolist(), rel=1e-3)
        best = scores.exp().topk(5)
        assert [[p for _, p in row] for row in answer["top"]] == [pytest.approx(row, rel=1e-3) for row in best.values.tolist()]
    kl = (own.exp() * (own - theirs)).sum(-1)
    assert found["students"][0]["kl"] == pytest.approx(kl.tolist(), rel=1e-2, abs=1e-6)
    assert found["mean_from"] == 1


@pytest.mark.parametrize("student", WITH_UNITS)
def test_units_are_the_layers_own_top_k(tiny: Model, student: str) -> None:
    found = read(tiny, student)
    layer, units = tiny.layer(student), found["students"][0]["units"]
    source = tiny.source(layer, HOOKPOINT, torch.tensor([found["tokens"]["ids"]]))
    with torch.no_grad():
        code = layer.encode(source)
    assert len(units["from"]) == len(source) + 1
    for at in range(len(source)):
        span = slice(units["from"][at], units["from"][at + 1])
        active = code.values[at] > 0
        assert set(units["unit"][span]) == set(code.indices[at][active].tolist())
        assert units["a"][span] == pytest.approx(sorted(code.values[at][active].tolist(), reverse=True), rel=1e-3)
        assert all(share >= 0 for share in units["share"][span])


@pytest.mark.parametrize("student", WITH_UNITS)
def test_effects_are_first_order_effects_of_removal(tiny: Model, student: str) -> None:
    """A small part of one unit's activation at one token is taken away: the loss of the rest changes by that part of the effect."""
    found = read(tiny, student)
    ids, units, layer = torch.tensor([found["tokens"]["ids"]]), found["students"][0]["units"], tiny.layer(student)
    part = 1e-2

    class Less(torch.nn.Module):
        reads = layer.reads

        def __init__(self, at: int, unit: int, change: float) -> None:
            super().__init__()
            self.at, self.unit, self.change = at, unit, change

        def forward(self, x: Tensor) -> Tensor:
            code = layer.encode(x)
            values = code.values.clone()
            values[0, self.at][code.indices[0, self.at] == self.unit] *= 1 - self.change
            return layer._decode(Code(values[0], code.indices[0], None if code.hidden is None else code.hidden[0]), x[0], Plan())[None]

    def loss(at: int, unit: int, change: float) -> float:
        with tiny.host.replace({HOOKPOINT: Less(at, unit, change)}):
            scores = tiny.host.logits(ids)[0].double().log_softmax(-1)
        return float(-scores[:-1].gather(-1, ids[0, 1:, None]).sum())

    checked = 0
    for at in (0, 3, 8):
        for i in range(units["from"][at], units["from"][at + 1]):
            slope = (loss(at, units["unit"][i], part) - loss(at, units["unit"][i], -part)) / (2 * part)
            assert units["effect"][i] == pytest.approx(slope, rel=0.03, abs=2e-4), (at, units["unit"][i])
            checked += 1
    assert checked >= 3


class Perfect(SparseLayer):
    """The host's own MLP as a student without units."""

    kind, unit = "dense", "none"

    def __init__(self, mlp: torch.nn.Module, scale: float) -> None:
        super().__init__()
        self.d_in = self.d_out = 16
        self.n_units = self.k = 0
        self.mlp, self.scale = mlp, scale

    def _active(self, k: int | None) -> int:
        return 0

    def _select(self, x: Tensor, k: int, plan: Plan) -> tuple[Tensor, Tensor]:
        return x.new_zeros(len(x), 0), torch.zeros(len(x), 0, dtype=torch.int64)

    def _decode(self, code: Code, x: Tensor | None, plan: Plan) -> Tensor:
        return self.mlp(x) * self.scale


def test_a_perfect_student_costs_nothing_and_a_zero_one_what_ablation_costs(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    for scale in (1.0, 0.0):
        monkeypatch.setattr(tiny, "layer", lambda _name, s=scale: Perfect(tiny.host.mlp(HOOKPOINT), s))
        found = read(tiny, "mxd-k2")
        student, host = found["students"][0], found["host"]
        if scale:
            assert student["loss"] == host["loss"] and student["top"] == host["top"] and not any(student["kl"])
        else:
            ids = torch.tensor([found["tokens"]["ids"]])
            with tiny.host.replace({HOOKPOINT: Perfect(tiny.host.mlp(HOOKPOINT), 0.0)}):
                scores = tiny.host.logits(ids)[0].log_softmax(-1)
            assert student["loss"][1:] == pytest.approx((-scores[:-1].gather(-1, ids[0, 1:, None])[:, 0]).tolist(), rel=1e-3)
            assert any(student["kl"])
        assert student["units"] == {"from": [0] * (len(found["tokens"]["ids"]) + 1), "unit": [], "a": [], "share": [], "effect": []}


def test_several_students_are_read_as_each_alone(tiny: Model) -> None:
    together = read(tiny, *WITH_UNITS)["students"]
    assert [student["name"] for student in together] == list(WITH_UNITS)
    for student in together:
        alone = read(tiny, student["name"])["students"][0]
        assert student["loss"][1:] == pytest.approx(alone["loss"][1:], rel=1e-4) and student["units"]["unit"] == alone["units"]["unit"]


def test_a_single_token_is_read_too(tiny: Model) -> None:
    found = reads.sentence(tiny, reads.Tokens([300 % 259], ""), ["mxd-k2"], job())
    assert found["students"][0]["loss"] == [None] and set(found["students"][0]["units"]["effect"]) <= {0.0, -0.0}


@pytest.mark.parametrize("student", WITH_UNITS)
def test_heat_and_search_by_text_see_what_the_sentence_sees(tiny: Model, student: str) -> None:
    units = read(tiny, student)["students"][0]["units"]
    sums: dict[int, float] = {}
    for at in range(1, len(units["from"]) - 1):
        for i in range(units["from"][at], units["from"][at + 1]):
            sums[units["unit"][i]] = sums.get(units["unit"][i], 0.0) + units["a"][i]
    found = reads.firing_on(tiny, reads.Tokens(None, TEXT), student)
    assert sorted(found) == sorted(sums) and sums[found[0]] == pytest.approx(max(sums.values()))
    heat = reads.heat(tiny, reads.Tokens(None, TEXT), student, found[0])
    assert sum(heat["a"][1:]) == pytest.approx(sums[found[0]], rel=1e-3) and len(heat["a"]) == len(heat["tokens"]["ids"])


# ---- doses and ablations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", asks.WHERE)
@pytest.mark.parametrize("student", ["mxd-k2", "topk-sae-k2"])
def test_a_dose_is_the_next_token_under_each_strength(tiny: Model, at: str, student: str) -> None:
    found = trials.dose(tiny, asks.Dose(student, PROMPT, 2, at, 5.0, False), job())
    assert found["strengths"] == [-4, -3, -2, -1, 0, 1, 2, 3, 4] and found["raw"] == [5.0 * step for step in found["strengths"]]
    layer, ids = tiny.layer(student), torch.tensor([tiny.ids(PROMPT, special=False)])
    for unit, curves in ((2, found["tokens"]), (found["control_unit"], found["control"])):
        for i, value in enumerate(found["raw"]):
            edited = Edited(layer, add={unit: value}).eval()
            with tiny.host.replace({HOOKPOINT: edited if at == "all" else trials.LastOnly(layer, edited)}):
                p = tiny.host.logits(ids)[0, -1].softmax(-1)
            for curve in curves:
                assert curve["p"][i] == pytest.approx(float(p[curve["id"]]), rel=1e-2, abs=1e-6)
    assert len(found["tokens"]) == 5 and [c["id"] for c in found["control"]] == [c["id"] for c in found["tokens"]]
    spread = [max(c["p"]) - min(c["p"]) for c in found["tokens"]]
    assert spread == sorted(spread, reverse=True)


def test_a_dose_in_the_prompt_differs_from_one_at_its_end(tiny: Model) -> None:
    ends = [trials.dose(tiny, asks.Dose("mxd-k2", PROMPT, 2, at, 50.0, False), job())["tokens"] for at in asks.WHERE]
    assert ends[0] != ends[1]


@pytest.mark.parametrize("student", WITH_UNITS)
def test_an_ablation_is_the_loss_without_minus_the_loss_with(tiny: Model, student: str) -> None:
    found = read(tiny, student)
    ids, units, layer = found["tokens"]["ids"], found["students"][0]["units"], tiny.layer(student)
    unit = units["unit"][units["from"][2]]
    at = [t for t in range(1, len(ids)) if unit in units["unit"][units["from"][t] : units["from"][t + 1]]]
    firings = [trials.Firing(ids, t, 1) for t in at]
    answer = trials.ablate(tiny, student, unit, firings, {1: 100}, job())

    class Hole(torch.nn.Module):
        reads = layer.reads

        def __init__(self, position: int) -> None:
            super().__init__()
            self.position = position

        def forward(self, x: Tensor) -> Tensor:
            whole, without = layer(x).y, Edited(layer, scale={unit: 0.0})(x).y
            return torch.cat([whole[:, : self.position], without[:, self.position : self.position + 1], whole[:, self.position + 1 :]], 1)

    def loss(module: torch.nn.Module) -> float:
        with tiny.host.replace({HOOKPOINT: module}):
            scores = tiny.host.logits(torch.tensor([ids]))[0].double().log_softmax(-1)
        return float(-scores[:-1].gather(-1, torch.tensor(ids)[1:, None]).sum())

    lost = [loss(Hole(t)) - loss(layer) for t in at]
    assert answer["exact"] == pytest.approx(sum(lost) / len(lost), rel=1e-2, abs=1e-5) and answer["exact_n"] == len(at)


def test_an_ablation_ends_in_time_with_what_it_has(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    found = read(tiny, "mxd-k2")
    ids, units = found["tokens"]["ids"], found["students"][0]["units"]
    unit = units["unit"][units["from"][2]]
    firings = [trials.Firing(ids[: len(ids) - i // 9], 2, i % 2) for i in range(18)]
    assert trials.ablate(tiny, "mxd-k2", unit, firings, {0: 1, 1: 1}, job())["exact_n"] == 18
    monkeypatch.setattr(trials, "ABLATION_SECONDS", 0.0)
    assert trials.ablate(tiny, "mxd-k2", unit, firings, {0: 1, 1: 1}, job())["exact_n"] == trials.ROWS_AT_ONCE


def test_ablation_where_the_unit_is_silent_is_refused(tiny: Model) -> None:
    found = read(tiny, "mxd-k2")
    active = set(found["students"][0]["units"]["unit"])
    silent = next(unit for unit in range(tiny.layer("mxd-k2").n_units) if unit not in active)
    with pytest.raises(Refusal, match="fires at none"):
        trials.ablate(tiny, "mxd-k2", silent, [trials.Firing(found["tokens"]["ids"], 3, 0)], {0: 1}, job())


def test_strata_are_weighted_by_what_they_stand_for() -> None:
    mean, error = trials.stratified({0: [1.0, 3.0], 1: [10.0, 10.0, 10.0]}, {0: 10, 1: 30, 2: 60})
    assert mean == pytest.approx(0.25 * 2 + 0.75 * 10)
    assert error == pytest.approx((0.25**2 * 2 / 2) ** 0.5)
    assert trials.stratified({0: [2.0], 1: [4.0]}, {0: 1, 1: 1}) == (3.0, None)
    alone, spread = trials.stratified({0: [2.0], 1: [4.0, 6.0]}, {0: 1, 1: 1})
    assert (alone, spread) == (3.5, pytest.approx((0.25 * 2 + 0.25 * 2 / 2) ** 0.5)), "a single sample is as spread as the others"


def test_a_host_in_another_number_format(run: mxd.Run, opened: Model) -> None:
    shelf = Shelf(run.path)
    half = Model(shelf, Host.load(str(run.info["config"]["host"]), device="cpu", dtype="bfloat16"))
    layer = half.layer("mxd-k2")
    edits = (Change(1, "add", 3.0, "all"),)
    heard = Heard(half, asked(edits=edits, lanes=("host", "replaced", "steered")))
    for name, module in (("replaced", layer), ("steered", Edited(layer, add={1: 3.0}))):
        with half.host.replace({HOOKPOINT: module}):
            assert heard.ids(name)[:3] == half.host.generate(PROMPT, new_tokens=12).new_ids[:3], name
    for student in (*WITH_UNITS, "dense"):
        near, exact = (read(one, student)["students"][0] for one in (half, opened))
        assert near["loss"][1:] == pytest.approx(exact["loss"][1:], rel=0.05, abs=0.05)
    unit = read(half, "mxd-k2")["students"][0]["units"]["unit"][0]
    assert reads.heat(half, reads.Tokens(None, TEXT), "mxd-k2", unit)["a"][0] > 0
    assert trials.dose(half, asks.Dose("topk-sae-k2", PROMPT, 2, "generated", 5.0, False), job())["tokens"]
    assert trials.ablate(half, "mxd-k2", unit, [trials.Firing(half.ids(TEXT, special=False), 0, 0)], {0: 1}, job())["exact_n"] == 1
    shelf.close()


# ---- the thread -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def worker(tiny: Model) -> Iterator[Worker]:
    made = Worker(lambda: tiny)
    made.start()
    made.go()
    until(lambda: made.status()["state"] == "ready")
    yield made
    made.close()


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.002)


class Held:
    """Long work that goes on until it is let go, a step at a time."""

    def __init__(self) -> None:
        self.go, self.steps, self.begun = threading.Event(), 0, threading.Event()

    def __call__(self, _model: Model, own: Job) -> str:
        self.begun.set()
        while not self.go.is_set():
            own.check()
            self.steps += 1
            time.sleep(0.001)
        return "done"


def test_work_is_done_in_turn_and_told_of(worker: Worker) -> None:
    held = Held()
    first = worker.submit(Job("first", held, long=True))
    held.begun.wait(10)
    second = worker.submit(Job("second", lambda _m, _j: threading.current_thread().name, long=True))
    assert worker.status() == {"state": "ready", "why": None, "queue": 1, "job": first.id}
    held.go.set()
    assert (first.future.result(10), second.future.result(10)) == ("done", "mxd-host")
    until(lambda: worker.status() == {"state": "ready", "why": None, "queue": 0, "job": None})


def test_short_work_is_done_between_two_steps_of_long_work(worker: Worker) -> None:
    held = Held()
    long = worker.submit(Job("long", held, long=True))
    held.begun.wait(10)
    assert worker.submit(Job("short", lambda _m, _j: 7)).future.result(10) == 7
    assert not long.future.done()
    with pytest.raises(Refusal, match="short failed"):
        worker.submit(Job("short", lambda _m, _j: 1 / 0)).future.result(10)
    held.go.set()
    assert long.future.result(10) == "done", "what goes wrong in between does not end it"


def test_the_fifth_is_refused_and_short_work_is_counted_apart(worker: Worker) -> None:
    held = Held()
    kept = [worker.submit(Job("long", held, long=True)) for _ in range(live.MOST_WAITING)]
    held.begun.wait(10)
    with pytest.raises(Refusal) as refused:
        worker.submit(Job("long", held, long=True))
    assert refused.value.status == 429
    assert worker.submit(Job("short", lambda _m, _j: 1)).future.result(10) == 1
    assert worker.cancel(kept[2].id) and not worker.cancel(kept[2].id)
    worker.submit(Job("long", held, long=True))
    held.go.set()
    assert kept[3].future.result(10) == "done"
    with pytest.raises(Cancelled):
        kept[2].future.result(10)


def test_a_new_run_of_the_same_pane_takes_the_place_of_the_old(worker: Worker) -> None:
    held = Held()
    old = worker.submit(Job("long", held, long=True, pane="bench"))
    other = worker.submit(Job("long", lambda _m, _j: 1, long=True, pane="dose"))
    new = worker.submit(Job("long", lambda _m, _j: 2, long=True, pane="bench"))
    with pytest.raises(Cancelled):
        old.future.result(10)
    assert (other.future.result(10), new.future.result(10)) == (1, 2)


def test_stopping_frees_the_thread_within_a_token(worker: Worker) -> None:
    told: list[float] = []

    def work(tiny: Model, own: Job) -> None:
        lanes.generate(tiny, asked(tokens=200), own, lambda name, _data: told.append(time.monotonic()) if name == "token" else None)

    own = worker.submit(Job("generating", work, long=True))
    until(lambda: len(told) > 12)
    step = (told[-1] - told[0]) / len(told) * 4
    began = time.monotonic()
    assert worker.cancel(own.id)
    own.future.result(10)
    assert time.monotonic() - began < step + 0.5
    assert worker.submit(Job("next", lambda _m, _j: "ready", long=True)).future.result(10) == "ready"


def test_time_is_limited(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "SECONDS", 0.05)
    with pytest.raises(Refusal, match="this took too long"):
        worker.submit(Job("long", Held(), long=True)).future.result(10)


def test_a_bug_is_one_line_and_the_log_names_the_place_only(worker: Worker, capfd: pytest.CaptureFixture[str]) -> None:
    def work(_model: Model, _job: Job) -> None:
        raise ValueError("the secret prompt")

    with pytest.raises(Refusal, match="ValueError") as refused:
        worker.submit(Job("generating", work)).future.result(10)
    assert refused.value.status == 503
    said = capfd.readouterr().err
    assert "unexpected ValueError while generating at test_live.py:" in said and "secret" not in said


def test_whoever_is_gone_is_not_worked_for(worker: Worker) -> None:
    held = Held()
    worker.submit(Job("long", held, long=True))
    gone = worker.submit(Job("long", lambda _m, _j: 1, long=True))
    assert gone.future.cancel()
    held.go.set()
    assert worker.submit(Job("long", lambda _m, _j: 2, long=True)).future.result(10) == 2


def test_without_a_host_the_reason_is_told() -> None:
    def load() -> Model:
        raise HostError("no host smollm3", expected="smollm2", next="mxd fetch smollm2")

    worker = Worker(load)
    with pytest.raises(Refusal, match="still being loaded") as refused:
        worker.submit(Job("short", lambda _m, _j: 1))
    assert refused.value.status == 503
    worker.start()
    worker.go()
    until(lambda: worker.status()["state"] == "failed")
    assert worker.status()["why"] == {"what": "no host smollm3", "expected": "smollm2", "got": "", "next": "mxd fetch smollm2"}
    with pytest.raises(Refusal, match=r"the host is not there \| got no host smollm3 \| next: mxd fetch smollm2"):
        worker.submit(Job("short", lambda _m, _j: 1))
    worker.close()


def test_the_host_is_loaded_only_once_the_page_was_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = threading.Event()

    def load() -> Model:
        loaded.set()
        raise HostError("none")

    worker = Worker(load)
    worker.start()
    assert not loaded.wait(0.1)
    worker.go()
    assert loaded.wait(10)
    worker.close()
    closed = Worker(load)
    loaded.clear()
    closed.start()
    closed.close()
    assert not loaded.is_set()


def test_the_model_of_a_run_whose_host_is_gone_says_so(run: mxd.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf(run.path)
    monkeypatch.setitem(shelf.run.info["config"], "host", str(tmp_path / "gone.gguf"))
    with pytest.raises(HostError):
        Model.load(shelf, "cpu")
    shelf.close()
    assert isinstance(Host.load(str(run.info["config"]["host"])), Host)


def test_layers_are_kept_while_their_weights_stay(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tiny.layer("mxd-k2")
    assert tiny.layer("mxd-k2") is first
    monkeypatch.setattr(mxd.Run, "weights_sha256", lambda _self, _name: "another")
    assert tiny.layer("mxd-k2") is not first
    assert len(tiny._layers) <= model.LAYERS


def test_growing_text_comes_in_whole_characters(tiny: Model) -> None:
    text = "né 日🙂!"
    ids = tiny.host.encode(text)
    growing = lanes.Growing(tiny.host.decode, tiny.ids(PROMPT, special=False))
    pieces = [growing.add(token) for token in ids]
    assert "".join(pieces) == text and pieces.count("") == len(ids) - len(text)
    broken = lanes.Growing(tiny.host.decode, [])
    assert any(broken.add(ids[4]) for _ in range(lanes.LONGEST_CHARACTER)), "what stays broken is shown in the end"
