"""What a request must be before it is answered: from this machine, from this page, with the key, and small.

Pure ASGI, around everything else. In order:

    the name in the Host header   against a foreign name that resolves to this machine (DNS rebinding)
    the key, kept in a cookie     other users of the machine reach its loopback addresses too
    Sec-Fetch-Site and Origin     against pages of other origins; no CORS header is ever sent
    type and size of the body     JSON only, at most `BODY_BYTES`

and every answer, refusals included, carries the headers of `HEADERS`.
"""

from __future__ import annotations

import asyncio
import hmac
import re
import secrets
import time
from collections.abc import Collection
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from .replies import Refusal, refused, to_json

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

BODY_BYTES = 256 * 1024
BODY_SECONDS = 30.0
"""A body must have arrived after this time."""
TICKET_SECONDS = 120.0
"""How long the link that the browser is opened with is good for, once."""
OWN_NAMES = ("127.0.0.1", "localhost", "[::1]")
CSP = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)
HEADERS: dict[str, str] = {
    "content-security-policy": CSP,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?")
_CHANGES = ("POST", "PUT", "DELETE", "PATCH")


class Keys:
    """The secret of one server: printed in its link, then kept in a cookie.

    Attributes:
        secret: what opens the page for as long as the server lives.
        cookie: name of the cookie.
    """

    def __init__(self, port: int) -> None:
        self.secret, self.cookie = secrets.token_urlsafe(24), f"mxd-{port}"
        self._tickets: dict[str, float] = {}

    def ticket(self) -> str:
        """A key that opens the page once: a browser's command line is there for everybody to read."""
        made = secrets.token_urlsafe(24)
        self._tickets[made] = time.monotonic() + TICKET_SECONDS
        return made

    def opens(self, key: str) -> bool:
        """Whether a link with this key opens the page; a ticket is used up by it."""
        until = self._tickets.pop(key, 0.0)
        return time.monotonic() < until or self.knows(key)

    def knows(self, secret: str) -> bool:
        return hmac.compare_digest(secret.encode(), self.secret.encode())


class Guards:
    """The application `app` behind all of these checks."""

    def __init__(self, app: ASGIApp, keys: Keys, *, names: Collection[str] = ()) -> None:
        """`names`: names by which the machine may be called besides `OWN_NAMES`."""
        self._app, self._keys = app, keys
        self._names = {*OWN_NAMES, *(name.lower() for name in names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # the server is told to offer neither WebSocket nor lifespan
        path: str = scope["path"]

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *_headers(path)]
            await send(message)

        try:
            host = self._check_host(scope)
            if path == "/" and (key := _key(scope)) is not None:
                return await self._enter(key, answer)
            if path.startswith("/api/"):
                self._check_page(scope, host)
                receive = await _checked_body(scope, receive)
        except Refusal as error:
            return await _reply(answer, error.status, to_json(refused(error)), [(b"content-type", b"application/json")])
        await self._app(scope, receive, answer)

    def _check_host(self, scope: Scope) -> str:
        """The Host header, whose name must be one of ours."""
        hosts = _values(scope, b"host")
        host = hosts[0].lower() if len(hosts) == 1 else ""
        found = _HOST.fullmatch(host)
        if not found or found[1].rstrip(".") not in self._names:
            raise Refusal(
                400,
                "this server does not go by that name",
                expected=", ".join(sorted(self._names)),
                got=(host or f"{len(hosts)} Host headers")[:80],
                next="mxd explore RUN --allow-host NAME",
            )
        return host

    def _check_page(self, scope: Scope, host: str) -> None:
        """That a request for data comes from our own page, opened with the key."""
        (site,), (origin,) = (_values(scope, name)[:1] or [None] for name in (b"sec-fetch-site", b"origin"))
        if site not in (None, "same-origin", "none") or origin not in (None, f"http://{host}", f"https://{host}"):
            raise Refusal(403, "this request comes from another page", expected=f"http://{host}", got=(origin or site or "")[:80])
        if not any(self._keys.knows(value) for value in _cookies(scope, self._keys.cookie)):
            raise Refusal(403, "this page was opened without its key", next="open the link that mxd explore printed")
        if scope["method"] in _CHANGES:
            kind = (_values(scope, b"content-type") or [""])[0]
            bare = scope["method"] == "DELETE" and not kind
            if not bare and kind.partition(";")[0].strip().lower() != "application/json":
                raise Refusal(415, "a body of another type", expected="application/json", got=kind[:80] or "none")

    async def _enter(self, key: str, answer: Send) -> None:
        """Put the key into a cookie and out of the address."""
        headers = [(b"location", b"/"), (b"cache-control", b"no-store")]
        if self._keys.opens(key):
            cookie = f"{self._keys.cookie}={self._keys.secret}; HttpOnly; SameSite=Strict; Path=/"
            headers.append((b"set-cookie", cookie.encode()))
        await _reply(answer, 303, b"", headers)


async def _checked_body(scope: Scope, receive: Receive) -> Receive:
    """The request's body, read whole and given again; then what `receive` says itself, such as that the browser is gone."""
    said = _values(scope, b"content-length")
    if said and (not said[0].isdigit() or int(said[0]) > BODY_BYTES):
        raise _too_large(said[0][:20])
    parts: list[bytes] = []
    more = True
    deadline = time.monotonic() + BODY_SECONDS
    while more:
        try:
            message: dict[str, Any] = dict(await asyncio.wait_for(receive(), max(deadline - time.monotonic(), 0.01)))
        except asyncio.TimeoutError:
            raise Refusal(400, "the body of a request did not arrive", expected=f"within {BODY_SECONDS:g} s") from None
        if message["type"] != "http.request":
            raise Refusal(400, "the browser went before its request was read")
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
        if sum(map(len, parts)) > BODY_BYTES:
            raise _too_large("more")
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": b"".join(parts), "more_body": False}

    return again


def _too_large(got: str) -> Refusal:
    return Refusal(413, "a request that is too large", expected=f"at most {BODY_BYTES:,} bytes", got=got)


def _headers(path: str) -> list[tuple[bytes, bytes]]:
    found = {**HEADERS, "cache-control": "no-store"} if path.startswith("/api/") else HEADERS
    return [(name.encode(), value.encode()) for name, value in found.items()]


async def _reply(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    headers = [*headers, (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _values(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name]


def _key(scope: Scope) -> str | None:
    """The key in a link; None where there is none."""
    return parse_qs(scope.get("query_string", b"").decode("latin-1")).get("key", [None])[0]


def _cookies(scope: Scope, name: str) -> list[str]:
    pairs = (pair.strip().partition("=") for value in _values(scope, b"cookie") for pair in value.split(";"))
    return [value.strip('"') for key, _, value in pairs if key == name]
