"""Labels of a whole run: statistical ones, those of a model that answers, refuses, talks nonsense or is silent; resume, limits, costs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mxd import cli
from mxd.checkpoint import Run
from mxd.errors import ConfigError, MxdError, RunError
from mxd.explore import asking, by_model
from mxd.explore.codes import codes_folder
from mxd.explore.label import label
from mxd.explore.labelling import Bar
from mxd.explore.store import UnitStore, folder, text_path, units_path
from mxd.locks import only_writer
from mxd.unit_config import LabelConfig
from tests.explore import planted
from tests.explore.fake_model import FakeModel, excerpts, knows
from tests.explore.handmade import make_store

KEY = "sk-very-secret-0123456789"


class Told:
    """What was said, and how far bars went."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.bars: list[tuple[str, int, int]] = []

    @contextlib.contextmanager
    def bar(self, what: str, total: int) -> Iterator[Bar]:
        told = self

        class Kept:
            def update(self, done: int, note: str = "") -> None:
                told.bars.append((what, done, total))

        yield Kept()


Go = Callable[..., Told]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole")
    planted.planted_run(path)
    return path


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Run:
    """A run without labels."""
    shutil.copytree(whole / "explore", tmp_path / "explore")
    return planted.reopened(tmp_path)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeModel]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    made = FakeModel()
    yield made
    made.close()


