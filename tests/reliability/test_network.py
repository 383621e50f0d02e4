"""A network that goes away in the middle of a stream: a hub on this machine that drops connections, and processes that read from it."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from mxd import resume
from mxd.checkpoint import Run
from mxd.config import TrainConfig
from mxd.verify import verify
from tests.reliability.test_killed import options
from tests.small import documents, small_run

NAME = "someone/stories"
FILES = 24
DOCUMENTS_PER_FILE = 20
"""Together about 1 MB: more than the 256 documents that a stream keeps to stir, so that training begins before the last file is read."""
STEPS = 36

NOTHING: Mapping[str, str] = {}

STARTER = """
import os, shlex, sys
import datasets, transformers.models.llama.modeling_llama
from huggingface_hub.utils import http_backoff
from mxd import cli, pipeline

# The libraries ask again for minutes, and have no settings for that but these.
datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 2
datasets.config.STREAMING_READ_RETRY_INTERVAL = datasets.config.STREAMING_OPEN_RETRY_INTERVAL = 0.01
http_backoff.__kwdefaults__.update(base_wait_time=0.01, max_wait_time=0.01)

for line in sys.stdin:
    said, *words = shlex.split(line)
    if not (number := os.fork()):
        with open(said, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        code = cli.main(words)
        sys.stdout.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]), flush=True)
"""
"""Imports what takes seconds once, and forks for every command line that it is given: the file to say things in, and the words."""


class Hub(ThreadingHTTPServer):
    """As much of the Hugging Face hub as streaming one public dataset needs."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.first, self.later = "1" * 40, "2" * 40
        self.commits = {self.first: made("one"), self.later: made("another")}
        self.newest = self.first
        self.moves_on_at: int | None = None
        self.mend()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def mend(self, *breaks: int, for_good: bool = False) -> None:
        """Answer everything from now on, but drop the connection at these bytes of the dataset's files, and then be gone if `for_good`."""
        self.served, self.dropped, self.breaks, self.for_good, self.is_gone = 0, 0, sorted(breaks), for_good, False

    def count(self, sent: int) -> None:
        self.served += sent
        if self.moves_on_at is not None and self.served >= self.moves_on_at:
            self.newest = self.later

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that ends in the middle of an answer is no news here."""


def made(name: str) -> dict[str, bytes]:
    """The files of a dataset with documents made up out of `name`."""
    texts = [text for _, text in documents(name, number=FILES * DOCUMENTS_PER_FILE)]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    return {
        f"train-{n:05}-of-{FILES:05}.jsonl": "".join(lines[n * DOCUMENTS_PER_FILE :][:DOCUMENTS_PER_FILE]).encode() for n in range(FILES)
    }


class Answer(BaseHTTPRequestHandler):
    """One connection to the hub."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: Any) -> None:
        """Silence: standard error is for what went wrong."""

    def do_GET(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        if hub.is_gone:
            return self.hang_up()
        if path.startswith(f"/datasets/{NAME}/resolve/"):
            return self.file(*path.removeprefix(f"/datasets/{NAME}/resolve/").split("/", 1))
        what, _, revision = path.removeprefix(f"/api/datasets/{NAME}").strip("/").partition("/")
        commit = hub.newest if revision in ("", "main") else revision.partition("/")[0]
        if commit not in hub.commits or not path.startswith(f"/api/datasets/{NAME}"):
            return self.send(404, b"{}", "RepoNotFound" if commit in hub.commits else "RevisionNotFound")
        files = [{"type": "file", "path": name, "size": len(data), "oid": commit} for name, data in hub.commits[commit].items()]
        if what == "tree":  # of folders, which there are none of, the hub says so with this
            if "/" in revision:
                return self.send(404, b"{}", "EntryNotFound")
            return self.send(200, json.dumps(files).encode())
        if what == "paths-info":
            asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode()).get("paths", [])
            return self.send(200, json.dumps([file for file in files if file["path"] in asked]).encode())
        siblings = [{"rfilename": file["path"]} for file in files]
        self.send(200, json.dumps({"id": NAME, "sha": commit, "private": False, "siblings": siblings, "tags": []}).encode())

    do_POST = do_HEAD = do_GET

    def file(self, commit: str, name: str) -> None:
        """A file of the dataset, or a piece of it; the connection is dropped where it is time for that."""
        hub = self.server
        if (data := hub.commits[commit].get(name)) is None:
            return self.send(404, b"", "EntryNotFound")
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        piece = data[int(first) : int(last or len(data)) + 1]
        about = {"ETag": f'"{name}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        about["Content-Range"] = f"bytes {first}-{int(first) + len(piece) - 1}/{len(data)}"
        if self.command == "HEAD" or not hub.breaks or hub.served + len(piece) < hub.breaks[0]:
            hub.count(len(piece) if self.command == "GET" else 0)
            return self.send(206 if "Range" in self.headers else 200, piece, about=about)
        self.send(206, piece, sent=max(1, hub.breaks.pop(0) - hub.served), about=about)
        hub.is_gone = hub.for_good and not hub.breaks
        self.hang_up()

    def send(self, code: int, body: bytes, problem: str = "", *, sent: int | None = None, about: Mapping[str, str] = NOTHING) -> None:
        self.send_response(code)
        for name, value in {**about, "Content-Length": str(len(body)), "X-Error-Code": problem}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:sent])

    def hang_up(self) -> None:
        self.server.dropped += 1
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)


