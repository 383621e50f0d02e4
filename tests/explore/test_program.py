"""``mxd explore`` as a program: ports, links, browsers, its end, and the collection that runs beside it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from mxd import cli
from mxd.checkpoint import Run
from mxd.errors import ConfigError
from mxd.explore import collector, serve
from mxd.explore.collector import Collector
from mxd.explore.shelf import Shelf
from mxd.explore.store import units_path
from mxd.unit_config import ExploreConfig
from tests.explore.browser import MXD, until

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- the program ------------------------------------------------------------------------------------------------------------


def test_a_port_that_is_taken() -> None:
    first = serve.listen("127.0.0.1", 0)
    port = first.getsockname()[1]
    second = serve.listen("127.0.0.1", port)
    assert port < second.getsockname()[1] <= port + serve.MOST_TRIES
    first.close()
    second.close()
    for host, number in (("256.0.0.1", 8008), ("127.0.0.1", 70_000), ("no such name", 1)):
        with pytest.raises(ConfigError):
            serve.listen(host, number)
    assert first.proto == socket.IPPROTO_TCP, "else asyncio holds small answers back"


def ask(link: str, path: str = "", cookie: str = "") -> tuple[int, bytes, Any]:
    request = urllib.request.Request(link + path, headers={"cookie": cookie} if cookie else {})
    opener = urllib.request.build_opener(type("Stay", (urllib.request.HTTPRedirectHandler,), {"redirect_request": lambda *_: None}))
    try:
        with opener.open(request, timeout=20) as answer:
            return answer.status, answer.read(), answer.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), error.headers


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_program_from_its_link_to_its_end(made: Run, number: int) -> None:
    command = [sys.executable, "-m", "mxd", "explore", str(made.path), "--port", "0", "--no-browser", "--device", "cpu"]
    began = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        try:
            assert program.stdout and program.stderr
            line = program.stdout.readline()
            found = re.search(r"(http://127\.0\.0\.1:(\d+)/)\?key=(\S+)", line)
            assert found, line
            status, _, headers = ask(found[1], f"?key={found[3]}")
            assert status == 303
            cookie = headers["set-cookie"].split(";")[0]
            assert cookie == f"mxd-{found[2]}={found[3]}"
            assert ask(found[1], "api/run")[0] == 403
            status, data, _ = ask(found[1], "api/run", cookie)
            assert status == 200 and json.loads(data)["name"] == "run"
            assert time.monotonic() - began < 20, "the page does not wait for PyTorch"
            program.send_signal(number)
            said, errors = program.communicate(timeout=30)
        finally:
            program.kill()
    assert program.returncode == 130
    assert found[3] not in said + errors and errors.strip() == "mxd: stopped", "no log, least of all of the key"


def test_the_program_says_what_is_wrong(made: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for args, expected in (
        ([str(tmp_path / "none")], "does not exist"),
        ([str(made.path), "--students", "nobody"], "no student of that name"),
        ([str(made.path), "--port", "70000"], "no such port"),
        ([str(made.path), "--host", "256.0.0.1"], "no such address"),
    ):
        assert cli.main(["explore", *args, "--no-browser"]) == 1
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1 and error[0].startswith("mxd: error: ") and expected in error[0]


def served(run: Run, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[list[str], list[str]]:
    """What `serve` says and which links it opens, ended at once."""
    said: list[str] = []
    opened: list[str] = []
    usual: dict[str, Any] = {"port": 0, "device": "cpu", **options}
    monkeypatch.setattr(serve, "open_browser", opened.append)

    def run_(self: serve.Server, _sockets: Any) -> None:
        self.on_start()
        os.kill(os.getpid(), signal.SIGINT)
        assert self.should_exit and not self.force_exit
        os.kill(os.getpid(), signal.SIGINT)
        assert self.force_exit

    monkeypatch.setattr(serve.Server, "run", run_)
    with pytest.raises(KeyboardInterrupt):
        serve.serve(run.path, ExploreConfig(**usual), said.append)
    return said, opened


def test_the_browser_gets_a_key_of_its_own(made: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    said, opened = served(made, monkeypatch)
    (link,) = re.findall(r"http://\S+key=(\S+)", "\n".join(said))
    assert len(opened) == 1 and link not in opened[0], "command lines can be read by everybody"
    assert served(made, monkeypatch, no_browser=True)[1] == []


def test_another_port_and_a_wide_open_address_are_said(made: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = serve.listen("127.0.0.1", 0)
    port = taken.getsockname()[1]
    said, _ = served(made, monkeypatch, port=port, no_browser=True)
    taken.close()
    assert said[0].startswith(f"mxd: port {port} is taken, this is ")
    said, _ = served(made, monkeypatch, host="0.0.0.0", no_browser=True)
    assert "WARNING" in said[0] and "http://127.0.0.1:" in said[1]
    assert not [line for line in served(made, monkeypatch, no_browser=True)[0] if "WARNING" in line]


def test_a_browser_in_a_terminal_is_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(serve.webbrowser, "open", opened.append)
    monkeypatch.setattr(serve.sys, "platform", "linux")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    serve.open_browser("http://x")
    time.sleep(0.05)
    assert not opened
    monkeypatch.setenv("DISPLAY", ":0")
    serve.open_browser("http://x")
    until(lambda: opened == ["http://x"])


# ---- collecting beside the server -------------------------------------------------------------------------------------------


def wait_for(made: Collector, *states: str, seconds: float = 60.0) -> dict[str, Any]:
    until(lambda: made.status()["state"] in states, seconds)
    return made.status()


def follow(run: Run, monkeypatch: pytest.MonkeyPatch, program: str) -> Collector:
    """A collector whose child is this Python program; its arguments are those of mxd collect."""
    script = run.path.parent / "child.py"
    script.write_text(f"import json, os, signal, sys, time\npath = {str(run.path / 'explore' / 'collect.json')!r}\n{program}")
    real = subprocess.Popen

    def popen(command: list[str], **how: Any) -> Any:
        assert command[1:4] == ["-m", "mxd", "collect"]
        return real([sys.executable, str(script), *command[4:]], **how)

    monkeypatch.setattr(collector.subprocess, "Popen", popen)
    return Collector(Shelf(run.path), students=(MXD,), device="cpu")


def test_what_is_there_is_not_collected_again(made: Run) -> None:
    found = Collector(Shelf(made.path))
    assert found.missing() == []
    found.go()
    assert found.status()["state"] == "done", "what collect.json says of last time"
    found.close()


def test_the_child_is_followed_and_ended(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    units_path(run, MXD).unlink()
    program = (
        "assert sys.argv[1:] == [os.path.dirname(os.path.dirname(path)), '--device', 'cpu', '--students', 'mxd-k2'], sys.argv\n"
        "signal.signal(signal.SIGINT, lambda *_: (open(path + '.ended', 'w').close(), sys.exit(130)))\n"
        "about = {'state': 'running', 'pid': os.getpid(), 'stage': 'the host reads', 'done': 5, 'total': 9, 'seconds_left': 2.5}\n"
        "time.sleep(0.3)\njson.dump(about, open(path, 'w'))\ntime.sleep(60)\n"
    )
    child = follow(run, monkeypatch, program)
    assert child.missing() == [MXD]
    child.go()
    child.go()
    assert child.status() == {"state": "running", "stage": "starting", "done": None, "total": None, "seconds_left": None, "why": None}
    until(lambda: child.status()["done"] == 5)
    assert child.status() == {"state": "running", "stage": "the host reads", "done": 5, "total": 9, "seconds_left": 2.5, "why": None}
    other = Collector(Shelf(run.path))
    assert other._other() and other.status()["state"] == "running", "another server sees it, and starts none"
    child.close()
    assert (run.path / "explore" / "collect.json.ended").exists()
    assert other.status()["state"] == "failed" and "mxd collect" in other.status()["why"]


def test_the_last_words_of_a_child_are_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    units_path(run, MXD).unlink()
    words = "collecting: 3 %\\rmxd: error: no host x | next: mxd fetch"
    child = follow(run, monkeypatch, f"print({words!r}.replace(chr(92) + 'r', chr(13)), file=sys.stderr)\nsys.exit(1)\n")
    child.go()
    found = wait_for(child, "failed")
    assert found["why"] is not None and "no host x | next: mxd fetch" in found["why"]
    child.close()


@pytest.mark.parametrize(
    "told",
    [
        "{",
        "[]",
        '{"state": 5}',
        '{"state": "running", "pid": "1"}',
        '{"state": "running", "pid": 99999999, "done": {}}',
        '{"state": "odd"}',
    ],
)
def test_a_strange_collect_json_is_survived(run: Run, told: str) -> None:
    (run.path / "explore" / "collect.json").write_text(told)
    found = Collector(Shelf(run.path))
    assert found.status()["state"] in ("none", "failed") and found.status()["done"] is None
    found.close()


def test_weights_that_changed_are_collected_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "weights_sha256", lambda _self, name: "new" if name == MXD else "")
    assert MXD in Collector(Shelf(run.path)).missing()


@pytest.mark.slow
def test_what_is_missing_is_collected_in_the_background(run: Run) -> None:
    shutil.rmtree(run.path / "explore")
    real = Collector(Shelf(run.path), device="cpu")
    real.go()
    found = wait_for(real, "done", "failed", seconds=240)
    assert found["state"] == "done", found
    assert real.missing() == []
    real.close()
