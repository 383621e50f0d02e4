"""Generation agreement: a perfect layer, one that changes the first token, ends of text, prompts, intervals, what is shown."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mxd.checkpoint import Run
from mxd.config import EvalConfig
from mxd.errors import ConfigError
from mxd.evals import sections, suite, svg
from mxd.evals.generation import measure as generation
from mxd.evals.generation import show as generation_show
from mxd.evals.generation.measure import agreement, draw_prompts, identical_tokens, in_batches
from mxd.evals.parts import Found, Shared, Subject, finite
from mxd.host import Host
from mxd.layers import MxD, MxDConfig, SparseLayer
from mxd.recipes import published
from mxd.text import Corpus

from .hosts import WORDS, random_layer, tiny_llama, write_run, write_text

HOOKPOINT = "layers.1.mlp"
SMALL = EvalConfig(agreement_prompts=40, agreement_tokens=6, bootstrap=200)
Measure = Callable[..., Found]


@pytest.fixture(scope="module")
def host() -> Host:
    torch.set_num_threads(1)
    return tiny_llama()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    return write_run(folder / "run", write_text(folder / "text"), kinds=("mxd", "topk-sae", "dense"))


@pytest.fixture(scope="module")
def measure(host: Host, run: Run) -> Measure:
    """measure(layer, shared=None, said=[], **options) with `SMALL` and those options."""
    corpus = Corpus(run.info["config"]["text"])

    def of(layer: nn.Module, shared: Shared | None = None, said: list[tuple[float, str]] | None = None, **options: Any) -> Found:
        told = said if said is not None else []
        config = replace(SMALL, **options)
        subject = Subject(
            run, run.students[0], cast(SparseLayer, layer), host, corpus, config, shared or Shared(), lambda *call: told.append(call)
        )
        return generation.measure(subject)

    return of


class Push(nn.Module):
    """Returns one vector wherever it stands."""

    def __init__(self, vector: Tensor) -> None:
        super().__init__()
        self.vector = nn.Parameter(vector, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.vector.expand(x.shape)


class Through(nn.Module):
    """Hands the MLP's own output through, as a perfect SAE."""

    reads = "output"

    def forward(self, y: Tensor) -> Tensor:
        return y


def own_mlp_as_mxd(host: Host) -> MxD:
    """The host's MLP as an MxD with one expert that is always on: G = 0, b_G = 1, C = 1, D the host's decoder."""
    weights = host.weights(HOOKPOINT)
    layer = MxD(MxDConfig(16, 16, 1, 1, 24, "silu", glu=True))
    with torch.no_grad():
        for parameter in (layer.G, layer.b):
            parameter.zero_()
        layer.b_G.fill_(1)
        layer.C.fill_(1)
        layer.D.copy_(weights.D)
        layer.encoder.E.copy_(weights.E)
        assert layer.encoder.E_gate is not None and weights.E_gate is not None
        layer.encoder.E_gate.copy_(weights.E_gate)
    return layer.eval().requires_grad_(False)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("perfect", ["own", "sae", "mxd"])
def test_a_perfect_layer_writes_what_the_host_writes(host: Host, measure: Measure, perfect: str, temperature: float) -> None:
    layer = {"own": host.mlp(HOOKPOINT), "sae": Through(), "mxd": own_mlp_as_mxd(host)}[perfect]
    found = measure(layer, agreement_temperature=temperature)
    assert found["shares"] == [1.0] * 7
    assert found["shares_ci95"] == [[1.0, 1.0]] * 7
    assert found["mean_identical_tokens"] == 6 and found["complete_share"] == 1
    assert {sample["rest"] for sample in found["samples"]} == {""}


def test_sampling_at_a_temperature_is_sampling(host: Host, measure: Measure) -> None:
    """Otherwise the perfect layer at temperature 1 would be the greedy one again."""
    greedy, sampled, other = (
        [s["host"] for s in measure(host.mlp(HOOKPOINT), agreement_temperature=t, seed=seed)["samples"]]
        for t, seed in ((0.0, 0), (1.0, 0), (1.0, 0))
    )
    assert sampled == other != greedy


