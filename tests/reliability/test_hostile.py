"""Hostile files: whatever stands in a file that comes from somebody else, loading it ends in an error of ours or in what it says.

No code of theirs runs, nothing outside the folder is read, and no size that a header claims is believed before it is checked.
"""

from __future__ import annotations

import ast
import copy
import json
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from mxd import checkpoint, edits, pipeline, printing, resume
from mxd.cache import Cache
from mxd.checkpoint import Run
from mxd.config import EditConfig, EvalConfig, HarvestConfig, TrainConfig
from mxd.errors import MxdError
from mxd.evals import report
from mxd.pipeline import train
from mxd.sealed import read_json, write_sealed
from tests.reliability.figures import note
from tests.small import save_host, save_texts

pytestmark = pytest.mark.usefixtures("one_thread", "unsynced")

SOURCE = Path(checkpoint.__file__).parent


@pytest.fixture
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tens of thousands of files are written here that need not outlive a power cut."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, its activations and an edit."""
    folder = tmp_path_factory.mktemp("made")
    host, text = str(save_host(folder / "host", layers=2)), (str(save_texts(folder / "texts", number=60)),)
    act = HarvestConfig(out=folder / "act", host=host, text=text, layers=("1",), tokens=512, tokens_per_sequence=32, device="cpu")
    pipeline.harvest(act, quiet=True)
    config = TrainConfig(out=folder / "run", activations=act.out, kinds=("mxd", "transcoder"), k=(2,), tokens=512, keep_state=True)
    run = train(replace(config, tokens_per_step=256, buffer_tokens=512, warmup_steps=1), quiet=True)
    pipeline.evaluate(run, EvalConfig(sequences=4, fit_tokens=128, bootstrap=10, permutations=2), quiet=True)
    edits.write(folder / "edit.json", edits.make(EditConfig(student="mxd-k2", ablate=(1,)), run))
    return folder


def read_run(folder: Path) -> None:
    run = Run.open(folder / "run")
    run.metrics()
    for record in run.students:
        run.load(record.name)
    printing.run(run)
    if run.students:
        edits.make(EditConfig(student=run.students[0].name, ablate=(1,)), run)


def read_cache(folder: Path) -> None:
    cache = Cache.open(folder / "act")
    names = [site.hookpoint for site in cache.sites]
    list(cache.batches(names, cache.tokens))
    cache.validation(names)
    for name in names:
        cache.weights(name)


def read_edit(folder: Path) -> None:
    edits.load_edit(folder / "edit.json", folder / "run")


def read_state(folder: Path) -> None:
    resume.newest(folder / "run")


def read_report(folder: Path) -> None:
    before = {path: path.read_bytes() for path in (folder / "run").glob("report.*")}
    try:
        report.write_report(folder / "run")
        printing.report(folder / "run")
    finally:
        for path, content in before.items():
            path.write_bytes(content)


READERS: dict[str, Callable[[Path], None]] = {
    "run/run.json": read_run,
    "run/mxd-k2/layers.1.mlp/cfg.json": read_run,
    "run/transcoder-k2/layers.1.mlp/cfg.json": read_run,
    "run/state/000000002/state.json": read_state,
    "run/report.json": read_report,
    "act/manifest.json": read_cache,
    "edit.json": read_edit,
}
"""File of the folder -> what reads it."""
BINARY: dict[str, Callable[[Path], None]] = {
    "run/mxd-k2/layers.1.mlp/mxd.safetensors": read_run,
    "run/transcoder-k2/layers.1.mlp/sae.safetensors": read_run,
    "act/layers.1.mlp/mlp.safetensors": read_cache,
    "act/train/layers.1.mlp/00000.safetensors": read_cache,
}

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, -1, 1, 2**31, 2**62, 10**30]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=12),
    st.sampled_from(["../outside", "/etc/passwd", "C:\\x", "\x00", "a/../../b", "\u202e", "layers.1.mlp", "float32"]),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=6
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))]


def put(value: Any, place: tuple[Any, ...], new: Any, *, away: bool) -> Any:
    """`value` with something else at a place, or nothing."""
    if not place:
        return new
    value = copy.deepcopy(value)
    at = value
    for key in place[:-1]:
        at = at[key]
    if away:
        del at[place[-1]]
    else:
        at[place[-1]] = new
    return value


def write_as_theirs(path: Path, value: Any) -> None:
    """Whoever writes such a file can seal it as well."""
    if isinstance(value, dict):
        write_sealed(path, value)
    else:
        path.write_text(json.dumps(value))


def try_json(made: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(READERS)))
    path = made / name
    whole = path.read_bytes()
    value = json.loads(whole)
    value.pop("sha256", None)
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.sampled_from(places(value)))
        value = put(value, place, data.draw(VALUES), away=bool(place) and data.draw(st.booleans()))
        if not isinstance(value, (dict, list)):
            break
    try:
        write_as_theirs(path, value)
        try:
            READERS[name](made)
        except MxdError as error:
            assert len(str(error).splitlines()) == 1
    finally:
        path.write_bytes(whole)


