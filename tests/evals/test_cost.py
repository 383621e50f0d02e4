"""Cost: the paper's parameter totals, multiply-adds against counts by hand, memory by hand, who takes turns, what is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from mxd.checkpoint import Run
from mxd.config import EvalConfig
from mxd.errors import TextError
from mxd.evals import sections, suite
from mxd.evals.cost import measure as cost
from mxd.evals.cost import show as cost_show
from mxd.evals.parts import Shared, Subject, finite
from mxd.host import Host
from mxd.layers import LAYERS, Edited, Sizes, build
from mxd.recipes import published
from mxd.text import Corpus

from .hosts import random_layer, tiny_llama, write_run, write_text

HOOKPOINT = "layers.1.mlp"
I, O, H, N, K = 24, 40, 56, 900, 5  # noqa: E741
"""Sizes at which no two products are alike; N is more than 16 K, so that rows are gathered; a square, for product keys."""


@pytest.fixture(scope="module", autouse=True)
def few_runs() -> Any:
    """Times are not what is tested here."""
    torch.set_num_threads(1)
    patch = pytest.MonkeyPatch()
    patch.setattr(cost, "RUNS", 3)
    for name, small in (("PAPER_WIDTH", 16), ("PAPER_EXPERTS", 128), ("PAPER_LATENTS", 144), ("PAPER_K", 4)):
        patch.setattr(cost, name, small)
    yield
    patch.undo()


def at_the_papers_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("PAPER_WIDTH", 1024), ("PAPER_EXPERTS", 8192), ("PAPER_LATENTS", 9216), ("PAPER_K", 32)):
        monkeypatch.setattr(cost, name, value)


def test_the_papers_two_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    at_the_papers_sizes(monkeypatch)
    found = {name: cost.counted(layer, torch.empty(512, 1024, device="meta")) for name, layer in cost.paper_rivals("meta").items()}
    for row in found.values():
        assert row["weights"] == row["macs_per_token_all_units"] == 18_874_368 == cost_show.PUBLISHED_WEIGHTS
        assert row["flops_per_token"] == 2 * row["macs_per_token"]
    assert found["mxd"]["macs_per_token"] == 2 * 1024**2 + 8192 * 1024 + 32 * 1024
    assert found["transcoder"]["macs_per_token"] == 9216 * 1024 + 32 * 1024


@pytest.mark.parametrize("name", list(published()["sizes"]))
def test_published_totals_with_biases(name: str) -> None:
    about = published()["sizes"][name]
    d, glu = about["d"], about.get("mxd_encoder") == "glu"
    sizes = Sizes(d, d, about["transcoder_latents"], 32, about["mxd_hidden"], "silu" if glu else "gelu", glu)
    x = torch.empty(2, d, device="meta")
    wanted = {
        "transcoder": (sizes, about["transcoder_params"]),
        "skip-transcoder": (sizes, about["skip_transcoder_params"]),
        "mxd": (sizes._replace(n_units=about["mxd_experts"]), about["mxd_params"]),
    }
    for kind, (own, params) in wanted.items():
        row = cost.counted(build(kind, own, device="meta"), x)
        assert row["params"] == params
        assert row["weights"] == row["macs_per_token_all_units"]  # every weight is multiplied once


def by_hand(glu: bool) -> dict[str, tuple[int, int]]:
    """Multiply-adds per token: as run, and what every unit's row would add."""
    encoder, dense, rest = I * H * (2 if glu else 1), H * O, (N - K) * O
    return {
        "mxd": (encoder + dense + N * I + K * O, rest),
        "mxd-pk": (encoder + dense + 2 * 30 * I + K * O, rest),
        "transcoder": (N * I + K * O, rest),
        "skip-transcoder": (N * I + K * O + I * O, rest),
        "topk-sae": (N * O + K * O, rest),
        "dense": (encoder + dense, 0),
        "additive": (encoder + dense + N * I + K * O, rest),
    }


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("kind", list(by_hand(False)))
def test_multiply_adds_by_hand(kind: str, glu: bool, device: str) -> None:
    """On the CPU products go through oneDNN on some machines and MKL on others; on the meta device through neither."""
    layer = build(kind, Sizes(I, O, N, K, H, "gelu", glu), device=device).eval().requires_grad_(False)
    found = cost.work(layer, torch.zeros(7, layer.d_in, device=device))
    run, rest = by_hand(glu)[kind]
    assert found == (run, run + rest)


