"""Questions to an endpoint that may cost money: counted, kept within limits, and never paid for twice."""

from __future__ import annotations

import hashlib
import json
import math
import re
import sqlite3
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ..endpoint import Declined, Endpoint, Pace, text_of
from ..errors import MxdError, RunError
from .store import create, now

Answer = TypeVar("Answer")

CHARACTERS = 3.5
"""Characters of a token, where an endpoint does not say how many tokens it has read: English has about four."""
_TABLES = {
    "reply": "CREATE TABLE reply (asked TEXT PRIMARY KEY, model TEXT NOT NULL, reply TEXT NOT NULL, tokens_in INTEGER NOT NULL, "
    "tokens_out INTEGER NOT NULL, created TEXT NOT NULL)"
}
_REFUSAL = re.compile(r"(?i)\W*(i['’]?m sorry|i am sorry|sorry,|i can(['’]?t|not)|i won['’]?t|i['’]?m unable|i am unable|as an ai)\b")


class Spent(MxdError):
    """What may be spent is spent."""


class Stopped(MxdError):
    """Somebody asked for an end."""


class Usage(NamedTuple):
    """What was asked."""

    requests: int = 0
    tokens_in: int = 0
    tokens_out: int = 0

    def cost(self, price_in: float | None, price_out: float | None) -> float | None:
        """In the currency of the prices, which are for a million tokens; None if one is not known."""
        if price_in is None or price_out is None:
            return None
        return (self.tokens_in * price_in + self.tokens_out * price_out) / 1e6


class Limits(NamedTuple):
    """What may be spent."""

    tokens: int | None = None
    cost: float | None = None
    price_in: float | None = None
    price_out: float | None = None


