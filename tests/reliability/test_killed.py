"""Killed: real processes, ended at any instant and at every file operation, and the run that is gone on with afterwards.

The ordinary suite takes a sample; ``make torture`` takes all of it and writes benchmarks/results/reliability.json.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mxd import resume
from mxd.checkpoint import Run
from mxd.config import TrainConfig
from mxd.pipeline import train
from tests.reliability.figures import note
from tests.small import small_run

pytestmark = pytest.mark.usefixtures("one_thread")

WITHOUT_IT = 3
"""Exit code of a process that finished although an operation failed."""
TOUCHES = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "shutil.rmtree", "tempfile.mkstemp")
"""File operations by the names of Python's audit events; of an open, only what may write."""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run of 48 steps with a state every fourth; a second or so once Python is up."""
    folder = tmp_path_factory.mktemp("small")
    return small_run(folder, kinds=("mxd", "topk-sae"), tokens=12_288, sequences_per_read=4, save_every_tokens=1024)


@pytest.fixture(scope="module")
def expected(small: TrainConfig) -> dict[str, str]:
    return bits(train(small, quiet=True))


def bits(run: Run) -> dict[str, str]:
    assert run.info["finished"] and {s.steps for s in run.students} == {48}
    return {s.name: run.weights_sha256(s.name) for s in run.students}


def child(work: Callable[[], object], said: Path | None = None) -> int:
    """A process of its own that does `work` and nothing else; its number. What ends it otherwise is written to `said`."""
    number = os.fork()
    if number == 0:
        try:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 2)
            work()
            os._exit(0)
        except BaseException:
            if said is not None:
                said.write_text(traceback.format_exc())
            os._exit(1)
    return number


def ended(number: int) -> int:
    """Its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def kill_and_go_on(config: TrainConfig, expected: dict[str, str], kills: int, dice: random.Random) -> int:
    """Train over and over, each time ended by SIGKILL after a random time, until that has happened `kills` times; returns the runs
    that got through in between, each of which must have the expected bits."""
    began = time.monotonic()
    assert ended(child(lambda: train(replace(config, out=config.out / "timed"), quiet=True))) == 0
    seconds = time.monotonic() - began
    runs, killed = 0, 0
    while killed < kills:
        out = config.out / str(runs)
        said = config.out / "said"
        process = child(lambda out=out: train(replace(config, out=out), quiet=True), said)
        time.sleep(dice.uniform(0.05, 0.8) * seconds)
        os.kill(process, signal.SIGKILL)
        code = ended(process)
        killed += code == -signal.SIGKILL
        assert code in (0, -signal.SIGKILL), said.read_text() if said.is_file() else f"exit {code}"
        if is_finished(out):  # also where it was killed behind that
            assert bits(Run.open(out)) == expected
            runs += 1
    out = config.out / str(runs)
    assert bits(train(replace(config, out=out), quiet=True) if not is_finished(out) else Run.open(out)) == expected
    return runs + 1


def is_finished(path: Path) -> bool:
    return (path / "run.json").is_file() and '"finished": true' in (path / "run.json").read_text()


def test_killed_at_random_instants(small: TrainConfig, expected: dict[str, str], tmp_path: Path) -> None:
    kill_and_go_on(replace(small, out=tmp_path), expected, 4, random.Random(0))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_many_random_instants(small: TrainConfig, expected: dict[str, str], tmp_path: Path) -> None:
    runs = kill_and_go_on(replace(small, out=tmp_path), expected, 60, random.Random(1))
    note("kills at random instants", kills=60, runs=runs, lost=0)


def at_operation(n: int, folder: Path, act: Callable[[], None]) -> list[str]:
    """From now on in this process, `act` at the `n`-th file operation under `folder`. For good: audit hooks cannot be removed.

    Returns a list that then holds what the operation was.
    """
    left = n
    happened: list[str] = []

    def hook(event: str, args: tuple[object, ...]) -> None:
        nonlocal left
        if event not in TOUCHES or (event == "open" and not (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR))):
            return
        if str(args[0]).startswith(str(folder)):
            left -= 1
            if left == 0:
                happened.append(event)
                act()

    sys.addaudithook(hook)
    return happened


def crash_at(n: int, config: TrainConfig) -> int:
    def work() -> None:
        at_operation(n, config.out, lambda: os._exit(9))
        train(config, quiet=True)

    return ended(child(work))


def fail_at(n: int, config: TrainConfig, number: int) -> int:
    """The n-th operation fails, as on a full disk; what was done before and is undone behind it must leave a run to go on with."""

    def fail() -> None:
        raise OSError(number, os.strerror(number), str(config.out))

    def work() -> None:
        happened = at_operation(n, config.out, fail)
        train(config, quiet=True)
        if happened:  # an operation that the run can do without
            os._exit(WITHOUT_IT)

    return ended(child(work))


def every_operation(small: TrainConfig, expected: dict[str, str], folder: Path, act: Callable[[int, TrainConfig], int], step: int) -> int:
    """Break the n-th operation, for every n (every `step`-th), and go on; returns how many were broken."""
    n, broken = 1, 0
    while True:
        config = replace(small, out=folder / str(n))
        code = act(n, config)
        run = Run.open(config.out) if is_finished(config.out) else train(config, quiet=True)
        assert bits(run) == expected, f"operation {n}"
        if code == 0:
            return broken
        broken, n = broken + 1, n + step


@pytest.mark.parametrize("act", [crash_at, lambda n, config: fail_at(n, config, errno.ENOSPC)], ids=["crash", "full disk"])
def test_broken_at_some_file_operations(
    small: TrainConfig, expected: dict[str, str], tmp_path: Path, act: Callable[[int, TrainConfig], int]
) -> None:
    assert every_operation(small, expected, tmp_path, act, 41) >= 4


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("what", ["crash", "full disk", "read-only", "input/output error"])
def test_broken_at_every_file_operation(small: TrainConfig, expected: dict[str, str], tmp_path: Path, what: str) -> None:
    numbers = {"full disk": errno.ENOSPC, "read-only": errno.EROFS, "input/output error": errno.EIO}
    act = crash_at if what == "crash" else lambda n, config: fail_at(n, config, numbers[what])
    note(f"file operations broken by: {what}", faults=every_operation(small, expected, tmp_path, act, 1), lost=0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_asked_to_stop_it_finishes_the_step_saves_and_says_how_to_go_on(small: TrainConfig, tmp_path: Path, number: signal.Signals) -> None:
    config = replace(small, tokens=60_000, passes=8, save_every_tokens=None, out=tmp_path / "run")
    command = [sys.executable, "-m", "mxd", "train", "--out", str(config.out), *options(config)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        metrics = config.out / "metrics.jsonl"
        while not metrics.is_file() or metrics.read_text().count("\n") < 4:
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            time.sleep(0.05)
        process.send_signal(number)
        said = process.communicate(timeout=120)[1]
    assert process.returncode == 130, said
    assert "stopping after this step" in said and f"next: mxd train --resume {config.out}, or mxd eval {config.out}" in said
    state = resume.newest(config.out)
    run = Run.open(config.out)
    assert state is not None and {s.steps for s in run.students} == {state.step} and not run.info["finished"]


def options(config: TrainConfig) -> list[str]:
    """A configuration as a command line."""
    from mxd.study import command

    words = command(replace(config, out=TrainConfig.out)).split()
    return words[2:]
