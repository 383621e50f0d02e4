"""The part `probes` on a tiny host: a unit that is the label, every kind, the reading of texts, roles, options, what is shown."""

from __future__ import annotations

import gc
import json
import random
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch

from mxd import labelled
from mxd.checkpoint import Run
from mxd.config import EvalConfig
from mxd.errors import ConfigError, TextError
from mxd.evals import sections, svg
from mxd.evals.parts import Found, Shared, Subject, finite
from mxd.evals.probing import measure as probing
from mxd.evals.probing import read as probing_read
from mxd.evals.probing.read import Codes, Linear, Piece, Reading, layer_codes, piece_of, scores
from mxd.host import Host
from mxd.labelled import Sample, Task, make
from mxd.layers import Edited, SparseLayer, TopKSAE, Transcoder

from .hosts import WORDS, random_layer, tiny_llama, write_run, write_text

HOOKPOINT = "layers.1.mlp"
SMALL = EvalConfig(tasks=("topic",), probe_samples_per_class=60, bootstrap=100)
KINDS = ("mxd", "mxd-pk", "transcoder", "skip-transcoder", "topk-sae", "additive")
Measure = Callable[..., Found]


def words_task(classes: int = 2, each: int = 120, thin: bool = False) -> Task:
    """Class c is texts of words 20 c to 20 c + 19."""
    rng = random.Random(0)
    samples = [
        Sample(f"{c}-{i}", " ".join(rng.choices(WORDS[20 * c : 20 * c + 20], k=rng.randint(6, 14))), f"c{c}", f"{c}-{i}")
        for c in range(classes)
        for i in range(each)
    ]
    if thin:
        samples += [Sample(f"thin-{i}", f"w1 w2 w3 w4 w5 {' w6' * i}", "thin", f"thin-{i}") for i in range(6)]
    return make("topic", "made-up words", samples, ["c0", "c1", "c2", "thin"])


@pytest.fixture(autouse=True)
def tasks(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Task]]:
    known = {"topic": words_task(thin=True)}

    def task(name: str) -> Task:
        if name not in known:
            raise TextError(f"{name} is away")
        return known[name]

    monkeypatch.setattr(labelled, "task", task)
    yield known


@pytest.fixture(scope="module")
def host() -> Host:
    torch.set_num_threads(1)
    return tiny_llama()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    return write_run(folder / "run", write_text(folder / "text", documents=4), kinds=("mxd", "topk-sae", "dense"))


@pytest.fixture
def measure(host: Host, run: Run) -> Measure:
    def of(layer: SparseLayer, shared: Shared | None = None, said: list[float] | None = None, **options: Any) -> Found:
        told = said if said is not None else []
        config = replace(SMALL, **options)
        subject = Subject(
            run, run.students[0], layer, host, cast(Any, None), config, shared or Shared(), lambda share, _: told.append(share)
        )
        return json.loads(json.dumps(finite(probing.measure(subject))))

    return of


def pieces(host: Host, task: Task) -> list[Piece]:
    return [p for s in task.samples if (p := piece_of(host, task, s, paper=False))]


def planted(host: Host) -> Transcoder:
    """Unit 3 is the best linear direction for class 0 (16 dimensions do not part the classes); the rest have no weight at all."""
    task = words_task()
    read = Reading(host, HOOKPOINT, pieces(host, task), [])
    own = np.array([read.row[piece] for s in task.samples if (piece := piece_of(host, task, s, paper=False)) and s.label == "c0"])
    is_first = np.isin(np.arange(len(read.pieces)), own)
    design = np.concatenate([read.x, np.ones((len(read.x), 1))], 1)
    solved = np.linalg.lstsq(design, np.where(is_first, 1.0, -1.0), rcond=None)[0]
    layer = cast(Transcoder, random_layer("transcoder"))
    with torch.no_grad():
        layer.W_enc.zero_()
        layer.b_enc.fill_(-1.0)
        layer.W_enc[3] = torch.as_tensor(solved[:-1], dtype=torch.float32)
        layer.b_enc[3] = float(solved[-1])
    return layer


def cell(found: Found, source: str = "student", feature: str = "pre", size: int = 1) -> dict[str, Any]:
    return found["tasks"]["topic"]["figures"][source][feature][f"k{size}"]


