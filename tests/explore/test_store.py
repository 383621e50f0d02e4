"""Databases are read with checks; notes are kept."""

from __future__ import annotations

import shutil
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from mxd.checkpoint import Run
from mxd.errors import RunError
from mxd.explore import schema
from mxd.explore.notes import Conflict, Notes
from mxd.explore.store import TextStore, UnitStore, create, making, notes_path, units_path
from tests.explore.handmade import make_store


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_store(tmp_path_factory.mktemp("store"), n_units=60, tokens=2048)


@pytest.fixture
def copy(run: Run, tmp_path: Path) -> Run:
    return Run.open(shutil.copytree(run.path, tmp_path / "run"))


def change(run: Run, *statements: str) -> Path:
    path = units_path(run, "mxd-k2")
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        for statement in statements:
            database.execute(statement)
    return path


def test_the_planted_units(run: Run) -> None:
    store, text = UnitStore(run, "mxd-k2"), TextStore(run)
    columns = store.columns()
    assert columns["state"][:3].tolist() == [0, 3, 2]
    assert columns["fires"][0] == 0 and columns["fires"][1] == store.tokens == 2048 - 64
    assert columns["top_token_share"][2] == 1 and columns["token_entropy"][2] == 0
    assert columns["partner"][2] == 3 and store.matches(2)[0]["jaccard"] == 1
    examples = store.examples(2)
    assert sum(fires for band, (fires, _) in examples.items() if band) == columns["fires"][2]
    for _, contexts in examples.values():
        for c in contexts:
            sequence = text.sequence(c.seq)
            units = sequence.text.encode("utf-16-le")
            start, end = int(sequence.cuts[c.start + c.peak]), int(sequence.cuts[c.start + c.peak + 1])
            assert units[2 * start : 2 * end].decode("utf-16-le") == "t"
            assert c.a == 1 + c.start + c.peak
    assert store.best([1, 2, 0])[2].rank == 0 and 0 not in store.best([0])
    assert store.hists([2])[2].sum() == columns["fires"][2]
    assert store.best_matches()["transcoder-k2"][2] == 1
    assert store.row(0)["max_a"] is None and store.blobs(0)["peak_tokens"].size == 0


@pytest.mark.parametrize(
    ("statements", "said"),
    [
        (["CREATE VIEW v AS SELECT 1"], "other tables"),
        (["CREATE TRIGGER t AFTER INSERT ON label BEGIN SELECT 1; END"], "other tables"),
        (["DROP TABLE match"], "other tables"),
        (["PRAGMA application_id = 1"], "another program"),
        ([f"PRAGMA user_version = {schema.VERSION + 1}"], "newer mxd"),
        (["DELETE FROM unit WHERE unit = 3"], "another number of units"),
        (["DELETE FROM meta WHERE key = 'tokens'"], "damaged"),
    ],
)
def test_a_database_that_is_not_ours_is_refused(copy: Run, statements: list[str], said: str) -> None:
    change(copy, *statements)
    with pytest.raises(RunError, match=said):
        UnitStore(copy, "mxd-k2")


def test_damaged_rows_are_refused_one_by_one(copy: Run) -> None:
    change(
        copy,
        "UPDATE unit_blob SET hist = x'0102' WHERE unit = 5",
        "UPDATE example SET data = substr(data, 1, 9) WHERE unit = 6",
        "UPDATE unit SET fires = 'many' WHERE unit = 7",
    )
    store = UnitStore(copy, "mxd-k2")
    for broken in (lambda: store.blobs(5), lambda: store.examples(6), lambda: store.row(7), lambda: store.columns(("fires",))):
        with pytest.raises(RunError, match="damaged"):
            broken()
    assert store.examples(2), "the others are still read"
    with pytest.raises(RunError, match="no unit 9999"):
        store.row(9999)
    with pytest.raises(RunError, match="no column"):
        store.columns(("fires; DROP TABLE unit",))


def test_text_and_garbage(copy: Run) -> None:
    with pytest.raises(RunError, match="no sequence 777"):
        TextStore(copy).sequence(777)
    units_path(copy, "mxd-k2").write_bytes(b"SQLite format 3\0" + b"\xff" * 5000)
    with pytest.raises(RunError, match="damaged"):
        UnitStore(copy, "mxd-k2")
    units_path(copy, "mxd-k2").unlink()
    with pytest.raises(RunError, match="next: mxd collect"):
        UnitStore(copy, "mxd-k2")


def test_a_writer_killed_in_the_middle_leaves_nothing_damaged(copy: Run, tmp_path: Path) -> None:
    path = units_path(copy, "mxd-k2")
    before = UnitStore(copy, "mxd-k2").columns()["fires"]
    with closing(sqlite3.connect(path, isolation_level=None)) as writer:
        writer.execute("PRAGMA cache_size = 1")
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("UPDATE unit SET fires = 7")
        writer.execute("UPDATE unit_blob SET hist = zeroblob(100000)")  # more than the cache holds: it goes to the file
        killed = tmp_path / "killed"
        shutil.copytree(copy.path, killed)
        writer.execute("ROLLBACK")
    run = Run.open(killed)
    assert units_path(run, "mxd-k2").with_name("mxd-k2.sqlite-journal").is_file()
    store = UnitStore(run, "mxd-k2")
    assert (store.columns()["fires"] == before).all() and store.hists([2])[2].sum() > 0


