"""Collecting on a tiny host: numbers against the model itself, stopping and going on, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sqlite3
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mxd.checkpoint import Run
from mxd.cli import main
from mxd.errors import ConfigError, RunError
from mxd.explore import collect as module
from mxd.explore import databases, directions, gradients, reading
from mxd.explore.codes import Codes, codes_folder
from mxd.explore.collect import collect
from mxd.explore.store import TextStore, UnitStore, folder, units_path
from mxd.sealed import read_json, write_json
from mxd.text import Corpus
from mxd.unit_config import CollectConfig
from mxd.written import Written
from tests.evals.hosts import LENGTH, tiny_llama, write_run, write_text

KINDS = ("mxd", "mxd-pk", "mov", "cp-mumoe", "transcoder", "skip-transcoder", "topk-sae", "additive", "dense")
SMALL = CollectConfig(tokens=640, effect_tokens=160, contexts=3)
HOST = tiny_llama()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("collect") / "texts")


@pytest.fixture(scope="module")
def collected(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = write_run(tmp_path_factory.mktemp("collected") / "run", text, KINDS)
    collect(run, SMALL, opener(text))
    return run


def opener(text: Path) -> Any:
    return lambda: (HOST, Corpus(str(text)))


def bits(run: Run) -> dict[str, Any]:
    """Everything in the databases but the times."""
    found: dict[str, Any] = {}
    for path in sorted(folder(run).glob("*.sqlite")):
        with closing(sqlite3.connect(path)) as database:
            for (table,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
                rows = database.execute(f"SELECT * FROM {table}").fetchall()
                found[f"{path.name}/{table}"] = [row for row in rows if row[0] != "created"]
    return found


def test_every_kind_with_units_is_collected(collected: Run) -> None:
    for record in collected.students:
        if record.kind == "dense":
            assert not units_path(collected, record.name).exists()
            continue
        store = UnitStore(collected, record.name)
        codes = Codes(collected, record.name)
        assert store.n_units == record.n_units and store.tokens == 640 - 640 // LENGTH
        columns = store.columns()
        assert columns["fires"].sum() == codes.firings > 0
        live = columns["fires"] > 0
        assert np.isfinite(columns["max_a"][live]).all() and (columns["effect_n"][live] <= columns["fires"][live]).all()
        assert np.isfinite(columns["share"][live]).all() and (columns["share"][live] > 0).all()
        steady = columns["steadiness"]
        if record.kind in ("transcoder", "skip-transcoder", "topk-sae"):
            assert np.allclose(steady[live], 1), "a direction is steady"
        if record.kind == "mxd":
            assert (steady[live] < 0.999).any(), "an expert is a map"
            assert len(store.blobs(int(np.flatnonzero(live)[0]))["promoted"])
        assert store.meta["weights_sha256"] == collected.weights_sha256(record.name)
        assert {match["student"] for match in store.matches(int(np.flatnonzero(live)[0]))} >= {"mxd-k4"} - {record.name}


def test_the_codes_are_what_the_layer_says(collected: Run) -> None:
    text, host = TextStore(collected), HOST
    for name in ("mxd-k4", "topk-sae-k4"):
        layer, codes = collected.load(name), Codes(collected, name)
        for seq in (0, 17):
            ids = torch.from_numpy(text.sequence(seq).ids.astype(np.int64))[None]
            seen = host.read(ids, ["layers.1.mlp"])["layers.1.mlp"]
            code = layer.encode((seen.y if layer.reads == "output" else seen.x)[0])
            indices, values = codes.codes(seq * LENGTH, (seq + 1) * LENGTH)
            assert not values[0].any(), "the first token is left out"
            for position in range(1, LENGTH):
                expected = {int(n): float(a) for n, a in zip(code.indices[position], code.values[position], strict=True) if a > 0}
                found = {int(n): float(a) for n, a in zip(indices[position], values[position], strict=True) if a > 0}
                assert found == pytest.approx(expected, rel=1e-4)
        for unit in range(layer.n_units):
            tokens, values = codes.active(unit)
            assert (np.diff(tokens) > 0).all() and (values > 0).all()
        chunked = sum(len(chunk.tokens) for chunk in codes.chunks(50))
        assert chunked == codes.firings


class Without(nn.Module):
    """The host's own MLP plus a small part of what a unit writes taken away at one position."""

    def __init__(self, mlp: nn.Module, position: int, change: Tensor) -> None:
        super().__init__()
        self._mlp, self.position, self.change = [mlp], position, change

    def forward(self, x: Tensor) -> Tensor:
        y = self._mlp[0](x).clone()
        y[:, self.position] -= self.change
        return y


