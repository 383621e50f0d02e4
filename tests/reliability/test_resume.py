"""Going on: a run that was broken off, wherever and however often, ends with the bits of one that was not."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mxd import pipeline, resume
from mxd.cache import Cache
from mxd.checkpoint import Run
from mxd.config import HarvestConfig, TrainConfig
from mxd.course import FREE
from mxd.errors import ConfigError, RunError
from mxd.pipeline import train
from mxd.sealed import read_json, write_sealed
from mxd.train import Student
from mxd.verify import verify
from tests.small import small_run

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 16


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Options of a run of 16 steps that takes a second; its shuffle buffer is filled anew eight times."""
    return small_run(
        tmp_path_factory.mktemp("small"),
        kinds=("mxd", "topk-sae"),
        sequences_per_read=4,
        log_every_steps=4,
        warmup_steps=2,
        save_every_minutes=0,
    )


@pytest.fixture(scope="module")
def cached(small: TrainConfig) -> Cache:
    """What `small` reads, and as much again, in three files."""
    names = ("host", "text", "layers", "tokens_per_sequence", "sequences_per_read", "device")
    made = {name: getattr(small, name) for name in names}
    return pipeline.harvest(HarvestConfig(out=small.out.with_name("act"), tokens=8192, tokens_per_shard=3072, **made), quiet=True)


def from_cache(small: TrainConfig, cache: Cache) -> TrainConfig:
    default = TrainConfig()
    settled = {name: getattr(default, name) for name in ("host", "text", "layers", "tokens_per_sequence", "sequences_per_read")}
    return replace(small, activations=cache.path, **settled)


def bits(run: Run) -> dict[str, str]:
    """sha256 of every student's weights."""
    return {s.name: run.weights_sha256(s.name) for s in run.students} | {
        s.name + " on disk": hashlib.sha256(next((run.path / s.folder).glob("*.safetensors")).read_bytes()).hexdigest()
        for s in run.students
        if s.kind.startswith("mxd")
    }


def rows(run: Run) -> list[dict[str, Any]]:
    """The metrics without times."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in run.metrics()]


class _Breaker:
    """Breaks training off before a student takes its step `at`, in whatever way."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at: int | None = None
        self.error: BaseException = KeyboardInterrupt()
        self.taken: list[tuple[str, int]] = []
        real = Student.step

        def step(student: Student, batch: Any) -> None:
            if student.steps == self.at:
                self.at = None
                raise self.error
            self.taken.append((student.name, student.steps))
            real(student, batch)

        monkeypatch.setattr(Student, "step", step)

    def __call__(self, config: TrainConfig, at: int, error: BaseException | None = None) -> None:
        self.at, self.error = at, error or KeyboardInterrupt()
        with pytest.raises(type(self.error)):
            train(config, quiet=True)
        assert self.at is None, "it was broken off"


@pytest.fixture
def broken_off(monkeypatch: pytest.MonkeyPatch) -> _Breaker:
    return _Breaker(monkeypatch)