def test_a_query_that_never_ends_is_ended(run: Run) -> None:
    store = UnitStore(run, "mxd-k2")
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
    with pytest.raises(RunError, match="took too long"):
        store.ask(endless, seconds=0.05)
    assert store.row(2), "and the next one is answered"


def test_a_database_is_made_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "one.sqlite"
    with pytest.raises(ZeroDivisionError), making(path, schema.NOTES, {"a": "b"}):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with making(path, schema.NOTES, {"a": "b"}):
        assert not path.exists()
    assert path.is_file() and len(list(tmp_path.iterdir())) == 1


def test_labels_are_searched_as_plain_words(copy: Run) -> None:
    change(
        copy,
        "INSERT INTO label VALUES (3, 'someone', '100% treaties_signed', 'model', 'm', 0.9, 60, NULL, NULL, '2026')",
        "INSERT INTO label VALUES (3, 'statistical', 'other', 'statistical', '', 0.5, 60, NULL, NULL, '2027')",
    )
    store = UnitStore(copy, "mxd-k2")
    assert store.labelled("TREATIES") == [3] and store.labelled("0%") == [3] and store.labelled("s_s") == [3]
    assert store.labelled("1%t") == [] and store.labelled("'; DROP") == []
    assert [label["author"] for label in store.labels([3])[3]] == ["someone", "statistical"], "a model's before statistical ones"


def test_notes(copy: Run) -> None:
    notes = Notes(copy)
    assert notes.all() == [] and not notes.path.exists(), "made at the first write"
    first = notes.put("sha", 3, "mxd-k2", star=True, text="<b>bold</b>", tags=["law"], expected=None)
    assert first and first["star"] and first["text"] == "<b>bold</b>" and first["tags"] == ["law"]
    second = notes.put("sha", 3, "mxd-k2", star=False, text="changed", tags=[], expected=first["updated"])
    with pytest.raises(Conflict) as conflict:
        Notes(copy).put("sha", 3, "mxd-k2", star=False, text="late", tags=[], expected=first["updated"])
    assert conflict.value.current["text"] == "changed"
    assert Notes(copy).get("sha", 3) == second, "another process sees it"
    with pytest.raises(RunError, match="too long"):
        notes.put("sha", 4, "mxd-k2", star=False, text="x" * 20_001, tags=[], expected=None)
    assert second and notes.put("sha", 3, "mxd-k2", star=False, text="", tags=[], expected=second["updated"]) is None
    assert notes.all() == []
    name = notes.save_bench("mxd-k2", {"prompt": "a"}, {"lanes": []})
    assert notes.benches()[0]["id"] == name
    notes.delete_bench(name)
    assert notes.benches() == []
    notes.save_sentence({"text": "a b"}, "a b", ["mxd-k2"], {"mean_from": 0})
    name = notes.save_sentence({"text": "a b"}, "a b", ["mxd-k2"], {"mean_from": 1})
    assert [(one["id"], one["request"], one["students"]) for one in notes.sentences()] == [(name, {"text": "a b"}, ["mxd-k2"])], "once"
    assert notes.sentence(name) == {"mean_from": 1} and notes.sentence("other") is None
    notes.delete_sentence(name)
    assert notes.sentences() == []


def test_notes_of_before_sentences_were_kept(copy: Run) -> None:
    older = {name: made for name, made in schema.NOTES.items() if name != "sentence"}
    notes_path(copy).parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(notes_path(copy))) as database, database:
        create(database, older)
        database.execute("INSERT INTO note VALUES ('sha', 3, 'mxd-k2', 1, 'old', '[]', '2026')")
    notes = Notes(copy)
    assert [note["text"] for note in notes.all()] == ["old"] and notes.sentences() == []
    assert notes.save_sentence({"seq": 1}, "a", ["mxd-k2"], {})
    notes.close()
    with closing(sqlite3.connect(notes_path(copy))) as database, database:
        database.execute("DROP TABLE bench")
    with pytest.raises(RunError, match="damaged"):
        Notes(copy)


def test_notes_of_many_threads(copy: Run) -> None:
    notes = Notes(copy)
    threads = [
        threading.Thread(target=lambda u=u: notes.put("sha", u, "mxd-k2", star=True, text=str(u), tags=[], expected=None))
        for u in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(note["unit"] for note in notes.all()) == list(range(20))


def test_strange_notes_are_refused(copy: Run) -> None:
    path = Notes(copy).path
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE note (x)")
    with pytest.raises(RunError, match="damaged"):
        Notes(copy).all()


def test_columns_are_float32_in_the_order_of_units(run: Run) -> None:
    store = UnitStore(run, "mxd-k2")
    fires = store.columns(("fires",))["fires"]
    assert fires.dtype == np.float32 and fires.shape == (store.n_units,)
    assert fires[5] == store.row(5)["fires"]