def test_every_prompt_has_noise_of_its_own_whatever_its_batch(host: Host) -> None:
    def texts(batches: list[list[int]], seed: int) -> list[list[int]]:
        same = ["w1 w2 w3 w4"] * 4
        return [g.new_ids for g in generation.continued(host, same, batches, new_tokens=8, temperature=5.0, seed=seed)]

    found = texts([[0, 1], [2, 3]], 0)
    assert len({tuple(ids) for ids in found}) == 4
    assert texts([[3, 0, 2], [1]], 0) == found
    assert not {tuple(ids) for ids in texts([[0, 1], [2, 3]], 1)} & {tuple(ids) for ids in found}


def test_a_layer_that_changes_the_first_token_agrees_nowhere(host: Host, measure: Measure) -> None:
    firsts = {text.split()[0] for text in (s["host"] for s in measure(host.mlp(HOOKPOINT))["samples"]) if text}
    table = host.model.get_output_embeddings().weight
    # A token that the host never writes first, and that a push along its own row of the unembedding makes the best one.
    wanted = next(
        i for i in range(3, 63) if f"w{i - 3}" not in firsts and int((table @ table[i]).argmax()) == i and float(table[i].norm()) > 1
    )
    found = measure(Push(1e4 * table[wanted]), agreement_prompts=32)
    assert found["shares"] == [1.0] + [0.0] * 6
    assert found["mean_identical_tokens"] == 0
    assert {sample["same"] for sample in found["samples"]} == {""}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_batches_change_nothing(measure: Measure, monkeypatch: pytest.MonkeyPatch, temperature: float) -> None:
    layer = random_layer("mxd")
    whole = measure(layer, agreement_temperature=temperature)
    assert 0 < whole["mean_identical_tokens"] < 6
    monkeypatch.setattr(generation, "ROWS", 7)
    assert measure(layer, agreement_temperature=temperature) == whole


@pytest.mark.parametrize(
    ("own", "host", "expected"),
    [
        ([5, 6, 7, 8], [5, 6, 7, 8], 4),
        ([5, 6, 9, 8], [5, 6, 7, 8], 2),
        ([9, 6, 7, 8], [5, 6, 7, 8], 0),
        ([5, 1], [5, 1], 4),  # both end (token 1) at the same place
        ([5, 1], [5, 6, 7, 8], 1),  # one ends early
        ([5, 6, 7, 1], [5, 1], 1),
        ([5, 6, 1], [5, 6, 7, 1], 2),
    ],
)
def test_identical_tokens_by_hand(own: list[int], host: list[int], expected: int) -> None:
    assert identical_tokens(own, host, 4) == expected == identical_tokens(host, own, 4)


def test_shares_by_hand() -> None:
    found = agreement([0, 1, 3, 3], [0, 1, 2, 3], new_tokens=3, resamples=500, seed=0)
    assert found["n_tokens"] == [0, 1, 2, 3]
    assert found["shares"] == [1.0, 0.75, 0.5, 0.5]
    assert (found["mean_identical_tokens"], found["complete_share"]) == (1.75, 0.5)
    assert found["shares_ci95"][0] == [1, 1]
    low, high = found["shares_ci95"][2]
    assert low == 0.0 and high == 1.0  # of four samples, two: nearly anything


def test_intervals_resample_documents() -> None:
    """A hundred copies of each of four samples are four samples."""
    four = agreement([0, 1, 3, 3], [0, 1, 2, 3], new_tokens=3, resamples=500, seed=0)
    many = agreement(np.repeat([0, 1, 3, 3], 100).tolist(), np.repeat([0, 1, 2, 3], 100).tolist(), new_tokens=3, resamples=500, seed=0)
    assert many == four
    alone = agreement(np.repeat([0, 1, 3, 3], 100).tolist(), range(400), new_tokens=3, resamples=500, seed=0)
    assert alone["shares_ci95"][2][1] - alone["shares_ci95"][2][0] < 0.2


TEXTS = [("a", "a1 a2 a3 a4 a5 a6"), ("b", "b1\n b2\tb3  b4"), ("c", "c1 c2 c3"), ("d", " ".join(f"d{i}" for i in range(30)))]


