"""Whoever asks the page's server must come from its page, with its key; everybody else learns nothing."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from mxd.explore import guards
from mxd.explore.guards import BODY_BYTES, Guards, Keys

BASE = "http://127.0.0.1:8008"
SECRET = "the page's data"


async def _data(request: Request) -> Response:
    return PlainTextResponse(f"{SECRET} {len(await request.body())}")


async def _shell(_: Request) -> Response:
    return PlainTextResponse("shell")


@pytest.fixture
def keys() -> Keys:
    return Keys(8008)


@pytest.fixture
def client(keys: Keys) -> TestClient:
    methods = ["GET", "POST", "PUT", "DELETE"]
    app = Starlette(routes=[Route("/", _shell), Route("/static/x", _shell), Route("/api/data", _data, methods=methods)])
    return TestClient(Guards(app, keys, names=("lab.example",)), base_url=BASE, follow_redirects=False)


def entered(client: TestClient, keys: Keys) -> TestClient:
    assert client.get("/", params={"key": keys.secret}).status_code == 303
    return client


def error_of(answer: Any, status: int) -> dict[str, str]:
    assert answer.status_code == status, answer.text
    assert SECRET not in answer.text
    error = answer.json()["error"]
    assert set(error) == {"what", "expected", "got", "next"} and error["what"]
    return error


def test_the_key_goes_into_a_cookie_and_out_of_the_address(client: TestClient, keys: Keys) -> None:
    answer = client.get("/", params={"key": keys.secret})
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith("mxd-8008=") and all(word in cookie for word in ("HttpOnly", "SameSite=Strict", "Path=/"))
    assert client.get("/api/data").text == f"{SECRET} 0"


@pytest.mark.parametrize("cookie", ["", "mxd-8008=", "mxd-8008=guess", "mxd-8009={}", "other={}", "mxd-8008=\xe9"])
def test_without_the_key_there_is_a_shell_and_no_data(client: TestClient, keys: Keys, cookie: str) -> None:
    headers = {b"cookie": cookie.format(keys.secret).encode("latin-1")}
    assert client.get("/", headers=headers).text == "shell"
    assert client.get("/static/x", headers=headers).status_code == 200
    error = error_of(client.get("/api/data", headers=headers), 403)
    assert error["next"] == "open the link that mxd explore printed"


def test_a_wrong_key_opens_nothing(client: TestClient) -> None:
    answer = client.get("/", params={"key": "guess"})
    assert answer.status_code == 303 and "set-cookie" not in answer.headers
    error_of(client.get("/api/data"), 403)


def test_a_ticket_opens_the_page_once_and_not_for_long(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    ticket, late = keys.ticket(), keys.ticket()
    assert keys.opens(ticket) and not keys.opens(ticket)
    now = time.monotonic()
    monkeypatch.setattr(guards.time, "monotonic", lambda: now + guards.TICKET_SECONDS + 1)
    assert not keys.opens(late) and keys.opens(keys.secret) and keys.opens(keys.secret)


@pytest.mark.parametrize("host", ["127.0.0.1:8008", "localhost:9999", "[::1]:8008", "127.0.0.1", "LOCALHOST:1", "lab.example:8008"])
def test_the_machine_answers_to_its_own_names_at_any_port(client: TestClient, keys: Keys, host: str) -> None:
    entered(client, keys)
    assert client.get("/api/data", headers={"host": host, "cookie": f"mxd-8008={keys.secret}"}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost@evil.example", "", "10.0.0.1", "a b", "[::2]"])
def test_foreign_names_are_refused(client: TestClient, keys: Keys, host: str) -> None:
    for path in ("/", "/static/x", "/api/data", f"/?key={keys.secret}"):
        answer = client.get(path, headers={"host": host, "cookie": f"mxd-8008={keys.secret}"})
        assert "set-cookie" not in answer.headers and "shell" not in answer.text
        error_of(answer, 400)


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:8009"},
        {"origin": "http://localhost:8008"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE"])
def test_other_pages_are_refused(client: TestClient, keys: Keys, method: str, headers: dict[str, str]) -> None:
    entered(client, keys)
    answer = client.request(method, "/api/data", headers={"content-type": "application/json", **headers}, content=b"{}")
    error_of(answer, 403)
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_our_own_page_is_answered(client: TestClient, keys: Keys) -> None:
    entered(client, keys)
    for headers in ({"origin": BASE}, {"sec-fetch-site": "same-origin"}, {"sec-fetch-site": "none"}):
        answer = client.post("/api/data", headers={"content-type": "application/json; charset=utf-8", **headers}, content=b"{}")
        assert answer.text == f"{SECRET} 2"
    forwarded = {"host": "localhost:5000", "origin": "http://localhost:5000", "cookie": f"mxd-8008={keys.secret}"}
    assert client.get("/api/data", headers=forwarded).status_code == 200, "through a tunnel the port is another"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/jsonp", ""])
def test_other_types_are_refused(client: TestClient, keys: Keys, kind: str) -> None:
    entered(client, keys)
    headers = {"content-type": kind} if kind else {}
    assert error_of(client.post("/api/data", headers=headers, content=b"{}"), 415)["expected"] == "application/json"
    if not kind:
        assert client.delete("/api/data").status_code == 200, "without a body a type says nothing"


def test_large_bodies_are_refused(client: TestClient, keys: Keys) -> None:
    entered(client, keys)
    json_type = {"content-type": "application/json"}
    assert client.post("/api/data", headers=json_type, content=b"x" * BODY_BYTES).text == f"{SECRET} {BODY_BYTES}"
    error_of(client.post("/api/data", headers=json_type, content=b"x" * (BODY_BYTES + 1)), 413)
    pieces = (b"x" * 65536 for _ in range(5))
    error_of(client.post("/api/data", headers=json_type, content=pieces), 413)
    error_of(client.post("/api/data", headers={**json_type, "content-length": "-1"}, content=b"{}"), 413)


def test_a_body_that_does_not_come_is_not_waited_for(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "BODY_SECONDS", 0.05)
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(60)
        raise AssertionError

    async def send(message: Any) -> None:
        sent.append(message)

    async def app(*_: Any) -> None:
        raise AssertionError("must not be reached")

    headers = [(b"host", b"localhost"), (b"cookie", f"mxd-8008={keys.secret}".encode()), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/api/data", "query_string": b"", "headers": headers}
    asyncio.run(Guards(app, keys)(scope, receive, send))
    assert sent[0]["status"] == 400 and "did not arrive" in json.loads(sent[1]["body"])["error"]["what"]


def test_every_answer_is_guarded(client: TestClient, keys: Keys) -> None:
    refused = client.get("/api/data")
    answers = [refused, client.get("/"), client.get("/nothing"), client.get("/", headers={"host": "evil.example"})]
    answers += [entered(client, keys).get("/api/data"), client.get("/", params={"key": "guess"})]
    for answer in answers:
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "require-trusted-types-for 'script'" in answer.headers["content-security-policy"]
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cross-origin-resource-policy"] == answer.headers["cross-origin-opener-policy"] == "same-origin"
    assert refused.headers["cache-control"] == client.get("/api/data").headers["cache-control"] == "no-store"
