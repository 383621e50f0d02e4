"""What every user of an endpoint shares and the judge's tests do not see: the pace, refusals, what is silent and what is nonsense."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from mxd.endpoint import Declined, Endpoint, NoAnswer, Pace, Refused, address, objects, text_of
from mxd.errors import ConfigError, MxdError
from tests.explore.fake_model import FakeModel


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeModel]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    made = FakeModel(lambda _question: "yes")
    yield made
    made.close()


def test_requests_are_spread_evenly_over_a_minute() -> None:
    now = [100.0]
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        now[0] += seconds

    pace = Pace(30, clock=lambda: now[0], sleep=sleep)
    for _ in range(4):
        pace.wait()
    assert waits == [2.0, 2.0, 2.0]
    now[0] += 60
    pace.wait()
    assert waits == [2.0, 2.0, 2.0], "time that nobody used is not saved up"
    pace.wait()
    assert waits[3:] == [2.0]
    free = Pace(None, clock=lambda: now[0], sleep=sleep)
    for _ in range(100):
        free.wait()
    assert len(waits) == 4


def test_a_pace_holds_over_threads() -> None:
    waits: list[float] = []
    pace = Pace(60, clock=lambda: 0.0, sleep=waits.append)
    threads = [threading.Thread(target=pace.wait) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(waits) == [1.0, 2.0, 3.0, 4.0]


def test_a_refusal_is_not_asked_again(fake: FakeModel) -> None:
    def parse(_reply: Any) -> str:
        raise Declined("a refusal")

    with pytest.raises(NoAnswer, match=r"^model m declines \| got a refusal$") as caught:
        Endpoint(fake.url, "m", sleep=lambda _s: None).ask("q", parse)
    assert len(fake.asked) == 1 and not caught.value.silent and not isinstance(caught.value, Refused)


@pytest.mark.parametrize(("answer", "silent"), [(b"<html>", False), (503, True)])
def test_what_is_silent_and_what_is_nonsense(fake: FakeModel, answer: Any, silent: bool) -> None:
    fake.answer = lambda _question: answer
    with pytest.raises(NoAnswer, match="model m gave no answer in 3 attempts") as caught:
        Endpoint(fake.url, "m", attempts=3, sleep=lambda _s: None).ask("q", text_of)
    assert caught.value.silent is silent and len(fake.asked) == 3


def test_what_is_called_before_each_request_can_end_it(fake: FakeModel) -> None:
    calls: list[int] = []

    def before() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise MxdError("enough")

    fake.answer = lambda _question: 503
    with pytest.raises(MxdError, match=r"^enough$"):
        Endpoint(fake.url, "m", sleep=lambda _s: None).ask("q", text_of, before)
    assert len(fake.asked) == 2


def test_words_name_the_options_of_the_verb() -> None:
    with pytest.raises(ConfigError, match=r"^--endpoint is no address"):
        address("ftp://h")
    with pytest.raises(ConfigError, match=r"^--endpoint holds credentials .* see --key-env$"):
        address("http://u:p@h")
    with pytest.raises(ConfigError, match=r"^the key of the model cannot be sent"):
        Endpoint("http://h", "m", "a\nb")


def test_the_key_is_in_the_header_only(fake: FakeModel) -> None:
    made = Endpoint(fake.url, "m", " secret ")
    assert made.ask("q", text_of) == "yes"
    assert fake.keys == ["Bearer secret"] and "secret" not in repr(made) and "secret" not in str(made.body("q"))


def test_objects_in_a_text() -> None:
    text = 'first {"a": 1} then {"b": {"a": 2}} and {"a": 3, "c": 4} {'
    assert [one["a"] for one in objects(text, {"a"})] == [1, 2, 3]


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_the_key_follows_no_redirect(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            seen.append(f"POST {self.path}")
            self.send_response(code)
            self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_GET(self) -> None:
            seen.append(f"GET {self.path} {self.headers.get('Authorization')}")
            self.send_error(404)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        with pytest.raises(Refused, match=rf"got HTTP {code} .* give --endpoint the address that it redirects to"):
            Endpoint(f"http://127.0.0.1:{server.server_address[1]}/v1", "m", "secret").ask("q", text_of)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert seen == ["POST /v1/chat/completions"]