def test_prompts_are_four_words_in_a_row_and_documents_take_turns() -> None:
    found = draw_prompts(TEXTS, prompts=12, seed=0)
    for text, owner in zip(found.texts, found.documents, strict=True):
        words = text.split(" ")
        assert len(words) == 4
        source = next(body for name, body in TEXTS if name == words[0][0]).split()
        start = source.index(words[0])
        assert source[start : start + 4] == words
        assert owner == found.documents[[t[0] for t in found.texts].index(text[0])]
    letters = "".join(text[0] for text in found.texts)
    assert sorted(letters[:3]) == ["a", "b", "d"]  # c is too short; the others once each before anyone comes again
    assert sorted(letters[3:5]) == ["a", "d"]  # b has one place only
    assert len(set(found.texts)) == 12


def test_prompts_depend_on_the_seed_and_not_on_the_order() -> None:
    first = draw_prompts(TEXTS, prompts=8, seed=0)
    assert draw_prompts(TEXTS[::-1], prompts=8, seed=0) == first
    assert draw_prompts(TEXTS, prompts=8, seed=1) != first
    starts = {draw_prompts(TEXTS[3:], prompts=1, seed=seed).texts[0].split()[0] for seed in range(400)}
    assert starts == {f"d{i}" for i in range(27)}  # every place, the last included


def test_prompts_that_do_not_fit_are_passed_over() -> None:
    found = draw_prompts(TEXTS, prompts=10, seed=0, fits=lambda text: "d9" not in text.split() and text[0] != "a")
    assert found.texts and not any(text[0] == "a" or "d9" in text.split() for text in found.texts)


def test_too_little_text() -> None:
    with pytest.raises(ConfigError, match=r"too little held-out text .* expected 32 prompts of 4 words \| got 31 ") as error:
        draw_prompts(TEXTS, prompts=32, seed=0)
    assert "--agreement-prompts" in str(error.value)
    assert len(draw_prompts(TEXTS, prompts=31, seed=0).texts) == 31  # 3 + 1 + 0 + 27 places


def test_prompts_come_from_the_split_asked_for(measure: Measure, host: Host, run: Run) -> None:
    layer = host.mlp(HOOKPOINT)
    corpus = Corpus(run.info["config"]["text"])
    for split in ("test", "validation"):
        texts = [" ".join(document.text.split()) for document in corpus.documents(split)]
        found = measure(layer, split=split)
        assert found["split"] == split
        assert all(any(sample["prompt"] in text for text in texts) for sample in found["samples"])


def test_long_prompts_of_a_short_host_are_passed_over(host: Host, measure: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Host, "max_tokens", 4 + 6)  # BOS, four words and six tokens are 11
    with pytest.raises(ConfigError, match="too little held-out text"):
        measure(host.mlp(HOOKPOINT))


