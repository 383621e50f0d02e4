"""A language model behind any OpenAI-compatible endpoint, local ones too: one question, one answer, retries with limits.

The key goes into the Authorization header and nowhere else: not into messages, files or redirects.
"""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPResponse
from typing import Any, NamedTuple, TypeVar, cast
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from .errors import ConfigError, MxdError

Answer = TypeVar("Answer")

ATTEMPTS = 4
"""Requests for one answer, at most."""
LONGEST_WAIT = 30.0
"""Longest wait between two requests in seconds, also when the endpoint asks for more (Retry-After)."""
TIMEOUT = 60.0
"""Seconds for one whole reply."""
LARGEST_REPLY = 2**20
"""Bytes of a reply that are read."""
LARGEST_REASON = 2**16
"""Bytes of why an endpoint refuses: of a longer reason nothing is told."""
LONGEST_REASON = 240
"""Characters of it that are told."""
_RETRY = {408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529}


class Words(NamedTuple):
    """How messages speak of an endpoint."""

    who: str = "model"
    """What the model is here; its name follows."""
    answer: str = "answer"
    """What it is asked for."""
    url: str = "--endpoint"
    """The option that holds its address."""
    model: str = "--model"
    """The option that names the model."""
    key: str = "--key-env"
    """The option that names the environment variable with the key."""


WORDS = Words()


class NoAnswer(MxdError):
    """None was given, in spite of retries. `silent`: the endpoint could not be reached or did not answer at all."""

    silent = False


class Refused(NoAnswer):
    """An endpoint that will not answer the next question either: wrong key, unknown model."""


class Declined(ValueError):
    """A model that answers that it will not answer: the same question is not asked again."""