def test_effects_are_the_slope_of_the_hosts_loss(collected: Run) -> None:
    """Against finite differences through the whole host, for a map and for a direction."""
    sequence = TextStore(collected).sequence(1)
    ids = torch.from_numpy(sequence.ids.astype(np.int64))[None]
    loss = gradients.losses(HOST.logits(ids), ids)
    assert np.allclose(sequence.host_loss[1:], loss[0, 1:], atol=1e-5) and np.isnan(sequence.host_loss[0])
    for name in ("mxd-k4", "transcoder-k4"):
        layer, codes = collected.load(name), Codes(collected, name)
        seen = HOST.read(ids, ["layers.1.mlp"])["layers.1.mlp"]
        written = Written(layer, seen.x[0])
        (chunk,) = written.chunks(seen.x[0], seen.y[0])
        added = written.units(chunk)
        for position in (3, 9):
            tokens, units, _ = codes.of_tokens(2 * LENGTH)
            effects = np.asarray(codes._arrays["effects"])[: len(tokens)]
            for slot in range(layer.k):
                here = (tokens == LENGTH + position) & (units == int(chunk.code.indices[position, slot]))
                if not here.any():
                    continue
                step = 1e-2
                totals: list[float] = []
                for sign in (1, -1):
                    with HOST.replace({1: Without(HOST.mlp(1), position, sign * step * added[position, slot])}):
                        totals.append(float(gradients.losses(HOST.logits(ids), ids)[0, 1:].double().sum()))
                slope = (totals[0] - totals[1]) / (2 * step)
                assert effects[here][0] == pytest.approx(slope, rel=0.03, abs=2e-3)


def test_gradients_are_taken_where_they_were_asked_for(collected: Run) -> None:
    codes, text = Codes(collected, "mxd-k4"), TextStore(collected)
    tokens, _, _ = codes.of_tokens(codes.tokens)
    known = np.isfinite(np.asarray(codes._arrays["effects"]))
    assert (known == (tokens < 160)).all()
    assert np.isfinite(text.sequence(9).host_loss[1:]).all() and np.isnan(text.sequence(10).host_loss).all()


