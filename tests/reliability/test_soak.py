"""A soak: train, kill, go on, verify, evaluate, again and again on the built-in model, for two hours.

``make soak`` runs it (``MXD_SOAK_MINUTES`` for another length) and adds its figures to benchmarks/results/reliability.json.
"""

from __future__ import annotations

import ctypes
import gc
import os
import random
import shutil
import signal
import statistics
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from mxd import pipeline, verify
from mxd.checkpoint import Run
from mxd.config import EvalConfig, TrainConfig
from tests.reliability.figures import note
from tests.reliability.test_killed import child, ended, is_finished

pytestmark = [pytest.mark.soak, pytest.mark.network, pytest.mark.usefixtures("one_thread")]

MINUTES = float(os.environ.get("MXD_SOAK_MINUTES", "120"))
WARM_UP = 4
"""Rounds after which a process has imported, compiled and cached what it ever will."""
GROWTH_MIB = 64
"""More than allocators move about, less than one leaked student."""
CONFIG = TrainConfig(
    layers=("8",), kinds=("mxd", "skip-transcoder"), k=(16,), budget="6x", tokens=8192, tokens_per_step=256, buffer_tokens=2048,
    tokens_per_sequence=128, sequences_per_read=4, save_every_tokens=1024, text=("sotu",), device="cpu",
)  # fmt: skip


class Held(NamedTuple):
    """What this process holds after a round."""

    mib: float
    """Resident memory."""
    files: int
    """Open files."""
    threads: int
    """Threads of Python."""


def held() -> Held:
    """Without what the allocator keeps free for later, which goes up and down by a quarter."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Held(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir("/proc/self/fd")), threading.active_count())


def one_round(out: Path, wait: float) -> tuple[bool, dict[str, str], float]:
    """Whether the kill met the training, the checksums of the students gone on with, and the excess CE of the first."""
    config = replace(CONFIG, out=out)
    process = child(lambda: pipeline.train(config, quiet=True))
    time.sleep(wait)
    os.kill(process, signal.SIGKILL)
    killed = ended(process) == -signal.SIGKILL
    run = Run.open(out) if is_finished(out) else pipeline.train(config, quiet=True)
    report = pipeline.evaluate(run, EvalConfig(sequences=6, fit_tokens=512, bootstrap=20, permutations=2), quiet=True)
    broken = [checked for checked in verify.verify(out) if checked.problem]
    assert not broken, broken
    sums = {student.name: run.weights_sha256(student.name) for student in run.students}
    shutil.rmtree(out)
    return killed, sums, report["students"][0]["excess_ce"]


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where this machine keeps the built-in model, and the index to fetch it from; all other tests go without."""
    monkeypatch.delenv("MXD_CACHE", raising=False)
    monkeypatch.delenv("PIP_NO_INDEX", raising=False)


@pytest.mark.usefixtures("own_cache")
@pytest.mark.timeout(60 * MINUTES + 1800)
def test_training_killing_and_going_on_for_hours(tmp_path: Path) -> None:
    dice, began = random.Random(0), time.monotonic()
    whole = pipeline.train(replace(CONFIG, out=tmp_path / "whole"), quiet=True)
    seconds = time.monotonic() - began
    expected = {student.name: whole.weights_sha256(student.name) for student in whole.students}
    after: list[Held] = []
    killed, costs = 0, set[float]()
    while time.monotonic() - began < 60 * MINUTES or len(after) < WARM_UP + 4:
        met, sums, cost = one_round(tmp_path / "run", dice.uniform(0.1, 1.0) * seconds)
        assert sums == expected, f"round {len(after)}"
        killed, costs = killed + met, costs | {cost}
        after.append(held())
        print(f"round {len(after)}: {killed} killed, {after[-1]}", file=sys.stderr, flush=True)
    assert len(costs) == 1, "the same run is evaluated to the same figures"
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".lock") == ["whole"], "nothing is left lying about"
    quarter = max(1, (len(after) - WARM_UP) // 4)
    first, last = after[WARM_UP : WARM_UP + quarter], after[-quarter:]
    mib = [statistics.median(one.mib for one in some) for some in (first, last)]
    assert mib[1] - mib[0] < GROWTH_MIB, after
    assert max(one.files for one in last) <= max(one.files for one in first), after
    assert max(one.threads for one in last) <= max(one.threads for one in first), after
    note(
        "soak", minutes=round((time.monotonic() - began) / 60, 1), rounds=len(after), killed=killed, lost=0,
        mib_first_quarter=round(mib[0], 1), mib_last_quarter=round(mib[1], 1), open_files=last[-1].files, threads=last[-1].threads,
    )  # fmt: skip