class Said(NamedTuple):
    code: int
    lines: list[str]

    @property
    def own(self) -> list[str]:
        """What mxd says itself, of warnings and errors; the libraries say beside it that they ask again."""
        return [line for line in self.lines if line.startswith(("mxd: error", "mxd: WARNING"))]


class Starter:
    """Runs `mxd` with its hub at an address."""

    def __init__(self, folder: Path, hub: Hub) -> None:
        self.folder = folder
        offline = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
        env = {name: value for name, value in os.environ.items() if name not in offline and not name.lower().endswith("_proxy")}
        # Whatever asks for anything but the hub would leave this machine: the count of downloads does.
        env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "HF_UPDATE_DOWNLOAD_COUNTS": "0", "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, "-c", STARTER], env=env, stdin=pipe, stdout=pipe, text=True)

    def __call__(self, *words: str) -> Said:
        assert self.process.stdin is not None and self.process.stdout is not None
        said = self.folder / "said"
        print(shlex.join([str(said), *words]), file=self.process.stdin, flush=True)
        code = self.process.stdout.readline()
        return Said(int(code), said.read_text().splitlines())


class Undisturbed(NamedTuple):
    """A run with nothing in its way."""

    bits: dict[str, str]
    served: int
    """Bytes of the dataset's files that it took."""


class Stopped(NamedTuple):
    """A run that lost its network."""

    path: Path
    said: Said


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def mxd(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starter]:
    starter = Starter(tmp_path_factory.mktemp("mxd"), hub)
    with starter.process as process:
        yield starter
        process.kill()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """36 steps, the first of which are taken before the last file is read."""
    folder = tmp_path_factory.mktemp("small")
    sizes = {"tokens": STEPS * 4096, "tokens_per_step": 4096, "buffer_tokens": 8192, "tokens_per_sequence": 128, "sequences_per_read": 32}
    return replace(small_run(folder, number=1, kinds=("mxd", "topk-sae"), **sizes), text=(NAME,))