@pytest.mark.parametrize("product", ["mkl", "onednn"])
def test_multiply_adds_do_not_depend_on_the_product(product: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mxd.ops import gemm

    monkeypatch.setattr(gemm, "uses_onednn", lambda: product == "onednn" and torch.backends.mkldnn.is_available())
    layer = build("mxd", Sizes(I, O, N, K, H, "gelu", False)).eval()
    assert cost.work(layer, torch.zeros(3, I)).macs == by_hand(False)["mxd"][0]


def test_crowded_rows_are_counted_as_the_dense_product_that_they_are() -> None:
    layer = build("transcoder", Sizes(I, O, 20, K, H), device="cpu").eval()
    assert cost.work(layer, torch.zeros(3, I)) == (20 * I + 20 * O, 20 * I + 20 * O)


@pytest.mark.parametrize("kind", list(LAYERS))
def test_every_kind_can_be_counted(kind: str) -> None:
    layer = random_layer(kind)
    x = torch.randn(32, layer.d_in)
    row = cost.counted(layer, x)
    assert row["params"] == layer.budget()
    assert row["macs_per_token_all_units"] >= row["macs_per_token"] > 0
    assert row["working_mib"] >= 32 * layer.d_out * 4 / cost.MIB


def test_an_edited_layer_costs_what_its_layer_does_and_the_added_rows() -> None:
    layer = build("transcoder", Sizes(I, O, N, K, H)).eval()
    x = torch.randn(4, I)
    assert cost.work(Edited(layer, scale={3: 0.0}), x) == cost.work(layer, x)
    assert cost.work(Edited(layer, add={3: 1.0}), x).macs == cost.work(layer, x).macs + O


def test_a_hosts_mlp_by_hand() -> None:
    mlp = tiny_llama().mlp(HOOKPOINT)
    row = cost.counted(mlp, torch.randn(5, 16))
    assert row["macs_per_token"] == row["macs_per_token_all_units"] == row["params"] == row["weights"] == 3 * 16 * 24


class Chain(nn.Module):
    """Holds two of its three results at a time."""

    def forward(self, x: Tensor) -> Tensor:
        a = x + 1
        b = torch.cat([a, a])
        del a
        c = b * 2
        return c.view(-1)[:3]  # a view: no memory of its own, but it keeps that of c


def test_memory_by_hand() -> None:
    x = torch.zeros(64, 4)
    size = 64 * 4 * 4
    assert cost.working_bytes(nn.Identity(), x) == 0
    assert cost.working_bytes(Chain(), x) == 4 * size  # b and c, each twice x; a is gone before c is made
    row = cost.counted(nn.Linear(4, 4), x)
    assert row["working_mib"] == size / cost.MIB
    assert row["peak_mib"] == (2 * size + 4 * (16 + 4)) / cost.MIB


def test_what_lives_on_counts_on() -> None:
    kept: list[Tensor] = []

    class Keeps(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            kept.append(x + 1)
            return x + 2

    x = torch.zeros(64)
    assert cost.working_bytes(Keeps(), x) == 2 * 64 * 4


def test_rivals_take_turns_on_their_own_input(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []

    class Named(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, x: Tensor) -> Tensor:
            assert not torch.is_grad_enabled()
            calls.append((self.name, len(x)))
            return x

    clock = iter(range(1000))
    monkeypatch.setattr("time.perf_counter", lambda: 1e-3 * next(clock) ** 2)
    found = cost.compared({"a": (Named("a"), torch.zeros(2, 3)), "b": (Named("b"), torch.zeros(4, 3))})
    assert calls[:10] == [("a", 2), ("b", 4)] * 5  # two rounds that warm up and three that count
    # The n-th call (from 0) lasts 4n + 1 ms; a has calls 4, 6, 8 and b 5, 7, 9.
    assert found["a"]["milliseconds"] == pytest.approx(25) and found["b"]["milliseconds"] == pytest.approx(29)
    assert found["a"]["milliseconds_quartiles"] == pytest.approx([21, 29])
    assert found["b"]["microseconds_per_token"] == pytest.approx(29_000 / 4)


@pytest.fixture(scope="module")
def host() -> Host:
    return tiny_llama()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    return write_run(folder / "run", write_text(folder / "text"), kinds=("mxd", "topk-sae", "dense"))


def subject(run: Run, host: Host, number: int, shared: Shared, corpus: Any = None, said: list[Any] | None = None) -> Subject:
    record = run.students[number]
    told = said if said is not None else []
    texts = corpus or Corpus(run.info["config"]["text"])
    return Subject(run, record, run.load(record.name), host, texts, EvalConfig(), shared, lambda *call: told.append(call))


def test_students_and_host_get_the_same_held_out_tokens(run: Run, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, tuple[nn.Module, Tensor]]] = []
    before = cost.compared

    def compared(rivals: Any) -> Any:
        given.append(dict(rivals))
        return before(rivals)

    monkeypatch.setattr(cost, "compared", compared)
    shared, said = Shared(), []
    found = [cost.measure(subject(run, host, i, shared, said=said)) for i in range(3)]
    assert len(given) == 4  # three students, and once the paper's sizes
    students = [one for one in given if "student" in one]
    corpus = Corpus(run.info["config"]["text"])
    block = next(corpus.blocks(host.tokenizer, "test", tokens_per_sequence=16, sequences_per_block=32))
    read = host.read(block.ids, [HOOKPOINT])[HOOKPOINT]
    for one, figures in zip(students, found, strict=True):
        expected = read.y if figures["reads_output"] else read.x
        assert torch.equal(one["student"][1], expected.flatten(0, 1))
        assert torch.equal(one["host_mlp"][1], read.x.flatten(0, 1)) and one["host_mlp"][0] is host.mlp(HOOKPOINT)
        assert figures["batch_tokens"] == 512
    assert [figures["reads_output"] for figures in found] == [False, True, False]
    assert [figures["student"]["params"] for figures in found] == [record.params for record in run.students]
    assert json.loads(json.dumps(finite(found[0]))) == finite(found[0])
    assert all(0 <= share <= 1 for share, _ in said)


def test_no_held_out_text(run: Run, host: Host, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("w1 w2", encoding="utf-8")
    with pytest.raises(TextError):
        cost.measure(subject(run, host, 0, Shared(), Corpus(str(tmp_path))))


def row(milliseconds: float, quartiles: tuple[float, float] | None = None, macs: float = 100.0) -> dict[str, Any]:
    spread = list(quartiles or (milliseconds, milliseconds))
    work = {"params": 1000, "weights": 900, "macs_per_token": macs, "flops_per_token": 2 * macs, "macs_per_token_all_units": 300.0}
    taken = {"milliseconds": milliseconds, "milliseconds_quartiles": spread, "microseconds_per_token": 1e3 * milliseconds / 512}
    return {**work, **taken, "working_mib": 1.0, "peak_mib": 2.0}


def student(kind: str, own: dict[str, Any], paper: dict[str, Any], *, reads_output: bool = False) -> dict[str, Any]:
    figures = {"student": own, "host_mlp": row(2.0, macs=50.0), "reads_output": reads_output, "paper": paper, "batch_tokens": 512}
    around = {"device": "cpu", "threads": 1, "dtype": "float32", "host_dtype": "float32"}
    return {"name": kind, "kind": kind, "k": 4, "recipe": "ours", cost.NAME: {**figures, **around}}


def test_what_is_said_is_what_the_figures_say() -> None:
    apart = {"mxd": row(3.0, (2.9, 3.1)), "transcoder": row(4.0, (3.9, 4.1))}
    (section,) = cost_show.show([student("mxd", row(6.0), apart), student("topk-sae", row(6.0), apart, reads_output=True)])
    said = " ".join(section.words)
    assert "MxD: 2.00 times the multiply-adds of the host's MLP, 1.00 times its parameters, 3.00 times its time in place." in said
    assert "2.00 times the multiply-adds of the host's MLP, on top of the MLP, which still runs" in said
    assert "4.00 times its time in place" in said  # the SAE's 6 ms and the MLP's own 2
    assert "0.750 times the time of the transcoder here (0.957 published)." in said
    overlapping = {"mxd": row(3.0, (2.0, 4.0)), "transcoder": row(4.0, (3.9, 4.1))}
    (section,) = cost_show.show([student("mxd", row(6.0), overlapping)])
    assert "no difference is shown" in " ".join(section.words)


def test_the_papers_values_stand_beside_ours() -> None:
    paper = {"mxd": row(3.0), "transcoder": row(4.0)}
    (section,) = cost_show.show([student("mxd", row(6.0), paper)])
    ours, theirs = section.tables[1].rows
    assert ("1.394" in ours and "386.5" in ours) and ("1.457" in theirs and "389.5" in theirs)
    assert [len(r) for table in section.tables for r in table.rows] == [len(table.heads) for table in section.tables for _ in table.rows]
    assert "host&#x27;s MLP" in sections.html(section)
    assert any("18,874,368" in note for note in section.notes)


def test_the_suite_knows_it_and_missing_is_said() -> None:
    assert suite.part(cost.NAME) is cost.PART
    assert cost_show.show([cast("dict[str, Any]", {"name": "a", cost.NAME: {"missing": "why"}})]) == []
