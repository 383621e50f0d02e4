"""From options to a run folder and a report, on a host and texts small enough for seconds."""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mxd import ops, pipeline, plan, train
from mxd.cache import Cache, CacheWriter
from mxd.checkpoint import Run
from mxd.config import KINDS, EvalConfig, HarvestConfig, TrainConfig
from mxd.errors import ConfigError, HostError, LayerError, MxdError, RunError, TextError, TooLittleText
from mxd.feed import HostFeed
from mxd.host import Host
from mxd.pipeline import harvest
from mxd.train import Student
from tests.small import small_run


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Options of a run that takes a second."""
    return small_run(
        tmp_path_factory.mktemp("small"), layers_of_host=3, kinds=("mxd", "transcoder"), budget="16x", log_every_steps=4, warmup_steps=2
    )


def test_one_pass_trains_every_kind_k_layer_and_recipe(small: TrainConfig, tmp_path: Path) -> None:
    config = replace(small, out=tmp_path / "run", kinds=KINDS, k=(2, 3), layers=("0", "layers.2.mlp"), recipe=("paper", "ours"))
    run = train(config, quiet=True)
    names = {s.name for s in run.students}
    assert len(names) == len(run.students) == 2 * 2 * (8 * 2 + 1)
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
        {"precision": "bf16"},
        {"aux_weight": 0.5, "dead_after_tokens": 256},
        {"recipe": ("ours+width=0.5",)},
        {"recipe": ("ours+phi=relu",)},
        {"recipe": ("ours+encoder=mlp",)},
        {"recipe": ("ours+random-k",)},
        {"recipe": ("ours+l1=0.1",)},
    ],
)
def test_each_option_changes_the_result(small: TrainConfig, change: dict[str, Any], tmp_path: Path) -> None:
    def weights(config: TrainConfig) -> torch.Tensor:
        run = train(replace(config, out=tmp_path / str(len(list(tmp_path.iterdir()))), kinds=("mxd",)), quiet=True)
        return run.load(run.students[0].name).get_parameter("G")

    before, after = weights(small), weights(replace(small, **change))
    assert before.shape != after.shape or not torch.equal(before, after)


@pytest.mark.parametrize(
    "change", [{"precision": "tf32"}, {"gate": "screened"}, {"scores_mib": 0.5}, {"recompute": True}, {"deterministic": True}]
)
def test_the_settings_of_the_ops_hold_while_training_and_no_longer(
    small: TrainConfig, change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[ops.Settings] = []
    step = Student.step
    monkeypatch.setattr(Student, "step", lambda self, batch: (seen.append(ops.current()), step(self, batch))[1])
    before = ops.current()
    run = train(replace(small, out=tmp_path / "run", **change), quiet=True)
    (name, value), *_ = change.items()
    assert seen and all(getattr(settings, name) == value for settings in seen)
    assert ops.current() is before and getattr(before, name) != value
    assert run.info["config"][name] == value


def test_the_screened_gate_and_small_slices_train_the_same_layer(small: TrainConfig, tmp_path: Path) -> None:
    def final_loss(name: str, **change: Any) -> float:
        run = train(replace(small, **{"out": tmp_path / name, "kinds": ("transcoder",), **change}), quiet=True)
        return [row["loss"] for row in run.metrics() if "loss" in row][-1]

    plain = final_loss("plain")
    assert final_loss("slices", scores_mib=0.01) == pytest.approx(plain, rel=1e-4)
    assert final_loss("screened", gate="screened") == pytest.approx(plain, rel=1e-4)
    assert final_loss("recomputed", kinds=("mxd",), recompute=True) == pytest.approx(final_loss("mxd", kinds=("mxd",)), rel=1e-4)


def test_settings_of_the_auxiliary_loss_reach_every_student(small: TrainConfig) -> None:
    site = Host.load(small.host, device="cpu").site(1)
    spec = plan.plan(small, [site])[0]
    assert (spec.aux_weight, spec.aux_k, spec.dead_after_tokens) == (0.0, site.d_in // 2, 409)
    long = replace(small, tokens=10**9, aux_weight=0.25, aux_k=7)
    spec = plan.plan(long, [site])[0]
    assert (spec.aux_weight, spec.aux_k, spec.dead_after_tokens) == (0.25, 7, 10_000_000)
    assert plan.plan(replace(long, dead_after_tokens=5), [site])[0].dead_after_tokens == 5


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
    assert {key: value for key, value in on_disk.items() if key not in ("sha256", "files")} == json.loads(json.dumps(report))
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
    with pytest.raises(KeyboardInterrupt, match=r"stopped at step 5 of 16; .*next: mxd train --resume .*run, or mxd eval"):
        train(config, quiet=True)
    run = Run.open(tmp_path / "run")
    assert not run.info["finished"] and [s.steps for s in run.students] == [5, 5]
    assert run.load("mxd-k2").n_units > 0
    monkeypatch.undo()
    with pytest.raises(RunError, match="interrupted run"):
        train(replace(config, lr=1e-3), quiet=True)
    assert train(replace(config, lr=1e-3, overwrite=True), quiet=True).info["finished"]


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
        ({"recipe": ("ours", "ours+rank=0.5")}, ConfigError, r"--recipe ours\+rank=0.5: \+rank=0.5 has no effect on any of --kinds"),
        ({"sizes": "published", "host": "gpt2", "recipe": ("ours+width=0.5",)}, ConfigError, r"settles what \+width=0.5 would"),
        ({"loss": "mse"}, ConfigError, "unknown --loss"),
        ({"schedule": "cosine"}, ConfigError, "unknown --schedule"),
        ({"sizes": "big"}, ConfigError, "matched or published"),
        ({"sizes": "published"}, ConfigError, "for the paper's hosts"),
        ({"tokens": -5}, ConfigError, "--tokens must be at least 1"),
        ({"tokens": 100}, ConfigError, "one step needs more tokens"),
        ({"aux_weight": -1.0}, ConfigError, "--aux-weight must be at least 0"),
        ({"aux_k": 0}, ConfigError, "--aux-k must be at least 1"),
        ({"dead_after_tokens": 0}, ConfigError, "--dead-after-tokens must be at least 1"),
        ({"precision": "fp8"}, ConfigError, r"unknown precision \| expected .* \| got fp8"),
        ({"gate": "half"}, ConfigError, "unknown gate"),
        ({"scores_mib": -1.0}, ConfigError, "scores_mib must be positive"),
        ({"sizes": "published", "kinds": ("mxd-pk",), "host": "gpt2"}, ConfigError, "no --sizes published for mxd-pk"),
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
        raise TooLittleText("too little validation text")

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


# training from cached activations


def harvesting(small: TrainConfig, **changes: Any) -> HarvestConfig:
    """What harvests the activations that `small` reads, in shards of 1,024 tokens."""
    config = HarvestConfig(
        out=small.out.parent / "activations",
        host=small.host,
        device="cpu",
        text=small.text,
        tokens_per_sequence=32,
        layers=("1", "2"),
        tokens=4096,
        tokens_per_shard=1024,
    )
    return replace(config, **changes)


@pytest.fixture(scope="module")
def cached(small: TrainConfig) -> Cache:
    return harvest(harvesting(small), quiet=True)


def from_cache(small: TrainConfig, cache: Cache, **changes: Any) -> TrainConfig:
    """`small` without what the cache has settled."""
    return replace(small, host="smollm2", text=("sotu", "wiki-en"), tokens_per_sequence=128, activations=cache.path, layers=(), **changes)


def weight_files(run: Run) -> dict[str, str]:
    """sha256 of every student's weights, by its place in the run folder."""
    files = sorted(run.path.rglob("*.safetensors"))
    return {str(path.relative_to(run.path)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def losses(run: Run) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in run.metrics()]


@pytest.mark.parametrize("change", [{}, {"passes": 2, "tokens": 3000, "buffer_tokens": 2048, "seed": 3}])
def test_training_from_the_cache_gives_the_bits_of_streaming(
    small: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    """Every kind, two layers, recipes with and without the host's encoder; weights, losses and measures of the routing."""
    wanted = replace(small, kinds=KINDS, layers=("1", "2"), recipe=("ours", "host-encoder"), **change)
    streamed = train(replace(wanted, out=tmp_path / "streamed"), quiet=True)
    cache = harvest(harvesting(small, out=tmp_path / "cache", seed=wanted.seed), quiet=True)
    monkeypatch.setattr(Host, "load", lambda *_, **__: pytest.fail("the host was loaded"))
    run = train(replace(from_cache(wanted, cache), out=tmp_path / "run"), quiet=True)
    assert len(run.students) == len(streamed.students) >= 18
    assert weight_files(run) == weight_files(streamed)
    assert losses(run) == losses(streamed)
    assert any("probe" in row for row in losses(run))


def test_a_run_from_the_cache_says_where_it_came_from_and_is_evaluated_in_its_host(
    small: TrainConfig, cached: Cache, tmp_path: Path
) -> None:
    run = train(from_cache(small, cached, out=tmp_path / "run", seed=7, kinds=("transcoder",)), quiet=True)
    streamed = train(replace(small, out=tmp_path / "streamed", kinds=("transcoder",)), quiet=True)
    for name in ("host", "text"):
        assert run.info[name] == streamed.info[name]
    assert run.info["config"]["host"] == small.host and run.info["config"]["tokens_per_sequence"] == 32
    assert run.info["config"]["activations"] == str(cached.path)
    assert run.info["activations"] == {
        "path": str(cached.path),
        "manifest_sha256": hashlib.sha256((cached.path / "manifest.json").read_bytes()).hexdigest(),
        "dtype": "float32",
        "tokens": 4096,
    }
    _, corpus = pipeline.reopen(run, device="cpu")
    assert run.info["seed"] == 7 and corpus.seed == 0, "the order of the text is the harvest's"
    report = pipeline.evaluate(run, EvalConfig(sequences=20, fit_tokens=1024, bootstrap=20, permutations=1), quiet=True)
    assert {s["hookpoint"] for s in report["students"]} == {"layers.1.mlp", "layers.2.mlp"}


def test_the_seed_of_the_training_shuffles_the_cache_anew(small: TrainConfig, cached: Cache, tmp_path: Path) -> None:
    first, second = (train(from_cache(small, cached, out=tmp_path / str(s), kinds=("dense",), seed=s), quiet=True) for s in (0, 1))
    assert weight_files(first).keys() == weight_files(second).keys()
    assert losses(first)[0]["loss"] != losses(second)[0]["loss"]


@pytest.mark.parametrize(("store", "first", "trained"), [("bfloat16", 5e-4, 2e-2), ("float16", 2e-5, 1e-3)])
def test_a_cache_in_sixteen_bits_gives_nearly_the_same_loss(
    small: TrainConfig, cached: Cache, tmp_path: Path, store: str, first: float, trained: float
) -> None:
    rounded = harvest(harvesting(small, out=tmp_path / "cache", store=store), quiet=True)
    runs = [train(from_cache(small, c, out=tmp_path / str(i), kinds=("dense",)), quiet=True) for i, c in enumerate((cached, rounded))]
    assert weight_files(runs[0]) != weight_files(runs[1])
    whole, close = ([row["loss"] for row in run.metrics() if "loss" in row] for run in runs)
    apart = [abs(a - b) / a for a, b in zip(whole, close, strict=True)]
    assert 0 < max(apart[:2]) < first, "before anything is trained, the rounding alone"
    assert max(apart) < trained
    shards = [sum(file.stat().st_size for file in (c.path / "train").rglob("*.safetensors")) for c in (cached, rounded)]
    assert 0.45 < shards[1] / shards[0] < 0.55


@pytest.mark.parametrize("layers", [("2",), ("layers.2.mlp",), ("2", "1")])
def test_some_of_the_cached_layers(small: TrainConfig, cached: Cache, tmp_path: Path, layers: tuple[str, ...]) -> None:
    run = train(replace(from_cache(small, cached, out=tmp_path / "run", kinds=("dense",)), layers=layers), quiet=True)
    expected = {f"layers.{layer}.mlp" if layer.isdigit() else layer for layer in layers}
    assert {s.hookpoint for s in run.students} == expected
    assert run.info["config"]["layers"] == list(layers)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"host": "gpt2"}, r"--host contradicts --activations .* \| expected .*host \| got gpt2 \| next: leave it out, or harvest again"),
        ({"text": ("news",)}, r"--text contradicts .* \| got news"),
        ({"tokens_per_sequence": 64}, r"--tokens-per-sequence contradicts .* expected 32 \| got 64"),
        ({"sequences_per_read": 4}, r"--sequences-per-read contradicts .* expected 8 \| got 4"),
        ({"dtype": "bfloat16"}, r"--dtype contradicts .* expected float32 \| got bfloat16"),
        ({"revision": "main"}, r"--revision contradicts .* expected None \| got main"),
        ({"text_column": "body"}, r"--text-column contradicts .* expected text \| got body"),
        ({"layers": ("0",)}, r"holds no activations of 0 \| expected layers.1.mlp, layers.2.mlp \| got 0"),
        ({"layers": ("1", "layers.1.mlp")}, "--layers names an MLP twice"),
        ({"tokens": 4097}, r"holds too few tokens \| expected --tokens of at most 4,096 \| got 4,097 \| next: lower --tokens"),
        ({"device": "cuda:63"}, "this machine has no device cuda:63"),
    ],
)
def test_options_that_contradict_the_cache(small: TrainConfig, cached: Cache, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        train(replace(from_cache(small, cached, out=tmp_path / "run"), **change), quiet=True)
    assert not (tmp_path / "run").exists()


def test_options_that_agree_with_the_cache_may_be_given(small: TrainConfig, cached: Cache, tmp_path: Path) -> None:
    config = replace(small, out=tmp_path / "run", kinds=("dense",), activations=cached.path)
    assert train(config, quiet=True).info["finished"]


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_damaged_shard_ends_the_run_and_is_named(small: TrainConfig, cached: Cache, tmp_path: Path, damage: str) -> None:
    import shutil

    path = Path(shutil.copytree(cached.path, tmp_path / "cache"))
    shard = path / "train" / "layers.2.mlp" / "00001.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] if damage == "truncate" else data[:-1] + bytes([data[-1] ^ 1]))
    config = from_cache(small, Cache.open(path), out=tmp_path / "run", kinds=("dense",))
    with pytest.raises(RunError, match=r"layers\.2\.mlp/00001\.safetensors (was changed|is truncated)"):
        train(config, quiet=True)
    assert not (tmp_path / "run").exists(), "the first buffer holds that shard: nothing was trained"
    train(replace(config, layers=("1",)), quiet=True)


@pytest.mark.parametrize("cause", [KeyboardInterrupt, RuntimeError])
def test_no_thread_outlives_a_training_that_is_stopped(
    small: TrainConfig, cached: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cause: type[BaseException]
) -> None:
    real = Student.step
    reading: list[str] = []

    def stop(self: Student, batch: Any) -> None:
        reading.extend(thread.name for thread in threading.enumerate())
        if self.steps == 3:
            raise cause
        real(self, batch)

    monkeypatch.setattr(Student, "step", stop)
    with pytest.raises(cause):
        train(from_cache(small, cached, out=tmp_path / "run", kinds=("dense",)), quiet=True)
    assert "mxd-read-ahead" in reading, "the cache is read in a thread"
    assert "mxd-read-ahead" not in [thread.name for thread in threading.enumerate()]


def test_the_harvest_is_what_the_host_reads(small: TrainConfig, cached: Cache) -> None:
    assert cached.finished and cached.tokens == 4096
    manifest = json.loads((cached.path / "manifest.json").read_text())
    assert manifest["config"]["text"] == list(small.text) and manifest["host"]["fingerprint"]
    assert manifest["text"]["split_rule"] and manifest["split"] == "train" and manifest["versions"]["torch"] == torch.__version__
    assert [len(entry["train"]) for entry in manifest["hookpoints"].values()] == [4, 4]
    feed = HostFeed(replace(small, layers=("1", "2")))
    feed.prepare()
    for name, weights in (("layers.1.mlp", cached.weights("layers.1.mlp")), ("layers.2.mlp", cached.weights("layers.2.mlp"))):
        for got, own in zip(weights, feed.host.weights(name), strict=True):
            assert (got is None and own is None) or (got is not None and own is not None and torch.equal(got, own))
    held_out, own = cached.validation(["layers.2.mlp"]), feed.held_out()
    assert held_out is not None and own is not None
    assert all(torch.equal(a, b) for a, b in zip(held_out["layers.2.mlp"], own["layers.2.mlp"], strict=True))


def test_an_interrupted_harvest_keeps_whole_shards_to_train_from(
    small: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = CacheWriter.add

    def interrupted(self: CacheWriter, batches: Any) -> None:
        if self.kept == 2048:
            raise KeyboardInterrupt
        real(self, batches)

    monkeypatch.setattr(CacheWriter, "add", interrupted)
    out = tmp_path / "cache"
    with pytest.raises(
        KeyboardInterrupt, match=r"stopped; 2,048 tokens in whole shards are kept \| next: mxd train --activations .* --tokens 2048"
    ):
        harvest(harvesting(small, out=out), quiet=True)
    monkeypatch.undo()
    cache = Cache.open(out)
    assert not cache.finished and cache.tokens == 2048
    with pytest.raises(ConfigError, match=r"too few tokens \(its harvest was interrupted\) \| expected --tokens of at most 2,048"):
        train(from_cache(small, cache, out=tmp_path / "run"), quiet=True)
    run = train(from_cache(small, cache, out=tmp_path / "run", tokens=2048, kinds=("dense",)), quiet=True)
    streamed = train(replace(small, layers=("1", "2"), tokens=2048, kinds=("dense",), out=tmp_path / "streamed"), quiet=True)
    assert weight_files(run) == weight_files(streamed)
    with pytest.raises(RunError, match="holds interrupted cached activations"):
        harvest(harvesting(small, out=out), quiet=True)
    assert harvest(harvesting(small, out=out, overwrite=True), quiet=True).finished


@pytest.mark.parametrize("cause", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_harvest_stopped_before_its_first_shard_leaves_nothing(
    small: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cause: BaseException
) -> None:
    def fail(*_: Any) -> None:
        raise cause

    monkeypatch.setattr(CacheWriter, "add", fail)
    with pytest.raises(type(cause), match=r"nothing was kept \| next: a smaller --tokens-per-shard|No space left"):
        harvest(harvesting(small, out=tmp_path / "cache"), quiet=True)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"store": "float8"}, ConfigError, "unknown --store | expected float32 or float16, bfloat16 | got float8"),
        ({"tokens_per_shard": 0}, ConfigError, "--tokens-per-shard must be at least 1"),
        ({"sequences_per_read": 0}, ConfigError, "--sequences-per-read must be at least 1"),
        ({"layers": ()}, ConfigError, "--layers needs one or more different values"),
        ({"layers": ("7",)}, HostError, "no MLP at 7"),
        ({"layers": ("1", "layers.1.mlp")}, ConfigError, "names an MLP twice"),
        ({"tokens_per_sequence": 1}, ConfigError, "--tokens-per-sequence must be at least 2"),
        ({"tokens": 10_000_000}, TextError, "too little training text"),
        ({"text": ()}, ConfigError, "--text needs one or more"),
    ],
)
def test_a_harvest_that_cannot_work_is_refused_before_anything_is_written(
    small: TrainConfig, tmp_path: Path, change: dict[str, Any], error: type[MxdError], words: str
) -> None:
    with pytest.raises(error) as caught:
        harvest(replace(harvesting(small, out=tmp_path / "cache"), **change), quiet=True)
    assert str(caught.value).startswith(words.split(" | ")[0]) or words in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_the_disk_is_estimated_and_a_full_one_refused(
    small: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Usage:
        free = 1000

    config = harvesting(small, out=tmp_path / "cache", tokens=5000, store="bfloat16")
    with monkeypatch.context() as patch:
        patch.setattr(plan.shutil, "disk_usage", lambda _: Usage)
        with pytest.raises(
            ConfigError, match=r"too full for these activations \| expected 1 MiB free \| .* lower --tokens, or --store bfloat16"
        ):
            harvest(config)
    assert f"mxd: {tmp_path / 'cache'} will take 1 MiB: 5,120 tokens x (16 + 16) + (16 + 16) numbers, bfloat16" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()
    harvest(config, quiet=True)
    Usage.free = 1000
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: Usage)
    harvest(replace(config, overwrite=True, tokens=2048), quiet=True)  # what is replaced makes room


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"tokens_per_sequence": 16},
        {"sequences_per_read": 4},
        {"store": "float16"},
        {"tokens_per_shard": 2048},
        {"tokens": 2048},
        {"layers": ("1",)},
    ],
)
def test_each_option_of_a_harvest_changes_it(small: TrainConfig, cached: Cache, tmp_path: Path, change: dict[str, Any]) -> None:
    other = harvest(replace(harvesting(small, out=tmp_path / "cache"), **change), quiet=True)
    stored, before = (
        sorted((p.name, p.stat().st_size, p.read_bytes()) for p in (c.path / "train").rglob("*.*") if p.is_file()) for c in (other, cached)
    )
    assert stored != before or (list(change) == ["sequences_per_read"] and other.tokens_per_read != cached.tokens_per_read)