@pytest.fixture
def go(run: Run) -> Go:
    def labelled(**options: Any) -> Told:
        told = Told()
        label(run, LabelConfig(**options), told.bar, told.lines.append)
        return told

    return labelled


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waits between attempts."""
    made = by_model.Endpoint
    monkeypatch.setattr(by_model, "Endpoint", lambda *args, **options: dataclasses.replace(made(*args, **options), sleep=lambda _s: None))


def rows(run: Run, author: str | None = None) -> dict[int, dict[str, Any]]:
    store = UnitStore(run, planted.STUDENT)
    found = {
        unit: one for unit, all_of_it in store.labels(range(planted.UNITS)).items() for one in all_of_it if author in (None, one["author"])
    }
    store.close()
    return found


def scores(run: Run) -> list[float | None]:
    store = UnitStore(run, planted.STUDENT)
    found = [store.row(unit)["score"] for unit in range(planted.UNITS)]
    store.close()
    return found


def ask(fake: FakeModel, **options: Any) -> dict[str, Any]:
    return {"endpoint": fake.url, "model": "wise", "units": (2,), "parallel": 1, **options}


# --- statistical ---------------------------------------------------------------------------------------------------------------------


def test_every_unit_has_a_name_and_a_score_or_a_reason(run: Run, go: Go) -> None:
    told = go()
    found = rows(run, "statistical")
    assert sorted(found) == list(range(planted.UNITS)) and found[2]["text"] == "“w7”" and found[0]["text"] == "(never fired)"
    for unit, one in found.items():
        assert one["method"] == "statistical" and one["model"] == "" and one["fuzzing"] is None and one["fuzzing_n"] is None
        assert (one["detection"] is None) == (unit in (0, 1, 5)) == (one["detection_n"] is None)
    assert scores(run)[2] == 1.0 and scores(run)[0] is None
    assert told.lines[0].startswith("mxd-k2: 9 statistical labels, 6 with a score: detection 0.9")
    assert told.bars[-1] == ("statistical labels of mxd-k2", 9, 9)


def test_what_has_a_label_is_left_alone(run: Run, go: Go) -> None:
    go(units=(2,))
    before = rows(run)[2]["created"]
    assert sorted(rows(run)) == [2]
    go()
    assert rows(run)[2]["created"] == before and len(rows(run)) == planted.UNITS
    assert go().lines == []
    go(units=(2,), overwrite=True)
    assert rows(run)[2]["created"] > before


def test_top_and_by_choose_units(run: Run, go: Go) -> None:
    go(top=2)
    assert sorted(rows(run)) == [7, 8], "effect is the unit's number in this run"
    go(top=1, by="fires")
    assert sorted(rows(run)) == [1, 7, 8]
    go(top=100, by="fires")
    assert sorted(rows(run)) == [1, 2, 3, 4, 6, 7, 8], "neither the dead one nor the one that fires three times"
    with pytest.raises(ConfigError, match=r"^--by share is not known of any unit of mxd-k2 .* next: --by fires$"):
        go(top=1, by="share")


def test_the_seed_draws_other_texts(run: Run, go: Go) -> None:
    go(units=(4, 7))
    before = [rows(run)[unit]["detection"] for unit in (4, 7)]
    go(units=(4, 7), overwrite=True, seed=1)
    assert [rows(run)[unit]["detection"] for unit in (4, 7)] != before


def test_students_are_chosen_by_name(tmp_path: Path) -> None:
    made = planted.planted_run(tmp_path, names=(planted.STUDENT, "other-k2"))
    told = Told()
    label(made, LabelConfig(students=("other-k2",)), told.bar, told.lines.append)
    assert [line.split(":")[0] for line in told.lines] == ["other-k2"]
    label(made, LabelConfig(), told.bar, told.lines.append)
    assert [line.split(":")[0] for line in told.lines] == ["other-k2", "mxd-k2"]


def test_writing_says_so_and_leaves_the_database_as_it_should_be(run: Run, go: Go) -> None:
    before = units_path(run, planted.STUDENT).stat().st_mtime_ns
    go()
    assert units_path(run, planted.STUDENT).stat().st_mtime_ns > before
    for _ in range(2):
        store = UnitStore(run, planted.STUDENT)  # it checks the tables
        assert store.meta["updated"] == max(one["created"] for one in rows(run).values())
        store.close()
        go(units=(3,), overwrite=True)
    assert not [p for p in folder(run).iterdir() if p.name.endswith(("-journal", "-wal"))]


def test_readers_are_not_held_up(run: Run, go: Go) -> None:
    reader = UnitStore(run, planted.STUDENT)
    go()
    assert len(reader.labels([2])[2]) == 1
    reader.close()


def test_a_dry_run_writes_nothing(run: Run, go: Go, fake: FakeModel) -> None:
    assert go(dry_run=True).lines == ["mxd-k2: 9 statistical labels to make"]
    lines = go(**ask(fake, dry_run=True, price_in=1.0, price_out=10.0, requests_per_minute=5.0)).lines
    assert rows(run) == {} and fake.asked == [] and not (folder(run) / "label-cache.sqlite").exists()
    assert lines[1].startswith("1 units to label by wise: about 15 requests, ") and "at least 3 minutes" in lines[1]
    assert "in the currency of the prices" in lines[1]


# --- a model that answers ------------------------------------------------------------------------------------------------------------


def test_a_model_that_knows_scores_one(run: Run, go: Go, fake: FakeModel) -> None:
    told = go(**ask(fake, price_in=1000.0, price_out=10_000.0))
    one = rows(run, "wise")[2]
    assert {k: v for k, v in one.items() if k != "created"} == {
        "author": "wise",
        "text": "the word w7",
        "method": "model",
        "model": "wise",
        "detection": 1.0,
        "detection_n": 70,
        "fuzzing": 1.0,
        "fuzzing_n": 70,
    }
    assert len(fake.asked) == 15 and set(fake.keys) == {f"Bearer {KEY}"}
    assert "1 of 1 units labelled, 1 with a score: detection 1.00" in told.lines[-1]
    assert told.lines[-1].endswith("15 requests, 1,500 tokens read and 150 written, 3.00 in the currency of the prices")


@pytest.mark.parametrize(("answer", "score"), [(1, 0.5), (0, 0.5)])
def test_a_model_that_always_says_the_same_scores_a_half(run: Run, go: Go, fake: FakeModel, answer: int, score: float) -> None:
    fake.answer = lambda q: '{"label": "all"}' if '"strength"' in q else json.dumps({"answers": [answer] * len(excerpts(q))})
    go(**ask(fake))
    assert (rows(run, "wise")[2]["detection"], rows(run, "wise")[2]["fuzzing"]) == (score, score)


def test_a_model_that_is_always_wrong_scores_nothing(run: Run, go: Go, fake: FakeModel) -> None:
    right = knows("w7")

    def wrong(question: str) -> str:
        found = json.loads(right(question))
        return json.dumps({"answers": [1 - one for one in found["answers"]]} if "answers" in found else found)

    fake.answer = wrong
    go(**ask(fake))
    assert rows(run, "wise")[2]["detection"] == 0.0 == rows(run, "wise")[2]["fuzzing"]
    assert scores(run)[2] == 0.0, "zero because it was wrong, and above the statistical label's 1"


def test_a_models_label_comes_before_a_statistical_one(run: Run, go: Go, fake: FakeModel) -> None:
    go()
    assert scores(run)[7] not in (None, 0.5)
    fake.answer = lambda q: '{"label": "all"}' if '"strength"' in q else json.dumps({"answers": [1] * len(excerpts(q))})
    go(**ask(fake, units=(7,)))
    assert scores(run)[7] == 0.5
    store = UnitStore(run, planted.STUDENT)
    assert [one["author"] for one in store.labels([7])[7]] == ["wise", "statistical"]
    store.close()
    go(units=(7,), overwrite=True)
    assert scores(run)[7] == 0.5


def test_every_unit_gets_a_statistical_label_beside_the_models(run: Run, go: Go, fake: FakeModel) -> None:
    go(**ask(fake, units=(), top=1, by="fires"))
    assert len(rows(run, "statistical")) == planted.UNITS and sorted(rows(run, "wise")) == [1]
    assert (rows(run, "wise")[1]["detection"], rows(run, "wise")[1]["detection_n"]) == (None, 0), "it fires everywhere: no test is possible"
    asked = len(fake.asked)
    assert go(**ask(fake, units=(), top=1, by="fires")).lines[0].startswith("0 units to label") and len(fake.asked) == asked


def test_no_reply_is_paid_for_twice(run: Run, go: Go, fake: FakeModel) -> None:
    go(**ask(fake))
    created = rows(run, "wise")[2]["created"]
    go(**ask(fake))
    assert len(fake.asked) == 15 and rows(run, "wise")[2]["created"] == created, "it has a label"
    told = go(**ask(fake, overwrite=True))
    assert len(fake.asked) == 15 and rows(run, "wise")[2]["created"] > created, "it is labelled again from what is kept"
    assert "0 requests" in told.lines[-1]
    go(**ask(fake, model="other"))
    assert len(fake.asked) == 30
    go(**ask(fake, seed=1, overwrite=True))
    assert len(fake.asked) > 30
    kept = (folder(run) / "label-cache.sqlite").read_bytes()
    assert KEY.encode() not in kept and b"127.0.0.1" not in kept


def test_a_stopped_command_goes_on_where_it_was(run: Run, go: Go, fake: FakeModel) -> None:
    told = Told()

    @contextlib.contextmanager
    def bar(what: str, total: int) -> Iterator[Bar]:
        class Interrupted:
            def update(self, done: int, note: str = "") -> None:
                if what.startswith("labels") and done == 1:
                    raise KeyboardInterrupt

        yield Interrupted()

    with pytest.raises(KeyboardInterrupt):
        label(run, LabelConfig(**ask(fake, units=(2, 3, 8))), bar, told.lines.append)
    assert list(rows(run, "wise")) == [2] and "1 of 3 units labelled" in told.lines[-1]
    time.sleep(0.2)  # what was under way ends
    asked = len(fake.asked)
    assert asked < 45
    told = go(**ask(fake, units=(2, 3, 8)))
    assert sorted(rows(run, "wise")) == [2, 3, 8] and len(fake.asked) <= 46, "at most the one that was under way is asked again"
    assert told.lines[-2].startswith("2 units to label by wise")


def test_units_are_asked_about_at_the_same_time(run: Run, go: Go, fake: FakeModel) -> None:
    right = knows("w7")

    def slow(question: str) -> str:
        time.sleep(0.03)
        return right(question)

    fake.answer = slow
    go(**ask(fake, units=(2, 3, 7, 8), parallel=3))
    assert 2 <= fake.most_at_once <= 3 and len(rows(run, "wise")) == 4
    fake.most_at_once = 0
    go(**ask(fake, units=(2, 3), parallel=1, model="other"))
    assert fake.most_at_once == 1


def test_the_key_comes_from_the_variable_that_is_named(run: Run, go: Go, fake: FakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELSEWHERE", "other")
    go(**ask(fake, key_env="ELSEWHERE"))
    assert set(fake.keys) == {"Bearer other"}
    del fake.keys[:]
    go(**ask(fake, key_env="NONE_SUCH", model="second"))
    assert set(fake.keys) == {None}


def test_requests_are_spread(go: Go, fake: FakeModel) -> None:
    begun = time.monotonic()
    go(**ask(fake, requests_per_minute=1800.0))
    assert time.monotonic() - begun >= 14 / 30


# --- limits --------------------------------------------------------------------------------------------------------------------------


def test_max_tokens_is_never_passed(run: Run, go: Go, fake: FakeModel) -> None:
    fake.usage = None
    told = Told()
    with pytest.raises(
        asking.Spent, match=r"^--max-tokens is reached \| expected at most 8,000 \| next: the same command with more goes on$"
    ):
        label(run, LabelConfig(**ask(fake, units=(2, 8), max_tokens=8000)), told.bar, told.lines.append)
    spent = sum(asking.tokens_of(question) for question in fake.asked)
    assert 3000 < spent <= 8000 and rows(run, "wise") == {}
    asked = len(fake.asked)
    go(**ask(fake, units=(2,)))
    assert len(fake.asked) == 15 and asked > 2, "what was answered is kept"


def test_max_cost_is_never_passed(run: Run, go: Go, fake: FakeModel) -> None:
    fake.usage = {"prompt_tokens": 1_000_000, "completion_tokens": 0}
    with pytest.raises(asking.Spent, match=r"^--max-cost is reached \| expected at most 3"):
        go(**ask(fake, max_cost=3.0, price_in=1.0, price_out=1.0))
    assert len(fake.asked) == 3


def test_usage_that_is_nonsense_is_estimated(go: Go, fake: FakeModel) -> None:
    fake.usage = {"prompt_tokens": "many", "completion_tokens": -4}
    read = int(go(**ask(fake)).lines[-1].split("requests, ")[1].split(" tokens")[0].replace(",", ""))
    assert read == sum(asking.tokens_of(question) for question in fake.asked)


# --- a model that does not answer ----------------------------------------------------------------------------------------------------


def test_refusals_leave_units_without_a_label(run: Run, go: Go, fake: FakeModel) -> None:
    right = knows("w7")
    fake.answer = lambda q: {"content": None, "refusal": "No."} if '"strength"' in q and len(fake.asked) == 1 else right(q)
    told = go(**ask(fake, units=(2, 8)))
    assert sorted(rows(run, "wise")) == [8] and "1 of 2 units labelled" in told.lines[-1] and "missing: 1 × a refusal" in told.lines[-1]
    go(**ask(fake, units=(2, 8)))
    assert sorted(rows(run, "wise")) == [2, 8], "the next run asks for it again"


@pytest.mark.usefixtures("quick")
def test_nonsense_in_a_test_is_no_score_and_never_zero(run: Run, go: Go, fake: FakeModel) -> None:
    right = knows("w7")
    fake.answer = lambda q: "maybe" if "between << and >>. For each" in q else right(q)
    told = go(**ask(fake))
    one = rows(run, "wise")[2]
    assert (one["detection"], one["detection_n"], one["fuzzing"], one["fuzzing_n"]) == (1.0, 70, None, None)
    assert "missing: 1 × a reply without 10 zeros and ones" in told.lines[-1]
    fake.answer = lambda q: "maybe" if "at least one" in q else right(q)
    go(**ask(fake, units=(8,)))
    assert rows(run, "wise")[8]["detection"] is None and rows(run, "wise")[8]["fuzzing"] == 1.0
    assert scores(run)[8] == 1.0, "that of the statistical label"
    fake.answer = right
    go(**ask(fake, units=(8,)))
    assert rows(run, "wise")[8]["detection"] == 1.0


@pytest.mark.usefixtures("quick")
def test_a_model_that_only_talks_nonsense_is_left_alone(run: Run, go: Go, fake: FakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_model, "FAILED", 3)
    fake.answer = lambda _q: "what?"
    with pytest.raises(RunError, match=r"^no usable reply for 3 units in a row \| got model wise gave no answer in 4 attempts"):
        go(**ask(fake, units=(2, 3, 4, 7, 8)))
    assert rows(run, "wise") == {} and len(fake.asked) == 12


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("answer", [503, 429, b"<html>"])
def test_an_endpoint_that_recovers_costs_nothing(run: Run, go: Go, fake: FakeModel, answer: Any) -> None:
    right = knows("w7")
    fake.answer = lambda q: answer if len(fake.asked) % 2 else right(q)
    told = go(**ask(fake))
    assert rows(run, "wise")[2]["detection"] == 1.0 and len(fake.asked) == 30 and "missing" not in told.lines[-1]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("answer", [503, 429])
def test_an_endpoint_that_is_down_is_left_alone(run: Run, go: Go, fake: FakeModel, answer: int) -> None:
    fake.answer = lambda _q: answer
    with pytest.raises(RunError, match=rf"^no reply for 3 units in a row .* HTTP {answer}.* goes on from here$"):
        go(**ask(fake, units=(2, 3, 4, 7, 8)))
    assert len(fake.asked) == 12 and rows(run, "wise") == {} and len(rows(run, "statistical")) == 5


@pytest.mark.usefixtures("quick")
def test_silence_ends_after_the_time_that_was_set(run: Run, go: Go, fake: FakeModel) -> None:
    fake.answer = lambda _q: None
    begun = time.monotonic()
    told = Told()
    with pytest.raises(RunError, match=r"^no reply for 3 units in a row"):
        label(run, LabelConfig(**ask(fake, units=(2, 3, 8), timeout=0.05)), told.bar, told.lines.append)
    assert time.monotonic() - begun < 5 and "missing: 3 × " in told.lines[-1]


@pytest.mark.parametrize(("code", "advice"), [(401, "--key-env"), (404, "--model")])
def test_a_wrong_key_or_model_ends_at_once(run: Run, go: Go, fake: FakeModel, code: int, advice: str) -> None:
    fake.answer = lambda _q: code
    with pytest.raises(RunError, match=rf"^model wise refuses \| got HTTP {code} .*{advice}") as caught:
        go(**ask(fake, units=(2, 3)))
    assert len(fake.asked) == 1 and KEY not in str(caught.value)


SAID = {
    b'{"error": {"message": "You exceeded\\nyour quota", "type": "x"}}': "You exceeded your quota",
    b'{"detail": "Server is pinned to another model"}': "Server is pinned to another model",
    b'{"error": "model not found"}': "model not found",
    b'{"object": "error", "message": "too long"}': "too long",
    b"<html><body><h1>Bad \x1b[31mrequest</h1></body></html>": "Bad [31mrequest",
    b"x" * 20_000: "x" * 239 + "…",
    b"{" + b" " * 70_000 + b"}": "",
}


@pytest.mark.parametrize("reason", SAID, ids=lambda reason: reason[:20].decode())
def test_what_an_endpoint_says_of_its_refusal_is_told(run: Run, go: Go, fake: FakeModel, reason: bytes) -> None:
    fake.answer = lambda _q: (403, reason)
    with pytest.raises(RunError) as caught:
        go(**ask(fake, units=(2,)))
    assert caught.value.got == (f"HTTP 403 Forbidden: {SAID[reason]}" if SAID[reason] else "HTTP 403 Forbidden")


@pytest.mark.parametrize("reason", [b"", b"{}", b"[1]", b'{"error": {"code": 3}}', b"[" * 9000, b"\xff\xfe"])
def test_a_refusal_without_words(run: Run, go: Go, fake: FakeModel, reason: bytes) -> None:
    fake.answer = lambda _q: (403, reason)
    with pytest.raises(RunError, match="HTTP 403 Forbidden") as caught:
        go(**ask(fake, units=(2,)))
    assert "\n" not in str(caught.value)


def test_a_key_that_is_sent_back_is_not_told(run: Run, go: Go, fake: FakeModel) -> None:
    fake.answer = lambda _q: (401, json.dumps({"error": {"message": f"wrong key: {KEY}"}}).encode())
    with pytest.raises(RunError, match=r"wrong key: \(key\)") as caught:
        go(**ask(fake, units=(2,)))
    assert KEY not in str(caught.value)


def test_a_model_that_takes_no_temperature_is_asked_without(run: Run, go: Go, fake: FakeModel) -> None:
    """As OpenAI's reasoning models, which refuse any other than their own."""
    wise = fake.answer
    reason = b'{"error": {"message": "Unsupported value: \'temperature\' does not support 0 with this model."}}'
    fake.answer = lambda question: wise(question) if "temperature" not in fake.bodies[-1] else (400, reason)
    go(**ask(fake, units=(2, 3), parallel=1))
    assert sorted(rows(run, "wise")) == [2, 3]
    assert ["temperature" in body for body in fake.bodies] == [True] + [False] * (len(fake.bodies) - 1), "told once, remembered"
    fake.answer = lambda _q: (400, reason)
    with pytest.raises(RunError, match="temperature"):
        go(**ask(fake, units=(4,)))


