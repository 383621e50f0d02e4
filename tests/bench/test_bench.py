"""`mxd bench`: every benchmark at tiny shapes, what is kept of it, and that a wrong result is never timed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mxd import cli
from mxd.bench import BENCHMARKS, dense, gemm, memory, run, runs, timing, train_step
from mxd.bench.memory import Job, peak
from mxd.bench.rows import FIELDS, row
from mxd.checkpoint import Run
from mxd.config import BenchConfig
from mxd.errors import ConfigError, MxdError
from mxd.options import BenchOptions
from tests import small

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("material")
    return str(small.save_host(folder / "host")), str(small.save_texts(folder / "texts"))


def quick(name: str, material: tuple[str, str], **options: Any) -> BenchConfig:
    host, text = material
    return BenchConfig(names=(name,), device="cpu", threads=1, runs=1, quick=True, host=host, text=(text,), **options)


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name != "peers"])
def test_every_benchmark_runs(name: str, material: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown: list[tuple[str, int]] = []
    found = run.run(quick(name, material, out=tmp_path), lambda name, rows: shown.append((name, len(rows))))[name]
    assert found
    assert shown == [(name, len(found))]
    for made in found:
        assert set(FIELDS) <= set(made)
        assert made["verified"] is True
        assert made["check"], "the row says what was verified"
        assert made["device"] == "cpu"
        if made["rival_ms"] is not None:
            assert made["time_ratio"] == pytest.approx(made["ours_ms"] / made["rival_ms"], rel=1e-2)
    kept = json.loads((tmp_path / f"{name}-cpu.json").read_text())
    assert kept["rows"] == found, "all of them, none taken for another"
    assert kept["machine"]["threads"] == 1
    assert kept["versions"]["torch"] == torch.__version__
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(f"mxd: {name}: ")]
    assert len(lines) == len(found)


def test_the_command_prints_a_table_and_writes_nothing_of_a_quick_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    assert cli.main(["bench", "gemm", "--quick", "--threads", "1", "--runs", "1", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "gemm: medians" in said
    assert "oneDNN" in said
    assert list(tmp_path.iterdir()) == []
    assert torch.get_num_threads() == threads
    monkeypatch.setattr(gemm, "SHAPES", ((8, 8, 8),))
    assert cli.main(["bench", "gemm", "--threads", "1", "--runs", "2", "--device", "cpu"]) == 0
    assert json.loads((tmp_path / "benchmarks" / "results" / "gemm-cpu.json").read_text())["rows"][0]["runs"] == 8


def test_help_lists_every_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--help"]) == 0
    said = capsys.readouterr().out
    for name in BENCHMARKS:
        assert name in said
    assert {f for f in BenchOptions.__dataclass_fields__} == set(BenchConfig.__dataclass_fields__)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"names": ("trainstep",)}, ["unknown benchmark", "expected train_step", "got trainstep"]),
        ({"runs": 0}, ["--runs must be at least 1", "got 0"]),
        ({"threads": 0}, ["--threads must be at least 1"]),
        ({"names": ("gemm",), "device": "tpu"}, ["unknown --device", "auto, cpu or cuda", "got tpu"]),
    ],
)
def test_what_cannot_work_is_one_line(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        run.run(BenchConfig(**options), quiet=True)
    for word in words:
        assert word in str(caught.value)


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no device cuda"):
        run.run(BenchConfig(names=("gemm",), device="cuda"))


def test_all_of_them_by_default_and_peers_only_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for there in (False, True):
        monkeypatch.setattr(run, "_peers_installed", lambda there=there: there)
        assert run.check(BenchConfig()) == [name for name in BENCHMARKS if there or name != "peers"]
    assert run.check(BenchConfig(names=("ops", "gemm", "ops"))) == ["ops", "gemm"]


def stopping(**_: object) -> Iterator[dict[str, Any]]:
    yield row("first", "a rival", device="cpu", shape={"n": 1}, dtype="float32", ours_ms=1.0, rival_ms=2.0, check="by hand", runs=1)
    raise KeyboardInterrupt


def test_a_stop_keeps_what_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gemm, "rows", stopping)
    assert cli.main(["bench", "gemm", "--threads", "1", "--device", "cpu", "--out", str(tmp_path)]) == 130
    assert "1 rows measured in" in capsys.readouterr().err
    assert [r["case"] for r in json.loads((tmp_path / "gemm-cpu.json").read_text())["rows"]] == ["first"]


def test_a_line_says_what_was_measured() -> None:
    (made,) = [found for found in [next(stopping())]]
    assert run.line(made) == "first · n 1: 1 ms against 2 ms (a rival), ratio 0.5"
    assert run.line({**made, "rival_ms": None, "setting": "bf16", "ours_ms": 1234.5}) == "first · bf16 · n 1: 1,234 ms"
    assert run.milliseconds(None) == "–"


# --- a wrong result is not timed ----------------------------------------------------------------------------------------------------


def off(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda *args, **options: function(*args, **options) * 1.001


@pytest.mark.parametrize("name", ["train_step", "scaling"])
def test_a_reference_that_differs_stops_the_benchmark(name: str, material: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "mxd", off(dense.mxd))
    with pytest.raises(MxdError, match="do not agree, so nothing is timed"):
        run.run(quick(name, material), quiet=True)


def test_a_dense_gate_that_differs_stops_ops(material: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "topk", off(dense.topk))
    with pytest.raises(MxdError, match="do not agree, so nothing is timed"):
        run.run(quick("ops", material), quiet=True)


def test_verify() -> None:
    assert timing.verify("two sums", 2e-7, 1e-6) == "two sums agree to 2.0e-07"
    for error in (2e-6, float("nan")):
        with pytest.raises(MxdError, match="at most 1e-06"):
            timing.verify("two sums", error, 1e-6)
    a = torch.tensor([3.0, 4.0])
    assert timing.relative_error(a + torch.tensor([0.0, 0.5]), a) == pytest.approx(0.1)


def test_rivals_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    ticks = iter(range(1000))
    monkeypatch.setattr("time.perf_counter", lambda: 1e-3 * next(ticks) ** 2)
    found = timing.in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, runs=3, device=CPU, warm_up=1)
    assert order == ["a", "b"] * 4
    # The n-th call (from 0) lasts from tick 2n to 2n + 1, so (2n + 1)² − (2n)² = 4n + 1 ms; a has calls 2, 4, 6 and b 3, 5, 7.
    assert found == {"a": pytest.approx(17.0), "b": pytest.approx(21.0)}


def test_weights_are_compared_byte_by_byte(tmp_path: Path) -> None:
    made: list[Run] = []
    for name, content in (("one", b"same"), ("two", b"same"), ("three", b"other")):
        folder = tmp_path / name / "mxd-k4"
        folder.mkdir(parents=True)
        (folder / "mxd.safetensors").write_bytes(content)
        made.append(Run(tmp_path / name, {}, []))
    assert "1 of 1 files" in runs.same_weights(made[0], [made[1]])
    with pytest.raises(MxdError, match="the same bytes"):
        runs.same_weights(made[0], [made[1], made[2]])
    with pytest.raises(MxdError, match="no weights to compare"):
        runs.same_weights(made[0], [])


def test_the_float32_product_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from mxd.ops import gemm as products

    monkeypatch.setenv("MXD_GEMM", "auto")
    products.uses_onednn.cache_clear()
    before = products.uses_onednn()
    with train_step.product("mkl"):
        assert products.uses_onednn() is False
    assert products.uses_onednn() is before
    monkeypatch.delenv("MXD_GEMM")
    with train_step.product("onednn"):
        pass
    assert "MXD_GEMM" not in train_step.os.environ


# --- memory -------------------------------------------------------------------------------------------------------------------------


def test_peak_memory_is_what_the_steps_need() -> None:
    job = Job(d=64, h=64, n=20_000, k=4, tokens=512, threads=1)
    ours, theirs = peak(job), peak(job._replace(rival="dense"))
    kept = 16 * dense.make(CPU, d=64, h=64, n=20_000, k=4).budget()  # parameters, gradients, two moments
    matrix = 4 * job.tokens * job.n
    assert 0.9 * kept < ours < kept + 2.5 * matrix
    assert theirs > ours + matrix, "the reference keeps several matrices of tokens x N"


def test_a_process_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho Traceback >&2\necho 'RuntimeError: no memory' >&2\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setattr(memory.sys, "executable", str(script))
    with pytest.raises(MxdError, match=r"the process that measures memory ended with 3 .* got RuntimeError: no memory"):
        peak(Job(d=8, h=8, n=8, k=4, tokens=8, threads=1))
