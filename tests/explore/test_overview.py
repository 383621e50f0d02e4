"""The overview of a measured run, in Chromium, against its report; and the published frontier."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from mxd.checkpoint import Run
from mxd.config import EvalConfig
from mxd.explore import published
from mxd.pipeline import evaluate
from tests.explore.browser import MXD, OTHER, Served, Tabs, chromium
from tests.explore.lab import numbers

PAPER = {"k": [2, 4], "excess": {"mxd": [0.5, 0.25], "transcoder": [0.75, 0.375]}}


@pytest.mark.parametrize(
    ("host", "layer"), [("gpt2", 8), ("openai-community/gpt2", 8), ("EleutherAI/pythia-410m", 15), ("Llama-3.2-3B", 12)]
)
def test_what_was_published_of_a_host_and_layer(host: str, layer: int) -> None:
    found: Any = published.frontier(host, {f"layers.{layer}.mlp"})
    assert found["k"] == [16, 32, 64, 128, 256] and set(found["excess"]) == {"mxd", "transcoder", "skip-transcoder"}
    assert all(0 < value < 0.04 for values in found["excess"].values() for value in values)
    assert all(a < b for a, b in zip(found["excess"]["mxd"], found["excess"]["transcoder"], strict=True))


def test_nothing_was_published_of_other_layers_and_hosts() -> None:
    assert published.frontier("gpt2", {"layers.7.mlp"}) is None and published.frontier("gpt2", {"layers.8.mlp", "layers.7.mlp"}) is None
    assert published.frontier("smollm2", {"layers.8.mlp"}) is None and published.frontier("my-gpt2-xl", {"layers.8.mlp"}) is None
    found: Any = published.frontier("gpt2", {"layers.8.mlp"})
    assert found["excess"]["mxd"][1] == pytest.approx(3.60394 - 3.60108, abs=1e-6)


class Measured(NamedTuple):
    """A served run that was evaluated, and its report."""

    server: Served
    report: dict[str, Any]

    def student(self, name: str) -> dict[str, Any]:
        return next(student for student in self.report["students"] if student["name"] == name)


@pytest.fixture
def measured(run: Run, monkeypatch: pytest.MonkeyPatch) -> Iterator[Measured]:
    chromium()
    evaluate(run, EvalConfig(sequences=8, fit_tokens=512, bootstrap=20, permutations=1), quiet=True)
    monkeypatch.setattr(published, "frontier", lambda host, hookpoints: PAPER if hookpoints == {"layers.1.mlp"} else None)
    with contextlib.ExitStack() as stack:
        server = Served(run)
        stack.callback(server.stop)
        yield Measured(server, json.loads((run.path / "report.json").read_text()))


@pytest.mark.browser
@pytest.mark.usefixtures("one_thread")
def test_the_overview_shows_the_report_and_the_paper_beside_it(measured: Measured, tabs: Tabs) -> None:
    tab = tabs.open(measured.server, f"#/{MXD}/overview")
    own = measured.student(MXD)
    shown = {
        name: numbers(tab.page.locator(".figure", has=tab.page.get_by_text(name, exact=True)).first.locator("b").inner_text())[0]
        for name in ("CE of the host", "replaced", "excess", "L0")
    }
    wanted = {"CE of the host": measured.report["base_ce"], "replaced": own["ce"], "excess": own["excess_ce"], "L0": own["l0"]}
    assert shown == pytest.approx(wanted, rel=0.06, abs=0.0006)
    frontier = tab.page.locator("section", has=tab.page.get_by_role("heading", name="What replacing costs"))
    titles = frontier.locator("svg title").evaluate_all("all => all.map(el => el.textContent)")
    for name in (MXD, OTHER):
        (said,) = [title for title in titles if title.startswith(f"{name}: ")]
        assert numbers(said.split(": ")[1]) == pytest.approx(
            [measured.student(name)["excess_ce"], *measured.student(name)["excess_ce_ci95"]], rel=0.06, abs=0.0006
        )
    papers = {title for title in titles if ", paper: " in title}
    assert len(papers) == 4 and any("MxD" in title and ".25 nats" in title for title in papers)
    assert frontier.locator("polygon.hollow, circle.hollow").count() >= 4, "published points are hollow"
    labels = frontier.locator("svg text").evaluate_all("all => all.map(el => el.textContent)")
    assert sum("paper" in text for text in labels) == 2


@pytest.mark.browser
@pytest.mark.usefixtures("one_thread")
def test_nothing_of_the_paper_beside_other_hosts(measured: Measured, tabs: Tabs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "frontier", lambda host, hookpoints: None)
    tab = tabs.open(measured.server, f"#/{MXD}/overview")
    assert "What replacing costs" in tab.text() and "paper" not in tab.text()
