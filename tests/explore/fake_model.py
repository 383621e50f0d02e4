"""A language model behind an endpoint on this machine that knows what the units of `tests.explore.planted` fire on, or misbehaves."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = str | bytes | int | tuple[int, bytes] | dict[str, Any] | None
"""Text of a reply, raw bytes, an HTTP code (and a body), a whole message; None for silence."""


class FakeModel:
    """Answers what `answer` makes of a question.

    Attributes: `asked`, the questions so far; `bodies`, all that was sent; `keys`, the Authorization headers.
    """

    def __init__(self, answer: Callable[[str], Answer] | None = None) -> None:
        self.answer = answer or knows("w7")
        self.asked: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.reason = "stop"
        self.usage: dict[str, Any] | None = {"prompt_tokens": 100, "completion_tokens": 10}
        self.at_once = self.most_at_once = 0
        self.lock, self.end = threading.Lock(), threading.Event()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                question = body["messages"][0]["content"]
                with fake.lock:
                    fake.bodies.append(body)
                    fake.asked.append(question)
                    fake.keys.append(self.headers.get("Authorization"))
                    fake.at_once += 1
                    fake.most_at_once = max(fake.most_at_once, fake.at_once)
                try:
                    self.reply(fake.answer(question))
                finally:
                    with fake.lock:
                        fake.at_once -= 1

            def reply(self, answer: Answer) -> None:
                if answer is None:
                    fake.end.wait(20)
                    return
                reason = b"{}"
                if isinstance(answer, tuple):
                    answer, reason = answer
                code = answer if isinstance(answer, int) else 200
                message = answer if isinstance(answer, dict) else {"role": "assistant", "content": answer}
                body = {"choices": [{"message": message, "finish_reason": fake.reason}], **({"usage": fake.usage} if fake.usage else {})}
                data = answer if isinstance(answer, bytes) else reason if isinstance(answer, int) else json.dumps(body).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(data)))
                if code == 429:
                    self.send_header("Retry-After", "0")
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def close(self) -> None:
        self.end.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def excerpts(question: str) -> list[str]:
    """The texts in a question."""
    return [json.loads(line)["text"] for line in question.splitlines() if line.startswith('{"') and '"text"' in line]


def knows(token: str, label: str = "the word w7") -> Callable[[str], str]:
    """A model that finds every `token`, and takes marks for right if each of them is one."""

    def answer(question: str) -> str:
        texts = excerpts(question)
        if '"strength"' in question:
            return json.dumps({"label": label})
        marked = [re.findall("<<(.*?)>>", text, re.DOTALL) for text in texts]
        if any(marked):
            return json.dumps({"answers": [int(all(set(one.split()) == {token} for one in marks)) for marks in marked]})
        return json.dumps({"answers": [int(token in text.split()) for text in texts]})

    return answer