def test_a_stopped_pass_goes_on_to_the_same_bits(collected: Run, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", text, KINDS)
    monkeypatch.setattr(reading, "COMMIT_SEQUENCES", 8)
    for stop in (1, 3):

        def say(done: int, _note: str, stop: int = stop) -> None:
            if done >= stop * 8 * LENGTH:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            collect(run, SMALL, opener(text), say)
        assert read_json(folder(run) / "collect.json")["state"] == "failed"
    at = read_json(codes_folder(run, "mxd-k4") / "about.json")["sequences"]
    assert 8 <= at < 40
    with (codes_folder(run, "mxd-k4") / "values.f4").open("ab") as file:
        file.write(b"torn")  # of a write that was never committed
    collect(run, SMALL, opener(text))
    assert bits(run) == bits(collected)
    assert read_json(folder(run) / "collect.json")["state"] == "done"


def test_stopped_while_databases_are_made(collected: Run, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The databases in the making are given up at their next chunk, nothing of them is left, and none is begun."""
    run = write_run(tmp_path / "run", text, KINDS)
    begun, own = threading.Event(), databases.build

    def waits(*args: Any, halt: threading.Event, **how: Any) -> None:
        begun.set()
        assert halt.wait(20)
        own(*args, halt=halt, **how)

    def stops(*args: Any) -> Any:
        if begun.wait(1):
            raise KeyboardInterrupt
        return written(*args)

    written = directions.written
    monkeypatch.setattr(databases, "build", waits)
    monkeypatch.setattr(directions, "written", stops)
    with pytest.raises(KeyboardInterrupt):
        collect(run, SMALL, opener(text))
    monkeypatch.undo()
    assert [path.name for path in folder(run).glob("*.sqlite")] == ["text.sqlite"] and not list(folder(run).glob(".*.writing"))
    assert read_json(folder(run) / "collect.json")["why"] == "stopped"
    collect(run, SMALL, opener(text))
    assert bits(run) == bits(collected)


def test_what_goes_wrong_in_a_database_is_said(collected: Run, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", text, KINDS)
    own = databases.build

    def full(path: Path, *args: Any, **how: Any) -> None:
        if path.stem == "transcoder-k4":
            raise OSError(28, "No space left on device")
        own(path, *args, **how)

    monkeypatch.setattr(databases, "build", full)
    with pytest.raises(OSError, match="No space left"):
        collect(run, SMALL, opener(text))
    assert "No space left" in read_json(folder(run) / "collect.json")["why"]
    monkeypatch.undo()
    collect(run, SMALL, opener(text))
    assert bits(run) == bits(collected)


def test_students_are_added_to_what_is_there(collected: Run, text: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", text, KINDS)
    assert collect(run, dataclasses.replace(SMALL, students=("mxd-k4",)), opener(text)) == ["mxd-k4"]
    assert [p.stem for p in folder(run).glob("*.sqlite") if p.stem != "text"] == ["mxd-k4"]
    collect(run, SMALL, opener(text))
    assert bits(run) == bits(collected), "also matched with those that came later"


def test_what_is_there_is_not_collected_again(collected: Run, text: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder(collected).glob("*.sqlite")}
    assert collect(collected, SMALL, lambda: pytest.fail("the host is not needed")) == []
    assert before == {path: path.stat().st_mtime_ns for path in folder(collected).glob("*.sqlite")}


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"tokens": 320}, "tokens"),
        ({"contexts": 4}, "contexts"),
        ({"seed": 1}, "seed"),
        ({"effect_tokens": 0}, "effect_tokens"),
        ({"split": "test"}, "split"),
    ],
)
def test_other_options_need_overwrite_and_do_something(
    collected: Run, text: Path, tmp_path: Path, change: dict[str, Any], differs: str
) -> None:
    run = Run.open(shutil.copytree(collected.path, tmp_path / "run"))
    with closing(sqlite3.connect(units_path(run, "mxd-k4"), isolation_level=None)) as database:
        database.execute("INSERT INTO label VALUES (3, 'me', 'kept', 'model', 'm', 0.75, 60, NULL, NULL, 'now')")
    other = dataclasses.replace(SMALL, **change)
    with pytest.raises(RunError, match=f"collected with other options.*{differs}.*--overwrite"):
        collect(run, other, opener(text))
    before = bits(run)
    collect(run, dataclasses.replace(other, overwrite=True), opener(text))
    after = bits(run)
    tables = [key for key in after if key.endswith(("/unit", "/example", "/seq")) and after[key] != before[key]]
    assert tables, "the option does something"
    assert UnitStore(run, "mxd-k4").labels([3])[3][0]["text"] == "kept" and UnitStore(run, "mxd-k4").row(3)["score"] == 0.75


def test_retrained_students_are_collected_anew(collected: Run, text: Path, tmp_path: Path) -> None:
    run = Run.open(shutil.copytree(collected.path, tmp_path / "run"))
    about = run.path / run.student("mxd-k4").folder / "cfg.json"
    changed = read_json(about)
    changed["mxd"]["weights_sha256"] = "1" * 64
    write_json(about, changed)
    assert not module._finished(run, run.student("mxd-k4"), SMALL)
    assert module._finished(run, run.student("transcoder-k4"), SMALL)


def test_probes_of_a_newer_report_are_taken_over(collected: Run, tmp_path: Path) -> None:
    run = Run.open(shutil.copytree(collected.path, tmp_path / "run"))
    cell = {"k1": {"classes": [{"class": "law", "units": [5], "f1": 0.9}, {"class": "no", "units": [5], "f1": 0.4}]}}
    tasks = {"topics": {"samples": {"test": 120}, "figures": {"student": {"code": cell, "pre": cell}}}, "none": {"figures": {}}}
    report = {"format_version": 1, "students": [{"name": "mxd-k4", "probes": {"tasks": tasks}}, {"name": "transcoder-k4"}]}
    (run.path / "report.json").write_text(json.dumps(report))
    collect(run, SMALL, lambda: pytest.fail("the host is not needed"))
    store = UnitStore(run, "mxd-k4")
    assert store.probes([5])[5] == [
        {"task": "topics", "class": "law", "f1": 0.9, "n": 120},
        {"task": "topics", "class": "no", "f1": 0.4, "n": 120},
    ]
    assert store.row(5)["probe_f1"] == 0.9 and store.row(4)["probe_f1"] is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"split": "train"}, "unknown --split"),
        ({"tokens": 0}, "nothing to collect"),
        ({"contexts": 51}, "1 to 50"),
        ({"students": ("dense",)}, "no units to look at"),
        ({"students": ("nobody",)}, "no student of that name"),
    ],
)
def test_bad_options_are_refused_before_the_host_is_loaded(collected: Run, change: dict[str, Any], said: str) -> None:
    with pytest.raises((ConfigError, RunError), match=said):
        collect(collected, dataclasses.replace(SMALL, **change), lambda: pytest.fail("not reached"))


def test_a_full_disk_is_seen_ahead(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", text, ("mxd",))
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10, 10, 1000))  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="no room"):
        collect(run, SMALL, opener(text))


def test_damaged_codes_are_found(collected: Run, text: Path, tmp_path: Path) -> None:
    run = Run.open(shutil.copytree(collected.path, tmp_path / "run"))
    values = codes_folder(run, "mxd-k4") / "values.f4"
    values.write_bytes(values.read_bytes()[:-4])
    with pytest.raises(RunError, match=r"values\.f4 is damaged.*mxd collect"):
        Codes(run, "mxd-k4")
    units = codes_folder(run, "transcoder-k4") / "units.u4"
    units.write_bytes(b"\xff" * len(units.read_bytes()))
    with pytest.raises(RunError, match="is damaged"):
        Codes(run, "transcoder-k4")
    with pytest.raises(RunError, match="are not there"):
        (codes_folder(run, "mov-k4") / "about.json").unlink()
        Codes(run, "mov-k4")
    ids = folder(run) / "codes" / "ids.npy"
    ids.write_bytes(ids.read_bytes()[:-8] + b"\0" * 8)
    units_path(run, "mxd-k4").unlink()
    with pytest.raises(RunError, match=r"ids\.npy"):
        collect(run, SMALL, opener(text))


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import mxd
    from tests.small import small_run

    mxd.train(small_run(tmp_path, kinds=("mxd", "transcoder"), tokens=512, number=220), quiet=True)
    run = str(tmp_path / "run")
    options = ["--tokens", "1024", "--effect-tokens", "128", "--contexts", "2", "--device", "cpu"]
    assert main(["collect", run, *options, "--students", "mxd-k2"]) == 0
    assert "mxd-k2 in" in capsys.readouterr().out
    assert main(["collect", run, *options, "--students", "mxd-k2"]) == 0
    assert "collected already" in capsys.readouterr().out
    assert main(["collect", run, *options, "--seed", "3"]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main(["collect", str(tmp_path / "nowhere")]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_the_loss_is_the_definitions() -> None:
    """Against the definition, and a uniform model by hand."""
    ids = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]])
    found = gradients.losses(torch.zeros(2, 4, 10), ids)
    assert torch.isnan(found[:, 0]).all() and torch.allclose(found[:, 1:], torch.tensor(10.0).log())
    loss, seen = gradients.read(HOST, ids, ["layers.0.mlp"])
    assert torch.allclose(loss[:, 1:], gradients.losses(HOST.logits(ids), ids)[:, 1:], atol=1e-5)
    (only,) = seen.values()
    assert only.gradient.abs().sum() > 0 and only.x.shape[:2] == (2, 4)
    assert HOST.model.get_submodule("model.layers.0.mlp") is HOST.mlp(0), "the host is left as it was"


def test_a_token_stands_in_the_document_that_the_ends_of_text_before_it_say(collected: Run, text: Path) -> None:
    store = TextStore(collected)
    sequence = next(s for s in map(store.sequence, range(40)) if 1 in s.ids[2:-2].tolist())
    at = sequence.ids.tolist().index(1)
    names = {position: store.document(sequence, position)[0] for position in (at - 1, at, at + 1)}
    assert names[at - 1] == names[at] != names[at + 1], "an end of text belongs to the document that it ends"
    words = {
        name: [store.tokens[int(token)] for token in part]
        for name, part in ((names[at], sequence.ids[1:at]), (names[at + 1], sequence.ids[at + 1 :]))
    }
    documents = [" ".join(path.read_text(encoding="utf-8").split()) for path in text.glob("*.txt")]
    for name, said in words.items():
        (whole,) = [document for document in documents if document.startswith(name)]
        assert " ".join(said) in whole
    assert store.tokens[1] == "</s>" and 1 in store.special and store.tokens[5] == "w2"
