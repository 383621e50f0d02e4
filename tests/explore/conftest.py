"""A run with made-up databases, for all who look at it through the page's server."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from mxd.checkpoint import Run
from mxd.explore.store import units_path
from tests.explore.browser import MXD, Served, Tabs, chromium, launched, live
from tests.explore.handmade import make_store

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with two students that were collected, and the dense control. Not to be changed: see `run`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run = make_store(tmp_path_factory.mktemp("served"), kinds=("mxd", "transcoder", "dense"))
    torch.set_num_threads(threads)
    with sqlite3.connect(units_path(run, MXD)) as database:
        row = (1, "me", "all letters", "manual", "", None, None, None, None, "2026-01-01")
        database.execute(f"INSERT INTO label VALUES ({', '.join('?' * 10)})", row)
    database.close()
    return run


@pytest.fixture
def run(made: Run, tmp_path: Path) -> Run:
    """A copy to break."""
    return Run.open(shutil.copytree(made.path, tmp_path / "run"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium. Not for the whole session: while playwright runs, no other test could use asyncio."""
    with launched() as browser:
        yield browser


@pytest.fixture
def tabs(browser: Browser) -> Iterator[Tabs]:
    """Opens watched pages; a problem of one that the test has not expected fails it."""
    made = Tabs(browser)
    yield made
    try:
        made.check()
    finally:
        made.close()


@pytest.fixture(scope="session")
def served(made: Run) -> Iterator[Served]:
    """`made` at a port, with its host, for all tests: notes that a test writes stay there."""
    chromium()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    server = Served(made, load=live(made)).ready()
    yield server
    server.stop()
    torch.set_num_threads(threads)