def settled(examples: int, *, derandomize: bool = True) -> Callable[[Any], Any]:
    """So many inputs, the same ones every time; without `derandomize`, those of a seed."""
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large, HealthCheck.large_base_example]
    return settings(max_examples=examples, deadline=None, derandomize=derandomize, database=None, suppress_health_check=checks)


@settled(400)
@given(data=st.data())
def test_json_of_any_content(made: Path, data: st.DataObject) -> None:
    try_json(made, data)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_json_of_any_content_many(made: Path) -> None:
    number = 0

    def many(data: st.DataObject) -> None:
        nonlocal number
        number += 1
        try_json(made, data)

    for part in range(10):  # hypothesis remembers what it has tried, and becomes slow and large over tens of thousands
        seed(part)(settled(2_000, derandomize=False)(given(data=st.data())(many)))()
    note("JSON files of other content", inputs=number, crashes=0)


def header(**changes: Any) -> bytes:
    """A safetensors file of one tensor, its header changed."""
    about = {"x": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **changes}}
    text = json.dumps(about).encode()
    return struct.pack("<Q", len(text)) + text + bytes(16)


HEADERS = [
    b"",
    b"\x00" * 7,
    struct.pack("<Q", 2**63) + b"{}",
    struct.pack("<Q", 2**40) + b"{}",
    struct.pack("<Q", 2) + b"[]",
    struct.pack("<Q", 4) + b"null",
    header(shape=[2**62, 2**62]),
    header(shape=[-1, 4]),
    header(data_offsets=[0, 2**60]),
    header(data_offsets=[16, 0]),
    header(dtype="F4096"),
    header(shape="many"),
    header(),
]


def with_sums(made: Path, name: str, data: bytes) -> None:
    """The sums that go with it: theirs too."""
    import hashlib

    digest = hashlib.sha256(data).hexdigest()
    if name.startswith("run"):
        cfg = made / Path(name).with_name("cfg.json")
        about = read_json(cfg)
        about["mxd"]["weights_sha256"] = digest
        write_sealed(cfg, about)
        return
    manifest = read_json(made / "act/manifest.json")
    entry = manifest["hookpoints"]["layers.1.mlp"]
    for shard in (entry["weights"], *entry["train"]):
        if f"act/{shard['file']}" == name:
            shard.update(bytes=len(data), sha256=digest)
    write_sealed(made / "act/manifest.json", manifest)


def try_binary(made: Path, name: str, data: bytes) -> None:
    kept = {
        path: path.read_bytes()
        for path in (made / name, made / Path(name).with_name("cfg.json"), made / "act/manifest.json")
        if path.is_file()
    }
    try:
        (made / name).write_bytes(data)
        with_sums(made, name, data)
        try:
            BINARY[name](made)
        except MxdError as error:
            assert len(str(error).splitlines()) == 1
    finally:
        for path, content in kept.items():
            path.write_bytes(content)


@pytest.mark.parametrize("name", sorted(BINARY))
@pytest.mark.parametrize("data", HEADERS, ids=range(len(HEADERS)))
def test_safetensors_headers_that_lie(made: Path, name: str, data: bytes) -> None:
    try_binary(made, name, data)


def mutated(whole: bytes, dice: random.Random) -> bytes:
    """Bytes changed near the front, where the header is; or cut; or made longer."""
    data = bytearray(whole)
    for _ in range(dice.randrange(1, 6)):
        data[dice.randrange(min(len(data), 1200))] = dice.randrange(256)
    cut = dice.random()
    return bytes(data[: dice.randrange(len(data))]) if cut < 0.2 else bytes(data) + bytes(dice.randrange(64)) if cut < 0.3 else bytes(data)


def many_binaries(made: Path, number: int, dice: random.Random) -> None:
    wholes = {name: (made / name).read_bytes() for name in BINARY}
    for _ in range(number):
        name = dice.choice(sorted(wholes))
        try_binary(made, name, mutated(wholes[name], dice))


def test_safetensors_of_any_bytes(made: Path) -> None:
    many_binaries(made, 300, random.Random(0))


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_safetensors_of_any_bytes_many(made: Path) -> None:
    many_binaries(made, 45_000, random.Random(1))
    note("safetensors files of other bytes", inputs=45_000, crashes=0)


class _Malicious:
    """Whoever unpickles this runs a command."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def test_no_pickle_is_opened_whatever_it_is_called(made: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    data = pickle.dumps(_Malicious(mark))
    folder = tmp_path / "made"
    shutil.copytree(made, folder)
    for name, reader in {**READERS, **BINARY}.items():
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(data)
        with pytest.raises(MxdError):
            reader(folder)
        (folder / name).write_bytes(whole)
    assert not mark.exists()
    pickle.loads(data)
    assert mark.exists(), "it would have run"


PICKLING = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}


def test_nothing_in_the_source_unpickles() -> None:
    """Imports of pickle and calls of torch.load, which reads pickles; weights_only or not."""
    found: list[str] = []
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
                if PICKLING & {module, *(alias.name for alias in node.names)}:
                    found.append(f"{path.name}:{node.lineno}")
            elif isinstance(node, ast.Attribute) and node.attr == "load" and isinstance(node.value, ast.Name) and node.value.id == "torch":
                found.append(f"{path.name}:{node.lineno}")
    assert not found
