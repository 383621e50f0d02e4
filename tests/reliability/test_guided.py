"""Fuzzing guided by coverage, where atheris is installed (``pip install -e '.[fuzz]'``)."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.interop.test_reference import tensor, whole
from tests.reliability.figures import note
from tests.reliability.test_foreign_texts import parquet
from tests.reliability.test_gguf import gguf

RUNS = 20_000


def fuzz(parser: str, seed: bytes, folder: Path, runs: int) -> subprocess.CompletedProcess[str]:
    seeds = folder / "seeds"
    seeds.mkdir()
    (seeds / "honest").write_bytes(seed)
    command = [sys.executable, "-m", "tests.reliability.guided", parser, str(seeds), f"-runs={runs}", f"-artifact_prefix={folder}/"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("parser", ["gguf", "parquet", "pickles"])
def test_parsers_of_bytes_guided_by_coverage(parser: str, tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="pip install -e '.[fuzz]'")
    rows = ["one", "two", "three", "two"]
    seeds = {
        "gguf": gguf,
        "parquet": lambda: parquet(tmp_path / "small.parquet", rows, row_group_size=2).read_bytes(),
        "pickles": lambda: whole(tensor(0, (4,), (1,))),
    }
    done = fuzz(parser, seeds[parser](), tmp_path, RUNS)
    assert done.returncode == 0, done.stderr[-2000:]
    (runs,) = re.findall(r"Done (\d+) (?:runs )?in", done.stdout + done.stderr)
    assert int(runs) >= RUNS
    note(f"{parser}, guided by coverage", inputs=int(runs), crashes=0)


@pytest.mark.slow
def test_what_such_fuzzing_finds_is_not_a_success(tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="pip install -e '.[fuzz]'")
    done = fuzz("planted", b"nothing", tmp_path, 10 * RUNS)
    assert done.returncode != 0 and "ZeroDivisionError" in done.stdout + done.stderr
