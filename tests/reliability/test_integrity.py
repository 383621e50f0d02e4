"""Integrity: whatever byte of whatever file is not what was written, something says so and names the file, or nothing comes of it."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mxd import cli, pipeline
from mxd.cache import Cache
from mxd.checkpoint import Run
from mxd.config import EvalConfig, HarvestConfig, TrainConfig
from mxd.errors import MxdError, RunError
from mxd.evals import report
from mxd.pipeline import train
from mxd.sealed import read_json, write_json, write_sealed
from mxd.verify import verify
from tests.reliability.figures import note
from tests.small import save_host, save_texts

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run with everything in it that mxd writes, and the activations that it was trained on."""
    folder = tmp_path_factory.mktemp("made")
    host, text = str(save_host(folder / "host", layers=2)), (str(save_texts(folder / "texts", number=160)),)
    act = pipeline.harvest(
        HarvestConfig(out=folder / "act", host=host, text=text, layers=("1",), tokens=1024, tokens_per_sequence=32, tokens_per_shard=512),
        quiet=True,
    )
    config = TrainConfig(out=folder / "run", activations=act.path, kinds=("mxd", "transcoder"), k=(2,), tokens=1024, keep_state=True)
    run = train(replace(config, tokens_per_step=256, buffer_tokens=512, warmup_steps=1), quiet=True)
    quick = EvalConfig(sequences=10, fit_tokens=256, bootstrap=20, permutations=2, parts=("cost",))
    pipeline.evaluate(run, quick, quiet=True)
    return run.path, act.path


def loaded(run: Path, act: Path) -> dict[str, Any]:
    """All that comes out of the files: what is damaged must not change it."""
    opened, cache = Run.open(run), Cache.open(act)
    found: dict[str, Any] = {"info": opened.info, "metrics": opened.metrics(), "report": report.read(opened)}
    for record in opened.students:
        layer = opened.load(record.name)
        found[record.name] = (layer.describe(), [p.clone() for p in layer.state_dict().values()])
    found["batches"] = [part for batch in cache.batches(["layers.1.mlp"], 1024) for part in batch["layers.1.mlp"]]
    validation = cache.validation(["layers.1.mlp"])
    found["validation"] = list(validation["layers.1.mlp"]) if validation else None
    found["weights"] = [w for w in cache.weights("layers.1.mlp") if w is not None]
    found["cache"] = (cache.info, cache.tokens)
    return found


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def flip(data: bytes, dice: random.Random) -> bytes:
    """One bit of one byte."""
    at = dice.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << dice.randrange(8))]) + data[at + 1 :]


def cut(data: bytes, dice: random.Random) -> bytes:
    return data[: dice.randrange(len(data))]


def damage(made: tuple[Path, Path], folder: Path, times: int, dice: random.Random) -> tuple[int, int]:
    """Damage every file `times` times, one at a time; returns how often, and how often nothing had to be said."""
    run, act = folder / "run", folder / "act"
    shutil.copytree(made[0], run)
    shutil.copytree(made[1], act)
    expected, done, unchanged = loaded(run, act), 0, 0
    files = sorted(path for root in (run, act) for path in root.rglob("*") if path.is_file())
    assert len(files) > 15 and not any(file.problem for root in (run, act) for file in verify(root))
    for path in files:
        whole = path.read_bytes()
        for _ in range(times):
            ways: list[Callable[[bytes, random.Random], bytes]] = [flip, cut]
            path.write_bytes(dice.choice(ways)(whole, dice))
            problems = [file.problem for root in (run, act) for file in verify(root) if file.problem]
            if path.read_bytes() != whole and not problems:
                unchanged += 1
            assert not problems or any(path.name in problem for problem in problems), f"{path}: {problems}"
            try:
                got = loaded(run, act)
            except MxdError as error:
                assert path.name in str(error) or path.parent.name in str(error), f"{path}: {error}"
            else:
                assert same(got, expected), f"{path} was damaged, and nobody noticed"
            done += 1
        path.write_bytes(whole)
    return done, unchanged


def test_bytes_flipped_and_files_cut_at_random(made: tuple[Path, Path], tmp_path: Path) -> None:
    damage(made, tmp_path, 2, random.Random(0))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_bytes_flipped_and_files_cut_at_many_places(made: tuple[Path, Path], tmp_path: Path) -> None:
    done, unchanged = damage(made, tmp_path, 100, random.Random(1))
    note("bytes flipped and files cut", damaged=done, without_effect=unchanged, unnoticed=0)


def test_verify_reads_every_file_there_is(made: tuple[Path, Path]) -> None:
    for root in made:
        there = {path for path in root.rglob("*") if path.is_file()}
        assert {file.path for file in verify(root)} == there
        assert sum(file.bytes for file in verify(root)) == sum(path.stat().st_size for path in there)


def test_the_command_names_what_is_damaged(made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(made[0], run)
    assert cli.main(["verify", str(run)]) == 0
    assert "all as they were written" in capsys.readouterr().out
    (run / "report.html").write_text("mine")
    next(run.glob("state/*/mxd-k2.safetensors")).unlink()
    assert cli.main(["verify", str(run)]) == 1
    said = capsys.readouterr()
    assert "report.html was changed" in said.out and "mxd-k2.safetensors is missing" in said.out
    assert "2 of the" in said.err and len(said.err.splitlines()) == 1
    assert cli.main(["verify", str(tmp_path)]) == 1
    assert "holds nothing to verify" in capsys.readouterr().err


def test_a_file_from_before_seals_is_read(tmp_path: Path) -> None:
    value = {"a": [1.5, None, "ü"], "b": {"2": 1e-9}}
    write_sealed(tmp_path / "new.json", value)
    write_json(tmp_path / "old.json", value)
    assert read_json(tmp_path / "new.json") == read_json(tmp_path / "old.json") == value
    text = (tmp_path / "new.json").read_text()
    (tmp_path / "new.json").write_text(text.replace("1.5", "1.6"))
    with pytest.raises(RunError, match=r"new\.json was changed"):
        read_json(tmp_path / "new.json")
