"""The page in Chromium: strange text in it, other pages against it, and every state in which something is missing."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import itertools
import json
import re
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import quote, urlencode

import pytest

from mxd.checkpoint import Run
from mxd.explore import export
from mxd.explore.notes import Notes
from mxd.explore.store import TextStore, text_path, units_path
from tests.explore import keepsakes
from tests.explore.browser import MXD, OTHER, Served, Tab, Tabs, chromium, live
from tests.explore.handmade import LETTER, make_store

pytestmark = [pytest.mark.browser, pytest.mark.usefixtures("one_thread")]

VIEWS = {
    "overview": "",
    "units": f"#/{MXD}/units",
    "unit": f"#/{MXD}/unit/2",
    "sentence": f"#/{MXD}/sentence",
    "bench": f"#/{MXD}/bench",
    "compare": f"#/{MXD}/compare?unit=2",
    "notes": f"#/{MXD}/notes",
}
LOADED = r"^console: Failed to load resource: the server responded with a status of "
"""What Chromium says of every answer that is none."""
REFUSED = r"^console: Failed to load resource: net::ERR_(CONNECTION_REFUSED|CONNECTION_RESET|EMPTY_RESPONSE|SOCKET_NOT_CONNECTED)"


# ---- runs with strange text -----------------------------------------------------------------------------------------------------

MARKUP = "</script><script>window.ran=1</script><img src=x onerror=window.ran=1><svg onload=window.ran=1>"
HOSTILE = f"{MARKUP}\u202e\u2028\x00\"'`${{window.ran=1}} {{{{ran}}}} end"
LONG = "w" * 10_000
ODD = (
    "\t\tif (a < b && c > d) {\n\t\t\treturn '&amp;';\r\n\t\t}\n",
    "  two blanks before,   three between, and one after \n\n",
    "👩‍🚀👍🏽 flags 🇫🇷🇯🇵, music 𝄞, a heart ❤️\n",
    "漢字かな交じり文の例、한국어 문장, ประโยคไทย\n",
    "שלום עולם, treaty של 1871 (חוזה)\nمرحبا بالعالم ١٢٣\n",
    "nul \x00 bell \x07 soft\u00adhyphen zero\u200bwidth \ufeffmark bidi \u202eback\u202c isolate \u2067x\u2069 line\u2028end\n",
    "e\u0301 a\u0300\u0316 z\u0361o — “quotes” ½ ﬁ Ǆ\n",
    MARKUP + "\n",
)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on text that is hard to show, of which some is meant to break the page."""
    path = tmp_path_factory.mktemp("odd")
    return make_store(path, n_units=60, tokens=6144, documents=lambda i: f"{i} {''.join(ODD)}", contexts=15, tokens_per_sequence=64)