def test_models_that_take_no_temperature_are_found_out_by_several_at_once(run: Run, go: Go, fake: FakeModel) -> None:
    wise, both = fake.answer, threading.Barrier(2, timeout=20)

    def answer(question: str) -> Any:
        if "temperature" not in next(body for body in fake.bodies[::-1] if body["messages"][0]["content"] == question):
            return wise(question)
        both.wait()  # both have been asked before either is told
        return 400, b"temperature: only 1"

    fake.answer = answer
    go(**ask(fake, units=(2, 3), parallel=2))
    assert sorted(rows(run, "wise")) == [2, 3]


def test_replies_are_of_a_limited_length(run: Run, go: Go, fake: FakeModel) -> None:
    go(**ask(fake, units=(2,), reply_tokens=77))
    assert {body["max_tokens"] for body in fake.bodies} == {77}
    go(**ask(fake, units=(2,), overwrite=True))
    assert {body["max_tokens"] for body in fake.bodies} == {77}, "what was answered is known under another limit, too"
    reason = b'{"error": {"message": "Unsupported parameter: \'max_tokens\' is not supported with this model."}}'
    own = fake.answer
    fake.answer = lambda question: own(question) if "max_tokens" not in fake.bodies[-1] else (400, reason)
    go(**ask(fake, units=(3,), parallel=1))
    assert sorted(rows(run, "wise")) == [2, 3] and fake.bodies[-1]["temperature"] == 0
    with pytest.raises(ConfigError, match="--reply-tokens"):
        go(**ask(fake, units=(3,), reply_tokens=0))