@pytest.mark.parametrize("source", ["host", "cache"])
@pytest.mark.parametrize("passes", [1, 3])
def test_a_run_stopped_by_hand_goes_on_to_the_same_bits(
    small: TrainConfig, cached: Cache, tmp_path: Path, broken_off: _Breaker, source: str, passes: int
) -> None:
    base = small if source == "host" else from_cache(small, cached)
    base = replace(base, passes=passes, tokens=4096 // passes // 256 * 256, probe_every_steps=5)
    whole = train(replace(base, out=tmp_path / "whole"), quiet=True)
    config = replace(base, out=tmp_path / "run")
    for at in (1, 2, 7, 13):
        broken_off(config, at)
        run = Run.open(config.out)
        assert [s.steps for s in run.students] == [at, at] and not run.info["finished"]
    run = train(config, quiet=True)
    assert run.info["finished"] and bits(run) == bits(whole) and rows(run) == rows(whole)
    assert run.info["resumed"] == [1, 2, 7, 13]
    assert not (run.path / resume.STATE).exists(), "a finished run has no more use for its states"
    taken = [step for name, step in broken_off.taken if name == "mxd-k2"]
    steps = base.tokens * passes // 256
    assert taken == list(range(steps)) * 2, "no step was taken twice"


@pytest.mark.parametrize("kinds", [("mxd",), ("mxd-pk", "transcoder", "dense", "additive", "cp-mumoe", "mov")])
def test_one_student_or_many(small: TrainConfig, tmp_path: Path, broken_off: _Breaker, kinds: tuple[str, ...]) -> None:
    base = replace(small, kinds=kinds, k=(2, 3), random_k=True)
    whole = train(replace(base, out=tmp_path / "whole"), quiet=True)
    broken_off(replace(base, out=tmp_path / "run"), 6)
    assert bits(train(replace(base, out=tmp_path / "run"), quiet=True)) == bits(whole)


@pytest.mark.parametrize("recipe", ["host-encoder", "paper", "ours+muon"])
def test_every_way_of_starting_and_optimising(small: TrainConfig, tmp_path: Path, broken_off: _Breaker, recipe: str) -> None:
    base = replace(small, recipe=(recipe,), kinds=("mxd", "transcoder"))
    whole = train(replace(base, out=tmp_path / "whole"), quiet=True)
    broken_off(replace(base, out=tmp_path / "run"), 9)
    assert bits(train(replace(base, out=tmp_path / "run"), quiet=True)) == bits(whole)


def test_a_crash_goes_back_to_the_last_state(
    small: TrainConfig, tmp_path: Path, broken_off: _Breaker, caplog: pytest.LogCaptureFixture
) -> None:
    whole = train(replace(small, out=tmp_path / "whole"), quiet=True)
    broken_off.taken.clear()
    config = replace(small, out=tmp_path / "run", save_every_tokens=4 * 256)
    broken_off(config, 11, RuntimeError("out of luck"))
    assert "once it is mended: mxd train --resume" in caplog.text
    states = sorted(path.name for path in (config.out / resume.STATE).iterdir())
    assert len(states) == 2, "the last two are kept"
    assert bits(train(TrainConfig(resume=config.out), quiet=True)) == bits(whole)


def test_states_come_by_tokens_and_by_minutes(small: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    real = resume.save
    monkeypatch.setattr(resume, "save", lambda run, students, step, info: saved.append(step) or real(run, students, step, info))
    train(replace(small, out=tmp_path / "a", save_every_tokens=1280), quiet=True)
    assert saved == [5, 10, 15]
    saved.clear()
    train(replace(small, out=tmp_path / "b", save_every_minutes=1e-9), quiet=True)
    assert saved == list(range(1, STEPS))
    saved.clear()
    run = train(replace(small, out=tmp_path / "c"), quiet=True)
    assert saved == [] and not (run.path / resume.STATE).exists()
    run = train(replace(small, out=tmp_path / "d", keep_state=True), quiet=True)
    assert saved == [STEPS] and resume.newest(run.path) is not None


def test_a_damaged_state_is_passed_over_for_the_one_before(
    small: TrainConfig, tmp_path: Path, broken_off: _Breaker, caplog: pytest.LogCaptureFixture
) -> None:
    whole = train(replace(small, out=tmp_path / "whole"), quiet=True)
    config = replace(small, out=tmp_path / "run", save_every_tokens=1024)
    broken_off(config, 10)
    newest = max((config.out / resume.STATE).iterdir())
    file = newest / "mxd-k2.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        run = train(config, quiet=True)
    assert f"{file} is missing, truncated or was changed" in caplog.text and "going on from" in caplog.text
    assert bits(run) == bits(whole) and rows(run) == rows(whole) and run.info["resumed"] == [8]


def test_with_all_states_damaged_nothing_is_guessed(small: TrainConfig, tmp_path: Path, broken_off: _Breaker) -> None:
    config = replace(small, out=tmp_path / "run")
    broken_off(config, 5)
    state = next((config.out / resume.STATE).iterdir()) / "state.json"
    about = json.loads(state.read_text())
    about["step"] = 4
    state.write_text(json.dumps(about))
    with pytest.raises(RunError, match=r"state\.json was changed"):
        train(config, quiet=True)
    del about["sha256"]
    about["format_version"] = 99
    write_sealed(state, about)
    with pytest.raises(RunError, match=r"written by a newer mxd .* got 99 .* pip install --upgrade"):
        train(config, quiet=True)


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_by_a_newer_mxd_is_refused(small: TrainConfig, tmp_path: Path, broken_off: _Breaker, finished: bool) -> None:
    config = replace(small, out=tmp_path / "run")
    broken_off(config, 5)
    info = json.loads((config.out / "run.json").read_text())
    del info["sha256"]
    write_sealed(config.out / "run.json", {**info, "format_version": 99, "finished": finished})
    with pytest.raises(RunError, match=r"written by a newer mxd .* got 99 .* pip install --upgrade"):
        train(replace(TrainConfig(), resume=config.out), quiet=True)
    with pytest.raises(RunError, match=r"written by a newer mxd .* got 99 .* pip install --upgrade"):
        train(config, quiet=True)


def test_a_run_that_was_moved_goes_on_and_so_do_its_activations(
    small: TrainConfig, cached: Cache, tmp_path: Path, broken_off: _Breaker
) -> None:
    there = tmp_path / "act"
    shutil.copytree(cached.path, there)
    base = replace(from_cache(small, cached), activations=there)
    whole = train(replace(base, out=tmp_path / "whole"), quiet=True)
    broken_off(replace(base, out=tmp_path / "run"), 6)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    there.rename(tmp_path / "act2")
    with pytest.raises(RunError, match="act does not exist"):
        train(TrainConfig(resume=tmp_path / "elsewhere"), quiet=True)
    run = train(TrainConfig(resume=tmp_path / "elsewhere", activations=tmp_path / "act2"), quiet=True)
    assert bits(run) == bits(whole)


@pytest.mark.parametrize("lost", ["folder", "shard"])
def test_activations_that_vanish_while_they_are_read_are_one_line_and_the_run_goes_on_when_they_are_back(
    small: TrainConfig, cached: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    there, away = tmp_path / "act", tmp_path / "away"
    shutil.copytree(cached.path, there)
    base = replace(from_cache(small, cached), activations=there, tokens=8192)
    whole = train(replace(base, out=tmp_path / "whole"), quiet=True)
    shard = there / "train" / "layers.1.mlp" / "00002.safetensors"
    gone, real = there if lost == "folder" else shard, Student.step

    def step(student: Student, batch: Any) -> None:
        if gone.exists() and student.steps == 2:
            gone.rename(away)
        real(student, batch)

    monkeypatch.setattr(Student, "step", step)
    config = replace(base, out=tmp_path / "run")
    with pytest.raises(RunError, match=r"0000[12]\.safetensors is missing \| .*next: ") as error:
        train(config, quiet=True)
    assert len(str(error.value).splitlines()) == 1
    stopped = Run.open(config.out)
    assert 2 < stopped.students[0].steps < 32 and not [checked for checked in verify(config.out) if checked.problem]
    monkeypatch.undo()
    with pytest.raises(RunError, match=r"act does not exist|0000[12]\.safetensors is missing"):
        train(config, quiet=True)
    assert Run.open(config.out).students == stopped.students
    away.rename(gone)
    assert bits(train(config, quiet=True)) == bits(whole)


def test_another_text_under_the_same_name_is_refused(small: TrainConfig, tmp_path: Path, broken_off: _Breaker) -> None:
    texts = tmp_path / "texts"
    shutil.copytree(small.text[0], texts)
    config = replace(small, text=(str(texts),), out=tmp_path / "run")
    broken_off(config, 5)
    some = sorted(texts.iterdir())[0]
    some.write_text(some.read_text() + " and more")
    words = r"was begun with another text \| expected sources 1\.bytes \d+, .*sources 1\.sha256 [0-9a-f]{60} \| got sources 1\.bytes \d+, "
    with pytest.raises(RunError, match=words):
        train(config, quiet=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr": 1e-3}, r"begun with other options \| expected --lr None \| got 0\.001"),
        ({"tokens": 2048}, r"other options .* --tokens 4096"),
        ({"kinds": ("mxd",)}, r"other options .* --kinds"),
        ({"overwrite": True}, "--resume and --overwrite exclude each other"),
    ],
)
def test_what_would_change_the_bits_is_refused(
    small: TrainConfig, tmp_path: Path, broken_off: _Breaker, changes: dict[str, Any], words: str
) -> None:
    config = replace(small, out=tmp_path / "run")
    broken_off(config, 5)
    with pytest.raises((RunError, ConfigError), match=words):
        train(TrainConfig(resume=config.out, **changes), quiet=True)
    assert [s.steps for s in Run.open(config.out).students] == [5, 5], "nothing was touched"


def test_resuming_what_is_finished_changes_nothing(small: TrainConfig, tmp_path: Path, broken_off: _Breaker) -> None:
    run = train(replace(small, out=tmp_path / "run"), quiet=True)
    before, taken = bits(run), len(broken_off.taken)
    assert bits(train(TrainConfig(resume=run.path), quiet=True)) == before and len(broken_off.taken) == taken
    with pytest.raises(RunError, match="holds a finished run"):
        train(replace(small, out=tmp_path / "run"), quiet=True)
    with pytest.raises(RunError, match=r"nowhere does not exist"):
        train(TrainConfig(resume=tmp_path / "nowhere"), quiet=True)


# more students


@pytest.mark.parametrize("source", ["host", "cache"])
def test_students_added_to_a_finished_pass_are_those_that_train_beside_the_others(
    small: TrainConfig, cached: Cache, tmp_path: Path, broken_off: _Breaker, source: str
) -> None:
    base = small if source == "host" else from_cache(small, cached)
    many = replace(base, kinds=("mxd", "transcoder", "topk-sae"), k=(2, 3))
    whole = train(replace(many, out=tmp_path / "whole"), quiet=True)
    train(replace(base, out=tmp_path / "run"), quiet=True)
    broken_off.taken.clear()
    more = TrainConfig(resume=tmp_path / "run", kinds=many.kinds, k=many.k)
    for at in (0, 4, 9):
        broken_off(more, at)
    run = train(more, quiet=True)
    assert {name for name, _ in broken_off.taken} == {"mxd-k3", "transcoder-k2", "transcoder-k3", "topk-sae-k3"}
    assert bits(run) == bits(whole) and [s.name for s in run.students] == [s.name for s in whole.students]
    by_student: Callable[[dict[str, Any]], Any] = lambda row: (row["student"], row["step"], "probe" in row)  # noqa: E731
    assert sorted(rows(run), key=by_student) == sorted(rows(whole), key=by_student)


def test_students_that_are_there_cannot_be_left_out(small: TrainConfig, tmp_path: Path) -> None:
    train(replace(small, out=tmp_path / "run"), quiet=True)
    with pytest.raises(RunError, match=r"holds students that are not asked for .* got mxd-k2 \| next: name all of --kinds"):
        train(TrainConfig(resume=tmp_path / "run", kinds=("topk-sae", "transcoder")), quiet=True)


# more tokens


@pytest.mark.parametrize("source", ["host", "cache"])
def test_a_prolonged_run_is_the_same_however_often_it_is_broken_off(
    small: TrainConfig, cached: Cache, tmp_path: Path, broken_off: _Breaker, source: str
) -> None:
    base = replace(small if source == "host" else from_cache(small, cached), keep_state=True)
    for name in ("whole", "run"):
        train(replace(base, out=tmp_path / name), quiet=True)
    broken_off.taken.clear()
    first = bits(Run.open(tmp_path / "run"))
    whole = train(TrainConfig(resume=tmp_path / "whole", tokens=6144), quiet=True)
    assert [s.tokens_trained for s in whole.students] == [6144, 6144] and bits(whole) != first
    assert [step for name, step in broken_off.taken if name == "mxd-k2"] == list(range(16, 24))
    for at in (16, 20, 23):
        broken_off(TrainConfig(resume=tmp_path / "run", tokens=6144), at)
    run = train(TrainConfig(resume=tmp_path / "run"), quiet=True)
    assert bits(run) == bits(whole) and run.info["legs"] == [[4096, 16], [2048, 8]] and run.info["config"]["tokens"] == 6144


def test_prolonging_an_unfinished_run_finishes_it_first(small: TrainConfig, tmp_path: Path, broken_off: _Breaker) -> None:
    base = replace(small, keep_state=True)
    train(replace(base, out=tmp_path / "whole"), quiet=True)
    whole = train(TrainConfig(resume=tmp_path / "whole", tokens=6144), quiet=True)
    broken_off(replace(base, out=tmp_path / "run"), 10)
    run = train(TrainConfig(resume=tmp_path / "run", tokens=6144), quiet=True)
    assert run.info["legs"] == whole.info["legs"]
    # The learning rate of steps 10 to 16 is already that of the longer run.
    assert bits(run) != bits(whole) and [s.tokens_trained for s in run.students] == [6144, 6144]


def test_without_its_state_a_finished_run_cannot_be_prolonged(small: TrainConfig, tmp_path: Path) -> None:
    train(replace(small, out=tmp_path / "run"), quiet=True)
    with pytest.raises(RunError, match=r"cannot be prolonged .* next: train it with --keep-state"):
        train(TrainConfig(resume=tmp_path / "run", tokens=6144), quiet=True)


# killed while replacing


def test_a_process_killed_while_it_replaced_a_run_loses_neither(small: TrainConfig, tmp_path: Path, broken_off: _Breaker) -> None:
    config = replace(small, out=tmp_path / "run")
    old = bits(train(config, quiet=True))
    aside = tmp_path / ".run.replaced-12345"
    config.out.rename(aside)
    config.out.mkdir()
    (config.out / "run.json").write_text('{"format_version": 1, "students": [], "finished": false}')
    with pytest.raises(RunError, match="finished run"):
        train(config, quiet=True)  # put back before anything else
    assert bits(Run.open(config.out)) == old and not aside.exists()
    shutil.copytree(config.out, aside)
    broken_off(replace(config, lr=1e-3, overwrite=True), 5)
    shutil.copytree(config.out, aside, dirs_exist_ok=True)
    run = train(replace(config, lr=1e-3), quiet=True)
    assert run.info["resumed"] == [5] and not aside.exists(), "what has a state is worth more than what it replaces"


def test_half_files_of_a_killed_process_go_and_nobody_elses_files(small: TrainConfig, tmp_path: Path, broken_off: _Breaker) -> None:
    config = replace(small, out=tmp_path / "run")
    config.out.mkdir()
    (config.out / ".run.json.x1.writing").write_text("{")
    broken_off(config, 5)
    halves = [config.out / ".cfg.json.x2.writing", config.out / resume.STATE / ".writing-1" / "half", tmp_path / ".mine.writing"]
    for half in halves:
        half.parent.mkdir(exist_ok=True)
        half.write_text("half")
    train(replace(config, keep_state=True), quiet=True)
    assert not any(half.exists() for half in halves[:2]) and halves[2].exists()
    assert not list(config.out.glob(".*.writing"))
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / ".essay.txt.x3.writing").write_text("mine")
    with pytest.raises(RunError, match="not a run folder"):
        train(replace(small, out=theirs), quiet=True)
    assert (theirs / ".essay.txt.x3.writing").exists()


def test_a_run_from_before_there_were_states(small: TrainConfig, tmp_path: Path) -> None:
    """Its run.json knows neither legs nor the newer options: students can be added, and an interrupted one says what to do."""
    run = train(replace(small, out=tmp_path / "run"), quiet=True)
    info = read_json(run.path / "run.json")
    older = {key: value for key, value in info.items() if key not in ("legs", "adding", "resumed", "metrics_sha256")}
    older["config"] = {key: value for key, value in info["config"].items() if key not in FREE or key in ("out", "activations")}
    write_sealed(run.path / "run.json", older)
    more = train(TrainConfig(resume=run.path, kinds=("mxd", "topk-sae", "dense")), quiet=True)
    assert [s.name for s in more.students] == ["mxd-k2", "topk-sae-k2", "dense"] and more.info["finished"]
    write_sealed(run.path / "run.json", {**older, "finished": False})
    with pytest.raises(RunError, match=r"interrupted run without a state .* next: add --overwrite"):
        train(TrainConfig(resume=run.path), quiet=True)
