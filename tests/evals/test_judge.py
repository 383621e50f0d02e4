"""A judge behind a fake endpoint on this machine: good, nonsense, 429, errors, silence, and what is kept."""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mxd.config import EvalConfig
from mxd.errors import ConfigError
from mxd.evals.steering import judge as module
from mxd.evals.steering.judge import Judge, NoVerdict, Verdict, check, judges, parse, question

KEY = "sk-very-secret-0123456789"
GOOD = '{"concept": "dogs", "coherence": 0.9, "fluency": 0.4}'


class Fake:
    """An endpoint that answers what `script` says, in order; its last answer goes on for ever."""

    def __init__(self) -> None:
        self.script: list[Any] = [GOOD]
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                fake.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                fake.headers.append(dict(self.headers))
                fake.paths.append(self.path)
                answer = fake.script[min(len(fake.asked), len(fake.script)) - 1]
                if callable(answer):
                    answer(self)
                elif isinstance(answer, tuple):
                    self.answer(answer[0], "no", dict(answer[1:]))
                else:
                    self.answer(200, answer if isinstance(answer, bytes) else completion(answer), {})

            def answer(self, code: int, body: str | bytes, headers: dict[str, str]) -> None:
                data = body.encode() if isinstance(body, str) else body
                self.send_response(code)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def close(self) -> None:
        self.stop.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def completion(content: Any) -> str:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]})


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    made = Fake()
    yield made
    made.close()


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def judge(fake: Fake, waits: list[float], tmp_path: Path) -> Judge:
    return Judge(fake.url, "wise", KEY, tmp_path / "deep" / "judge-cache.jsonl", timeout=5.0, sleep=waits.append)


def test_a_good_answer(fake: Fake, judge: Judge, waits: list[float]) -> None:
    assert judge.ask(["one <b>text</b>", "another"]) == Verdict(0.9, 0.4, "dogs")
    assert fake.paths == ["/v1/chat/completions"] and waits == []
    assert fake.headers[0]["Authorization"] == f"Bearer {KEY}"
    asked = fake.asked[0]
    assert (asked["model"], asked["temperature"], len(asked["messages"])) == ("wise", 0, 1)
    content = asked["messages"][0]["content"]
    assert content == question(["one <b>text</b>", "another"])
    assert "Below are 2 texts" in content and "<text 2>\nanother\n</text 2>" in content and KEY not in content


def test_without_a_key_none_is_sent(fake: Fake) -> None:
    Judge(f"{fake.url}/chat/completions/", "wise").ask(["a"])
    assert "Authorization" not in fake.headers[0] and fake.paths == ["/v1/chat/completions"]