def test_a_reply_that_was_cut_off_says_so_and_is_not_asked_for_again(run: Run, go: Go, fake: FakeModel) -> None:
    fake.answer, fake.reason = lambda _q: "I think that", "length"
    told = go(**ask(fake, units=(2,)))
    assert "a reply that was cut off; raise --reply-tokens" in told.lines[-1] and len(fake.asked) == 1
    fake.answer = knows("w7")
    go(**ask(fake, units=(3,)))
    assert sorted(rows(run, "wise")) == [3], "one that is whole all the same is taken"


def test_nobody_there(run: Run, go: Go, fake: FakeModel, monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    fake.close()
    with pytest.raises(RunError, match="Connection refused"):
        go(**ask(fake, units=(2, 3, 8)))


def test_units_with_too_few_texts_are_counted(run: Run, go: Go, fake: FakeModel) -> None:
    told = go(**ask(fake, units=(0, 2)))
    assert sorted(rows(run, "wise")) == [2] and "missing: 1 × it fires in too few texts" in told.lines[-1]


# --- hostile -------------------------------------------------------------------------------------------------------------------------


def test_a_label_made_by_hostile_text_is_one_line_of_text(run: Run, go: Go, fake: FakeModel) -> None:
    fake.answer = knows("w7", label="<img src=x onerror=alert(1)>\u202e\n\x00'; DROP TABLE label; --" + "x" * 5000)
    go(**ask(fake))
    text = rows(run, "wise")[2]["text"]
    assert text.startswith("<img src=x onerror=alert(1)> '; DROP TABLE label; --xxx") and len(text) == 200
    assert all("\n" not in line and "\u202e" not in line for q in fake.asked if '"strength"' not in q for line in [q.splitlines()[0]])


def test_a_foreign_cache_is_refused(run: Run, go: Go, fake: FakeModel) -> None:
    path = folder(run) / "label-cache.sqlite"
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(RunError, match=r"label-cache.sqlite cannot be used .* next: delete "):
        go(**ask(fake))
    path.unlink()
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE reply (asked)")
    connection.close()
    with pytest.raises(RunError, match="got other tables than ours"):
        go(**ask(fake))
    assert fake.asked == []


def test_kept_replies_that_were_changed_are_asked_for_again(run: Run, go: Go, fake: FakeModel) -> None:
    go(**ask(fake))
    with contextlib.closing(sqlite3.connect(folder(run) / "label-cache.sqlite")) as connection:
        connection.execute("UPDATE reply SET reply = 'nonsense' WHERE asked = (SELECT min(asked) FROM reply)")
        connection.execute("UPDATE reply SET reply = x'00ff' WHERE asked = (SELECT max(asked) FROM reply)")
        connection.commit()
    go(**ask(fake, overwrite=True))
    assert len(fake.asked) == 17 and rows(run, "wise")[2]["detection"] == 1.0


# --- what is missing -----------------------------------------------------------------------------------------------------------------


def test_without_codes_the_command_that_makes_them(run: Run, go: Go) -> None:
    (codes_folder(run, planted.STUDENT) / "about.json").unlink()
    with pytest.raises(RunError, match=r"^the codes of mxd-k2 are not there .* next: mxd collect .* --overwrite$"):
        go()


def test_without_anything_collected(run: Run, go: Go) -> None:
    units_path(run, planted.STUDENT).unlink()
    with pytest.raises(RunError, match=r"^nothing was collected about the units of .* next: mxd collect "):
        go()
    text_path(run).unlink()
    with pytest.raises(RunError, match=r"^there is no text.sqlite in this run .* next: mxd collect "):
        go()


def test_codes_of_another_collection(run: Run, go: Go) -> None:
    with contextlib.closing(sqlite3.connect(text_path(run))) as connection:
        connection.execute("DELETE FROM seq WHERE seq = (SELECT max(seq) FROM seq)")
        connection.commit()
    with pytest.raises(
        RunError, match=r"^the codes of mxd-k2 are of another collection .* expected 9 units on 599 sequences of 65 tokens \| got 9 on 600"
    ):
        go()


def test_a_locked_database_is_one_line(run: Run, go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    made = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **options: made(*args, **{**options, "timeout": 0.01}))
    with contextlib.closing(made(units_path(run, planted.STUDENT), isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(RunError, match=r"^labels cannot be written into .* got database is locked"):
            go()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"endpoint": "http://h/v1"}, r"^--endpoint without --model \| expected both, or neither \| next: add --model$"),
        ({"model": "m"}, r"^--model without --endpoint"),
        ({"endpoint": "file:///etc/passwd", "model": "m"}, r"^--endpoint is no address"),
        ({"endpoint": f"https://u:{KEY}@h/v1", "model": "m"}, r"^--endpoint holds credentials"),
        ({"endpoint": "http://h/v1", "model": "statistical"}, r"^a model of that name cannot be told from no model"),
        ({"max_tokens": 5}, r"^--max-tokens without --endpoint"),
        ({"requests_per_minute": 5.0}, r"^--requests-per-minute without --endpoint"),
        (
            {"endpoint": "http://h/v1", "model": "m", "max_tokens": 0},
            r"^--max-tokens makes no sense \| expected a positive number \| got 0",
        ),
        ({"endpoint": "http://h/v1", "model": "m", "price_in": -1.0}, r"^--price-in makes no sense"),
        ({"endpoint": "http://h/v1", "model": "m", "max_cost": 1.0, "price_in": 1.0}, r"^--max-cost without prices"),
        ({"units": (1,), "top": 3}, r"^--units and --top"),
        ({"by": "beauty"}, r"^no such column in --by"),
        ({"top": 0}, r"^--top makes no sense"),
        ({"parallel": 0}, r"^--parallel makes no sense"),
        ({"timeout": float("nan")}, r"^--timeout makes no sense"),
        ({"units": (99,)}, r"^no unit 99 in mxd-k2 \| expected a number from 0 to 8"),
    ],
)
def test_options_that_cannot_work(go: Go, options: dict[str, Any], message: str) -> None:
    with pytest.raises(MxdError, match=message) as caught:
        go(**options)
    assert KEY not in str(caught.value)


# --- the command line -------------------------------------------------------------------------------------------------------------------


def test_the_verb(tmp_path: Path, fake: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    made = make_store(tmp_path, n_units=60, kinds=("mxd",))
    units = made.students[0].n_units
    assert cli.main(["label", str(made.path)]) == 0
    said = capsys.readouterr()
    assert said.out == "" and "statistical labels of mxd-k2" in said.err and f"{units} statistical labels, " in said.err
    store = UnitStore(made, "mxd-k2")
    assert len(store.labels(range(units))) == units
    store.close()
    assert cli.main(["label", str(made.path)]) == 0 and capsys.readouterr().err == ""
    options = ["--endpoint", fake.url, "--model", "wise", "--units", "2", "--dry-run"]
    assert cli.main(["label", str(made.path), *options]) == 0
    assert "1 units to label by wise: about" in capsys.readouterr().err and fake.asked == []
    assert cli.main(["label", str(made.path), "--top", "0"]) == 1
    assert capsys.readouterr().err == "mxd: error: --top makes no sense | expected a positive number | got 0\n"
    with only_writer(folder(made)):
        assert cli.main(["label", str(made.path)]) == 1
    assert "is being written to" in capsys.readouterr().err