class Pace:
    """At most so many requests a minute, evenly spread, over all threads.

    Args:
        per_minute: None for no limit.
        clock: seconds.
        sleep: waits.
    """

    def __init__(
        self, per_minute: float | None, *, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._between = 60.0 / per_minute if per_minute else 0.0
        self._clock, self._sleep, self._lock = clock, sleep, threading.Lock()
        self._next = -math.inf

    def wait(self) -> None:
        """Return when the next request may go out."""
        if not self._between:
            return
        with self._lock:
            now = self._clock()
            turn = max(now, self._next)
            self._next = turn + self._between
        if turn > now:
            self._sleep(turn - now)


@dataclass
class Endpoint:
    """One model behind one address."""

    url: str
    """Address of the API (…/v1) or of its chat completions."""
    model: str
    """Name of the model."""
    key: str | None = field(default=None, repr=False)
    """Sent as a bearer token; None for endpoints that want none."""
    words: Words = WORDS
    """How messages speak of it."""
    timeout: float = TIMEOUT
    """Seconds for one whole reply."""
    attempts: int = ATTEMPTS
    """Requests for one answer, at most."""
    longest_wait: float = LONGEST_WAIT
    """Longest wait between two requests in seconds."""
    largest: int = LARGEST_REPLY
    """Bytes of a reply that are read."""
    sleep: Callable[[float], None] = field(default_factory=lambda: time.sleep)
    """Waits between attempts."""
    reply_tokens: int | None = None
    """Tokens of one reply, at most; None: as many as the endpoint likes."""
    _unwanted: frozenset[str] = field(default=frozenset(), init=False, repr=False)
    """What the model was found to take no word about: its temperature, or the length of its replies."""

    def __post_init__(self) -> None:
        """
        Raises:
            ConfigError: a key that cannot stand in a header (the message does not hold it).
        """
        self.key = sendable(self.key, self.words)

    def ask(self, content: str, parse: Callable[[Any], Answer], before: Callable[[], None] = lambda: None) -> Answer:
        """What `parse` makes of the JSON that the endpoint answers with.

        Args:
            content: the question.
            parse: raises ValueError for nonsense, which is asked again, and `Declined` for a refusal, which is not.
            before: called before each request: a pace, a limit on what may be spent, an end that was asked for. What it raises ends the
                question.

        Raises:
            NoAnswer: none was given in `attempts` attempts, or the endpoint refuses.
        """
        last, silent = "", False
        for attempt in range(self.attempts):
            wait, silent = 2.0**attempt, True
            before()
            how = self._how()
            try:
                return parse(self._reply(content, how))
            except HTTPError as error:
                with error:  # it holds the connection
                    said = _said(error, self.timeout)
                    last = self._without_key(f"HTTP {error.code} {error.reason}{said and f': {said}'}")
                    unwanted = {name for name in how if error.code == 400 and name in said}
                    if unwanted:
                        self._unwanted, wait = self._unwanted | unwanted, 0.0
                    elif error.code not in _RETRY:
                        raise Refused(f"{self.words.who} {self.model} refuses", got=last, next=_advice(error.code, self.words)) from None
                    else:
                        wait = _wait(error.headers.get("Retry-After"), wait)
            except (OSError, HTTPException) as error:
                last = f"{type(error).__name__}: {error.reason if isinstance(error, URLError) else error}"
            except Declined as error:
                raise NoAnswer(f"{self.words.who} {self.model} declines", got=self._without_key(str(error))) from None
            except ValueError as error:
                last, silent = str(error), False
            if attempt + 1 < self.attempts:
                self.sleep(min(wait, self.longest_wait))
        failed = NoAnswer(
            f"{self.words.who} {self.model} gave no {self.words.answer} in {self.attempts} attempts", got=self._without_key(last)
        )
        failed.silent = silent
        raise failed

    def body(self, content: str) -> dict[str, Any]:
        """What a question is known by: the model and what it is asked, without the key."""
        return {"model": self.model, "messages": [{"role": "user", "content": content}], "temperature": 0}

    def _how(self) -> dict[str, Any]:
        """How it is to answer, as far as it takes that."""
        wanted = {"temperature": 0, **({} if self.reply_tokens is None else {"max_tokens": self.reply_tokens})}
        return {name: value for name, value in wanted.items() if name not in self._unwanted}

    def _without_key(self, text: str) -> str:
        """`text` fit for a log, whatever the endpoint sends back."""
        return text.replace(self.key, "(key)") if self.key else text

    def _reply(self, content: str, how: Mapping[str, Any]) -> Any:
        """The JSON that the endpoint answers with.

        Raises:
            HTTPError, OSError, HTTPException: no answer, or not in time.
            ValueError: no JSON.
        """
        headers = {"Content-Type": "application/json", "User-Agent": "mxd", **({"Authorization": f"Bearer {self.key}"} if self.key else {})}
        body = {name: value for name, value in self.body(content).items() if name != "temperature"} | dict(how)
        request = Request(address(self.url, self.words), json.dumps(body).encode(), headers, method="POST")
        until = time.monotonic() + self.timeout
        with build_opener(_NoRedirect).open(request, timeout=self.timeout) as response:
            return json.loads(_read_all(response, until, self.largest).decode("utf-8", "replace"))


def address(url: str, words: Words = WORDS) -> str:
    """The address of chat completions under the address of an API.

    Raises:
        ConfigError: an address that is not http(s), or holds credentials.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"{words.url} is no address", expected="https://HOST/v1 or http://HOST:PORT/v1", got=url.split("@")[-1])
    if parts.username or parts.password:
        raise ConfigError(f"{words.url} holds credentials", expected="the key in an environment variable", next=f"see {words.key}")
    path = parts.path.rstrip("/")
    return parts._replace(path=path if path.endswith("/chat/completions") else f"{path}/chat/completions", fragment="").geturl()


def sendable(key: str | None, words: Words = WORDS) -> str | None:
    """The key without the blanks around it; None if nothing is left.

    Raises:
        ConfigError: it cannot stand in a header (the message does not hold it).
    """
    key = (key or "").strip() or None
    if key and not (key.isascii() and key.isprintable()):
        raise ConfigError(f"the key of the {words.who} cannot be sent", expected="printable ASCII on one line", next=f"see {words.key}")
    return key


def text_of(reply: Any) -> str:
    """The text in the JSON of a chat completion, without what a model thinks aloud before its last word.

    Raises:
        ValueError: there is none.
    """
    try:
        content = reply["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise ValueError("a reply without choices[0].message.content") from None
    if isinstance(content, list):  # some endpoints answer in parts
        content = "".join(str(cast("Mapping[str, Any]", part).get("text", "")) for part in content if isinstance(part, Mapping))
    if not isinstance(content, str):
        raise ValueError("a reply without text")
    return re.sub(r"(?s)<think>.*?</think>", "", content)


def objects(text: str, names: set[str]) -> Iterator[Mapping[str, Any]]:
    """JSON objects in a text that hold all `names`, whatever stands around them."""
    decoder, at = json.JSONDecoder(), text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            end = at + 1
        else:
            if isinstance(value, dict) and names <= value.keys():
                yield cast("Mapping[str, Any]", value)
            else:
                end = at + 1  # it may hold the object that is wanted
        at = text.find("{", end)


class _NoRedirect(HTTPRedirectHandler):
    """The key goes to the address that was given and to no other."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        return None


def _read_all(response: HTTPResponse, until: float, largest: int) -> bytes:
    """The whole body, if it comes in time: an endpoint that sends a byte a second does not."""
    parts: list[bytes] = []
    while part := response.read1(65_536):
        parts.append(part)
        if time.monotonic() > until:
            raise TimeoutError("the reply does not end")
        if sum(map(len, parts)) > largest:
            raise ValueError(f"a reply of more than {largest} bytes")
    return b"".join(parts)


def _said(error: HTTPError, timeout: float) -> str:
    """Why an endpoint says it refuses, in one short line: OpenAI's ``error.message``, or what others have in its place; may be empty."""
    try:
        data = _read_all(cast(HTTPResponse, error.fp), time.monotonic() + timeout, LARGEST_REASON)
    except (OSError, HTTPException, ValueError):
        return ""
    text = data.decode("utf-8", "replace")
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError):
        found = re.sub(r"<[^>]*>", " ", text)
    for name in ("error", "detail", "message") * 2:
        found = found[name] if isinstance(found, dict) and name in found else found
    words = " ".join("".join(c if c.isprintable() else " " for c in found).split()) if isinstance(found, str) else ""
    return words if len(words) <= LONGEST_REASON else f"{words[: LONGEST_REASON - 1]}…"


def _wait(asked: str | None, otherwise: float) -> float:
    """Seconds in a Retry-After header (a number or a date), never negative."""
    if not asked:
        return otherwise
    try:
        seconds = float(asked)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(asked).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return otherwise
    return max(0.0, seconds) if math.isfinite(seconds) else otherwise


def _advice(code: int, words: Words) -> str:
    if code in (401, 403):
        return f"put the key into the environment variable that {words.key} names"
    if 300 <= code < 400:
        return f"give {words.url} the address that it redirects to"
    return f"check {words.url} and {words.model}"