class Replies:
    """Replies by the SHA-256 of what was asked, in one SQLite file; usable from several threads."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            RunError: the file is not one of ours.
        """
        self.path, self._lock = path, threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=30)
        try:
            self._connection.execute("PRAGMA trusted_schema = 0")
            self._connection.execute("BEGIN IMMEDIATE")
            if not self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                create(self._connection, _TABLES)
            self._connection.execute("COMMIT")
            found = dict(self._connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL"))
        except sqlite3.Error as error:
            self._connection.close()
            raise self._damaged(str(error)) from None
        if found != _TABLES:
            self._connection.close()
            raise self._damaged("other tables than ours")

    def get(self, asked: str) -> str | None:
        """The text of the reply to a question; None if there is none."""
        with self._lock:
            try:
                row = self._connection.execute("SELECT reply FROM reply WHERE asked = ?", (asked,)).fetchone()
            except sqlite3.Error as error:
                raise self._damaged(str(error)) from None
        return row[0] if row and isinstance(row[0], str) else None

    def put(self, asked: str, model: str, reply: str, tokens_in: int, tokens_out: int) -> None:
        """Keep a reply."""
        with self._lock:
            try:
                values = (asked, model, reply.encode("utf-8", "replace").decode(), tokens_in, tokens_out, now())
                self._connection.execute("INSERT OR REPLACE INTO reply VALUES (?, ?, ?, ?, ?, ?)", values)
            except sqlite3.Error as error:
                raise self._damaged(str(error)) from None

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def _damaged(self, why: str) -> RunError:
        return RunError(f"{self.path} cannot be used", expected="replies that mxd label kept", got=why, next=f"delete {self.path}")


class Asker:
    """One model that is asked from several threads. Attributes: `spent` since it was made; `ended`, after which nothing is asked."""

    def __init__(self, endpoint: Endpoint, replies: Replies, pace: Pace, limits: Limits) -> None:
        self._endpoint, self._replies, self._pace, self._limits = endpoint, replies, pace, limits
        self._lock, self.ended = threading.Lock(), threading.Event()
        self.spent = Usage()
        self._promised = Usage()

    @property
    def model(self) -> str:
        return self._endpoint.model

    def ask(self, question: str, parse: Callable[[str], Answer], expected: int) -> Answer:
        """What `parse` makes of the reply; a reply that it could read is kept, and not asked for again.

        Args:
            question: what is asked.
            parse: of the text of a reply; raises ValueError for nonsense, `Declined` for a refusal.
            expected: tokens that the reply may have, about.

        Raises:
            NoAnswer: there is none.
            Spent: it would go over the limits.
            Stopped: it has ended.
        """
        asked = hashlib.sha256(json.dumps(self._endpoint.body(question), sort_keys=True).encode()).hexdigest()
        kept = self._replies.get(asked)
        if kept is not None:
            try:
                return parse(kept)
            except ValueError:
                pass  # the file was changed, or we read replies otherwise now
        likely = Usage(1, tokens_of(question), expected)
        promised = 0

        def before() -> None:
            nonlocal promised
            self._pace.wait()
            self._promise(likely)
            promised += 1

        def read(reply: Any) -> Answer:
            usage, text = self._count(question, reply), said(reply)
            try:
                answer = parse(text)
            except ValueError as error:
                if cut_off(reply) and not isinstance(error, Declined):  # nor would it be whole at the next attempt
                    raise Declined("a reply that was cut off; raise --reply-tokens") from None
                raise
            self._replies.put(asked, self.model, text, usage.tokens_in, usage.tokens_out)
            return answer

        try:
            return self._endpoint.ask(question, read, before)
        finally:
            with self._lock:
                self._promised = _times(self._promised, likely, -promised)

    def _promise(self, likely: Usage) -> None:
        """Set aside what a request will cost."""
        if self.ended.is_set():
            raise Stopped("stopped")
        with self._lock:
            total = _times(_times(self.spent, self._promised, 1), likely, 1)
            tokens, cost = total.tokens_in + total.tokens_out, total.cost(self._limits.price_in, self._limits.price_out)
            if tokens > (self._limits.tokens or math.inf):
                raise Spent(
                    "--max-tokens is reached", expected=f"at most {self._limits.tokens:,}", next="the same command with more goes on"
                )
            if cost is not None and self._limits.cost is not None and cost > self._limits.cost:
                raise Spent("--max-cost is reached", expected=f"at most {self._limits.cost:g}", next="the same command with more goes on")
            self._promised = _times(self._promised, likely, 1)

    def _count(self, question: str, reply: Any) -> Usage:
        """Add up what a reply has cost, by what it says of itself if it does."""
        usage = reply.get("usage") if isinstance(reply, Mapping) else None
        usage = usage if isinstance(usage, Mapping) else {}
        try:
            text = text_of(reply)
        except ValueError:
            text = ""
        parts = (usage.get("prompt_tokens"), tokens_of(question)), (usage.get("completion_tokens"), tokens_of(text))
        counts = [given if isinstance(given, int) and 0 <= given < 2**40 else otherwise for given, otherwise in parts]
        found = Usage(1, *counts)
        with self._lock:
            self.spent = _times(self.spent, found, 1)
        return found


def tokens_of(text: str) -> int:
    """About how many tokens a text has."""
    return math.ceil(len(text) / CHARACTERS)


def said(reply: Any) -> str:
    """The text of a reply.

    Raises:
        Declined: the endpoint says that the model refuses, or that it was made to.
        ValueError: there is none.
    """
    try:
        choice = reply["choices"][0]
        refusal, reason = choice["message"].get("refusal"), choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError):
        refusal = reason = None
    if isinstance(refusal, str) and refusal:
        raise Declined(f"a refusal: {refusal[:80]!r}")
    if reason == "content_filter":
        raise Declined("a refusal by a content filter")
    return text_of(reply)


def cut_off(reply: Any) -> bool:
    """Whether a reply ended because it had become too long."""
    try:
        return reply["choices"][0]["finish_reason"] == "length"
    except (KeyError, IndexError, TypeError):
        return False


def check_refusal(text: str) -> None:
    """
    Raises:
        Declined: the text begins as refusals do.
    """
    if _REFUSAL.match(text[:200]):
        raise Declined(f"a refusal: {text[:80]!r}")


def _times(one: Usage, other: Usage, factor: int) -> Usage:
    return Usage(*(a + factor * b for a, b in zip(one, other, strict=True)))
