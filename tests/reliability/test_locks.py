"""Two at once: the second writer is refused while the first lives, and only then."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from mxd import pipeline
from mxd.config import EvalConfig, HarvestConfig, TrainConfig
from mxd.errors import RunError
from mxd.locks import only_writer
from tests.small import small_run

HOLD = """
import sys, time
from pathlib import Path
from mxd.locks import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""
REFUSED = r"run is being written to \| expected one writer at a time .* next: wait until it is done"


@contextmanager
def another_writer(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    return small_run(tmp_path_factory.mktemp("small"), number=60, kinds=("mxd",), tokens=1024, buffer_tokens=512)


def test_a_writer_is_refused_while_another_lives_and_not_after_it_was_killed(tmp_path: Path) -> None:
    with another_writer(tmp_path / "run") as process:
        with pytest.raises(RunError, match=REFUSED), only_writer(tmp_path / "run"):
            raise AssertionError("two writers")
        with only_writer(tmp_path / "other"):
            pass
        process.kill()
        process.wait()
        with only_writer(tmp_path / "run"):
            pass


def test_a_lock_is_released_by_an_error_and_not_held_twice_in_one_process(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), only_writer(tmp_path / "run"):
        raise ZeroDivisionError
    with only_writer(tmp_path / "run"), pytest.raises(RunError, match=REFUSED), only_writer(tmp_path / "run"):
        raise AssertionError("two writers")


def test_training_evaluating_and_harvesting_are_writers(small: TrainConfig) -> None:
    harvest = HarvestConfig(small.out, host=small.host, text=small.text, layers=("1",), tokens=1024, tokens_per_sequence=32)
    with another_writer(small.out):
        with pytest.raises(RunError, match=REFUSED):
            pipeline.harvest(harvest, quiet=True)
        with pytest.raises(RunError, match=REFUSED):
            pipeline.train(small, quiet=True)
        assert not small.out.exists(), "nothing is touched"
    run = pipeline.train(small, quiet=True)
    before = sorted(path.name for path in run.path.iterdir())
    with another_writer(small.out):
        with pytest.raises(RunError, match=REFUSED):
            pipeline.train(replace(small, overwrite=True), quiet=True)
        with pytest.raises(RunError, match=REFUSED):
            pipeline.evaluate(run, EvalConfig(sequences=4, fit_tokens=256), quiet=True)
        assert sorted(path.name for path in run.path.iterdir()) == before
        assert run.load("mxd-k2") is not None, "readers are not held up"
    assert pipeline.evaluate(run, EvalConfig(sequences=4, fit_tokens=256), quiet=True)["students"]
