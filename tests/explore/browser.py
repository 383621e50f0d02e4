"""Who looks at the page in tests: `Client`, which stands for a browser with the key, and Chromium itself.

Chromium is the system's own, driven by playwright; nothing is downloaded. Every page is watched (`Tabs`): a request to another machine,
an error or a warning on the console, and an error of a script each fail the test.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import numpy as np
import pytest
from starlette.testclient import TestClient

from mxd.checkpoint import Run
from mxd.errors import RunError
from mxd.explore import serve
from mxd.explore.guards import Keys
from mxd.explore.live import Worker, loader
from mxd.explore.routes import Site
from mxd.explore.shelf import Shelf

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page, Route

Theme = Literal["light", "dark"]

BASE = "http://127.0.0.1:8008"
MXD = "mxd-k2"
OTHER = "transcoder-k2"


class Client:
    """A browser with the key."""

    def __init__(self, site: Site) -> None:
        self.site, keys = site, Keys(8008)
        self.http = TestClient(serve.guarded(site, keys), base_url=BASE)
        assert self.http.get("/", params={"key": keys.secret}).status_code == 200

    def get(self, path: str, status: int = 200, *, within: str = "", start: int | None = None, **params: Any) -> Any:
        """`within` and `start` are the parameters ``in`` and ``from``, which Python does not take for names."""
        odd: dict[str, Any] = {**({"in": within} if within else {}), **({} if start is None else {"from": start})}
        answer = self.http.get(path, params={**params, **odd})
        assert answer.status_code == status, answer.text
        return strict(answer.text)

    def post(self, path: str, body: Any, status: int = 200) -> Any:
        answer = self.http.post(path, json=body)
        assert answer.status_code == status, answer.text
        return strict(answer.text)

    def error(self, method: str, path: str, status: int, body: Any = None, **how: Any) -> dict[str, str]:
        answer = self.http.request(method, path, json=body, **how) if body is not None else self.http.request(method, path, **how)
        assert answer.status_code == status, answer.text
        error = strict(answer.text)["error"]
        assert set(error) == {"what", "expected", "got", "next"} and all("\n" not in part for part in error.values())
        return error


def strict(text: str) -> Any:
    """JSON without NaN."""

    def no(name: str) -> None:
        raise AssertionError(f"{name} in an answer")

    return json.loads(text, parse_constant=no)


def no_host() -> Any:
    raise RunError("no host here", next="mxd fetch")


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


def columns_of(data: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """The header and the columns of a binary answer."""
    (length,) = struct.unpack_from("<I", data)
    header = strict(data[4 : 4 + length].decode())
    start = -(-(4 + length) // 8) * 8
    assert start % 8 == 0 and len(data) == start + 4 * header["n"] * len(header["names"])
    table = np.frombuffer(data, "<f4", offset=start).reshape(len(header["names"]), header["n"])
    return header, dict(zip(header["names"], table, strict=True))


# ---- a real browser, and a real server ---------------------------------------------------------------------------------------------


def chromium() -> str:
    """The system's Chromium; skips, or with ``MXD_REQUIRE_BROWSER=1`` fails, where it or playwright is missing."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    missing = [name for name, there in (("chromium", found), ("playwright", importlib.util.find_spec("playwright"))) if not there]
    if missing:
        why = f"no {' and no '.join(missing)} here (apt-get install chromium, pip install playwright)"
        (pytest.fail if os.environ.get("MXD_REQUIRE_BROWSER") == "1" else pytest.skip)(why)
    return str(found)


@contextlib.contextmanager
def launched() -> Iterator[Browser]:
    """Chromium, headless."""
    path = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield browser
        browser.close()


class Served:
    """The page of a run at a real port, in a thread of this process.

    Attributes:
        run: what it shows.
        site: what the server knows.
        keys: its secret.
        base: "http://127.0.0.1:PORT", without a slash at the end.
        log: method, path and status of every answer.
    """

    def __init__(self, run: Run, *, load: Callable[[], Any] = no_host, port: int = 0, veil: bool = False) -> None:
        """`load` makes the host's model; `live` gives it. The server answers when this returns."""
        self.run, self.site = run, Site(Shelf(run.path), Worker(load), veil=veil)
        listener = serve.listen("127.0.0.1", port)
        self.port = int(listener.getsockname()[1])
        self.keys, self.base = Keys(self.port), f"http://127.0.0.1:{self.port}"
        self.log: list[tuple[str, str, int]] = []
        self.server = serve.Server(self._logged(serve.guarded(self.site, self.keys)))
        self.site.worker.start()
        self._listener = listener
        self._thread = threading.Thread(target=self.server.run, args=([listener],), name="mxd-served", daemon=True)
        self._thread.start()
        until(lambda: self.server.started)

    def _logged(self, app: Any) -> Any:
        async def logged(scope: Any, receive: Any, send: Any) -> None:
            async def tell(message: Any) -> None:
                if message["type"] == "http.response.start":
                    self.log.append((scope["method"], scope["path"], message["status"]))
                await send(message)

            await app(scope, receive, tell)

        return logged

    @property
    def link(self) -> str:
        """What `mxd explore` prints."""
        return f"{self.base}/?key={self.keys.secret}"

    def stop(self) -> None:
        """End it, answers on their way included."""
        if self._thread.is_alive():
            self.server.should_exit = self.server.force_exit = True
            self._thread.join(20)
            self._listener.close()
            self.site.close()

    def ready(self, seconds: float = 60.0) -> Served:
        """Wait until the host is loaded."""
        self.site.worker.go()
        until(lambda: self.site.worker.status()["state"] == "ready", seconds)
        return self


