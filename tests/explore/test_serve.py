"""The page's server: what each address answers, from made-up databases and a tiny host, and the program around it."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mxd import cli
from mxd.checkpoint import Run
from mxd.config import EvalConfig
from mxd.edits import check, load_edit
from mxd.edits import read as read_edit
from mxd.errors import RunError
from mxd.explore import answers, asks, routes, schema, serve
from mxd.explore.guards import Keys
from mxd.explore.live import Worker, loader
from mxd.explore.routes import Site
from mxd.explore.shelf import Shelf
from mxd.explore.store import text_path, units_path
from mxd.pipeline import evaluate
from tests.explore import keepsakes
from tests.explore.browser import MXD, OTHER, Client, columns_of, no_host, strict, until
from tests.explore.handmade import LETTER

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def browse() -> Iterator[Callable[..., Client]]:
    """Opens a run for reading."""
    opened: list[Site] = []

    def browse(run: Run, *, load: Callable[[], Any] = no_host, **options: Any) -> Client:
        site = Site(Shelf(run.path), Worker(load), **options)
        opened.append(site)
        return Client(site)

    yield browse
    for site in opened:
        site.close()


@pytest.fixture(scope="module")
def read(made: Run) -> Iterator[Client]:
    site = Site(Shelf(made.path), Worker(no_host))
    yield Client(site)
    site.close()


@pytest.fixture(scope="module")
def live(made: Run) -> Iterator[Client]:
    """With its host."""
    shelf = Shelf(made.path)
    site = Site(shelf, Worker(loader(shelf, "cpu")))
    site.worker.start()
    site.worker.go()
    client = Client(site)
    until(lambda: client.get("/api/status")["host"]["state"] == "ready", 60)
    yield client
    site.close()


# ---- the page itself --------------------------------------------------------------------------------------------------------


def test_the_page_and_its_files(read: Client) -> None:
    page = read.http.get("/")
    assert page.headers["content-type"].startswith("text/html") and "<script" in page.text
    asked = re.findall(r'(?:src|href)="(/static/[^"]+)"', page.text)
    assert {path.removeprefix("/static/") for path in asked} == set(routes.STATIC)
    for path in asked:
        answer = read.http.get(path)
        assert answer.status_code == 200 and answer.content
        assert read.http.get(path, headers={"if-none-match": answer.headers["etag"]}).status_code == 304


@pytest.mark.parametrize(
    "path", ["/static/index.html", "/static/..%2Froutes.py", "/static/%2e%2e/routes.py", "/static/packed.js", "/favicon.ico"]
)
def test_nothing_else_is_served(read: Client, path: str) -> None:
    read.error("GET", path, 404)


def test_what_is_not_answered_that_way(read: Client) -> None:
    read.error("POST", "/api/run", 405, {})
    read.error("OPTIONS", "/api/run", 405)
    read.error("GET", "/api/nothing", 404)


def test_status_without_a_host(read: Client, browse: Callable[..., Client], made: Run) -> None:
    found = read.get("/api/status")
    assert found["host"] == {"state": "loading", "name": made.info["host"]["name"], "progress": None, "why": None}
    assert (found["queue"], found["job"], found["veil"], found["collect"]["state"]) == (0, None, False, "none")
    veiled = browse(made, veil=True)
    assert veiled.get("/api/status")["veil"] is True
    veiled.site.worker.start()
    veiled.site.worker.go()
    until(lambda: veiled.get("/api/status")["host"]["state"] == "failed")
    assert veiled.get("/api/status")["host"]["why"]["next"] == "mxd fetch"
    for path, body in (("/api/sentence", {"text": "a", "students": [MXD]}), ("/api/generate", {"student": MXD, "prompt": "a"})):
        assert veiled.error("POST", path, 503, body)["got"] == "no host here"
    assert veiled.get(f"/api/s/{MXD}/units/1")["unit"] == 1, "what needs no host is answered"
    assert veiled.get(f"/api/s/{MXD}/search", q="t")["host_needed"] is True


def test_looking_at_the_run_wakes_the_host(made: Run, browse: Callable[..., Client]) -> None:
    asked: list[int] = []

    def load() -> Any:
        asked.append(1)
        raise RunError("none")

    client = browse(made, load=load)
    client.site.worker.start()
    client.get("/api/status")
    time.sleep(0.05)
    assert not asked
    client.get("/api/run")
    until(lambda: bool(asked))


# ---- the run ----------------------------------------------------------------------------------------------------------------


def test_the_run_says_who_it_is(read: Client, made: Run) -> None:
    found = read.get("/api/run")
    assert found["name"] == "run" and found["host_fingerprint"] == made.info["host"]["fingerprint"]
    assert found["report"] is None and "mxd eval" in found["report_why"]["next"]
    by_name = {student["name"]: student for student in found["students"]}
    assert [by_name[name]["word"] for name in (MXD, OTHER, "dense")] == ["expert", "latent", "none"]
    assert by_name["dense"]["store"] is None and by_name["dense"]["why"]["what"] == "dense has no units"
    own = by_name[MXD]
    assert own["weights_sha256"] == own["store"]["weights_sha256"] == made.weights_sha256(MXD)
    assert own["store"]["labelled"] == 1 and own["figures"] is None
    states = [own["store"][name] for name in schema.STATES]
    assert sum(states) == own["n_units"] and states[0] >= 1 and states[3] >= 1
    assert sum(own["frequency"]["counts"]) + own["frequency"]["dead"] == own["n_units"] and len(own["frequency"]["edges"]) == 41
    assert {banner["about"] for banner in found["banners"] if banner["student"] == MXD} >= {"shared", "tokens"}
    assert len(found["examples"]) == 3 and all(example["text"] for example in found["examples"])


def test_the_figures_are_the_reports(run: Run, browse: Callable[..., Client]) -> None:
    evaluate(run, EvalConfig(sequences=8, fit_tokens=512, bootstrap=20, permutations=1), quiet=True)
    report = json.loads((run.path / "report.json").read_text())
    found = browse(run).get("/api/run")
    assert found["report"]["base_ce"] == report["base_ce"] and "students" not in found["report"]
    for student, figures in zip(found["students"], report["students"], strict=True):
        assert student["figures"] == {name: value for name, value in figures.items() if name != "firing_histogram"}
    (run.path / "report.json").write_text("{}")
    assert found["report"] and browse(run).get("/api/run")["report_why"]["what"].endswith("is damaged")


# ---- units ------------------------------------------------------------------------------------------------------------------


def test_columns_are_those_of_the_database(read: Client, made: Run) -> None:
    names = [*schema.COLUMNS, "star", "labelled"]
    answer = read.http.get(f"/api/s/{MXD}/columns", params={"names": ",".join(names)})
    header, columns = columns_of(answer.content)
    assert header["names"] == names and header["weights_sha256"] == made.weights_sha256(MXD)
    with sqlite3.connect(units_path(made, MXD)) as database:
        rows = database.execute(f"SELECT {', '.join(schema.COLUMNS)} FROM unit ORDER BY unit").fetchall()
    database.close()
    for i, name in enumerate(schema.COLUMNS):
        assert np.array_equal(columns[name], np.array([row[i] for row in rows], np.float32), equal_nan=True), name
    assert columns["labelled"].nonzero()[0].tolist() == [1] and not columns["star"].any()
    assert np.isnan(columns["score"]).all()
    path, params = f"/api/s/{MXD}/columns", {"names": "fires"}
    tag = read.http.get(path, params=params).headers["etag"]
    assert read.http.get(path, params=params, headers={"if-none-match": tag}).status_code == 304
    assert read.http.get(path, params={"names": "state"}, headers={"if-none-match": tag}).status_code == 200
    assert read.error("GET", f"{path}?names=fires,weights", 404)["got"] == "weights"
    assert columns_of(read.http.get(path).content)[0]["names"] == []


def test_rows_hold_what_the_table_shows(read: Client) -> None:
    found = read.get(f"/api/s/{MXD}/rows", units="2,0,1")["units"]
    assert [row["unit"] for row in found] == [2, 0, 1]
    letter, dead, shared = found
    assert letter["top_token"] == "t" and shared["label"]["text"] == "all letters" and letter["label"] is None
    assert dead["best"] is None and dead["top_token"] is None and dead["note"] is None
    assert len(letter["best"]["cuts"]) <= 22 and letter["best"]["text"][letter["best"]["cuts"][letter["best"]["peak"]]] == "t"
    assert len(letter["spark"]) == 24 and sum(letter["spark"]) == read.get(f"/api/s/{MXD}/units/2")["columns"]["fires"]
    assert read.get(f"/api/s/{MXD}/rows")["units"] == []
    for units, status in (("1,x", 400), ("-1", 400), ("99999", 404), (",".join(map(str, range(201))), 422)):
        read.error("GET", f"/api/s/{MXD}/rows?units={units}", status)


def test_a_unit_and_its_contexts(read: Client, made: Run) -> None:
    found = read.get(f"/api/s/{MXD}/units/2")
    assert (found["word"], found["state"], found["student"]) == ("expert", "live", MXD)
    assert found["peak_tokens"] == [{"id": LETTER, "token": "t", "count": found["columns"]["fires"], "share": 1.0}]
    assert 3 in {partner["unit"] for partner in found["partners"]} and found["partners"][0]["jaccard"] == 1.0
    assert found["matches"][0] | {"student": OTHER, "unit": 2} == found["matches"][0]
    assert sum(found["hist"]["counts"]) == found["columns"]["fires"] and found["hist"]["max"] == found["columns"]["max_a"]
    with sqlite3.connect(text_path(made)) as database:
        texts = dict(database.execute("SELECT seq, text FROM seq").fetchall())
    database.close()
    for band in found["bands"]:
        assert band["name"] == schema.BANDS[band["band"]] and len(band["contexts"]) <= 10
        for context in band["contexts"]:
            assert context["text"] in texts[context["seq"]] and len(context["cuts"]) == len(context["ids"]) + 1
            position = context["start"] + context["peak"]
            if band["band"] < schema.TWINS:
                assert context["a"] == 1 + position and dict(context["levels"])[context["peak"]] >= 1
                assert band["low"] <= context["a"] <= band["high"]
                assert context["text"][context["cuts"][context["peak"]]] == "t"
            assert context["doc"]["name"] and set(context["doc"]) == {"name", "source"}
    limits = {band["band"]: (band["low"], band["high"]) for band in found["bands"]}
    assert limits[0][1] == limits[1][1] == found["columns"]["max_a"]
    assert all(limits[band][1] == limits[band - 1][0] for band in range(2, schema.TWINS)), "double deciles lie side by side"
    dead = read.get(f"/api/s/{MXD}/units/0")
    assert dead["state"] == "dead" and dead["bands"] == [] and -1 <= dead["nearest"]["cosine"] <= 1 and dead["nearest"]["unit"] != 0
    assert dead["norm"] > 0 and dead["gate_bias"] is not None
    layer = made.load(MXD)
    units = layer.units()
    assert units is not None and found["norm"] == pytest.approx(float(units.table[2].detach().norm()), rel=1e-4)


def test_one_band_of_a_unit_in_pieces(read: Client) -> None:
    whole = read.get(f"/api/s/{MXD}/units/1", band=2, n=100)["bands"]
    assert [band["band"] for band in whole] == [2]
    parts = [read.get(f"/api/s/{MXD}/units/1", band=2, start=start, n=3)["bands"][0]["contexts"] for start in (0, 3, 6, 9)]
    assert [context for part in parts for context in part] == whole[0]["contexts"]
    for bad, status in (("band=7", 404), ("n=101", 422), ("n=0", 422), ("from=-1", 400), ("band=x", 400), ("n=1e3", 400)):
        read.error("GET", f"/api/s/{MXD}/units/1?{bad}", status)
    read.error("GET", f"/api/s/{MXD}/units/99999", 404)
    read.error("GET", f"/api/s/{MXD}/units/x", 404)
    assert MXD in read.error("GET", "/api/s/nobody/units/1", 404)["expected"]
    read.error("GET", "/api/s/dense/units/0", 404)


def test_a_search_in_labels_notes_and_tokens(run: Run, browse: Callable[..., Client]) -> None:
    client = browse(run)
    client.http.put(f"/api/s/{MXD}/notes/7", json={"star": True, "text": "Letters of PEACE", "tags": ["history"]})
    found = client.get(f"/api/s/{MXD}/search", q="LETTERS")
    assert found["by"] == {"label": [1], "note": [7], "token": [], "text": []} and found["units"] == [1, 7]
    assert client.get(f"/api/s/{MXD}/search", q="histor")["by"]["note"] == [7]
    tokens = client.get(f"/api/s/{MXD}/search", within="token", q=" T ")
    assert {1, 2, 3} <= set(tokens["by"]["token"]) and 0 not in tokens["units"] and tokens["host_needed"] is False
    assert client.get(f"/api/s/{MXD}/search", q="%")["by"]["label"] == [], "a sign of LIKE is a sign"
    assert client.get(f"/api/s/{MXD}/search", q="")["units"] == []
    client.error("GET", f"/api/s/{MXD}/search?q={'x' * 201}", 422)
    client.error("GET", f"/api/s/{MXD}/search?q=x&in=weights", 422)


def test_matches_between_students(read: Client) -> None:
    found = read.get(f"/api/s/{MXD}/matches")["students"]
    assert set(found) == {OTHER}
    best = found[OTHER]["best"]
    assert best == sorted(best, reverse=True) and best[0] == 1.0 and found[OTHER]["without"] == sum(value < 0.1 for value in best)


# ---- notes and bench runs ---------------------------------------------------------------------------------------------------


def test_notes_are_kept_and_conflicts_told(run: Run, browse: Callable[..., Client]) -> None:
    client, path = browse(run), f"/api/s/{MXD}/notes/5"
    empty = client.get(path)
    assert (empty["star"], empty["text"], empty["updated"]) == (False, "", None)
    note = client.http.put(path, json={"star": True, "text": "<b>first</b>\u202e", "tags": ["a"]}).json()
    assert note["text"] == "<b>first</b>\u202e" and client.get(path) == note
    again = client.http.put(path, json={"text": "second", "tags": []}, headers={"if-match": f'"{note["updated"]}"'})
    assert again.status_code == 200 and again.json()["star"] is False
    for headers in ({}, {"if-match": note["updated"]}):
        lost = client.http.put(path, json={"text": "third"}, headers=headers)
        assert lost.status_code == 409 and lost.json()["current"]["text"] == "second" and lost.json()["error"]["what"]
    assert client.get(path)["text"] == "second"
    assert [(n["unit"], n["stale"]) for n in client.get("/api/notes")["notes"]] == [(5, False)]
    star = client.http.put(f"/api/s/{MXD}/notes/6", json={"star": True, "text": "", "tags": []}).json()
    _, columns = columns_of(client.http.get(f"/api/s/{MXD}/columns", params={"names": "star"}).content)
    assert columns["star"].nonzero()[0].tolist() == [6]
    gone = client.http.put(f"/api/s/{MXD}/notes/6", json={}, headers={"if-match": star["updated"]})
    assert gone.json() is None and len(client.get("/api/notes")["notes"]) == 1


def test_notes_that_cannot_be(run: Run, browse: Callable[..., Client]) -> None:
    client, path = browse(run), f"/api/s/{MXD}/notes/5"
    for body, status in (
        ({"text": "x" * 20_001}, 413),
        ({"tags": ["x"] * 21}, 413),
        ({"tags": ["x" * 61]}, 413),
        ({"text": 1}, 422),
        ({"tags": "a"}, 422),
        ({"star": 1}, 422),
        ([], 400),
    ):
        client.error("PUT", path, status, body)
    client.error("PUT", f"/api/s/{MXD}/notes/99999", 404, {"text": "a"})
    assert client.http.put(path, content=b'{"text": "\\ud83d"}', headers={"content-type": "application/json"}).json()["text"] == "\ufffd"
    assert client.http.put(path, content=b"{", headers={"content-type": "application/json"}).status_code == 400


def test_notes_on_other_weights_are_stale(run: Run, browse: Callable[..., Client]) -> None:
    client = browse(run)
    client.http.put(f"/api/s/{MXD}/notes/5", json={"text": "kept"})
    client.site.shelf.notes.put("other weights", 5, MXD, star=True, text="old", tags=[], expected=None)
    assert {note["text"]: note["stale"] for note in client.get("/api/notes")["notes"]} == {"kept": False, "old": True}
    assert client.get(f"/api/s/{MXD}/notes/5")["text"] == "kept"


def test_bench_runs_are_kept(run: Run, browse: Callable[..., Client]) -> None:
    client = browse(run)
    assert client.get("/api/bench") == {"runs": []}
    asked, result = keepsakes.bench_run()
    kept = client.post("/api/bench", {"student": MXD, "request": asked, "result": result})["id"]
    assert [(r["id"], r["request"], r["result"], r["student"]) for r in client.get("/api/bench")["runs"]] == [(kept, asked, result, MXD)]
    client.error("POST", "/api/bench", 422, {"student": MXD, "request": [], "result": {}})
    client.error("POST", "/api/bench", 422, {"student": MXD, "request": asked, "result": {"lanes": {}}})
    client.error("POST", "/api/bench", 413, {"student": MXD, "request": {}, "result": {"text": "x" * 210_000}})
    client.site.shelf.notes.save_bench(MXD, asked, {"lanes": {}})
    assert [r["id"] for r in client.get("/api/bench")["runs"]] == [kept], "what is not whole is not shown"
    client.error("POST", "/api/bench", 404, {"student": "nobody", "request": {}, "result": {}})
    assert client.http.delete(f"/api/bench/{kept}").status_code == 200 and client.get("/api/bench") == {"runs": []}


def test_an_export_is_a_file_of_about_the_size_told(run: Run, browse: Callable[..., Client]) -> None:
    client = browse(run)
    body = {"students": [MXD], "what": "filter", "units": [1, 2, 3], "contexts": 2}
    size = client.post("/api/export/size", body)
    answer = client.http.post("/api/export", json=body)
    assert answer.status_code == 200 and answer.headers["content-disposition"] == 'attachment; filename="run.html"'
    assert size["units"] == 3 and abs(len(answer.content) - size["bytes"]) < 0.1 * size["bytes"]
    for bad, status in (({"what": "all"}, 422), ({"what": "filter"}, 422), ({"students": ["nobody"]}, 404), ({"n": 0}, 422)):
        client.error("POST", "/api/export", status, {**body, **bad, **({"units": None} if bad == {"what": "filter"} else {})})


# ---- what goes wrong with files ---------------------------------------------------------------------------------------------


def test_a_new_collection_shows_without_a_restart(run: Run, browse: Callable[..., Client]) -> None:
    path = units_path(run, MXD)
    kept = path.rename(path.with_name("away"))
    client = browse(run)
    assert client.get("/api/run")["students"][0]["why"]["next"] == f"mxd collect {run.path}"
    client.error("GET", f"/api/s/{MXD}/units/2", 404)
    shutil.copy(kept, path)
    assert client.get("/api/run")["students"][0]["store"]["labelled"] == 1
    other = path.with_name("other")
    shutil.copy(kept, other)
    with sqlite3.connect(other) as database:
        database.execute("UPDATE unit SET fires = 123 WHERE unit = 2")
    database.close()
    os.replace(other, path)
    assert client.get(f"/api/s/{MXD}/units/2")["columns"]["fires"] == 123


def test_a_run_that_is_moved_away_is_an_error_and_comes_back(run: Run, browse: Callable[..., Client]) -> None:
    client = browse(run)
    client.http.put(f"/api/s/{MXD}/notes/5", json={"text": "kept"})
    away = run.path.with_name("away")
    run.path.rename(away)
    for path in ("/api/run", f"/api/s/{MXD}/units/1", f"/api/s/{MXD}/columns?names=fires", "/api/notes"):
        assert "does not exist" in client.error("GET", path, 503)["what"]
    client.error("PUT", f"/api/s/{MXD}/notes/5", 503, {"text": "lost?"})
    assert not run.path.exists(), "nothing is written where the run was"
    assert client.get("/api/status")["host"]["name"] is None and client.http.get("/").status_code == 200
    away.rename(run.path)
    assert client.get("/api/notes")["notes"][0]["text"] == "kept"


@pytest.mark.parametrize(
    "harm",
    [
        "UPDATE example SET data = x'00' WHERE unit = 2",
        "UPDATE example SET n = 1000 WHERE unit = 2",
        "UPDATE unit_blob SET hist = x'0000' WHERE unit = 2",
        "UPDATE unit SET fires = 'many' WHERE unit = 2",
        "DELETE FROM unit WHERE unit = 5",
        "CREATE VIEW unit2 AS SELECT 1",
        "CREATE TRIGGER t AFTER INSERT ON label BEGIN DELETE FROM unit; END",
        "PRAGMA application_id = 1",
        "PRAGMA user_version = 99",
    ],
)
def test_databases_of_strangers_are_an_error_of_one_line(run: Run, browse: Callable[..., Client], harm: str) -> None:
    with sqlite3.connect(units_path(run, MXD)) as database:
        database.execute(harm)
    database.close()
    client = browse(run)
    error = client.error("GET", f"/api/s/{MXD}/units/2", 503)
    assert "mxd collect" in error["next"] or "pip install" in error["next"]
    assert client.get(f"/api/s/{OTHER}/units/2")["unit"] == 2
    client.get("/api/run")


def test_text_of_strangers_is_an_error_of_one_line(run: Run, browse: Callable[..., Client]) -> None:
    with sqlite3.connect(text_path(run)) as database:
        database.execute("UPDATE seq SET text = 'short'")
    database.close()
    client = browse(run)
    assert "damaged" in client.error("GET", f"/api/s/{MXD}/units/2", 503)["what"]
    assert client.get("/api/run")["examples"] == []
    text_path(run).unlink()
    client.error("GET", f"/api/s/{MXD}/rows?units=1", 503)
    assert "text.sqlite" in client.error("GET", f"/api/s/{MXD}/units/2", 503)["what"]
    assert client.get("/api/run")["students"][0]["store"]


def test_a_bug_is_told_and_logged_without_what_was_sent(
    read: Client, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("secret words")

    monkeypatch.setattr(answers.Answers, "matches", broken)
    error = read.error("GET", f"/api/s/{MXD}/matches", 503)
    said = capfd.readouterr().err
    assert "ValueError" in error["what"] and "secret" not in json.dumps(error) + said and "test_serve.py" in said


# ---- the live model ---------------------------------------------------------------------------------------------------------


def events(client: Client, body: dict[str, Any]) -> list[tuple[str, Any]]:
    answer = client.http.post("/api/generate", json=body)
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream"), answer.text
    blocks = [block for block in answer.text.split("\n\n") if block and not block.startswith(":")]
    return [(block.split("\n")[0].removeprefix("event: "), strict(block.split("\n")[1].removeprefix("data: "))) for block in blocks]


def test_a_generation_is_a_stream_of_events(live: Client) -> None:
    body = {"student": MXD, "prompt": "law people", "edits": [{"unit": 3, "op": "add", "value": 2, "at": "all"}], "tokens": 6}
    found = events(live, {**body, "lanes": list(asks.LANES)})
    assert found[0][0] == "start" and [lane["lane"] for lane in found[0][1]["lanes"]] == list(asks.LANES)
    assert sum(name == "token" for name, _ in found) == 24 and found[-1][0] == "done"
    assert set(found[-1][1]["lanes"]) == set(asks.LANES)
    assert live.http.delete(f"/api/jobs/{found[0][1]['job']}").json() == {"cancelled": False}
    too_long = events(live, {**body, "prompt": "x" * 600})
    assert [name for name, _ in too_long] == ["error"] and too_long[0][1]["got"] == "601"
    assert live.get("/api/status")["job"] is None


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"student": "nobody"}, 404),
        ({"prompt": ""}, 422),
        ({"prompt": 5}, 422),
        ({"prompt": "x" * 20_001}, 422),
        ({"tokens": 257}, 422),
        ({"tokens": 0}, 422),
        ({"tokens": 1.5}, 422),
        ({"tokens": True}, 422),
        ({"lanes": ["host", "other"]}, 422),
        ({"lanes": []}, 422),
        ({"lanes": ["host", "host"]}, 422),
        ({"temperature": 0, "greedy": False}, 422),
        ({"top_p": 0}, 422),
        ({"seed": -1}, 422),
        ({"special": "yes"}, 422),
        ({"edits": [{"unit": 1, "op": "add", "value": 1e5}]}, 422),
        ({"edits": [{"unit": 1, "op": "add", "value": "1"}]}, 422),
        ({"edits": [{"unit": 1, "op": "add"}]}, 422),
        ({"edits": [{"unit": 99999, "op": "remove"}]}, 422),
        ({"edits": [{"unit": -1, "op": "remove"}]}, 422),
        ({"edits": [{"unit": 1, "op": "double", "value": 1}]}, 422),
        ({"edits": [{"unit": 1, "op": "remove", "at": "nowhere"}]}, 422),
        ({"edits": [{"unit": 1, "op": "remove"}] * 2}, 422),
        ({"edits": [{"unit": n, "op": "remove"} for n in range(9)]}, 422),
    ],
)
def test_requests_outside_their_limits_are_refused(live: Client, change: dict[str, Any], status: int) -> None:
    live.error("POST", "/api/generate", status, {"student": MXD, "prompt": "a", **change})


def test_numbers_that_are_none_are_refused(live: Client) -> None:
    for value in (b"NaN", b"Infinity", b"1e999", b"1" * 400):
        body = b'{"student": "mxd-k2", "prompt": "a", "edits": [{"unit": 1, "op": "add", "value": ' + value + b"}]}"
        answer = live.http.post("/api/generate", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 422, answer.text
    for body in (b"[]", b"", b"\xff", b"[" * 100_000, b'{"seed": ' + b"1" * 9000 + b"}"):
        answer = live.http.post("/api/generate", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400, answer.text


def test_sentences_are_kept(live: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    assert live.get("/api/sentences") == {"sentences": []}
    name = live.post("/api/sentences", {"text": "law people", "students": [MXD, "dense"]})["id"]
    assert live.post("/api/sentences", {"text": "law people", "students": [MXD, OTHER]}) == {"id": name}, "in the place of the first"
    other = live.post("/api/sentences", {"seq": 3, "students": [OTHER]})["id"]
    listed = {one["id"]: one for one in live.get("/api/sentences")["sentences"]}
    assert set(listed) == {name, other} and "answer" not in listed[name]
    assert (listed[name]["request"], listed[name]["text"], listed[name]["students"]) == ({"text": "law people"}, "law people", [MXD, OTHER])
    assert listed[other]["request"] == {"seq": 3} and listed[other]["text"] == live.site.shelf.text().store.sequence(3).text[:300]
    special = live.post("/api/sentences", {"text": "law people", "students": [MXD], "special": True})["id"]
    kept = {one["id"]: one["request"] for one in live.get("/api/sentences")["sentences"]}
    assert special != name and kept[special] == {"text": "law people", "special": True}, "another reading than as plain text"
    live.http.delete(f"/api/sentences/{special}")
    again = live.post("/api/sentence", {"text": "law people", "students": [MXD, OTHER]})
    assert {one["id"]: one["answer"] for one in live.site.answers.sentences([MXD, OTHER])}[name] == again
    assert [[s["name"] for s in one["answer"]["students"]] for one in live.site.answers.sentences([MXD])] == [[MXD]]
    live.site.shelf.notes.save_sentence({"text": "odd"}, "odd", [MXD], {})
    assert len(live.site.answers.sentences([MXD])) == 1, "what is not whole is left out"
    live.error("POST", "/api/sentences", 404, {"text": "a", "students": ["nobody"]})
    monkeypatch.setattr("mxd.explore.live_routes.MOST_KEPT", 100)
    live.error("POST", "/api/sentences", 413, {"text": "a", "students": [MXD]})
    for one in live.get("/api/sentences")["sentences"]:
        assert live.http.delete(f"/api/sentences/{one['id']}").status_code == 200
    assert live.get("/api/sentences") == {"sentences": []}


def test_a_sentence_and_a_collected_one(live: Client) -> None:
    found = live.post("/api/sentence", {"text": "law people", "students": [MXD, "dense"]})
    assert found["tokens"]["text"] == "law people" and [s["name"] for s in found["students"]] == [MXD, "dense"]
    assert found["students"][0]["word"] == "expert" and found["students"][0]["labels"] in ({}, {"1": "all letters"})
    stored = live.post("/api/sentence", {"seq": 3, "students": [OTHER]})
    sequence = live.site.shelf.text().store.sequence(3)
    assert stored["tokens"]["ids"] == sequence.ids.tolist() and stored["tokens"]["text"] == sequence.text
    assert live.post("/api/sentence", {"text": "a"})["students"] == []
    for body, status in (
        ({"students": [MXD]}, 422),
        ({"text": "a", "students": [MXD] * 5}, 422),
        ({"text": "a", "students": MXD}, 422),
        ({"text": "a", "students": ["nobody"]}, 404),
        ({"text": "x" * 600, "students": [MXD]}, 422),
        ({"seq": 10**8}, 503),
        ({"seq": "1"}, 422),
    ):
        live.error("POST", "/api/sentence", status, body)


def test_heat_dose_ablation_and_search_by_text(live: Client) -> None:
    heat = live.post("/api/heat", {"student": MXD, "unit": 4, "text": "treaty"})
    assert len(heat["a"]) == len(heat["tokens"]["ids"]) == 7
    dose = live.post("/api/dose", {"student": MXD, "prompt": "law", "unit": 4, "at": "all", "max": 2.0})
    assert dose["raw"][0] == -8.0 and len(dose["tokens"]) == 5 and dose["control_unit"] not in (None, 4)
    found = live.get(f"/api/s/{MXD}/search", q="treaty")
    assert found["host_needed"] is False and found["by"]["text"] and set(found["by"]["text"]) <= set(found["units"])
    for path, body in (("heat", {"text": "a", "unit": "1"}), ("heat", {"text": "a"}), ("dose", {"prompt": "a", "unit": 1, "max": 0})):
        live.error("POST", f"/api/{path}", 422, {"student": MXD, **body})
    assert "no token" in live.error("POST", "/api/ablate", 422, {"student": MXD, "unit": 0})["what"]


def test_an_ablation_of_stored_firings(live: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """The databases are made up: the layer is changed to fire where they say."""
    from mxd.layers import Edited

    model = live.site.worker.model
    assert model is not None
    always = Edited(model.layer(MXD), add={1: 1.0})
    monkeypatch.setattr(model, "layer", lambda _name: always)
    found = live.post("/api/ablate", {"student": MXD, "unit": 1})
    columns = live.get(f"/api/s/{MXD}/units/1")["columns"]
    assert found["firings"] == columns["fires"] and found["effect"] == columns["effect"]
    assert 40 <= found["exact_n"] <= 64 and found["exact"] != 0 and found["exact_se"] > 0


def test_an_edit_is_the_file_of_mxd_edit(live: Client, made: Run, tmp_path: Path) -> None:
    edits = [{"unit": 3, "op": "set", "value": 2}, {"unit": 4, "op": "scale", "value": 0.5}, {"unit": 5, "op": "remove"}]
    found = live.post("/api/edit", {"student": MXD, "edits": edits})
    path = tmp_path / "edit.json"
    path.write_text(json.dumps(found))
    edit = read_edit(path)
    assert edit.scale == {3: 0.0, 4: 0.5, 5: 0.0} and edit.add == {3: 2.0}
    assert check(edit, made).name == MXD and load_edit(path, made).n_units
    assert cli.main(["edit", str(made.path), "--student", MXD, "--ablate", "5", "--out", str(tmp_path / "own.json")]) == 0
    own = json.loads((tmp_path / "own.json").read_text())
    assert live.post("/api/edit", {"student": MXD, "edits": [{"unit": 5, "op": "remove"}]}) == own
    live.error("POST", "/api/edit", 422, {"student": MXD, "edits": [{"unit": 4, "op": "scale", "value": 1}]})


# ---- over a socket ----------------------------------------------------------------------------------------------------------


class Socket:
    """A server in a thread, as browsers reach it."""

    def __init__(self, site: Site) -> None:
        self.listener = serve.listen("127.0.0.1", 0)
        self.port = int(self.listener.getsockname()[1])
        self.keys = Keys(self.port)
        self.server = serve.Server(serve.guarded(site, self.keys))
        self.thread = threading.Thread(target=self.server.run, args=([self.listener],))
        self.thread.start()

    def ask(self, method: str, path: str, body: Any = None) -> http.client.HTTPConnection:
        made = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        headers = {"cookie": f"{self.keys.cookie}={self.keys.secret}", "content-type": "application/json"}
        made.request(method, path, None if body is None else json.dumps(body), headers)
        return made

    def json(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        made = self.ask(method, path, body)
        answer = made.getresponse()
        found = answer.status, strict(answer.read().decode())
        made.close()
        return found

    def idle(self) -> bool:
        status = self.json("GET", "/api/status")[1]
        return status["job"] is None and status["queue"] == 0

    def close(self) -> None:
        self.server.should_exit = self.server.force_exit = True
        self.thread.join(20)
        self.listener.close()


@pytest.fixture
def web(live: Client) -> Iterator[Socket]:
    made = Socket(live.site)
    until(lambda: made.server.started)
    yield made
    made.close()


LONG: dict[str, Any] = {"student": MXD, "prompt": "law people", "tokens": 256, "edits": [{"unit": 3, "op": "add", "value": 1}]}


def until_token(answer: Any, i: int) -> str:
    """The job, once its stream has come to token i."""
    job = ""
    while line := answer.readline().decode():
        if line.startswith("data: "):
            data = strict(line.removeprefix("data: "))
            job = data.get("job", job)
            if data.get("i") == i:
                return job
    raise AssertionError("the stream ended")


def slow(monkeypatch: pytest.MonkeyPatch, seconds: float = 0.02) -> None:
    """Every token takes so long at least."""
    from mxd.explore import lanes

    real = lanes.Batch.step

    def step(self: Any, going: Any) -> None:
        time.sleep(seconds)
        real(self, going)

    monkeypatch.setattr(lanes.Batch, "step", step)


def test_closing_the_stream_stops_the_generation(web: Socket, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(monkeypatch)
    for _ in range(2):
        made = web.ask("POST", "/api/generate", LONG)
        until_token(made.getresponse(), 3)
        assert made.sock is None or not web.idle()
        assert web.json("POST", "/api/sentence", {"text": "peace", "students": [MXD]})[0] == 200, "one reads while another writes"
        assert not web.idle()
        made.close()
        began = time.monotonic()
        until(web.idle)
        assert time.monotonic() - began < 2


def test_a_job_is_stopped_by_its_name(web: Socket, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(monkeypatch)
    made = web.ask("POST", "/api/generate", LONG)
    answer = made.getresponse()
    job = until_token(answer, 2)
    assert web.json("DELETE", f"/api/jobs/{job}") == (200, {"cancelled": True})
    rest = answer.read().decode()
    done = strict(rest.rpartition("data: ")[2])
    assert {lane["stopped"] for lane in done["lanes"].values()} == {"cancelled"} and done["lanes"]["host"]["tokens"] < 20
    made.close()
    assert web.json("DELETE", f"/api/jobs/{job}") == (200, {"cancelled": False})


def test_the_fifth_generation_is_refused_and_a_queued_one_gets_comments(web: Socket, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(monkeypatch)
    monkeypatch.setattr(routes, "PING_SECONDS", 0.05)
    kept = [web.ask("POST", "/api/generate", LONG) for _ in range(4)]
    streams = [made.getresponse() for made in kept]
    until_token(streams[0], 1)
    status, error = web.json("POST", "/api/generate", LONG)
    assert status == 429 and "waiting" in error["error"]["what"]
    assert streams[3].readline() == b": ping\n"
    for made, stream in zip(kept, streams, strict=True):
        stream.close()
        made.close()
    until(web.idle)


def test_a_read_nobody_waits_for_is_not_done(web: Socket, live: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(monkeypatch, 0.1)
    long = web.ask("POST", "/api/generate", LONG)
    until_token(long.getresponse(), 1)
    made = web.ask("POST", "/api/dose", {"student": MXD, "prompt": "law", "unit": 4, "max": 1.0})
    until(lambda: live.site.worker.status()["queue"] == 1)
    assert made.sock is not None
    made.sock.close()
    made.close()
    until(lambda: live.site.worker.status()["queue"] == 0)
    long.close()
    until(web.idle)
