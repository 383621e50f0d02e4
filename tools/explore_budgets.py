"""Measure the page of a collected run in a real browser, and write benchmarks/results/explore-cpu.json.

    python tools/explore_budgets.py RUN [LARGE_RUN]

Start-up is from the command to the first complete view, in a new process each time; the rest is medians over many. The export holds 500
units of one student. Collecting is done once more in a copy of the run, for as many of its students as are needed for 20,000 units; "beyond
the host" is the whole command less what the host alone takes for that text.
"""

from __future__ import annotations

import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from playwright.sync_api import Browser, Page, sync_playwright

from mxd.bench.machine import machine, versions
from mxd.checkpoint import Run
from mxd.explore.store import UnitStore
from mxd.sealed import read_json, write_json

OUT = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "explore-cpu.json"
VISITS = 40
COLLECTED_UNITS = 20_000


@contextmanager
def serving(run: str) -> Iterator[str]:
    """The link of a server on `run`."""
    server = subprocess.Popen(
        [sys.executable, "-m", "mxd", "explore", run, "--no-browser", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert server.stdout is not None
        for line in server.stdout:
            if found := re.search(r"http://\S+", line):
                yield found.group(0)
                break
    finally:
        server.terminate()
        server.wait(20)


def timed(work: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def start_up(page: Page, run: str) -> tuple[float, float]:
    """Seconds from the command to the overview, and of the overview again."""
    begun = time.perf_counter()
    with serving(run) as link:
        page.goto(link)
        page.locator("main svg").first.wait_for()
        first = time.perf_counter() - begun
        again = timed(lambda: (page.reload(), page.locator("main svg").first.wait_for()))
    return first, again


def unit_pages(page: Page, base: str, student: str, units: list[int]) -> list[float]:
    """Milliseconds from following a link to a unit to its contexts being drawn."""
    found: list[float] = []
    for unit in units:
        script = """async ([hash, unit]) => {
            const begun = performance.now();
            location.hash = hash;
            for (;;) {
              await new Promise((done) => requestAnimationFrame(done));
              const head = document.querySelector("main h1");
              if (head && head.textContent.includes(unit) && document.querySelector("main .ctx")) return performance.now() - begun;
              if (performance.now() - begun > 20000) return NaN;
            }
        }"""
        found.append(page.evaluate(script, [f"#/{student}/unit/{unit}", str(unit)]))
    return found


def first_token(page: Page, student: str, unit: int) -> dict[str, float]:
    """Seconds to the first token of the host's lane alone, and of host, replaced and steered together."""
    script = """async ([student, lanes, unit]) => {
        const edits = lanes.includes("steered") ? [{ unit, op: "add", value: 5, at: "generated" }] : [];
        const how = { greedy: true, temperature: 1, top_p: 1, seed: 0, tokens: 4, special: false };
        const body = { student, prompt: "Let's talk about", edits, lanes, ...how };
        const begun = performance.now();
        let at = null;
        await mxd.source.stream(body, (name) => { if (name === "token" && at === null) at = performance.now() - begun; });
        return at / 1000;
    }"""
    ways = {"host": ["host"], "steered": ["host", "replaced", "steered"]}
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(8):
        for name, lanes in ways.items():
            seconds = page.evaluate(script, [student, lanes, unit])
            if turn:  # the first warms up
                found[name].append(seconds)
    times = {name: statistics.median(each) for name, each in found.items()}
    return {**times, "ratio": times["steered"] / times["host"]}


def viewed(browser: Browser, run: str) -> dict[str, Any]:
    """How long the first page and the pages of units take, and, for the first student, the first token."""
    opened = Run.open(run)
    stores = {record.name: UnitStore(opened, record.name) for record in opened.students if record.n_units}
    student = next(iter(stores))
    page = browser.new_page()
    starts = [start_up(page, run) for _ in range(5)]
    with serving(run) as link:
        page.goto(link)
        page.get_by_text(re.compile("host: ready")).first.wait_for(timeout=120_000)
        live = [int(unit) for unit in stores[student].columns(("fires",))["fires"].argsort()[::-1][1 : 50 * VISITS : 50]]
        visits = unit_pages(page, link.split("/?")[0], student, live)
        tokens = first_token(page, student, live[0])
    page.close()
    return {
        "units": {name: store.n_units for name, store in stores.items()},
        "tokens": stores[student].tokens,
        "first_page_seconds": {
            "cold": round(statistics.median(a for a, _ in starts), 3),
            "again": round(statistics.median(b for _, b in starts), 3),
        },
        "unit_page_ms": {
            "median": round(statistics.median(visits), 1),
            "p95": round(sorted(visits)[int(0.95 * len(visits))], 1),
            "visits": len(visits),
        },
        "first_token_seconds": {key: round(value, 3) for key, value in tokens.items()},
    }


def exported(run: str, student: str) -> dict[str, float]:
    """Size of a file with 500 units, and how long it took to write."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "page.html"
        command = [sys.executable, "-m", "mxd", "export", run, "--students", student, "--top", "500", "--out", str(out)]
        seconds = timed(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))
        return {"units": 500, "bytes": out.stat().st_size, "seconds": round(seconds, 2)}


def collected(run: str) -> dict[str, Any]:
    """Seconds that ``mxd collect`` takes, and how many of them are not the host's own pass over the text."""
    opened = Run.open(run)
    chosen: list[str] = []
    units = 0
    for record in opened.students:
        if record.n_units and units < COLLECTED_UNITS:
            chosen.append(record.name)
            units += record.n_units
    with tempfile.TemporaryDirectory(dir=opened.path.parent) as folder:
        copy = Path(folder) / "run"
        shutil.copytree(opened.path, copy, ignore=shutil.ignore_patterns("explore", "*.lock"))
        command = [sys.executable, "-m", "mxd", "collect", str(copy), "--students", *chosen]
        seconds = timed(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        stores = [UnitStore(Run.open(copy), name) for name in chosen]
        log = read_json(copy / "explore" / "collect.json")["seconds"]
    sequences, with_gradient = int(stores[0].meta["sequences"]), int(stores[0].meta["effect_tokens"])
    length = int(stores[0].meta["tokens_per_sequence"])
    plain = sequences * length - with_gradient // (length - 1) * length
    host = log["host"] * sequences * length / plain
    times = {"whole": seconds, "host_alone": host, "beyond_host": seconds - host, **{f"of it: {name}": each for name, each in log.items()}}
    return {
        "students": chosen,
        "units": units,
        "tokens": sequences * length,
        "seconds": {name: round(each, 1) for name, each in times.items()},
    }


def main(run: str, large: str | None = None) -> None:
    opened = Run.open(run)
    names = [record.name for record in opened.students if record.n_units]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        rows: dict[str, Any] = {"machine": {**machine(torch.device("cpu")), **versions()}, opened.path.name: viewed(browser, run)}
        if large:
            rows["made-up units on a tiny host"] = viewed(browser, large)
        browser.close()
    rows["export"] = exported(run, names[0])
    rows["collecting"] = collected(run)
    write_json(OUT, rows)
    print(json.dumps({key: value for key, value in rows.items() if key != "machine"}, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
