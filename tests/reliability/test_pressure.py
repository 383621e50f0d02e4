"""Pressure: what memory a run will take is said before it starts, is about what it takes, and is refused where it cannot fit."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import resource
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mxd import cli, footprint
from mxd.config import TrainConfig
from mxd.errors import ConfigError
from mxd.footprint import Footprint, available, check_memory
from mxd.harvest import Batch
from mxd.layers import Sizes
from mxd.recipes import recipe
from mxd.sites import MLPSite
from mxd.train import Student, StudentSpec
from tests.small import save_host, save_texts

CPU = torch.device("cpu")
SITE = MLPSite("layers.1.mlp", 1, 64, 64, 128, "silu", True, "m")


def spec(kind: str, n_units: int, **changes: Any) -> StudentSpec:
    sizes = Sizes(64, 64, n_units, 8, 128, "silu", True)._replace(**changes)
    return StudentSpec(kind, "layers.1.mlp", kind, sizes, recipe("ours", kind))


def test_what_is_counted_is_what_students_and_buffer_hold() -> None:
    config = TrainConfig(tokens=100_000, buffer_tokens=2048, tokens_per_step=256)
    specs = [spec("transcoder", 512), spec("mxd", 256)]
    found = footprint.footprint(config, specs, [SITE], CPU)
    students = [Student(s, total_steps=10) for s in specs]
    assert found.students == sum(12 * p.numel() for student in students for p in student.layer.parameters())
    assert found.activations == (2048 + 2 * 2048) * 4 * 128
    assert found.total == found.students + found.activations + found.step and "GiB of memory beside the host" in found.line()


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"buffer_tokens": 8192}, "activations"),
        ({"scores_mib": 0.1}, "step"),
        ({"recompute": True}, "step"),
        ({"tokens_per_step": 2048}, "step"),
    ],
)
def test_what_an_option_changes(change: dict[str, Any], part: str) -> None:
    config, specs = TrainConfig(tokens=100_000, buffer_tokens=2048, tokens_per_step=256), [spec("mxd", 4096)]
    before = footprint.footprint(config, specs, [SITE], CPU)._asdict()
    after = footprint.footprint(replace(config, **change), specs, [SITE], CPU)._asdict()
    assert before[part] != after[part] and all(before[name] == after[name] for name in before if name != part)


def test_a_step_takes_about_what_is_estimated() -> None:
    """In a process of its own, of a student whose step is most of what there is: between half and twice."""
    config = TrainConfig(tokens=100_000, buffer_tokens=4096, tokens_per_step=4096)
    own = spec("mxd", 2048, d_hidden=2048)
    estimated = footprint.footprint(config, [own], [SITE], CPU)
    reading, writing = os.pipe()
    gc.collect()
    if sys.platform == "linux":  # what tests before this one have freed would be taken first, and not be seen
        ctypes.CDLL(None).malloc_trim(0)
    if os.fork() == 0:
        student = Student(own, total_steps=10)
        x = torch.randn(4096, 64)
        batch = Batch(x, x.tanh(), torch.zeros(4096, dtype=torch.bool))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        student.step(batch)
        os.write(writing, str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before).encode())
        os._exit(0)
    os.wait()
    taken = 1024 * int(os.read(reading, 100))
    expected = estimated.step + estimated.students * 2 / 3
    assert 0.5 < taken / expected < 2, f"{taken / 2**20:.0f} MiB against {expected / 2**20:.0f}"


def test_what_cannot_fit_is_refused_and_what_is_free_is_the_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprint, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(footprint, "CGROUP", tmp_path)
    assert available(CPU) is None
    check_memory(Footprint(2**40, 0, 0), CPU)  # nobody knows
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    3145728 kB\nSwapFree: 1048576 kB\nHugePages_Total: 0\n")
    assert available(CPU) == 4 * 2**30
    (tmp_path / "memory.max").write_text("max\n")
    assert available(CPU) == 4 * 2**30
    (tmp_path / "memory.max").write_text(f"{3 * 2**30}\n")
    (tmp_path / "memory.current").write_text(f"{2**30}\n")
    assert available(CPU) == 2 * 2**30
    check_memory(Footprint(2**30, 2**30, 2**40), CPU)  # of the step there is only an estimate
    with pytest.raises(ConfigError, match=r"will not fit into memory \| expected 2\.5 GiB free .* got 2\.0 GiB \| next: fewer students"):
        check_memory(Footprint(2 * 2**30, 2**29, 0), CPU)


def test_it_is_said_before_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    host, text = str(save_host(tmp_path / "host", layers=2)), str(save_texts(tmp_path / "texts", number=60))
    command = ["train", "--out", str(tmp_path / "run"), "--host", host, "--text", text, "--layers", "1", "--kinds", "mxd", "--k", "2"]
    command += ["--tokens-per-step", "256", "--tokens-per-sequence", "32"]
    assert cli.main([*command, "--tokens", "1024", "--buffer-tokens", "512"]) == 0
    said = capsys.readouterr().err
    assert re.search(r"mxd: 1 student, about \d+\.\d GiB of memory beside the host", said) and said.index("GiB") < said.index("training")
    # A buffer that no machine has is refused before anything is written.
    command[2] = str(tmp_path / "large")
    assert cli.main([*command, "--tokens", "1024", "--buffer-tokens", str(10**12)]) == 1
    said = capsys.readouterr().err
    assert "will not fit into memory" in said and len(said.splitlines()) == 1 and not (tmp_path / "large").exists()
