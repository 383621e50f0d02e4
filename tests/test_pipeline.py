"""From options to a run folder and a report, on a host and texts small enough for seconds."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mxd import pipeline, plan, train
from mxd.checkpoint import Run
from mxd.config import KINDS, EvalConfig, TrainConfig
from mxd.errors import ConfigError, HostError, LayerError, MxdError, RunError, TextError
from mxd.host import Host
from mxd.train import Student

from .small import save_host, save_texts


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Options of a run that takes a second."""
    folder = tmp_path_factory.mktemp("small")
    return TrainConfig(
        out=folder / "run",
        host=str(save_host(folder / "host", layers=3)),
        text=(str(save_texts(folder / "texts", number=160)),),
        layers=("1",),
        kinds=("mxd", "transcoder"),
        k=(2,),
        budget="16x",
        tokens=4096,
        tokens_per_step=256,
        buffer_tokens=1024,
        tokens_per_sequence=32,
        device="cpu",
        log_every_steps=4,
        warmup_steps=2,
    )


def test_one_pass_trains_every_kind_k_layer_and_recipe(small: TrainConfig, tmp_path: Path) -> None:
    config = replace(small, out=tmp_path / "run", kinds=KINDS, k=(2, 3), layers=("0", "layers.2.mlp"), recipe=("paper", "ours"))
    run = train(config, quiet=True)
    names = {s.name for s in run.students}
    assert len(names) == len(run.students) == 2 * 2 * (5 * 2 + 1)
    assert {"mxd-k3-ours@layers.2.mlp", "dense-paper@layers.0.mlp", "topk-sae-k2-ours@layers.0.mlp"} <= names
    assert all(s.tokens_trained == 4096 and s.steps == 16 and s.stopped is None for s in run.students)
    budget = run.students[0].params
    assert all(0.9 < s.params / budget <= 1.1 for s in run.students if s.kind != "dense")
    assert run.info["finished"] and run.info["train_tokens"] == 4096
    assert run.info["config"]["kinds"] == list(KINDS) and run.info["host"]["fingerprint"]
    for record in run.students:
        assert run.load(record.name).describe()["kind"] == record.kind


def test_the_same_seed_gives_the_same_bits_in_any_company(small: TrainConfig, tmp_path: Path) -> None:
    first = train(replace(small, out=tmp_path / "a"), quiet=True).load("mxd-k2")
    company = replace(small, out=tmp_path / "b", kinds=("dense", "mxd", "topk-sae"), k=(2, 4))
    second = train(company, quiet=True).load("mxd-k2")
    other = train(replace(small, out=tmp_path / "c", seed=1), quiet=True).load("mxd-k2")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.get_parameter("G"), other.get_parameter("G"))


@pytest.mark.parametrize(
    "change",
    [
        {"passes": 2},
        {"lr": 1e-2},
        {"warmup_steps": 9},
        {"schedule": "constant"},
        {"loss": "squared"},
        {"random_k": True},
        {"recipe": ("paper",)},
        {"recipe": ("host-encoder",)},
        {"budget": "20x"},
        {"tokens_per_step": 128},
        {"buffer_tokens": 2048},
        {"tokens": 2048},
        {"tokens_per_sequence": 16},
        {"layers": ("2",)},
        {"k": (3,)},
    ],
)
def test_each_option_changes_the_result(small: TrainConfig, change: dict[str, Any], tmp_path: Path) -> None:
    def weights(config: TrainConfig) -> torch.Tensor:
        run = train(replace(config, out=tmp_path / str(len(list(tmp_path.iterdir()))), kinds=("mxd",)), quiet=True)
        return run.load(run.students[0].name).get_parameter("G")

    before, after = weights(small), weights(replace(small, **change))
    assert before.shape != after.shape or not torch.equal(before, after)


def test_metrics_have_a_row_per_logged_step_and_student_and_the_routing(small: TrainConfig, tmp_path: Path) -> None:
    run = train(replace(small, out=tmp_path / "run", probe_every_steps=8), quiet=True)
    rows = run.metrics()
    logged = [(row["student"], row["step"]) for row in rows if "loss" in row]
    assert logged == [(name, step) for step in (1, 4, 8, 12, 16) for name in ("mxd-k2", "transcoder-k2")]
    probes = [row for row in rows if "probe" in row]
    assert [row["step"] for row in probes if row["student"] == "mxd-k2"] == [1, 8, 16]
    assert {"fvu", "fvu_mean_a", "fvu_best_constant", "id", "modulation_cv"} <= set(probes[0]["probe"])


def test_training_and_evaluating_end_to_end(small: TrainConfig, tmp_path: Path) -> None:
    run = train(replace(small, out=tmp_path / "run", kinds=KINDS, recipe=("host-encoder",)), quiet=True)
    report = pipeline.evaluate(run, EvalConfig(sequences=40, fit_tokens=1024, bootstrap=50, permutations=2), quiet=True)
    on_disk = json.loads((run.path / "report.json").read_text())
    assert on_disk == json.loads(json.dumps(report))
    for name in ("report.md", "report.html", "frontier.svg"):
        assert (run.path / name).stat().st_size > 500
    assert [s["kind"] for s in report["students"]] == list(KINDS)
    for student in report["students"]:
        assert math.isclose(student["ce"] - report["base_ce"], student["excess_ce"], abs_tol=1e-4)