def test_the_one_unit_that_knows_the_label(measure: Measure, host: Host) -> None:
    found = measure(planted(host))
    first = cell(found)["classes"][0]
    assert first["class"] == "c0" and first["units"] == [3]
    assert first["f1"] > found["tasks"]["topic"]["floor"][0] + 0.05, "above calling every text positive"
    assert found["tasks"]["topic"]["skipped"].keys() == {"thin"} and "too few samples" in found["tasks"]["topic"]["skipped"]["thin"]


def test_a_unit_that_is_the_label_exactly(measure: Measure, tasks: dict[str, Task], monkeypatch: pytest.MonkeyPatch, host: Host) -> None:
    """The mean input of every text is replaced by its label: F1 is 1, of the student's scores and of no control's."""
    task = tasks["topic"] = words_task()
    label = {piece: s.label for s in task.samples if (piece := piece_of(host, task, s, paper=False))}
    before = Reading.__init__

    def init(self: Reading, *args: Any, **more: Any) -> None:
        before(self, *args, **more)
        self.x[:, 0] = [100.0 if label[piece] == "c0" else -100.0 for piece in self.pieces]

    monkeypatch.setattr(Reading, "__init__", init)
    layer = cast(Transcoder, random_layer("transcoder"))
    with torch.no_grad():
        layer.W_enc[:, 0] = 0
        layer.W_enc[5], layer.W_enc[6] = torch.eye(16)[0], -torch.eye(16)[0]
    whole = measure(layer)
    found = cell(whole)
    assert [c["units"] for c in found["classes"]] == [[5], [6]]
    assert found["f1"] == 1.0 and found["f1_ci95"] == [1.0, 1.0] and found["balanced_accuracy"] == 1.0
    # Shuffled labels; units that see the label but for noise; codes, which are of single tokens, and so not of the label.
    assert cell(whole, "shuffled")["f1"] < 0.9
    assert all(cell(whole, source, "code")["f1"] < 0.95 for source in ("random", "neurons", "student"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_and_its_controls(measure: Measure, kind: str) -> None:
    said: list[float] = []
    layer = random_layer(kind)
    found = measure(layer, said=said)
    figures = found["tasks"]["topic"]["figures"]
    assert {source: set(features) for source, features in figures.items()} == {
        "student": {"pre", "code"}, "random": {"pre", "code"}, "neurons": {"pre", "code"}, "shuffled": {"pre", "code"}, "dense": {"y"},
    }  # fmt: skip
    for source in ("student", "random", "neurons"):
        assert set(figures[source]["code"]) == {"k1", "k2", "k5"}
        assert all(0 <= u < layer.n_units or source == "neurons" for c in figures[source]["code"]["k5"]["classes"] for u in c["units"])
    low, high = cell(found)["f1_ci95"]
    assert low <= cell(found)["f1"] <= high
    assert set(found["tasks"]["topic"]["above"]["random"]) == {"pre", "code"}
    assert said == sorted(said) and said[-1] <= 1


def test_the_dense_control_has_no_units(measure: Measure) -> None:
    assert measure(random_layer("dense")) == {"missing": "the dense control has no units"}


def test_scores_are_the_mean_of_the_gates_scores(host: Host) -> None:
    some = pieces(host, words_task())[:9]
    read = Reading(host, HOOKPOINT, some, ["input", "output"])
    for kind in KINDS:
        layer = random_layer(kind)
        found = scores(layer, read.mean(layer.reads))
        assert found is not None and found.n_units == layer.n_units
        whole = np.zeros((len(read.pieces), layer.n_units))
        for of, tokens in read.tokens(layer.reads):
            made = [layer.gate_input(tokens) @ w.T + b for w, b in layer.gates()]
            every = made[0] if len(made) == 1 else (made[0][:, :, None] + made[1][:, None]).flatten(1)
            for row in np.unique(of):
                whole[row] = every[of == row].double().mean(0)
        units = np.arange(layer.n_units)
        assert found.columns(np.arange(len(whole)), units) == pytest.approx(whole, abs=1e-4)
        assert found.means(np.array([0, 2, 5])) == pytest.approx(whole[[0, 2, 5]].mean(0), abs=1e-4)


def test_codes_are_the_mean_codes_also_of_an_edited_layer(host: Host) -> None:
    read = Reading(host, HOOKPOINT, pieces(host, words_task())[:9], ["input"])
    plain = random_layer("mxd")
    for layer in (plain, Edited(plain, scale={2: 0.0}, add={7: 1.5})):
        found = layer_codes(layer, read)
        whole = np.zeros((len(read.pieces), layer.n_units))
        for of, tokens in read.tokens("input"):
            code = layer.encode(tokens)
            each = torch.zeros(len(tokens), layer.n_units).scatter_add_(1, code.indices, code.values)
            for row in np.unique(of):
                whole[row] = each[of == row].double().mean(0)
        rows, units = np.array([8, 1, 3]), np.array([7, 2, 0, 24])
        assert found.columns(rows, units) == pytest.approx(whole[np.ix_(rows, units)], abs=1e-5)
        assert found.means(rows) == pytest.approx(whole[rows].mean(0), abs=1e-5)
    assert (layer_codes(Edited(plain, scale={2: 0.0}), read).columns(rows, np.array([2])) == 0).all()


def test_the_reading_is_that_of_each_text_alone(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    some = pieces(host, words_task())[:12]
    monkeypatch.setattr(probing_read, "TOKENS_PER_READ", 40)
    read = Reading(host, HOOKPOINT, [*some, some[0]], ["input", "output"])
    assert read.pieces == list(dict.fromkeys(some))
    for row, piece in enumerate(read.pieces):
        alone = host.read(torch.tensor([piece.ids]), [HOOKPOINT])[HOOKPOINT]
        inside = slice(piece.begin, piece.end)
        assert read.x[row] == pytest.approx(alone.x[0, inside].double().mean(0).numpy(), abs=1e-5)
        assert read.y[row] == pytest.approx(alone.y[0, inside].double().mean(0).numpy(), abs=1e-4)
        w, x = host.weights(HOOKPOINT), alone.x[0, inside]
        assert w.E_gate is not None
        hidden = torch.nn.functional.silu(x @ w.E_gate) * (x @ w.E)
        assert read.neurons[row] == pytest.approx(hidden.double().mean(0).numpy(), abs=1e-4)
    monkeypatch.setattr(probing_read, "KEPT_BYTES", 0)
    again = Reading(host, HOOKPOINT, some, ["input"])
    for (a, x), (b, y) in zip(read.tokens("input"), again.tokens("input"), strict=True):
        assert (a == b).all() and torch.equal(x, y), "read again where it is too much to keep"


def test_which_tokens_count(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(WORDS[:20])
    first, last = words_task(), replace(words_task(), keep="last")
    sample = Sample("s", text, "c0", "s")
    ids = host.encode(text)
    monkeypatch.setattr(probing_read, "TOKENS", 8)
    assert piece_of(host, first, sample, paper=False) == Piece((0, *ids[:8]), 1, 9)
    assert piece_of(host, last, sample, paper=False) == Piece((0, *ids[-8:]), 1, 9)
    assert piece_of(host, first, sample, paper=True) == Piece((0, *ids[:7]), 1, 7), "BOS among the 128, the last token dropped"
    begin = text.index("w10 w11")
    span = sample._replace(span=(begin, begin + 7))
    assert piece_of(host, last, span, paper=False) == Piece((0, *ids[4:12]), 7, 9), "the two tokens of the span, nothing behind them"
    assert piece_of(host, first, sample._replace(text="w1 w2 w3 w4"), paper=False) is None


def test_students_share_the_reading_and_the_controls(measure: Measure, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = Shared()
    one = measure(random_layer("mxd"), shared)

    def never(*_: object) -> None:
        raise AssertionError("the host must not read again")

    monkeypatch.setattr(host, "read", never)
    two = measure(random_layer("mxd", seed=1), shared)
    for source in ("random", "neurons", "dense"):
        assert one["tasks"]["topic"]["figures"][source] == two["tasks"]["topic"]["figures"][source]
    assert cell(one) != cell(two)


def test_codes_of_random_units_are_not_kept_once_they_are_probed(measure: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Any]] = []
    before = probing._random

    def spy(*args: Any) -> Any:
        features = before(*args)
        made.append(weakref.ref(features["code"]))
        return features

    monkeypatch.setattr(probing, "_random", spy)
    shared = Shared()
    measure(random_layer("mxd"), shared)
    gc.collect()
    assert len(made) == 1 and made[0]() is None
    measure(random_layer("mxd", seed=1), shared)
    assert len(made) == 1, "made once for students of one shape"


def test_random_units_beside_a_relu_fire_as_often_as_its_own(measure: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate without TopK has K = n_units: random directions without TopK would fire on half of all tokens."""
    layer = cast(Transcoder, random_layer("transcoder"))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.b_enc[[3, 8, 9]] = 1.0
    layer.k = layer.n_units
    seen: list[tuple[int, float]] = []
    before = probing._random

    def spy(subject: Subject, texts: Any, side: Any, k: int) -> Any:
        features = before(subject, texts, side, k)
        seen.append((k, cast(Codes, features["code"]).l0))
        return features

    monkeypatch.setattr(probing, "_random", spy)
    shared = Shared()
    found = measure(layer, shared)
    assert seen == [(3, pytest.approx(3, abs=0.01))] and found["protocol"]["random_k"] == 3
    usual = measure(random_layer("transcoder"), shared)
    assert seen[1][0] == 4 and usual["protocol"]["random_k"] == 4, "another K, another control"
    entries = [{"name": name, "kind": "transcoder", "probes": probes} for name, probes in (("relu", found), ("topk", usual))]
    assert any("through TopK with K = 3 (relu), 4 (topk) (a student without" in note for note in probing.PART.show(entries)[0].notes)
    assert any("through TopK with K = 3;" in note for note in probing.PART.show(entries[:1])[0].notes)
    assert probing.control_k(layer, 0.2) == 1


def test_the_note_names_the_languages_that_were_trained_on(measure: Measure, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(run.info, "text", {"sources": [{"name": "wiki-fr"}, {"name": "wiki-es"}]})
    found = measure(random_layer("mxd"))
    notes = " ".join(probing.PART.show([{"name": "a", "kind": "mxd", "probes": found}])[0].notes)
    assert "Wikipedia leads in French and Spanish were training texts of the students, of every kind, without labels" in notes
    assert "leads in English" not in notes and "corpora in English were not" in notes


def test_the_same_seed_gives_the_same_figures(measure: Measure) -> None:
    assert measure(random_layer("mxd")) == measure(random_layer("mxd"))
    assert cell(measure(random_layer("mxd"), seed=1), "random") != cell(measure(random_layer("mxd")), "random")


def test_the_options_do_something(measure: Measure, tasks: dict[str, Task]) -> None:
    layer = random_layer("mxd")
    plain = measure(layer)
    more = measure(layer, probe_samples_per_class=100)
    assert more["tasks"]["topic"]["samples"]["fit"] > plain["tasks"]["topic"]["samples"]["fit"]
    paper = measure(layer, probe_selection="paper")
    assert paper["protocol"]["selection"] == "paper" and plain["protocol"]["selection"] == "ours"
    assert all(c["chosen_f1"] == pytest.approx(c["f1"]) for c in cell(paper)["classes"]), "chosen on the test texts"
    tasks["language"] = words_task(classes=3)
    assert set(measure(layer, tasks=("topic", "language"))["tasks"]) == {"topic", "language"}


def test_suite_paper_follows_the_published_protocol(measure: Measure, tasks: dict[str, Task]) -> None:
    tasks["ag_news"] = words_task(each=400)
    found = measure(random_layer("mxd"), suite="paper", tasks=())
    assert set(found["tasks"]) == {"ag_news"} and found["protocol"]["selection"] == "paper"
    assert sum(found["tasks"]["ag_news"]["samples"].values()) == 800, "all, not --probe-samples-per-class"
    assert set(found["skipped"]) == {"github-code", "amazon-reviews", "europarl", "bias_in_bios"}


def test_split_validation_leaves_the_test_texts_alone(
    measure: Measure, tasks: dict[str, Task], host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = {s.id for s in tasks["topic"].split("test")}
    seen: list[set[str]] = []
    before = probing._load

    def spy(task: Task, chosen: Any, reading: Reading, config: EvalConfig) -> probing.Loaded:
        loaded = before(task, chosen, reading, config)
        seen.append({g for role in loaded.roles for g in np.array(loaded.groups)[role]})
        assert all(
            labelled.split_of(s) == "validation" for s in tasks["topic"].samples if s.group in np.array(loaded.groups)[loaded.roles.test]
        )
        return loaded

    monkeypatch.setattr(probing, "_load", spy)
    found = measure(random_layer("mxd"), split="validation", probe_samples_per_class=100)
    assert found["protocol"]["measured_on"] == "validation" and not seen[0] & test


def test_what_cannot_be_had_is_skipped_and_said(measure: Measure) -> None:
    found = measure(random_layer("mxd"), tasks=("topic", "europarl"))
    assert "europarl is away" in found["skipped"]["europarl"]
    with pytest.raises(ConfigError, match=r"no probing task could be had .*europarl is away"):
        measure(random_layer("mxd"), tasks=("europarl",))
    with pytest.raises(ConfigError, match="unknown task in --tasks"):
        measure(random_layer("mxd"), tasks=("topik",))


def test_no_class_has_enough(measure: Measure, tasks: dict[str, Task]) -> None:
    tasks["topic"] = words_task(each=20)
    found = measure(random_layer("mxd"))
    assert found["tasks"]["topic"]["figures"] == {} and set(found["tasks"]["topic"]["skipped"]) == {"c0", "c1"}
    (section,) = probing.PART.show([{"name": "a", "kind": "mxd", "probes": found}])
    assert section.words == ["No task has enough samples in two classes."]


def test_a_gate_that_is_not_linear_has_no_scores(host: Host) -> None:
    class Odd(TopKSAE):
        def gate_input(self, x: torch.Tensor) -> torch.Tensor:
            return x.abs()

    layer = random_layer("topk-sae")
    layer.__class__ = Odd
    assert scores(layer, np.random.default_rng(0).standard_normal((4, 16))) is None


def test_what_is_shown(measure: Measure, host: Host) -> None:
    shared = Shared()
    students: list[dict[str, Any]] = [
        {"name": "transcoder-k4", "kind": "transcoder", "probes": measure(planted(host), shared)},
        {"name": "topk-sae-k4", "kind": "topk-sae", "probes": measure(random_layer("topk-sae"), shared)},
        {"name": "dense", "kind": "dense", "probes": {"missing": "no units"}},
    ]
    (section,) = probing.PART.show(students)
    text = "\n".join(sections.markdown(section, str))
    assert "transcoder-k4" in text and "class thin is skipped: too few samples" in text and "random units beside topk-sae-k4" in text
    assert all(len(row) == len(table.heads) for table in section.tables for row in table.rows)
    assert svg.NAMES["transcoder"] in section.figures[0][1].svg()
    for student in students[:2]:
        for feature, what in (("code", "codes"), ("pre", "scores")):
            clear = student["probes"]["tasks"]["topic"]["above"]["random"][feature]["disjoint"]
            words = next(words for words in section.words if words.startswith(f"{student['name']}: single {what} are above"))
            assert ("intervals, on topic." in words, "on no task; not shown on topic." in words) == (clear, not clear)
    assert probing.PART.show([students[2]]) == []
    assert "<script" not in sections.html(section)


def test_the_language_named_is_the_best_on_validation_texts_not_on_test(measure: Measure, host: Host) -> None:
    probes = measure(planted(host))
    (task,) = probes["tasks"].values()
    probes["tasks"] = {"language": task}
    first, second = task["figures"]["student"]["code"]["k1"]["classes"][:2]
    first |= {"chosen_f1": 1.0, "f1": 0.25}
    second |= {"chosen_f1": 0.5, "f1": 1.0}
    (section,) = probing.PART.show([{"name": "transcoder-k4", "kind": "transcoder", "probes": probes}])
    named = [words for words in section.words if "tells a language best" in words]
    assert len(named) == 1 and f"({first['class']}, unit {first['units'][0]}) has F1 0.25" in named[0]


def test_features_kept_sparse_or_linear_agree_with_a_matrix() -> None:
    from scipy import sparse

    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((6, 8)) * (rng.random((6, 8)) < 0.4)
    found = Codes(sparse.csr_array(matrix))
    rows, units = np.array([4, 0]), np.array([7, 1, 3])
    assert (found.columns(rows, units) == matrix[np.ix_(rows, units)]).all()
    assert found.means(rows) == pytest.approx(matrix[rows].mean(0))
    two = Linear(np.eye(2), [(np.array([[1.0, 0], [2, 0]]), np.zeros(2)), (np.array([[0, 10.0], [0, 20]]), np.array([0.0, 1]))])
    assert two.columns(np.array([0, 1]), np.arange(4)).tolist() == [[1, 2, 2, 3], [10, 21, 10, 21]]