@pytest.fixture(scope="module")
def undisturbed(hub: Hub, mxd: Starter, small: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    hub.mend()
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    said = mxd("train", "--out", str(out), *options(small))
    assert said.code == 0 and not said.own, said.lines
    return Undisturbed(bits(out), hub.served)


def bits(path: Path) -> dict[str, str]:
    """sha256 of every student's weights in a finished run."""
    run = Run.open(path)
    assert run.info["finished"] and [s.steps for s in run.students] == [STEPS, STEPS]
    return {s.name: run.weights_sha256(s.name) for s in run.students}


@pytest.fixture(scope="module")
def stopped(hub: Hub, mxd: Starter, small: TrainConfig, undisturbed: Undisturbed, tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    out = tmp_path_factory.mktemp("stopped") / "run"
    hub.mend(undisturbed.served * 19 // 20, for_good=True)  # in the last of the readings, while it trains
    said = mxd("train", "--out", str(out), *options(small))
    assert hub.dropped > 1
    return Stopped(out, said)


def test_a_network_that_is_gone_for_good_is_one_line_and_leaves_a_whole_run(stopped: Stopped) -> None:
    out, said = stopped
    warning, how, error = said.own
    assert said.code == 1 and not any(line.startswith("Traceback") for line in said.lines)
    assert warning.startswith("mxd: WARNING: stopped at step ") and how.endswith(f": mxd train --resume {out}")
    assert error.startswith(f"mxd: error: cannot read on in the Hugging Face dataset {NAME} | expected ")
    assert error.endswith(" | next: run the same command again once the network is back")
    run, state = Run.open(out), resume.newest(out)
    assert state is not None and 0 < state.step < STEPS and [s.steps for s in run.students] == [state.step] * 2
    assert not run.info["finished"] and not [file for file in verify(out) if file.problem]


def test_once_it_is_back_the_run_goes_on_to_the_same_bits(
    hub: Hub, mxd: Starter, stopped: Stopped, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    out, before = tmp_path / "run", contents(stopped.path)
    shutil.copytree(stopped.path, out)
    hub.mend()
    hub.is_gone = True
    still = mxd("train", "--resume", str(out))
    assert still.code == 1 and contents(out) == before, "nothing is lost by asking too early"
    hub.mend()
    said = mxd("train", "--resume", str(out))
    assert said.code == 0 and not said.own, said.lines
    assert bits(out) == undisturbed.bits and len(Run.open(out).info["resumed"]) == 1


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_connections_that_are_dropped_now_and_then_are_made_again(
    hub: Hub, mxd: Starter, small: TrainConfig, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    hub.mend(*(undisturbed.served * part // 20 for part in (0, 5, 14, 19)))
    said = mxd("train", "--out", str(tmp_path / "run"), *options(small))
    assert said.code == 0 and not said.own and hub.dropped == 4, said.lines
    assert bits(tmp_path / "run") == undisturbed.bits


def test_a_dataset_that_moves_on_while_it_is_read_is_read_as_it_was(
    hub: Hub, mxd: Starter, small: TrainConfig, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    hub.mend()
    hub.moves_on_at = undisturbed.served // 3
    try:
        assert mxd("train", "--out", str(tmp_path / "run"), *options(small)).code == 0
        assert hub.newest == hub.later
    finally:
        hub.newest, hub.moves_on_at = hub.first, None
    assert bits(tmp_path / "run") == undisturbed.bits


def test_a_network_that_is_gone_before_the_first_byte_leaves_nothing(hub: Hub, mxd: Starter, small: TrainConfig, tmp_path: Path) -> None:
    hub.mend()
    hub.is_gone = True
    said = mxd("train", "--out", str(tmp_path / "run"), *options(small))
    errors = [line for line in said.own if line.startswith("mxd: error")]
    assert said.code == 1 and len(errors) == 1 and not any(line.startswith("Traceback") for line in said.lines), said.lines
    assert errors[0].startswith(f"mxd: error: cannot read the Hugging Face dataset {NAME} | ") and " | next: check the name" in errors[0]
    assert [path.name for path in tmp_path.iterdir()] == [".run.lock"], "which the next process takes over"


def test_a_network_that_is_gone_is_not_taken_for_text_without_validation(
    hub: Hub, mxd: Starter, small: TrainConfig, stopped: Stopped, tmp_path: Path
) -> None:
    hub.mend()
    hub.is_gone = True
    for words in (("--out", str(tmp_path / "run"), *options(small)), ("--resume", str(stopped.path))):
        said = mxd("train", *words)
        (error,) = said.own
        assert said.code == 1 and re.match(rf"mxd: error: cannot read (on in )?the Hugging Face dataset {NAME} \| ", error), said.lines


def test_a_run_goes_on_with_the_dataset_as_it_was(
    hub: Hub, mxd: Starter, stopped: Stopped, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    shutil.copytree(stopped.path, tmp_path / "run")
    hub.mend()
    hub.newest = hub.later
    try:
        said = mxd("train", "--resume", str(tmp_path / "run"))
    finally:
        hub.newest = hub.first
    assert said.code == 0, said.lines
    assert bits(tmp_path / "run") == undisturbed.bits