@pytest.fixture(scope="module")
def hostile(odd: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same, where everything that has a name is called by markup."""
    run = Run.open(shutil.copytree(odd.path, tmp_path_factory.mktemp("hostile") / MARKUP.replace("/", "\\")[:80]))
    with contextlib.closing(sqlite3.connect(text_path(run))) as database, database:
        database.execute("UPDATE doc SET name = ?, source = ?", (HOSTILE, MARKUP))
        database.execute("UPDATE token SET text = ? WHERE id = ?", (HOSTILE, LETTER))
    for student in (MXD, OTHER):
        with contextlib.closing(sqlite3.connect(units_path(run, student))) as database, database:
            for unit, text in ((2, HOSTILE), (3, LONG), (4, HOSTILE)):
                row = (unit, MARKUP, text, MARKUP, MARKUP, 0.5, 9, None, None, "2026")
                database.execute(f"INSERT INTO label VALUES ({', '.join('?' * 10)})", row)
            database.execute("INSERT INTO probe VALUES (2, ?, ?, 0.5, 9)", (MARKUP, HOSTILE))
    notes, weights = Notes(run), run.weights_sha256(MXD)
    notes.put(weights, 2, MXD, star=True, text=HOSTILE, tags=[MARKUP[:60]], expected=None)
    notes.put(weights, 3, MXD, star=True, text=LONG, tags=[], expected=None)
    request, result = keepsakes.bench_run(HOSTILE, HOSTILE, MARKUP, token=LETTER)
    result["lanes"][0]["stats"]["stopped"] = MARKUP
    notes.save_bench(MXD, request, result)
    notes.save_sentence({"text": HOSTILE}, HOSTILE, [MXD], keepsakes.sentence(HOSTILE, (MXD,), MARKUP))
    notes.close()
    return run


@pytest.fixture(scope="module")
def serve_it() -> Iterator[Callable[..., Served]]:
    """Serves a run until the module's tests are done."""
    chromium()
    with contextlib.ExitStack() as stack:

        def serve_it(run: Run, **options: Any) -> Served:
            server = Served(run, **options)
            stack.callback(server.stop)
            return server

        yield serve_it


def harmless(tab: Tab) -> None:
    """That nothing ran, nothing went away sideways, and no value was shown as a computer says it."""
    assert tab.page.evaluate("() => [window.ran, document.title.includes('ran=1</') ? null : 0]")[0] is None
    assert tab.page.evaluate("() => document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
    assert tab.page.evaluate("() => document.querySelectorAll('#main script, #main img, #main svg[onload], iframe, object').length") == 0
    assert not re.search(r"\bundefined\b|\bNaN\b|\[object ", tab.text())


# ---- 1: hostile text ------------------------------------------------------------------------------------------------------------


def seen(tab: Tab, words: str) -> None:
    """That `words` stand somewhere in the main part as text: to be read, or in a field."""
    found = """words => {
      const main = document.getElementById("main");
      const fields = [...main.querySelectorAll("textarea, input")].map(field => field.value);
      return [main.innerText, ...fields].some(text => text.replace(/\\s+/g, " ").includes(words));
    }"""
    assert tab.page.evaluate(found, words), (words, tab.page.url, tab.text()[:600])


SHOWN = {
    "overview": (),
    "units": (MARKUP, LONG[:100]),
    "unit": (MARKUP, f"{MARKUP}: {MARKUP}", "window.ran=1}"),
    "unit/3": (LONG[:100],),
    "sentence": (MARKUP,),
    "bench": (MARKUP[:50],),
    "compare": (MARKUP,),
    "notes": (MARKUP, LONG[:100]),
}


def test_hostile_text_is_text_and_nothing_else(hostile: Run, serve_it: Callable[..., Served], tabs: Tabs, tmp_path: Path) -> None:
    server = serve_it(hostile)
    routes = {**VIEWS, "unit/3": f"#/{MXD}/unit/3", "sentence": f"#/{MXD}/sentence?{urlencode({'text': HOSTILE})}"}
    tab = tabs.open(server, expects=(LOADED + "503",))
    for view, words in SHOWN.items():
        tab.go(routes[view])
        for text in words:
            seen(tab, text)
        harmless(tab)
        if view == "bench":
            tab.page.click("main button:has-text('Show')")
            tab.settled()
            seen(tab, MARKUP)
            harmless(tab)
    assert hostile.path.name in tab.page.inner_text("#run-name") and hostile.path.name in tab.page.title()
    tab.go(f"#/{MXD}/units?{urlencode({'q': MARKUP})}")
    tab.says("2 of ")
    tab.go(f"#/{quote(MARKUP, safe='')}/unit/2")
    tab.says(f'no student "{MARKUP}"')
    harmless(tab)
    chip = tab.page.locator('#main .cp[data-cp="U+202E"]').first
    assert chip.evaluate("el => getComputedStyle(el, '::before').content") == '"U+202E"'
    assert chip.text_content() == "\u202e" and not chip.locator("span").is_visible(), "kept, and not laid out"

    path = tmp_path / "page.html"
    export.write_html(hostile, path, units="starred")
    file = tabs.open(path, offline=True)
    for view, words in SHOWN.items():
        file.go(routes[view])
        for text in () if view in ("sentence", "overview") else words:
            seen(file, text)
        harmless(file)
    assert {url.split("#")[0] for url in file.asked} == {path.as_uri()}


# ---- 2: no request to elsewhere ----------------------------------------------------------------------------------------------------


def test_a_walk_through_all_views_asks_nobody_else(served: Served, tabs: Tabs) -> None:
    tab = tabs.open(served.link)
    assert tab.page.url == f"{served.base}/", "the key is out of the address"
    for name in ("Units", "Sentence", "Bench", "Compare", "Notes", "Overview"):
        tab.page.click(f".tabs a:has-text('{name}')")
        tab.settled()
        assert tab.page.get_attribute(f".tabs a:has-text('{name}')", "aria-current") == "page"
        assert len(tab.text()) > 40
        harmless(tab)
    for button in ("#pill", "#help", "main button:has-text('Export')"):
        tab.page.click(button)
        assert tab.page.locator("dialog[open]").inner_text().strip()
        tab.page.keyboard.press("Escape")
        tab.page.wait_for_selector("dialog", state="detached")
    tab.page.click("#theme")
    tab.page.keyboard.press("/")
    tab.page.keyboard.type("12")
    tab.page.keyboard.press("Enter")
    tab.says("expert 12")
    tab.settled()
    of_student = r"s/[\w-]+/(columns|rows|matches|units/\d+)\b.*"
    api = rf"api/(run|status|notes|bench|sentences|export/size|{of_student})"
    allowed = rf"/(\?key=[\w-]+|static/[a-z]+\.(js|css)|{api})?"
    strange = [url for url in tab.asked if not url.startswith("data:") and not re.fullmatch(re.escape(served.base) + allowed, url)]
    assert strange == [] and len(tab.asked) > 20
    entries: list[str] = tab.page.evaluate("() => performance.getEntriesByType('resource').map(entry => entry.name)")
    assert {url for url in entries if not url.startswith((served.base, "data:"))} == set()
    cookies = tab.page.context.cookies()
    assert [(cookie.get("name"), cookie.get("httpOnly"), cookie.get("sameSite")) for cookie in cookies] == [
        (served.keys.cookie, True, "Strict")
    ]
    assert tab.page.evaluate("() => document.cookie") == ""


# ---- 3: who may not look ------------------------------------------------------------------------------------------------------------


def asked(server: Served, method: str = "GET", path: str = "/api/run", body: str | None = None, **headers: str) -> tuple[int, Any]:
    """Ask with these headers, the key included unless `cookie` says otherwise."""
    all_of_them = {"cookie": f"{server.keys.cookie}={server.keys.secret}", **{name.replace("_", "-"): v for name, v in headers.items()}}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    try:
        connection.request(method, path, body, all_of_them)
        answer = connection.getresponse()
        text = answer.read().decode()
        return answer.status, json.loads(text) if text else None
    finally:
        connection.close()


def test_who_does_not_come_from_the_page_gets_no_data(served: Served) -> None:
    assert asked(served)[1]["name"] == "run"
    own = f"127.0.0.1:{served.port}"
    refusals: list[tuple[int, dict[str, str]]] = [
        (400, {"host": f"rebound.example:{served.port}"}),
        (403, {"cookie": ""}),
        (403, {"cookie": f"{served.keys.cookie}=guess"}),
        (403, {"origin": "http://other.example"}),
        (403, {"origin": "null"}),
        (403, {"origin": f"http://127.0.0.1:{served.port + 1}"}),
        (403, {"sec_fetch_site": "same-site"}),
        (403, {"sec_fetch_site": "cross-site"}),
    ]
    for status, headers in refusals:
        found, body = asked(served, **headers)
        assert found == status and set(body) == {"error"}, headers
    body = json.dumps({"student": MXD, "unit": 1, "text": "a treaty"})
    for status, kind in ((415, "text/plain"), (415, "application/x-www-form-urlencoded"), (200, "application/json")):
        assert asked(served, "POST", "/api/heat", body, content_type=kind, origin=f"http://{own}")[0] == status
    assert asked(served, host=f"localhost:{served.port}", origin=f"http://localhost:{served.port}")[0] == 200, "a tunnel's own name"


ATTACK = """async base => {
  const said = [];
  for (const init of [{}, {mode: "no-cors"}, {method: "POST", mode: "no-cors", body: "{}"}, {method: "DELETE"}]) {
    const path = init.method === "POST" ? "/api/notes" : "/api/run";
    try {
      const answer = await fetch(base + path, {credentials: "include", ...init});
      said.push(`${answer.type} ${(await answer.text()).length}`);
    } catch (error) {
      said.push(error.name);
    }
  }
  for (const [tag, name, path] of [["iframe", "src", "/"], ["script", "src", "/api/run"], ["img", "src", "/api/run"]]) {
    const el = Object.assign(document.createElement(tag), {[name]: base + path});
    said.push(await new Promise(done => {
      el.onload = () => done(`${tag} load`);
      el.onerror = () => done(`${tag} error`);
      document.body.append(el);
    }));
  }
  return said;
}"""


@pytest.fixture
def evil() -> Iterator[str]:
    """A page of somebody else on this machine."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(b"<title>evil</title><p>evil")

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_another_page_on_this_machine_reads_nothing(served: Served, tabs: Tabs, evil: str) -> None:
    """Cookies know no ports: a page at another port of 127.0.0.1 sends ours along, so the guards must tell."""
    tab = tabs.open(served)
    other = tabs.open(evil, inside=tab.page.context, expects=("",), settle=False)
    before = len(served.log)
    said = other.page.evaluate(ATTACK, served.base)
    assert said[0] == "TypeError" and said[3] == "TypeError", "no CORS header, so nothing can be read"
    assert not any(re.match(r"(basic|cors) ", text) for text in said), said
    assert said[5:] == ["script error", "img error"]
    answers = [answer for answer in served.log[before:] if answer[1].startswith("/api/") and answer[1] != "/api/status"]
    assert len(answers) >= 4 and {status for _, _, status in answers} == {403}, answers
    frames = [frame for frame in other.page.frames if frame != other.page.main_frame]
    assert all(not frame.url.startswith(served.base) for frame in frames), "not framed"


def test_without_its_key_the_page_says_where_it_is(served: Served, tabs: Tabs) -> None:
    for link in (served.base, f"{served.base}/?key=guess"):
        tab = tabs.open(link, expects=(LOADED + "403",))
        tab.says("This page was opened without its key".lower()[5:])
        assert "open the link that mxd explore printed" in tab.text()
        assert MXD not in tab.page.inner_text("body") and tab.page.inner_text("#run-name") == ""
        assert tab.page.context.cookies() == []


# ---- 8: text that is hard to show ---------------------------------------------------------------------------------------------------


def bytes_of(ids: list[int]) -> bytes:
    """What the byte-level tokens stand for: GPT-2's alphabet, sorted."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {**{byte: byte for byte in printable}, **{byte: 256 + i for i, byte in enumerate(others)}}
    alphabet = sorted(letters, key=lambda byte: chr(letters[byte]))
    return bytes(alphabet[token] for token in ids if token < 256)


DRAWN = """() => [...document.querySelectorAll("#main .rows > .row")].map(row => {
  const ctx = row.querySelector(".ctx"), link = row.querySelector(".doc a");
  return {text: ctx.textContent, direction: getComputedStyle(ctx).direction, href: link && link.getAttribute("href"),
    chips: [...ctx.querySelectorAll(".cp")].map(el => [el.dataset.cp, el.textContent]),
    marks: [...ctx.querySelectorAll(".ws")].map(el => [el.className, el.textContent, getComputedStyle(el, "::before").content])};
})"""


def test_text_that_is_hard_to_show_is_shown_to_the_last_character(odd: Run, serve_it: Callable[..., Served], tabs: Tabs) -> None:
    source = TextStore(odd)
    tab = tabs.open(serve_it(odd, load=live(odd)).ready(), f"#/{MXD}/unit/1?w=128")
    document = "".join(ODD)
    for more in ("max", "5–6", "1–2"):
        tab.page.click(f"#main section[aria-label='band {more}'] > button")
        tab.settled()
    unit = tab.page.evaluate("name => mxd.source.unit(name, 1, {n: 100})", MXD)
    for band in unit["bands"]:
        assert len(band["contexts"]) == 15
        del band["contexts"][15 if band["name"] in ("max", "5–6", "1–2") else 10 :]
    contexts = [context for band in unit["bands"] for context in band["contexts"]]
    rows = tab.page.evaluate(DRAWN)
    assert len(rows) == len(contexts) == 75
    seen_chips: set[str] = set()
    for row, context in zip(rows, contexts, strict=True):
        ids = source.sequence(context["seq"]).ids.tolist()
        whole = bytes_of(ids).decode("utf-8", "replace")
        assert row["text"] == context["text"] == source.sequence(context["seq"]).text == whole
        inside = [part for part in re.split("\ufffd+", context["text"]) if part]
        ends = [at for at, _ in context["special"]]
        if not ends:
            assert all(part in document or part[:4].strip().isdigit() for part in inside), "and in the document itself"
        assert all(code == f"U+{ord(text):04X}" for code, text in row["chips"])
        seen_chips |= {code for code, _ in row["chips"]}
        shown = {"ws nl": ("\n", '"↵"'), "ws tab": ("\t", '"→"'), "ws sp": (" ", '"·"')}
        assert all((text, before) == shown[css] for css, text, before in row["marks"])
    assert {"U+0000", "U+0007", "U+200B", "U+202E", "U+2028", "U+FEFF"} <= seen_chips
    first = re.compile("[^\\W\\d_]")
    hebrew = [row for row in rows if (found := first.search(row["text"])) and "\u0590" <= found[0] <= "\u06ff"]
    assert hebrew and all(row["direction"] == "rtl" for row in hebrew)
    latin = [row for row in rows if (found := first.search(row["text"])) and found[0].isascii()]
    assert latin and all(row["direction"] == "ltr" for row in latin)
    tab.go("#/")
    contexts = [context for band in unit["bands"] for context in band["contexts"][:10]]
    for width in (10, 32):
        tab.go(f"#/{MXD}/unit/1?w={width}")
        for row, context in zip(tab.page.evaluate(DRAWN), contexts, strict=True):
            start, n = max(0, min(context["peak"] - width // 2, len(context["ids"]) - width)), min(width, len(context["ids"]))
            assert row["text"] == cut(context, start, start + n)
    one_character_one_span(tab, contexts)

    for seq in sorted({context["seq"] for context in contexts})[:6]:
        tab.go(f"#/{MXD}/sentence?seq={seq}")
        tab.page.wait_for_selector("#main .sent .t")
        assert tab.page.evaluate("() => document.querySelector('#main .sent').textContent") == source.sequence(seq).text


def cut(context: dict[str, Any], start: int, end: int) -> str:
    """The text of some of a context's tokens."""
    units = context["text"].encode("utf-16-le", "surrogatepass")
    return units[2 * context["cuts"][start] : 2 * context["cuts"][end]].decode("utf-16-le")


def one_character_one_span(tab: Tab, contexts: list[dict[str, Any]]) -> None:
    """A character of several tokens is one span; its value is the largest of theirs."""
    astronaut = next(c for c in contexts if "👩" in c["text"] and c["cuts"][c["peak"]] > 0)
    drawn = tab.page.evaluate(
        """context => [...mxd.heat.context(context, {width: null, max: context.a}).querySelectorAll(".t")].map(el => el.textContent)""",
        {**astronaut, "levels": [[i, 200] for i in range(len(astronaut["ids"]))], "special": []},
    )
    assert "👩" in drawn and "".join(drawn) == astronaut["text"]
    drawn = tab.page.evaluate(
        """([text, cuts, values]) => {
          const el = mxd.heat.tokens({text, cuts, ids: cuts.slice(1), special: []}, values, {scale: 4});
          return [...el.querySelectorAll(".t")].map(span => [span.textContent, span.className]);
        }""",
        ["a👩b", [0, 1, 1, 1, 1, 3, 4], [None, 0, 4, 0, 1, 0]],
    )
    assert drawn == [["a", "t"], ["👩", "t h6"], ["b", "t"]]


# ---- 13: what is missing ------------------------------------------------------------------------------------------------------------


def walk(tab: Tab, *, skip: tuple[str, ...] = ()) -> dict[str, str]:
    """What every view says; none is blank."""
    said: dict[str, str] = {}
    for view, route in VIEWS.items():
        if view not in skip:
            tab.go(route or "#/")
            said[view] = tab.text()
            assert len(said[view].strip()) > 20, view
            harmless(tab)
    return said


def commands(tab: Tab) -> list[str]:
    """The commands that are offered to be copied."""
    return tab.page.locator("#main .command code").all_inner_texts()


def test_nothing_collected_yet(run: Run, serve_it: Callable[..., Served], tabs: Tabs) -> None:
    shutil.rmtree(run.path / "explore")
    tab = tabs.open(serve_it(run), expects=(LOADED + "404",))
    said = walk(tab)
    for view in ("overview", "units", "unit"):
        assert f"nothing was collected about {MXD} yet" in said[view]
        tab.go(VIEWS[view] or "#/")
        assert f"mxd collect {run.path}" in commands(tab)
    assert "mxd eval" in said["overview"], "and what has not been measured"


def test_half_of_it_collected(run: Run, serve_it: Callable[..., Served], tabs: Tabs) -> None:
    """One student is there, the other is being read."""
    units_path(run, OTHER).unlink()
    server = serve_it(run)
    running = {
        "state": "running",
        "stage": f"reading the text, {OTHER}",
        "done": 1_234_567,
        "total": 4_000_000,
        "seconds_left": 90.0,
        "why": None,
    }
    state = SimpleNamespace(status=lambda: running, go=lambda: None, close=lambda: None)
    server.site.collector = cast("Any", state)
    tab = tabs.open(server, expects=(LOADED + "404",))
    assert "collecting 30 %" in tab.page.inner_text("#pill")
    walk(tab)
    for view in ("units", "unit/2"):
        tab.go(f"#/{OTHER}/{view}")
        tab.says(f"Collecting (reading the text, {OTHER}): 1.2 M of 4.0 M tokens, 2 min left.")
    tab.go(f"#/{MXD}/unit/2")
    tab.says("expert 2")
    state.status = lambda: (
        running | {"state": "failed", "why": {"what": "the disk is full", "expected": "", "got": "", "next": "mxd collect run"}}
    )
    tab.go(f"#/{OTHER}/units")
    tab.says("the disk is full", 15)
    assert "next mxd collect run" in tab.text()
    tab.go("#/dense/units")
    tab.says("dense has no units")
    assert commands(tab) == []


def test_no_host(made: Run, serve_it: Callable[..., Served], tabs: Tabs) -> None:
    tab = tabs.open(serve_it(made), expects=(LOADED + "503",))
    tab.page.wait_for_selector("#pill[data-state=failed]")
    said = walk(tab)
    for view in ("sentence", "bench"):
        assert "no host here" in said[view] and "next: mxd fetch" in said[view], said[view]
    tab.go(f"#/{MXD}/sentence?text=a+treaty")
    tab.says("no host here")
    assert "mxd fetch" in tab.text()
    tab.go(f"#/{MXD}/units?q=treaty&in=text")
    tab.says("no host here")
    tab.page.click("#pill")
    assert "next: mxd fetch" in tab.page.locator("dialog").inner_text()


def test_the_server_goes_and_comes_back(made: Run, serve_it: Callable[..., Served], tabs: Tabs) -> None:
    server = serve_it(made)
    tab = tabs.open(server, f"#/{MXD}/unit/2", expects=(REFUSED, LOADED + "403"))
    rows = "() => [...document.querySelectorAll('#main .figures, #main .rows, #main .bars')].map(el => el.textContent)"
    before = tab.page.evaluate(rows)
    server.stop()
    tab.page.wait_for_selector("#gone:visible", timeout=15_000)
    bar = tab.page.inner_text("#gone")
    assert "The server has stopped answering" in bar and "next: start mxd explore" in bar and "\n" not in bar.strip()
    assert tab.page.inner_text("#pill") == "no server"
    assert tab.page.evaluate(rows) == before and len(before) > 8, "all that was loaded stays"
    tab.go(f"#/{MXD}/unit/7", settle=False)
    tab.says("The server does not answer.")
    tab.go(f"#/{MXD}/unit/2", settle=False)
    tab.says("The server does not answer.")
    again = serve_it(made, port=server.port)
    tab.page.click("#gone button")
    tab.page.wait_for_function("() => document.getElementById('gone').innerText.includes('open the link that mxd explore printed')")
    tabs.open(again, f"#/{MXD}/unit/7", inside=tab.page.context)
    tab.page.wait_for_selector("#gone", state="hidden", timeout=20_000)
    tab.says("expert 2")


def test_a_damaged_database(run: Run, serve_it: Callable[..., Served], tabs: Tabs) -> None:
    server = serve_it(run)
    tab = tabs.open(server, f"#/{MXD}/units", expects=(LOADED,))
    data = bytearray(units_path(run, MXD).read_bytes())
    data[len(data) // 4 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 4)
    units_path(run, MXD).unlink()
    units_path(run, MXD).write_bytes(data)
    tab.page.reload()
    tab.settled()
    said = walk(tab)
    text = " ".join(said.values())
    assert f"{units_path(run, MXD).name} is damaged" in text
    assert f"mxd collect {run.path} --students {MXD} --overwrite" in text
    tab.go(f"#/{OTHER}/unit/2")
    tab.says("latent 2")
    for name, text in (("a database of another program", "PRAGMA application_id = 7"), ("other tables", "CREATE VIEW v AS SELECT 1")):
        shutil.copy(units_path(Run.open(run.path), OTHER), units_path(run, MXD))
        with contextlib.closing(sqlite3.connect(units_path(run, MXD))) as database, database:
            database.execute(text)
        tab.page.reload()
        tab.settled()
        tab.go(f"#/{MXD}/units")
        tab.says(name)
    units_path(run, MXD).write_bytes(b"not a database at all" * 100)
    tab.page.reload()
    tab.settled()
    tab.go(f"#/{MXD}/unit/2")
    tab.says("is damaged")
    text_path(run).write_bytes(b"")
    tab.page.reload()
    tab.settled()
    tab.go(f"#/{OTHER}/unit/2")
    tab.says("text.sqlite is damaged")
    assert "mxd collect" in tab.text()


def test_a_unit_that_never_fired_and_one_that_is_not_there(served: Served, tabs: Tabs) -> None:
    tab = tabs.open(served, f"#/{MXD}/unit/0", expects=(LOADED + "404",))
    tokens = served.site.shelf.units(MXD).store.tokens
    said = tab.text()
    assert f"Dead: it fired on 0 of {tokens:,} tokens" in said and "Nearest live one" in said
    assert tab.page.locator("#main .chart, #main .rows, #main .skel").count() == 0, "no empty charts"
    assert tab.page.locator("#main .banner a").get_attribute("href") == f"#/{MXD}/unit/{nearest(served)}"
    tab.go(f"#/{MXD}/unit/99999")
    tab.says("no unit 99999")
    assert "expected a number from 0 to" in tab.text()
    tab.go(f"#/{MXD}/unit")
    tab.says("Choose one in Units")
    tab.go("#/nobody/nothing")
    tab.says('There is no view "nothing" here.')


def nearest(served: Served) -> int:
    """The live expert whose gate points most the same way as that of expert 0."""
    layer = served.run.load(MXD)
    gate = cast("Any", layer).G.detach().float()
    cosine = gate @ gate[0] / (gate.norm(dim=1) * gate[0].norm())
    cosine[0] = -2
    dead = served.site.shelf.units(MXD).firing["fires"] == 0
    cosine[dead] = -2
    return int(cosine.argmax())


# ---- 14: an exported file -----------------------------------------------------------------------------------------------------------

ONLY_LIVE = "button, input, select, textarea, form, .no-print, [data-live], a[href^='/api/'], nav, .controls"
STILL = f"""() => {{
  const copy = document.getElementById("main").cloneNode(true);
  for (const el of copy.querySelectorAll({json.dumps(ONLY_LIVE)})) el.remove();
  return copy.textContent.replace(/\\s+/g, " ").trim();
}}"""


def test_an_exported_file_says_what_the_server_says(made: Run, tabs: Tabs, served: Served, tmp_path: Path) -> None:
    tab = tabs.open(served, accept_downloads=True)
    tab.page.click("main button:has-text('Export')")
    dialog = tab.page.locator("dialog")
    dialog.locator("input[type=number]").first.fill("50")
    dialog.locator("select").select_option("fires")
    status = dialog.locator("[role=status]")
    status.filter(has_text="50 experts").wait_for()
    found = re.fullmatch(r"50 experts, about ([\d.]+) (kB|MB)", status.inner_text())
    assert found, status.inner_text()
    with tab.page.expect_download() as coming:
        dialog.locator("button:has-text('Download')").click()
    path = tmp_path / "saved.html"
    coming.value.save_as(path)
    said = float(found[1]) * {"kB": 1e3, "MB": 1e6}[found[2]]
    assert path.stat().st_size == pytest.approx(said, rel=0.05)
    tab.page.keyboard.press("Escape")

    units = "() => mxd.select(mxd.state.student, {sort: '-freq'}).then(all => [...all].slice(0, 50))"
    file = tabs.open(path, offline=True)
    assert file.page.evaluate(units) == tab.page.evaluate(units)
    assert file.page.evaluate("() => [mxd.source.live, document.getElementById('pill').innerText]") == [False, "file: reading only"]
    for route in (f"#/{MXD}/unit/1", f"#/{MXD}/unit/2?w=10", f"#/{MXD}/unit/4?band=1&scale=row", f"#/{MXD}/unit/5"):
        for one in (tab, file):
            one.go(route)
            one.page.wait_for_selector("#main .rows")
        live_text, file_text = tab.page.evaluate(STILL), file.page.evaluate(STILL)
        assert len(live_text) > 1000 and file_text == live_text, route
        colours = "() => [...document.querySelectorAll('#main .t')].map(el => getComputedStyle(el).backgroundColor)"
        assert file.page.evaluate(colours) == tab.page.evaluate(colours)
    for one in (tab, file):
        one.go("#/")
    figures = "() => [...document.querySelectorAll('#main .banner, #main .facts dd')].map(el => el.innerText)"
    shared = set(tab.page.evaluate(figures)) & set(file.page.evaluate(figures))
    assert len(shared) > 5
    assert {url.split("#")[0] for url in file.asked} == {path.as_uri()}
    blocked = file.page.evaluate("() => fetch('http://127.0.0.1:1/').then(() => 'asked', () => 'refused')")
    assert blocked == "refused" and any("Content Security Policy" in text for text in file.problems)
    file.problems.clear()
    for earlier, later in itertools.pairwise(re.findall(r"(?<=<script)[^>]*", path.read_text(encoding="utf-8"))):
        assert earlier != later, "one script and one block of data"