def test_a_text_without_validation_documents_is_harvested_without_them(
    small: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(*_: Any, **__: Any) -> Iterator[Any]:
        raise TooLittleText("too little validation text")

    monkeypatch.setattr(pipeline.Corpus, "sample", none)
    cache = harvest(harvesting(small, out=tmp_path / "cache"), quiet=True)
    assert cache.validation(["layers.1.mlp"]) is None
    caplog.clear()
    run = train(from_cache(small, cache, out=tmp_path / "run", kinds=("dense",)), quiet=True)
    assert "no validation text" in caplog.text
    assert not any("probe" in row for row in run.metrics())


def test_arms_of_a_recipe_train_in_one_pass_at_one_budget(small: TrainConfig, tmp_path: Path) -> None:
    arms = ("ours", "ours+width=0.25", "ours+phi=relu+encoder=mlp", "ours+rank=0.5", "ours+l1=0.1")
    config = replace(small, out=tmp_path / "run", kinds=("mxd", "cp-mumoe", "mov", "transcoder", "dense"), k=(2, 3), recipe=arms)
    run = train(config, quiet=True)
    layers = {record.name: run.load(record.name) for record in run.students}
    recorded = {record.name: record for record in run.students}
    assert {name for name in layers if name.startswith("transcoder")} == {
        "transcoder-k2-ours",
        "transcoder-k3-ours",
        "transcoder-relu-ours+l1=0.1",
    }
    assert {name for name in layers if name.startswith("dense")} == {f"dense-{arm}" for arm in arms[:3]}
    for kind in ("mxd", "cp-mumoe", "mov"):
        plain = layers[f"{kind}-k2-ours"].config
        assert (plain.d_hidden, plain.activation, plain.glu) == (24, "silu", True)
        assert layers[f"{kind}-k2-ours+width=0.25"].config.d_hidden == 6
        other = layers[f"{kind}-k2-ours+phi=relu+encoder=mlp"].config
        assert (other.activation, other.glu) == ("relu", False)
        free = layers[f"{kind}-relu-ours+l1=0.1"]
        assert free.k == free.n_units and recorded[f"{kind}-relu-ours+l1=0.1"].k == free.n_units
    assert layers["cp-mumoe-k2-ours"].config.rank == 16 and layers["cp-mumoe-k2-ours+rank=0.5"].config.rank == 8
    budget = recorded["transcoder-k2-ours"].params
    assert all(0.9 < record.params / budget <= 1 for record in run.students if record.kind != "dense")


def test_random_k_can_be_asked_for_by_one_arm(small: TrainConfig) -> None:
    config = replace(small, recipe=("ours", "ours+random-k", "ours+l1=0.1"), random_k=False)
    sites = HostFeed(config).sites
    drawn = {spec.name: spec.random_k for spec in plan.plan(config, sites)}
    assert drawn["mxd-k2-ours+random-k"] and not drawn["mxd-k2-ours"]
    every = {spec.name: spec.random_k for spec in plan.plan(replace(config, random_k=True), sites)}
    assert every["mxd-k2-ours"] and not every["mxd-relu-ours+l1=0.1"], "a gate with l1 has no K to draw"


def test_an_arm_is_compared_with_the_dense_control_of_what_concerns_it(small: TrainConfig, tmp_path: Path) -> None:
    arms = ("ours", "ours+positive-c", "ours+l1=0.1")
    run = train(replace(small, out=tmp_path / "run", kinds=("mxd", "dense"), recipe=arms), quiet=True)
    assert [s.name for s in run.students if s.kind == "dense"] == ["dense-ours"]
    report = pipeline.evaluate(run, EvalConfig(sequences=8, fit_tokens=512, bootstrap=20, permutations=2), quiet=True)
    routed = {s["name"]: s["routing"] for s in report["students"] if s["kind"] == "mxd"}
    assert len(routed) == 3
    for found in routed.values():
        assert isinstance(found["g_r"]["value"], float) and "reason" not in found["g_r"]
    free = next(s for s in report["students"] if s["name"] == "mxd-relu-ours+l1=0.1")
    assert 0 <= free["l0"] <= free["n_units"] == free["k"]