def live(run: Run) -> Callable[[], Any]:
    """Makes the model of a run's own host."""
    return loader(Shelf(run.path), "cpu")


_GO = """route => new Promise(done => {
  addEventListener("hashchange", () => setTimeout(done), {once: true});
  setTimeout(done, 500);
  location.hash = route;
})"""


class Tab:
    """A page that is watched.

    Attributes:
        page: playwright's.
        problems: requests to other machines, errors and warnings on the console, errors of scripts.
        asked: addresses that something was asked of, in order.
    """

    def __init__(self, page: Page) -> None:
        self.page = page
        self.problems: list[str] = []
        self.asked: list[str] = []
        self._waiting: set[Any] = set()
        page.on("console", lambda said: self.problems.append(f"console: {said.text}") if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        page.on("request", lambda request: self._waiting.add(request))
        page.on("requestfinished", lambda request: self._waiting.discard(request))
        page.on("requestfailed", lambda request: self._waiting.discard(request))
        page.route("**/*", self._only_here)

    def _only_here(self, way: Route) -> None:
        """Let a request to this machine through."""
        address = urlsplit(way.request.url)
        self.asked.append(way.request.url)
        if address.scheme in ("data", "blob", "file") or address.hostname in ("127.0.0.1", "localhost", "::1"):
            way.continue_()
        else:
            self.problems.append(f"a request to another machine: {way.request.url}")
            way.abort()

    def go(self, route: str, *, settle: bool = True) -> None:
        """Change the part after ``#`` and wait for what is drawn there."""
        self.page.evaluate(_GO, route)
        if settle:
            self.settled()

    def settled(self, seconds: float = 15.0) -> None:
        """Wait until nothing is on its way for a moment, no skeleton is left, and two frames were painted."""
        drawn = "() => !document.querySelector('#main .skel') && document.getElementById('main').innerText.trim() !== ''"
        end, quiet = time.monotonic() + seconds, 0
        while quiet < 3:
            self.page.wait_for_timeout(40)
            quiet = quiet + 1 if not self._waiting and self.page.evaluate(drawn) else 0
            assert time.monotonic() < end, f"still on their way: {[one.url for one in self._waiting]}; there is {self.text()[:500]!r}"
        self.frame()

    def frame(self) -> None:
        """Two frames: what was asked for is painted."""
        self.page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def says(self, text: str, seconds: float = 10.0) -> None:
        """Wait until `text` can be read in the page's main part."""
        find = "text => document.getElementById('main').innerText.includes(text)"
        try:
            self.page.wait_for_function(find, arg=text, timeout=1000 * seconds)
        except Exception as error:
            raise AssertionError(f"{text!r} is not in: {self.text()[:2000]}") from error

    def text(self) -> str:
        """What can be read in the page's main part."""
        return self.page.inner_text("#main")

    def shot(self, path: Path, *, whole: bool = False) -> Path:
        """A picture, of the window or of the `whole` page."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=path, full_page=whole)
        return path


class Tabs:
    """Opens pages that are watched: `check` fails on any problem that was not expected."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser
        self._contexts: list[BrowserContext] = []
        self._watched: list[tuple[Tab, tuple[str, ...]]] = []
        self._astray: list[str] = []
        """Requests of pages that opened by themselves."""

    def context(
        self, *, theme: Theme = "light", width: int = 1280, height: int = 900, offline: bool = False, **more: Any
    ) -> BrowserContext:
        """A profile of its own: cookies and storage are not shared with another. `more`: see ``Browser.new_context``."""
        size: Any = {"width": width, "height": height}
        made = self._browser.new_context(viewport=size, color_scheme=theme, offline=offline, reduced_motion="reduce", **more)
        made.set_default_timeout(10_000)
        made.route("**/*", lambda way: (self._astray.append(way.request.url), way.abort())[0])
        self._contexts.append(made)
        return made

    def open(
        self,
        place: Served | Path | str,
        route: str = "",
        *,
        key: bool = True,
        expects: tuple[str, ...] = (),
        inside: BrowserContext | None = None,
        settle: bool = True,
        **how: Any,
    ) -> Tab:
        """Open the page of a server (with its key), a file, or a link, at a route.

        Args:
            place: what to open.
            route: "#/STUDENT/VIEW…".
            key: whether to have the key.
            expects: regular expressions of problems that belong to the test.
            inside: a context, for two tabs that share theirs; else one is made as `how` says.
            settle: wait until everything is drawn.
            how: see `context`.
        """
        context = inside or self.context(**how)
        tab = Tab(context.new_page())
        self._watched.append((tab, expects))
        if isinstance(place, Served):
            if key:
                context.add_cookies([{"name": place.keys.cookie, "value": place.keys.secret, "url": place.base, "httpOnly": True}])
            place = place.base + "/"
        elif isinstance(place, Path):
            place = place.absolute().as_uri()
        tab.page.goto(place + route)
        if settle:
            tab.settled()
        return tab

    def check(self) -> None:
        """
        Raises:
            AssertionError: a page met a problem that was not expected.
        """
        assert self._astray == []
        for tab, expects in self._watched:
            left = [text for text in tab.problems if not any(re.search(known, text) for known in expects)]
            assert left == [], "\n".join(left)

    def close(self) -> None:
        for context in self._contexts:
            context.close()