def test_streamed_text_is_read_only_as_far_as_needed(host: Host, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    class Endless:
        streamed = True

        def documents(self, split: str) -> Any:
            while True:
                read.append(len(read))
                yield str(len(read)), " ".join(WORDS[len(read) % 50 :][:6])

    monkeypatch.setattr(generation, "STREAMED_DOCUMENTS", 3)
    layer = cast(SparseLayer, host.mlp(HOOKPOINT))
    subject = Subject(run, run.students[0], layer, host, cast(Any, Endless()), SMALL, Shared(), lambda *_: None)
    assert generation.measure(subject)["prompts"] == 40
    assert len(read) == 3 * 40


def test_batches_hold_every_prompt_once() -> None:
    lengths = [(7 * i) % 13 for i in range(150)]
    batches = in_batches(lengths)
    assert sorted(i for batch in batches for i in batch) == list(range(150))
    assert max(map(len, batches)) == generation.ROWS
    assert [lengths[i] for batch in batches for i in batch] == sorted(lengths)


def test_the_host_is_asked_once_for_all_students(host: Host, measure: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = Shared()
    said: list[tuple[float, str]] = []
    first = measure(random_layer("mxd"), shared, said)
    assert [s for s, _ in said] == sorted(s for s, _ in said) and said[-1][0] == 1
    calls: list[int] = []
    before = Host.generate_batch

    def counted(self: Host, prompts: Any, **how: Any) -> Any:
        calls.append(len(prompts))
        return before(self, prompts, **how)

    monkeypatch.setattr(Host, "generate_batch", counted)
    assert measure(random_layer("mxd"), shared) == first
    assert sum(calls) == 40
    assert host.model.get_submodule("model.layers.1.mlp") is host.mlp(HOOKPOINT)


def test_the_options_do_something(measure: Measure) -> None:
    layer = random_layer("topk-sae")
    base = measure(layer)
    assert (base["prompts"], base["new_tokens"], base["temperature"]) == (40, 6, 0)
    assert len(base["identical_tokens"].split()) == 40 and len(base["samples"]) == 32
    fewer = measure(layer, agreement_prompts=5, agreement_tokens=3)
    assert len(fewer["identical_tokens"].split()) == len(fewer["samples"]) == 5
    assert fewer["n_tokens"] == [0, 1, 2, 3]
    assert measure(layer, agreement_temperature=2.0)["identical_tokens"] != base["identical_tokens"]
    assert measure(layer, seed=1)["samples"] != base["samples"]
    assert set(generation.PART.options) == {"agreement_prompts", "agreement_tokens", "agreement_temperature"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"agreement_prompts": 0}, "--agreement-prompts is too small"),
        ({"agreement_tokens": 0}, "--agreement-tokens is too small"),
        ({"agreement_temperature": -0.1}, "impossible --agreement-temperature"),
        ({"agreement_temperature": float("nan")}, "impossible --agreement-temperature"),
        ({"agreement_temperature": float("inf")}, "impossible --agreement-temperature"),
        ({"agreement_prompts": 10_000}, "too little held-out text"),
    ],
)
def test_bad_options(measure: Measure, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        measure(random_layer("mxd"), **options)


@pytest.mark.parametrize("kind", ["mxd-pk", "transcoder", "skip-transcoder", "dense", "additive"])
def test_every_kind(measure: Measure, kind: str) -> None:
    found = finite(measure(random_layer(kind), agreement_prompts=6, agreement_tokens=3))
    assert found["shares"][0] == 1 and found["shares"] == sorted(found["shares"], reverse=True)
    assert json.loads(json.dumps(found)) == found


def student(name: str, kind: str, found: Found) -> dict[str, Any]:
    return {"name": name, "kind": kind, "k": 4, "recipe": "ours", generation.NAME: found}


def made(identical: list[int], new_tokens: int = 3, **more: Any) -> Found:
    """Figures as `measure` makes them, of samples with so many identical tokens."""
    samples = [{"prompt": f"p{i}", "host": "x", "same": "x"[:n], "rest": "y", "identical_tokens": n} for i, n in enumerate(identical)][:32]
    around = {"prompts": len(identical), "prompt_words": 4, "prompt_documents": 9, "new_tokens": new_tokens, "temperature": 0.0}
    return {
        **around, "host": "tiny", "hookpoint": HOOKPOINT, "split": "test",
        **agreement(identical, range(len(identical)), new_tokens=new_tokens, resamples=200, seed=0),
        "identical_tokens": " ".join(map(str, identical)), "documents": " ".join(map(str, range(len(identical)))),
        "samples": samples, **more,
    }  # fmt: skip


def test_what_is_said_is_what_the_figures_say() -> None:
    good, equal, bad = made([3, 3, 2, 3] * 30), made([3, 2, 3, 3] * 30), made([1, 0, 2, 1] * 30)
    (section,) = generation_show.show([student("a", "mxd", good), student("b", "transcoder", equal), student("c", "topk-sae", bad)])
    text = " ".join(section.words)
    assert "With the MxD in place, 75 % [69, 82] of 120 continuations" in text
    assert "longer than the TopK SAE by 1.8 [" in text
    assert "No difference is shown between it and the transcoder" in text
    assert "says nothing" in text
    head = section.tables[0].heads
    assert list(head) == ["student", "n = 1", "n = 2", "all 3", "tokens before the first difference"]
    assert section.tables[0].rows[0][2] == "1.00 [1.00, 1.00]"
    assert generation_show.difference(good, made([1, 2], 3)) is None


def test_paired_differences_see_what_separate_intervals_do_not() -> None:
    rng = np.random.default_rng(0)
    base = rng.integers(0, 15, 200)
    one, other = made((base + 1).tolist(), 16), made(base.tolist(), 16)
    gap = generation_show.difference(one, other)
    assert gap is not None and (gap.value, gap.low, gap.high) == (1, 1, 1)
    assert one["mean_identical_tokens_ci95"][0] < other["mean_identical_tokens_ci95"][1]


def test_published_rows_stand_beside_a_host_of_the_paper() -> None:
    paper = published()["generation_agreement"]["hosts"]["pythia-410m"]
    rows = generation_show.published_rows("EleutherAI/pythia-410m")
    assert [(row.kind, list(row.shares)) for row in rows] == [("topk-sae" if k == "sae" else k, v) for k, v in paper.items()]
    assert generation_show.published_rows("smollm2") == generation_show.published_rows("meta-llama/Llama-3.2-3B") == []
    (section,) = generation_show.show([student("a", "mxd", made([3, 16, 0], 16, host="gpt2"))])
    drawn = section.figures[0][1].svg()
    assert "MxD, paper" in drawn and drawn.count('class="axis dots"') == 4 and ">.94<" in drawn
    assert any("may be one ahead" in note for note in section.notes)
    (section,) = generation_show.show([student("a", "mxd", made([3, 16, 0], 16))])
    assert "paper" not in section.figures[0][1].svg()


def test_the_heat_map_has_a_cell_for_every_n() -> None:
    figure = generation_show.heat_map([generation_show.Row("MxD", "mxd", [1, 1, 0.5, 0.0], paper=False)])
    assert re.findall(r">([\d.]+)</text></g>", figure.svg()) == ["1", ".50", "0"]
    assert [float(v) for v in re.findall(r"fill-opacity:([\d.]+)", figure.svg())] == [1.0, 0.52, 0.04]
    long = generation_show.heat_map([generation_show.Row("MxD", "mxd", [1.0] * 65, paper=False)])
    assert len(re.findall("<rect", long.svg())) == 16 and ">64</text>" in long.svg()


def test_numbers_in_cells() -> None:
    assert [generation_show.short(v) for v in (1, 0, 0.999, 0.001, 0.944)] == ["1", "0", ".99", ".01", ".94"]


def test_numbers_can_be_read_in_every_cell_of_both_themes() -> None:
    def rgb(colour: str) -> np.ndarray[Any, Any]:
        return np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])

    def luminance(colour: np.ndarray[Any, Any]) -> float:
        linear = np.where(colour <= 0.03928, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    for theme in svg.STYLE.split("@media")[:2]:
        hue, ink, paper = (rgb(m[1]) for m in (re.search(rf"--{name}:(#\w+)", theme) for name in ("mxd", "ink", "paper")) if m)
        colours = {"var(--ink)": ink, "var(--paper)": paper, generation_show.DARK: rgb(generation_show.DARK)}
        for share in np.linspace(0, 1, 101):
            cell = generation_show._cell(0, 0, float(share), "")
            used = re.search(r'style="fill:([^;]+);font', cell)
            assert used
            opacity = generation_show.tint(float(share))
            ends = sorted(luminance(c) for c in (colours[used[1]], opacity * hue + (1 - opacity) * paper))
            assert (ends[1] + 0.05) / (ends[0] + 0.05) > 3.8


def test_texts_are_escaped() -> None:
    found = made([1, 3])
    found["samples"] = [{"prompt": "<b>&", "host": "<i>", "same": "<u>\n", "rest": "<script>", "identical_tokens": 1}]
    (section,) = generation_show.show([student("<s>", "mxd", found)])
    page = sections.html(section)
    assert "&lt;b&gt;&amp;" in page and "&lt;script&gt;" in page and "&lt;u&gt; ⏎" in page
    assert not re.search("<script>|<i>|<u>", page)


def test_what_ends_early_is_marked() -> None:
    found = made([1])
    found["samples"] = [{"prompt": "p", "host": "a b", "same": "a", "rest": "", "identical_tokens": 1}]
    (section,) = generation_show.show([student("s", "mxd", found)])
    assert "⊣</ins>" in section.html


def test_samples_are_cut_where_they_differ(host: Host, measure: Measure) -> None:
    found = measure(random_layer("mxd"))
    counts = [int(n) for n in found["identical_tokens"].split()]
    for sample, n in zip(found["samples"], counts, strict=False):
        assert sample["identical_tokens"] == n
        own, theirs = (sample["same"] + sample["rest"]).split(), sample["host"].split()
        assert sample["same"].split() == theirs[: len(sample["same"].split())]
        if n < 6 and len(own) > n and len(theirs) > n:
            assert len(sample["same"].split()) == n and own[n] != theirs[n]


def test_the_suite_knows_it_and_missing_is_said() -> None:
    assert suite.part(generation.NAME) is generation.PART
    assert generation_show.show([{"name": "a", generation.NAME: {"missing": "why"}}]) == []