@pytest.mark.parametrize(
    "content",
    [
        f"Here is my judgement:\n```json\n{GOOD}\n```\nI hope this helps {{really}}!",
        f'<think>first {{"coherence": 0.1, "fluency": 0.1}}</think>{GOOD}',
        f'{{"coherence": 0.1, "fluency": 0.1}} but on reflection {GOOD}',
        f'{{"answer": {GOOD}}}',
        f"{{ not json {GOOD}",
        '{"concept": "dogs", "coherence": "0.9", "fluency": 0.40}',
        [{"type": "text", "text": GOOD[:20]}, {"type": "text", "text": GOOD[20:]}, "noise"],
    ],
)
def test_json_wrapped_in_something(content: Any) -> None:
    assert parse(json.loads(completion(content))) == Verdict(0.9, 0.4, "dogs")


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ({}, "without choices"),
        ({"choices": []}, "without choices"),
        ({"choices": [{"message": {"content": None}}]}, "without text"),
        ([1], "without choices"),
        ("They are all about dogs. Coherence 0.9!", "without both scores"),
        ('{"coherence": 0.9}', "without both scores"),
        ('{"coherence": 9, "fluency": 4}', "no number from 0 to 1: '9'"),
        ('{"coherence": -0.1, "fluency": 0.4}', "no number from 0 to 1"),
        ('{"coherence": NaN, "fluency": 0.4}', "no number from 0 to 1"),
        ('{"coherence": true, "fluency": 0.4}', "no number from 0 to 1"),
        ('{"coherence": null, "fluency": 0.4}', "no number from 0 to 1"),
        ('{"coherence": "high", "fluency": 0.4}', "no number from 0 to 1"),
        ('{"coherence": [0.5], "fluency": 0.4}', "no number from 0 to 1"),
        (f'{{"coherence": 1{"0" * 400}, "fluency": 0.4}}', "no number from 0 to 1"),
        ('{"a":' * 5000, "without both scores"),
    ],
)
def test_nonsense_is_refused(reply: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(json.loads(completion(reply)) if isinstance(reply, str) else reply)


def test_nonsense_is_asked_again_with_limits(fake: Fake, judge: Judge, waits: list[float]) -> None:
    fake.script = ["what?", b"<html>", GOOD]
    assert judge.ask(["a"]) == Verdict(0.9, 0.4, "dogs") and waits == [1.0, 2.0]
    fake.script = ["what?"]
    with pytest.raises(NoVerdict, match=r"^judge wise gave no verdict in 4 attempts \| got a reply without both scores: 'what\?'$"):
        judge.ask(["b"])
    assert len(fake.asked) == 3 + module.ATTEMPTS and waits == [1.0, 2.0, 1.0, 2.0, 4.0]


def test_429_waits_as_long_as_it_is_told_to_with_limits(fake: Fake, judge: Judge, waits: list[float]) -> None:
    soon = formatdate(time.time() + 20, usegmt=True)
    fake.script = [(429, ("Retry-After", "7")), (429, ("Retry-After", "99999")), (503, ("Retry-After", soon)), GOOD]
    assert judge.ask(["a"]).coherence == 0.9
    assert waits[:2] == [7.0, module.LONGEST_WAIT] and 15 < waits[2] <= 20
    del waits[:]
    fake.asked.clear()
    fake.script = [(429, ("Retry-After", "soon")), (500, ("Retry-After", "nan")), (429, ("Retry-After", "-5")), GOOD]
    assert judge.ask(["b"]).coherence == 0.9 and waits == [1.0, 2.0, 0.0]


def test_always_429_is_missing_and_not_zero(fake: Fake, judge: Judge, caplog: pytest.LogCaptureFixture) -> None:
    fake.script = [(429,)]
    told: list[int] = []
    with caplog.at_level(logging.WARNING, "mxd"):
        found = judge.ask_all([["a"], ["b"], ["c"], ["d"]], told.append)
    assert found.verdicts == [None] * 4 and told == [1, 2, 3, 4]
    assert found.why == ["judge wise gave no verdict in 4 attempts | got HTTP 429 Too Many Requests: no"]
    assert len(fake.asked) == module.GIVE_UP_AFTER * module.ATTEMPTS, "then it is left alone"
    assert KEY not in caplog.text and KEY not in repr(judge)


def test_one_that_recovers_goes_on(fake: Fake, judge: Judge) -> None:
    fake.script = [*[(500,)] * module.ATTEMPTS, GOOD, *[(500,)] * module.ATTEMPTS, GOOD]
    found = judge.ask_all([["a"], ["b"], ["c"], ["d"]])
    assert [verdict is not None for verdict in found.verdicts] == [False, True, False, True]


@pytest.mark.parametrize(("code", "advice"), [(401, "--judge-key-env"), (404, "--judge-model"), (400, "--judge-url"), (307, "redirects")])
def test_a_refusal_is_not_asked_again(fake: Fake, judge: Judge, waits: list[float], code: int, advice: str) -> None:
    fake.script = [(code, ("Location", f"{fake.url}/elsewhere"))]
    found = judge.ask_all([["a"], ["b"]])
    assert found.verdicts == [None, None] and len(fake.asked) == 1 and waits == []
    assert f"got HTTP {code}" in found.why[0] and advice in found.why[0]


def hang(seconds_between: float) -> Callable[[Any], None]:
    def answer(handler: Any) -> None:
        handler.send_response(200)
        handler.end_headers()
        for _ in range(100):
            if handler.server.mxd_stop.wait(seconds_between):
                return
            try:
                handler.wfile.write(b" ")
            except OSError:
                return

    return answer


@pytest.mark.parametrize("seconds_between", [20.0, 0.02])
def test_silence_and_dripping_time_out(fake: Fake, waits: list[float], seconds_between: float) -> None:
    fake.server.mxd_stop = fake.stop  # pyright: ignore[reportAttributeAccessIssue]
    fake.script = [hang(seconds_between), GOOD]
    start = time.monotonic()
    assert Judge(fake.url, "wise", timeout=0.2, sleep=waits.append).ask(["a"]).fluency == 0.4
    assert 0.2 <= time.monotonic() - start < 2 and waits == [1.0]


def test_a_reply_without_end_is_refused(fake: Fake, judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST_REPLY", 100)
    fake.script = ["x" * 200]
    with pytest.raises(NoVerdict, match="more than 100 bytes"):
        judge.ask(["a"])


def test_nobody_there(waits: list[float], fake: Fake) -> None:
    fake.close()
    found = Judge(fake.url, "wise", sleep=waits.append).ask_all([["a"]])
    assert found.verdicts == [None] and "Connection refused" in found.why[0] and waits == [1.0, 2.0, 4.0]


def test_what_was_answered_is_not_asked_again(fake: Fake, judge: Judge) -> None:
    assert judge.cache is not None
    assert judge.ask(["a"]) == judge.ask(["a"]) == Verdict(0.9, 0.4, "dogs")
    assert len(fake.asked) == 1
    judge.ask(["b"])
    dataclasses.replace(judge, model="other").ask(["a"])
    assert len(fake.asked) == 3, "other texts and other judges are"
    kept = judge.cache.read_text(encoding="utf-8")
    assert KEY not in kept and "127.0.0.1" not in kept
    fake.script = [(429,)]
    found = judge.ask_all([["c"], ["d"], ["a"], ["e"]])
    assert found.verdicts == [None, None, Verdict(0.9, 0.4, "dogs"), None], "also once it was given up"


def test_a_damaged_cache_costs_only_what_is_damaged(fake: Fake, judge: Judge) -> None:
    assert judge.cache is not None
    judge.ask(["a"])
    judge.ask(["b"])
    text = judge.cache.read_text(encoding="utf-8").replace('"coherence": 0.9', '"coherence": 7', 1)
    judge.cache.write_text("\x00{\n[1]\n" + text.rstrip()[:-10], encoding="utf-8")
    judge.ask(["c"])
    assert len(fake.asked) == 3
    judge.ask(["c"])
    assert len(fake.asked) == 3
    judge.ask(["a"])
    judge.ask(["b"])
    assert len(fake.asked) == 5


def test_an_endpoint_that_sends_the_key_back(fake: Fake, judge: Judge) -> None:
    fake.script = [f"your key is {KEY}"]
    with pytest.raises(NoVerdict) as caught:
        judge.ask(["a"])
    assert KEY not in str(caught.value) and "(key)" in str(caught.value)


def test_a_key_that_cannot_be_sent_is_not_shown(fake: Fake) -> None:
    with pytest.raises(ConfigError, match="the key of the judge cannot be sent") as caught:
        Judge(fake.url, "wise", f"{KEY}\nX: y")
    assert KEY not in str(caught.value)
    assert Judge(fake.url, "wise", f"{KEY}\n").key == KEY, "a newline at the end of a file is common"


def test_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert judges(EvalConfig(), tmp_path / "c") == [], "off by default"
    check(EvalConfig())
    monkeypatch.setenv("OPENAI_API_KEY", "one")
    monkeypatch.setenv("OTHER", "two")
    config = EvalConfig(judge_url="http://127.0.0.1:1/v1", judge_model=("a", "b"))
    check(config)
    assert [(j.url, j.model, j.key) for j in judges(config, tmp_path / "c")] == [(config.judge_url, m, "one") for m in "ab"]
    assert [j.key for j in judges(dataclasses.replace(config, judge_key_env="OTHER"), tmp_path / "c")] == ["two", "two"]
    assert [j.key for j in judges(dataclasses.replace(config, judge_key_env="NONE_SUCH"), tmp_path / "c")] == [None, None]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"judge_url": "http://h/v1"}, r"^--judge-url without --judge-model \| expected both, or neither \| next: add --judge-model$"),
        ({"judge_model": ("a",)}, r"^--judge-model without --judge-url \| expected both, or neither \| next: add --judge-url$"),
        ({"judge_url": "file:///etc/passwd", "judge_model": ("a",)}, r"^--judge-url is no address \| expected https://HOST/v1"),
        ({"judge_url": "h/v1", "judge_model": ("a",)}, r"^--judge-url is no address"),
        ({"judge_url": f"https://u:{KEY}@h/v1", "judge_model": ("a",)}, r"^--judge-url holds credentials"),
    ],
)
def test_options_that_cannot_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check(EvalConfig(**options))
    assert KEY not in str(caught.value)


def test_options_that_cannot_work_are_refused_before_anything_is_measured() -> None:
    from mxd.evals.evaluate import _check

    with pytest.raises(ConfigError, match=r"^--judge-url without --judge-model"):
        _check(EvalConfig(judge_url="http://h/v1"))
