"""A whole evaluation on a tiny host: files, names, intervals, splits, and what goes wrong."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mxd.checkpoint import Run
from mxd.config import EvalConfig
from mxd.errors import ConfigError, RunError, TextError
from mxd.evals import evaluate as module
from mxd.evals.evaluate import evaluate
from mxd.host import Host
from mxd.text import Corpus

from .hosts import LENGTH, tiny_llama, write_run, write_text

SMALL = EvalConfig(sequences=30, fit_tokens=512, bootstrap=100, permutations=2)
PER_STUDENT = {
    "kind", "k", "d_in", "d_out", "n_units", "params", "tokens_trained", "ce", "excess_ce", "excess_ce_ci95", "ce_recovered", "kl",
    "top1_agreement", "nmse", "fvu", "l0", "dead_fraction", "max_firing_frequency", "train_seconds", "tokens_per_second", "seed", "recipe",
}  # fmt: skip
PER_RUN = {
    "host", "layer", "hookpoint", "base_ce", "zero_ablation_ce", "mean_ablation_ce", "eval_tokens", "train_tokens", "seed", "versions",
}  # fmt: skip


class World:
    """Host, text and one evaluated run."""

    def __init__(self, folder: Path) -> None:
        self.host: Host = tiny_llama()
        self.text = write_text(folder / "text")
        self.corpus = Corpus(str(self.text))
        self.run = write_run(folder / "run", self.text)
        self.told: list[tuple[float, str]] = []
        self.report = evaluate(self.run, self.host, self.corpus, SMALL, lambda done, note: self.told.append((done, note)))

    def student(self, kind: str) -> dict[str, Any]:
        return next(s for s in self.report["students"] if s["kind"] == kind)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def _refuse(text: str) -> None:
    raise AssertionError(f"{text} is not JSON")


def test_report_has_every_name_and_only_numbers_that_json_knows(world: World) -> None:
    on_disk = json.loads((world.run.path / "report.json").read_text(encoding="utf-8"), parse_constant=_refuse)
    assert {key: value for key, value in on_disk.items() if key not in ("files", "sha256")} == world.report
    assert set(world.report) >= PER_RUN
    assert [s["kind"] for s in world.report["students"]] == [
        "mxd",
        "mxd-pk",
        "cp-mumoe",
        "mov",
        "transcoder",
        "skip-transcoder",
        "topk-sae",
        "dense",
        "additive",
    ]
    for student in world.report["students"]:
        assert set(student) >= PER_STUDENT
        low, high = student["excess_ce_ci95"]
        assert low < student["excess_ce"] < high
        assert sum(student["excess_ce_sums"]) / sum(world.report["document_sequences"]) == pytest.approx(student["excess_ce"], rel=1e-4)
        assert len(student["excess_ce_sums"]) == len(world.report["document_sequences"]) == world.report["eval_documents"]
        assert student["fvu_ci95"][0] < student["fvu"] < student["fvu_ci95"][1]
        assert ("routing" in student) == (student["kind"] in ("mxd", "mxd-pk"))
    assert {"n_r", "g_r", "id"} <= set(world.student("mxd")["routing"])
    assert world.report["eval_tokens"] == 30 * LENGTH and world.report["layer"] == 1 and world.report["hookpoint"] == "layers.1.mlp"


def test_the_files_are_there_and_progress_reached_the_end(world: World) -> None:
    names = {p.name for p in world.run.path.iterdir() if p.is_file()}
    assert {"report.json", "report.md", "report.html", "frontier.svg"} <= names
    assert not [n for n in names if n.startswith(".")]
    assert world.told[-1][0] == 1.0 and [d for d, _ in world.told] == sorted(d for d, _ in world.told)


def test_figures_agree_with_each_other_and_with_the_host(world: World) -> None:
    block = world.corpus.sample(world.host.tokenizer, "test", sequences=30, tokens_per_sequence=LENGTH, seed=0)
    logits = world.host.logits(block.ids)[:, :-1].double().log_softmax(-1)
    base = float(-logits.gather(-1, block.ids[:, 1:, None]).mean())
    report = world.report
    assert report["base_ce"] == pytest.approx(base, rel=1e-6)
    for s in report["students"]:
        assert s["ce"] - report["base_ce"] == pytest.approx(s["excess_ce"], abs=1e-9)
        expected = (report["zero_ablation_ce"] - s["ce"]) / (report["zero_ablation_ce"] - report["base_ce"])
        assert s["ce_recovered"] == pytest.approx(expected, rel=1e-9)
    routing, dense = world.student("mxd")["routing"], world.student("dense")
    assert routing["fvu_dense"] == pytest.approx(dense["fvu"], rel=1e-5)
    assert routing["fvu"] == pytest.approx(world.student("mxd")["fvu"], rel=1e-4)
    assert dense["l0"] is None and world.student("mxd")["l0"] <= 4


def test_mean_ablation_uses_the_mean_over_training_text(world: World) -> None:
    block = world.corpus.sample(world.host.tokenizer, "train", sequences=512 // LENGTH, tokens_per_sequence=LENGTH, seed=0)
    mean = world.host.read(block.ids, ["layers.1.mlp"])["layers.1.mlp"].y.mean((0, 1))
    held_out = world.corpus.sample(world.host.tokenizer, "test", sequences=30, tokens_per_sequence=LENGTH, seed=0).ids

    class Mean(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return mean.expand(*x.shape[:-1], -1)

    with world.host.replace({"layers.1.mlp": Mean()}):
        logits = world.host.logits(held_out)[:, :-1].double().log_softmax(-1)
    expected = float(-logits.gather(-1, held_out[:, 1:, None]).mean())
    assert world.report["mean_ablation_ce"] == pytest.approx(expected, rel=1e-6)
    assert world.report["mean_ablation_ce"] != pytest.approx(world.report["zero_ablation_ce"], rel=1e-4)


def test_validation_split_leaves_the_test_files_alone_and_fits_on_training_text(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p.name: p.read_bytes() for p in world.run.path.glob("report.*")}
    asked: list[str] = []
    sample = Corpus.sample
    monkeypatch.setattr(Corpus, "sample", lambda self, t, split, **rest: asked.append(split) or sample(self, t, split, **rest))
    config = EvalConfig(sequences=20, fit_tokens=256, bootstrap=50, permutations=2, split="validation", students=("mxd-k4",))
    found = evaluate(world.run, world.host, world.corpus, config)
    assert sorted(asked) == ["train", "validation"]
    assert {p.name: p.read_bytes() for p in world.run.path.glob("report.*")} == before
    assert (world.run.path / "report-validation.json").is_file() and (world.run.path / "frontier-validation.svg").is_file()
    assert found["split"] == "validation" and [s["name"] for s in found["students"]] == ["mxd-k4"]
    assert found["students"][0]["routing"]["g_r"]["value"] is not None  # the dense control is found though not asked for


def test_several_hookpoints_and_small_memory_give_the_same_figures(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hookpoints = ("layers.0.mlp", "layers.1.mlp")
    run = write_run(tmp_path / "run", world.text, kinds=("mxd", "transcoder"), hookpoints=hookpoints)
    monkeypatch.setattr(module, "WEIGHT_BYTES", 1)
    told: list[float] = []
    found = evaluate(run, world.host, world.corpus, SMALL, lambda done, _note: told.append(done))
    assert told == sorted(told) and told[-1] == 1.0
    assert found["layer"] == [0, 1] and found["hookpoint"] == list(hookpoints)
    assert set(found["zero_ablation_ce"]) == set(hookpoints)
    assert found["zero_ablation_ce"]["layers.1.mlp"] == world.report["zero_ablation_ce"]
    ours = next(s for s in found["students"] if s["name"] == "transcoder-k4@layers.1.mlp")
    theirs = world.student("transcoder")
    for key in ("ce", "kl", "fvu", "excess_ce_ci95"):
        assert ours[key] == theirs[key], key
    page = (run.path / "report.html").read_text(encoding="utf-8")
    assert "<h2>layers.0.mlp</h2>" in page and "<h2>layers.1.mlp</h2>" in page
    assert found["students"][0]["routing"]["experts_matter"] is None


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"split": "train"}, ConfigError, "test or validation"),
        ({"sequences": 1}, ConfigError, "--sequences"),
        ({"bootstrap": 0}, ConfigError, "--bootstrap"),
        ({"students": ("mxd-k5",)}, RunError, "mxd-k4"),
        ({"sequences": 100_000}, TextError, "100"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(world: World, change: dict[str, Any], error: type[Exception], words: str) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in world.run.path.iterdir()}
    with pytest.raises(error, match=words) as caught:
        evaluate(world.run, world.host, world.corpus, dataclasses.replace(SMALL, **change))
    assert "\n" not in str(caught.value)
    assert {p.name: p.stat().st_mtime_ns for p in world.run.path.iterdir()} == before


def test_an_undefined_figure_becomes_null(world: World, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", world.text, kinds=("transcoder",))
    for path in run.path.rglob("sae.safetensors"):
        assert path.stat().st_size > 0
    layer = run.load("transcoder-k4")
    with torch.no_grad():
        layer.b_dec.fill_(math.nan)  # type: ignore[operator]
    from mxd.checkpoint import save_layer

    save_layer(run.path / run.students[0].folder, layer, run.students[0])
    found = evaluate(Run.open(run.path), world.host, world.corpus, SMALL)
    student = found["students"][0]
    assert student["fvu"] is None and student["excess_ce"] is None and student["excess_ce_ci95"] == [None, None]
    json.loads((run.path / "report.json").read_text(encoding="utf-8"), parse_constant=_refuse)