def test_interrupting_saves_what_there_is_and_says_how_to_go_on(
    small: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Student.step

    def interrupted(self: Student, batch: Any) -> None:
        if self.steps == 5:
            raise KeyboardInterrupt
        real(self, batch)

    monkeypatch.setattr(Student, "step", interrupted)
    config = replace(small, out=tmp_path / "run")
    with pytest.raises(KeyboardInterrupt, match=r"stopped at step 5 of 16; .*next: mxd eval .*--overwrite"):
        train(config, quiet=True)
    run = Run.open(tmp_path / "run")
    assert not run.info["finished"] and [s.steps for s in run.students] == [5, 5]
    assert run.load("mxd-k2").n_units > 0
    monkeypatch.undo()
    with pytest.raises(RunError, match="interrupted run"):
        train(config, quiet=True)
    assert train(replace(config, overwrite=True), quiet=True).info["finished"]


def test_interrupting_before_the_first_step_leaves_nothing(small: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Student, "start", stop)
    with pytest.raises(KeyboardInterrupt, match="nothing was written"):
        train(replace(small, out=tmp_path / "run"), quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_crash_while_replacing_a_run_brings_the_old_one_back(small: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(small, out=tmp_path / "run")
    before = train(config, quiet=True).load("mxd-k2").get_parameter("G")

    def fail(*_: Any) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(Student, "step", fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        train(replace(config, overwrite=True), quiet=True)
    assert torch.equal(Run.open(tmp_path / "run").load("mxd-k2").get_parameter("G"), before)


def test_a_crash_in_the_middle_saves_what_there_is(small: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Student.step

    def fail(self: Student, batch: Any) -> None:
        if self.steps == 7:
            raise RuntimeError("out of luck")
        real(self, batch)

    monkeypatch.setattr(Student, "step", fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        train(replace(small, out=tmp_path / "run"), quiet=True)
    assert [s.steps for s in Run.open(tmp_path / "run").students] == [7, 7]


def test_a_student_that_diverges_is_recorded_and_the_others_finish(
    small: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Student.start

    def poisoned(self: Student, *args: Any) -> None:
        real(self, *args)
        if self.spec.kind == "transcoder":
            with torch.no_grad():
                self.layer.get_parameter("b_dec").fill_(math.nan)

    monkeypatch.setattr(Student, "start", poisoned)
    run = train(replace(small, out=tmp_path / "run"), quiet=True)
    by_name = {s.name: s for s in run.students}
    assert by_name["transcoder-k2"].stopped == "the loss became nan at step 1"
    assert by_name["mxd-k2"].stopped is None and by_name["mxd-k2"].steps == 16


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"kinds": ("mdx",)}, ConfigError, r"expected mxd"),
        ({"kinds": ("mxd", "mxd")}, ConfigError, "--kinds needs"),
        ({"k": ()}, ConfigError, "--k needs one or more"),
        ({"k": (0,)}, ConfigError, "--k must be at least 1"),
        ({"k": (10_000,)}, LayerError, r"k must be between"),
        ({"budget": "100"}, LayerError, "too small for one unit"),
        ({"budget": "lots"}, ConfigError, "--budget is not understood"),
        ({"recipe": ("hers",)}, ConfigError, "unknown --recipe"),
        ({"loss": "mse"}, ConfigError, "unknown --loss"),
        ({"schedule": "cosine"}, ConfigError, "unknown --schedule"),
        ({"sizes": "big"}, ConfigError, "matched or published"),
        ({"sizes": "published"}, ConfigError, "for the paper's hosts"),
        ({"tokens": -5}, ConfigError, "--tokens must be at least 1"),
        ({"tokens": 100}, ConfigError, "one step needs more tokens"),
        ({"tokens_per_sequence": 1}, ConfigError, "--tokens-per-sequence"),
        ({"tokens": 10_000_000}, TextError, r"expected 10,000,000 tokens .* got \d\d\d,\d\d\d in"),
        ({"layers": ("7",)}, HostError, "no MLP at 7"),
        ({"layers": ("1", "layers.1.mlp")}, ConfigError, "names an MLP twice"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_written(
    small: TrainConfig, change: dict[str, Any], error: type[MxdError], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        train(replace(small, out=tmp_path / "run", **change), quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_known_before_the_work(small: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(ConfigError, match="too full for this run"):
        train(replace(small, out=tmp_path / "run"), quiet=True)


def test_without_validation_text_the_run_goes_on_without_probes(
    small: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(*_: Any, **__: Any) -> Iterator[Any]:
        raise TextError("too little validation text")

    monkeypatch.setattr(pipeline.Corpus, "sample", none)
    run = train(replace(small, out=tmp_path / "run"), quiet=True)
    assert "no validation text" in caplog.text
    assert not any("probe" in row for row in run.metrics())


def test_the_published_sizes_are_planned_to_the_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    from mxd import recipes
    from mxd.sites import MLPSite

    for config in recipes.paper_layers():
        key = recipes.published_host(config.host)
        assert key is not None
        paper = recipes.published()["sizes"][key]
        glu = paper.get("mxd_encoder") == "glu"
        site = MLPSite("layers.8.mlp", 8, paper["d"], paper["d"], paper["mxd_hidden"], "gelu", glu, "layers.8.mlp")
        for spec in plan.plan(config, [site]):
            params = plan.candidate(spec.kind, spec.sizes).budget()
            assert params == paper[f"{spec.kind.replace('-', '_')}_params"]


def test_a_host_read_by_the_run_is_the_one_evaluated(small: TrainConfig, tmp_path: Path) -> None:
    run = train(replace(small, out=tmp_path / "run"), quiet=True)
    host, corpus = pipeline.reopen(run, device="cpu")
    assert isinstance(host, Host) and host.name == small.host
    assert corpus.describe()["sources"][0]["name"] == small.text[0]
