"""The page beside a live host, in Chromium: sentences, the bench, several tabs, keys alone, and what axe finds.

What is shown is compared with what host and layers say by themselves: see `tests.explore.lab` for the students.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

import mxd
from mxd import cli, edits
from mxd.checkpoint import Run
from mxd.explore import collect
from mxd.explore.live import MOST_WAITING
from mxd.explore.store import TextStore, UnitStore, units_path
from mxd.layers import Edited, SparseLayer
from mxd.pipeline import reopen
from tests.explore.browser import Served, Tab, Tabs, Theme, chromium, live, until
from tests.explore.lab import (
    COLLECTED,
    HOOKPOINT,
    LETTER,
    MXD,
    PERFECT,
    PROMPT,
    TEXT,
    TIPS,
    TOKENS,
    TRANSCODER,
    ZERO,
    Bench,
    Keys,
    Lab,
    Nothing,
    answer,
    bench,
    colour,
    colours,
    idle,
    make_lab,
    mean_and_half,
    number,
    numbers,
    read_sentence,
    sent,
    slowed,
)

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = [pytest.mark.browser, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Not to be changed but for notes and bench runs."""
    chromium()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = make_lab(tmp_path_factory.mktemp("lab"))
    torch.set_num_threads(threads)
    return made


@pytest.fixture(scope="module")
def server(lab: Lab) -> Iterator[Served]:
    """The lab's page with its host."""
    made = Served(lab.run, load=live(lab.run)).ready()
    yield made
    made.stop()


# ---- 9: a sentence ----------------------------------------------------------------------------------------------------------------


def test_a_student_that_equals_the_mlp_changes_nothing(lab: Lab, server: Served, tabs: Tabs) -> None:
    tab = tabs.open(server, f"#/{PERFECT}/sentence")
    found = read_sentence(tab, TEXT)
    host, (student,) = found["host"]["loss"], found["students"]
    assert host[1:] == pytest.approx(lab.losses(lab.ids(TEXT)), abs=1e-3)
    assert student["loss"] == host and student["top"] == found["host"]["top"] and set(student["kl"]) == {0}
    tokens = sent(tab)
    assert "".join(token["text"] for token in tokens) == TEXT and len(tokens) == 1 + len(TEXT)
    assert set(colours(tokens)) == {""}
    summary = tab.page.locator("[role=status]", has_text="mean loss").inner_text()
    assert f"Δ 0 ± 0 over {len(TEXT)} tokens" in summary and "(worst 0 at" in summary
    mean = sum(host[1:]) / len(TEXT)
    assert numbers(summary)[:2] == pytest.approx([mean, mean], rel=0.01)
    tips = tab.page.locator(".sent").evaluate(TIPS)
    assert "first token: no loss" in tips[0] and all("Δ 0 nats" in tip and "KL after it 0 nats" in tip for tip in tips[1:])
    tab.page.get_by_role("button", name="KL").click()
    assert set(colours(sent(tab))) == {""}
    tab.page.get_by_role("button", name="host loss").click()
    assert "h6" in colours(sent(tab)), "what is drawn would be seen"


def test_a_student_that_returns_0_is_zero_ablation(lab: Lab, server: Served, tabs: Tabs) -> None:
    tab = tabs.open(server, f"#/{ZERO}/sentence")
    found = read_sentence(tab, TEXT)
    host, (student,) = found["host"]["loss"], found["students"]
    own, ablated = lab.losses(lab.ids(TEXT)), lab.losses(lab.ids(TEXT), Nothing())
    assert student["loss"][1:] == pytest.approx(ablated, abs=1e-3) and host[1:] == pytest.approx(own, abs=1e-3)
    deltas = [without - whole for without, whole in zip(ablated, own, strict=True)]
    tips = tab.page.locator(".sent").evaluate(TIPS)
    for tip, delta, whole, without in zip(tips[1:], deltas, own, ablated, strict=True):
        line = next(line for line in tip.splitlines() if line.startswith("loss host"))
        assert numbers(line) == pytest.approx([whole, without, delta], abs=0.006, rel=0.006), tip
    shown = [0.0, *(a - b for a, b in zip(student["loss"][1:], host[1:], strict=True))]
    assert colours(sent(tab)) == [colour(value, 2) for value in shown] and len({*colours(sent(tab))}) > 5
    mean, half = mean_and_half(deltas)
    summary = numbers(tab.page.locator("[role=status]", has_text="mean loss").inner_text())
    expected = [sum(own) / len(own), sum(ablated) / len(own), mean, half, len(own), max(deltas)]
    assert summary[:6] == pytest.approx(expected, abs=0.006, rel=0.006)


ROWS = """() => [...document.querySelectorAll('[aria-label="the pinned token"] tbody tr')]
    .map(row => [row.cells[0].innerText, row.cells[1].innerText])"""
PINNED = f"""() => [...document.querySelectorAll('.sent .t')].map(span => (span.click(), ({ROWS})()))"""


@pytest.mark.parametrize("name", [MXD, TRANSCODER, ZERO])
def test_listed_units_are_the_layers_own_top_k(name: str, lab: Lab, server: Served, tabs: Tabs) -> None:
    tab = tabs.open(server, f"#/{name}/sentence")
    read_sentence(tab, TEXT)
    own = lab.activations(name, lab.ids(TEXT))
    listed = tab.page.evaluate(PINNED)
    assert len(listed) == len(own)
    for rows, a in zip(listed, own, strict=True):
        expected = [(unit, float(a[unit])) for unit in a.argsort(descending=True).tolist() if a[unit] > 0]
        assert [int(unit.split()[0]) for unit, _ in rows] == [unit for unit, _ in expected]
        assert [number(value) for _, value in rows] == pytest.approx([value for _, value in expected], rel=0.006)
    assert max(map(len, listed)) == lab.run.student(name).k
    sums = own[1:].sum(0)
    strongest = [int(text) for text in tab.page.locator(".cells tbody th button").all_inner_texts()]
    assert strongest == sums.argsort(descending=True)[:12].tolist(), "of the sentence, the first token left out"


def test_a_stored_context_is_read_again_as_it_was_collected(lab: Lab, server: Served, tabs: Tabs) -> None:
    tab = tabs.open(server, f"#/{MXD}/unit/{LETTER}")
    hrefs = tab.page.locator(".rows .row .doc a").evaluate_all("all => all.map(a => a.getAttribute('href'))")
    places = [int(re.findall(r"at=(\d+)", href)[0]) for href in hrefs]
    far = next(i for i, at in enumerate(places) if at > 80)  # its context begins inside the sequence
    row, href, at = tab.page.locator(".rows .row").nth(far), hrefs[far], places[far]
    a = number(row.locator(".num").first.inner_text())
    peak = row.locator(".peak").inner_text()
    answer(tab.page, "/api/sentence", lambda: row.locator(".doc a").click())
    tab.page.wait_for_selector(".sent .t.sel")
    pinned = tab.page.locator(".sent .t.sel")
    assert pinned.get_attribute("data-i") == str(at) and pinned.inner_text() == peak
    units = tab.page.evaluate(ROWS)
    assert {int(unit.split()[0]): number(value) for unit, value in units}[LETTER] == pytest.approx(a, rel=0.006)
    seq = int(re.findall(r"seq=(\d+)", href)[0])
    store = TextStore(lab.run)
    own = lab.activations(MXD, torch.tensor([store.sequence(seq).ids.tolist()]))[:, LETTER]
    store.close()
    assert float(own[at]) == pytest.approx(a, rel=0.006)
    coloured = {token["i"] for token in sent(tab) if re.search(r"\bh[1-6]\b", token["css"])}
    assert coloured == set(own.nonzero()[:, 0].tolist()), "the link colours by the unit"


def test_a_sentence_is_kept_and_read_again(lab: Lab, server: Served, tabs: Tabs) -> None:
    tab = tabs.open(server, f"#/{MXD}/sentence")
    read_sentence(tab, TEXT)
    before = sent(tab)
    answer(tab.page, "/api/sentences", tab.page.get_by_role("button", name="Keep this sentence").click)
    tab.says(f"kept, as {MXD}, ")
    tab.go(f"#/{MXD}/sentence")
    row = tab.page.locator("tr", has_text=TEXT)
    assert row.locator("td").first.inner_text().split(", ")[0] == MXD and row.count() == 1
    answer(tab.page, "/api/sentence", tab.page.get_by_role("button", name=f"read again: {TEXT}").click)
    tab.page.wait_for_selector(".sent")
    tab.frame()
    assert sent(tab) == before
    tab.page.get_by_role("button", name=f"forget: {TEXT}").click()
    tab.page.wait_for_function("() => !document.body.innerText.includes('Kept sentences')")


# ---- the unit's page: one's own sentence, the exact effect ------------------------------------------------------------------------


def test_ones_own_sentence_shows_the_layers_activations(lab: Lab, server: Served, tabs: Tabs) -> None:
    own = lab.activations(MXD, lab.ids(TEXT))
    unit = int((own[1:] > 0).sum(0).argmax())
    tab = tabs.open(server, f"#/{MXD}/unit/{unit}")
    field = tab.page.get_by_label("your own sentence")
    field.fill(TEXT)
    answer(tab.page, "/api/heat", lambda: field.press("Enter"))
    tab.page.wait_for_selector(".sent")
    store = UnitStore(lab.run, MXD)
    most = store.row(unit)["max_a"] or 0.0
    store.close()
    a = own[:, unit].tolist()
    shown = sent(tab)
    assert colours(shown) == [colour(float(f"{value:.5g}"), most) for value in a] and "".join(t["text"] for t in shown) == TEXT
    tips = tab.page.locator(".sent").evaluate(TIPS)
    for tip, value in zip(tips, a, strict=True):
        if value:
            assert numbers(tip.splitlines()[1])[:2] == pytest.approx([value, 100 * value / most], rel=0.01)
        else:
            assert "a 0: not active here" in tip
    best = max(range(1, len(a)), key=lambda at: a[at])
    said = tab.page.locator("form [role=status]").inner_text()
    assert number(said.split()[2]) == pytest.approx(a[best], rel=0.006)
    field.fill("")
    field.press("Enter")
    assert sent(tab) == shown, "nothing is asked for nothing"


class OffAt(nn.Module):
    """A layer with one unit ablated at one position."""

    def __init__(self, layer: SparseLayer, unit: int, position: int) -> None:
        super().__init__()
        self.layer, self.off, self.position = layer, Edited(layer, scale={unit: 0.0}), position

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x).y.clone()
        y[:, self.position] = self.off(x[:, self.position : self.position + 1]).y[:, 0]
        return y


def whole_units(run: Run, name: str) -> list[int]:
    """Units all of whose firings, 6 to 40, were kept as contexts."""
    store = UnitStore(run, name)
    found: list[int] = []
    for unit in range(store.n_units):
        kept = sum(len(contexts) for band, (_, contexts) in store.examples(unit).items() if band < 6)
        if 6 <= kept <= 40 and kept == store.row(unit)["fires"]:
            found.append(unit)
    store.close()
    return found


def test_the_exact_effect_is_what_removing_it_costs(lab: Lab, server: Served, tabs: Tabs) -> None:
    unit = whole_units(lab.run, MXD)[0]
    layer, store = lab.layer(MXD), TextStore(lab.run)
    lost: list[float] = []
    for seq in range(int(store.meta["sequences"])):
        ids = torch.tensor([store.sequence(seq).ids.tolist()])
        places = [at for at in lab.activations(MXD, ids)[:, unit].nonzero()[:, 0].tolist() if at]
        whole = sum(lab.losses(ids, layer)) if places else 0.0
        lost += [sum(lab.losses(ids, OffAt(layer, unit, at))) - whole for at in places]
    store.close()
    tab = tabs.open(server, f"#/{MXD}/unit/{unit}")
    figure = tab.page.locator(".figure", has_text="effect, exact")
    assert figure.locator("b").inner_text() == "–"
    found = answer(tab.page, "/api/ablate", figure.get_by_role("button", name="measure").click)
    assert found["exact_n"] == len(lost) and found["exact"] == pytest.approx(sum(lost) / len(lost), rel=1e-2, abs=1e-3)
    tab.page.wait_for_selector("text=re-measure")
    assert number(figure.locator("b").inner_text()) == pytest.approx(sum(lost) / len(lost), abs=0.006)
    assert (
        f"n {len(lost)}" in figure.inner_text()
        and f"± {tab.page.evaluate('v => mxd.fmt.num(1.96 * v, 2)', found['exact_se'])}" in figure.inner_text()
    )
    again = answer(tab.page, "/api/ablate", figure.get_by_role("button", name="re-measure").click)
    assert again == found


# ---- compare ----------------------------------------------------------------------------------------------------------------------


def test_students_side_by_side_on_one_sentence(lab: Lab, server: Served, tabs: Tabs) -> None:
    tab = tabs.open(server, f"#/{MXD}/compare?with={TRANSCODER},{ZERO},{PERFECT}")
    found = read_sentence(tab, TEXT)
    names = [MXD, TRANSCODER, ZERO, PERFECT]
    assert [student["name"] for student in found["students"]] == names
    rows = tab.page.locator("section section:has(.sent)")
    assert rows.evaluate_all("all => all.map(el => el.getAttribute('aria-label'))") == names
    places = rows.evaluate_all(
        "all => all.map(el => [...el.querySelectorAll('.t')].map(t => [t.textContent, t.offsetLeft, t.offsetWidth]))"
    )
    assert all(row == places[0] for row in places) and len(places[0]) == 1 + len(TEXT), "token under token"
    host = found["host"]["loss"][1:]
    for row, student in zip(rows.all(), found["students"], strict=True):
        deltas = [a - b for a, b in zip(student["loss"][1:], host, strict=True)]
        mean, half = mean_and_half(deltas)
        kl = sum(student["kl"][1:]) / len(deltas)
        shown = numbers(row.locator("h3 small").inner_text())
        assert shown == pytest.approx([mean, half, len(deltas), kl], abs=0.006, rel=0.06)
        assert colours(row.locator(".sent").evaluate(TOKENS)) == ["", *(colour(delta, 2) for delta in deltas)]
    means = [numbers(row.locator("h3 small").inner_text())[0] for row in rows.all()]
    stand_ins: list[nn.Module] = [lab.layer(MXD), lab.layer(TRANSCODER), Nothing(), nn.Identity()]
    own = lab.losses(lab.ids(TEXT))
    direct = [sum(lab.losses(lab.ids(TEXT), one)) / len(own) - sum(own) / len(own) for one in stand_ins[:3]]
    assert means == pytest.approx([*direct, 0], abs=0.006)
    tab.page.get_by_role("checkbox", name=TRANSCODER, exact=True).click()
    tab.page.wait_for_function("() => document.querySelectorAll('section section .sent').length === 3")
    assert [numbers(row.locator("h3 small").inner_text())[0] for row in rows.all()] == [means[0], *means[2:]]


# ---- 10: the bench ----------------------------------------------------------------------------------------------------------------


def commonest(run: Run, name: str, n: int) -> list[int]:
    """The units that fire most."""
    store = UnitStore(run, name)
    found = store.columns(("fires",))["fires"].argsort()[::-1][:n].tolist()
    store.close()
    return found


def test_strength_0_is_the_student_as_it_is(lab: Lab, server: Served, tabs: Tabs) -> None:
    units = commonest(lab.run, MXD, 8)
    nothing = [f"{unit}:{'scale:1' if i % 4 == 3 else 'add:0'}:{('all', 'generated')[i % 2]}" for i, unit in enumerate(units)]
    made = bench(tabs, server, e=",".join(nothing), temp=0.9, n=24)
    made.run()
    replaced, host = made.tokens("replaced"), made.tokens("host")
    assert made.tokens("steered") == replaced and len(replaced) == 24
    assert made.drawn("steered") == made.drawn("replaced") != made.drawn("host")
    for lane in ("replaced", "steered"):
        differs = [i for i, (a, b) in enumerate(zip(made.tokens(lane), host, strict=False)) if a["id"] != b["id"]]
        marked = made.page.locator(f".lane[aria-label={lane}] .differs").evaluate_all("all => all.map(t => Number(t.dataset.i))")
        assert marked == differs and f"splits from the host at token {differs[0]}" in made.foot(lane)
    assert made.foot("steered") == made.foot("replaced")
    made.page.get_by_label(f"value for {units[0]}").fill("8")
    made.run()
    assert made.tokens("replaced") == replaced != made.tokens("steered"), "a strength that is not 0 does something, and only there"


def test_the_same_seed_gives_the_same_text(server: Served, tabs: Tabs) -> None:
    made = bench(tabs, server, e="3:add:6:generated", control=1)
    first = made.run()
    lanes = [made.drawn(lane) for lane in ("host", "replaced", "steered", "control")]
    second = made.run()
    steps = [[[name, data] for name, data in events if name in ("token", "done")] for events in (first, second)]
    assert steps[0] == steps[1] and [made.drawn(lane) for lane in ("host", "replaced", "steered", "control")] == lanes
    answer(made.page, "/api/bench", made.page.get_by_role("button", name="Keep this run").click)
    made.page.get_by_label("seed").fill("4")
    made.run()
    assert made.drawn("host") != lanes[0]
    made.page.get_by_role("button", name="Rerun").first.click()
    made.tab.says("The same text as the kept run, token by token, in all lanes.")
    assert [made.drawn(lane) for lane in ("host", "replaced", "steered", "control")] == lanes
    made.page.get_by_role("button", name="Show").first.click()
    made.tab.says(f"a kept run: {PROMPT}")
    assert [made.drawn(lane) for lane in ("host", "replaced", "steered", "control")] == lanes


def test_the_hosts_lane_is_plain_generate(lab: Lab, server: Served, tabs: Tabs) -> None:
    made = bench(tabs, server, e="3:add:9:all", seed=11, n=20)
    for temperature, top_p in ((0.8, 1.0), (1.2, 0.7), (0.0, 1.0)):
        made.page.get_by_label("greedy").set_checked(temperature == 0)
        for name, value in (("temperature", temperature), ("top-p", top_p)) if temperature else ():
            made.page.get_by_label(name).fill(str(value))
        made.run()
        how: dict[str, Any] = {"new_tokens": 20, "temperature": temperature, "seed": 11, "top_p": top_p}
        own = lab.host.generate_batch([PROMPT], **how)[0]
        assert [token["id"] for token in made.tokens("host")] == own.new_ids
        plain = "".join(token["text"] for token in made.tokens("host"))
        assert plain.rstrip("\ufffd") == own.text.rstrip("\ufffd")
        assert made.drawn("host") == [token["text"] or token.get("special", "") for token in made.tokens("host")]
        nats = lab.losses(torch.tensor([own.prompt_ids + own.new_ids]))[-len(own.new_ids) :]
        assert numbers(made.foot("host"))[0] == pytest.approx(sum(nats) / len(nats), rel=0.006)
        with lab.host.replace({HOOKPOINT: Edited(lab.layer(MXD), add={3: 9.0})}):
            assert [token["id"] for token in made.tokens("steered")] == lab.host.generate_batch([PROMPT], **how)[0].new_ids


def test_escape_stops_within_a_token_and_frees_the_queue(server: Served, tabs: Tabs, monkeypatch: pytest.MonkeyPatch) -> None:
    made, worker = bench(tabs, server, e="3:add:6:generated", n=256), server.site.worker
    cancel = worker.cancel
    with slowed(server) as steps:
        made.start()
        made.page.wait_for_function("() => document.querySelectorAll('.lane[aria-label=steered] .t').length > 2")
        heard: list[int] = []
        monkeypatch.setattr(worker, "cancel", lambda job: (heard.append(len(steps)), cancel(job))[1])
        pressed = time.monotonic()
        made.page.keyboard.press("Escape")
        until(lambda: idle(server))
        assert len(steps) <= heard[0] + 1 and time.monotonic() - pressed < 2, "no more than a step that began just then"
        made.ended()
        assert made.page.evaluate("mxd.source.status().then(s => [s.job, s.queue])") == [None, 0]
    (done,) = made.heard("done")
    count = done["lanes"]["steered"]["tokens"]
    assert 2 < count < 256 and len(made.drawn("steered")) == len(made.tokens("steered")) == count, "what there is stays, with its figures"
    assert {lane["stopped"] for lane in done["lanes"].values()} == {"cancelled"} and "cancelled" in made.foot("steered")
    assert made.page.locator("#main").get_by_text("stopped", exact=True).count() == 1
    kept = made.drawn("steered")
    made.page.get_by_label("tokens", exact=True).fill("12")
    made.run()
    (again,) = made.heard("done")
    assert again["lanes"]["steered"]["stopped"] is None and again["lanes"]["steered"]["tokens"] == 12
    assert made.drawn("steered")[: len(kept)] == kept[:12]


@pytest.mark.parametrize("way", ["another view", "the tab is closed", "a new run"])
def test_nobody_waits_for_a_run_that_was_left(way: str, server: Served, tabs: Tabs) -> None:
    made = bench(tabs, server, n=256)
    with slowed(server) as steps:
        made.start()
        made.page.wait_for_function("() => document.querySelectorAll('.lane .t').length > 2")
        (job,) = [data["job"] for data in made.heard("start")]
        if way == "another view":
            made.page.get_by_role("link", name="Notes").click()
        elif way == "the tab is closed":
            made.page.close()
        else:
            made.page.locator("button[form=bench-form]").click()
        before = len(steps)
        until(lambda: server.site.worker.status()["job"] != job)
        assert len(steps) <= before + 8, "well before its end"
        if way == "a new run":
            made.page.wait_for_function("() => document.querySelectorAll('.lane .t').length > 2")
            assert {len(made.drawn(lane)) for lane in ("host", "replaced")} <= set(range(12)), "the older run's tokens are gone"
            made.page.keyboard.press("Escape")
        until(lambda: idle(server))


FORM = """() => [...document.querySelectorAll('#main .panel :is(input, select, textarea)')].filter(el => el.offsetParent)
    .map(el => [el.getAttribute('aria-label') || el.closest('label').innerText, el.type === 'checkbox' ? el.checked : el.value])"""


def fill_form(page: Page) -> None:
    """Settings that are all other than the usual ones, by hand."""
    page.get_by_label("prompt", exact=True).fill('trade war\n<bos> "100 %" & peace, 日🙂')
    for unit, op, value in ((5, "set", "3.5"), (9, "scale", "-2"), (11, "remove", ""), (2, "add", "12")):
        page.get_by_label("to edit").fill(str(unit))
        page.get_by_role("button", name="+ expert").click()
        group = page.get_by_role("group", name=f"edit of {unit}")
        group.get_by_label("operation").select_option(op)
        if value:
            page.get_by_label(f"value for {unit}").fill(value)
        page.get_by_role("group", name=f"edit of {unit}").get_by_label("at which tokens").select_option("all" if unit != 9 else "generated")
    page.get_by_label("greedy").uncheck()
    for name, value in (("temperature", "0.7"), ("top-p", "0.85"), ("seed", "12"), ("tokens", "9")):
        page.get_by_label(name, exact=True).fill(value)
    page.get_by_label("read special tokens").check()
    page.get_by_label("control lane").check()


def test_settings_survive_in_the_link(server: Served, tabs: Tabs) -> None:
    made = Bench(tabs.open(server, f"#/{MXD}/bench"))
    usual = made.page.evaluate(FORM)
    fill_form(made.page)
    made.page.wait_for_timeout(400)
    shown = made.page.evaluate(FORM)
    assert {name for name, _ in usual} < {name for name, _ in shown} and "value for 5" in {name for name, _ in shown}
    other = Bench(tabs.open(server, "#" + made.page.url.partition("#")[2]))
    assert other.page.evaluate(FORM) == shown
    asked = [one.run()[0] for one in (made, other)]
    assert asked[0] == asked[1] and asked[0][0] == "ask"
    body = asked[0][1]
    assert body["edits"] == [
        {"unit": 5, "op": "set", "value": 3.5, "at": "all"},
        {"unit": 9, "op": "scale", "value": -2, "at": "generated"},
        {"unit": 11, "op": "remove", "value": 0, "at": "all"},
        {"unit": 2, "op": "add", "value": 12, "at": "all"},
    ]
    assert [body[name] for name in ("student", "lanes", "greedy", "special")] == [
        MXD,
        ["host", "replaced", "steered", "control"],
        False,
        True,
    ]
    assert [body[name] for name in ("temperature", "top_p", "seed", "tokens")] == [0.7, 0.85, 12, 9]
    assert [made.tokens(lane) for lane in body["lanes"]] == [other.tokens(lane) for lane in body["lanes"]]
    other.tab.go(f"#/{MXD}/overview")
    other.page.go_back()
    other.tab.settled()
    assert other.page.evaluate(FORM) == shown, "and Back"


def test_the_saved_edit_does_what_the_steered_lane_did(
    lab: Lab, server: Served, tabs: Tabs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = bench(tabs, server, e="5:set:3.5:all,9:scale:-2:all,11:remove::all,2:add:12:all", temp=0.7, seed=12, n=20)
    made.run()
    steered = [token["id"] for token in made.tokens("steered")]
    assert steered != [token["id"] for token in made.tokens("replaced")]
    with made.page.expect_download() as waiting:
        made.page.get_by_role("button", name="Save as edit file").click()
    path = tmp_path / waiting.value.suggested_filename
    waiting.value.save_as(path)
    edit = edits.read(path)
    assert edits.check(edit, lab.run).name == MXD and edit.hookpoint == HOOKPOINT
    assert (edit.scale, edit.add) == ({5: 0.0, 9: -2.0, 11: 0.0}, {5: 3.5, 2: 12.0})
    shown = made.page.locator(".command code").inner_text()
    assert shown == f"mxd generate runs/{lab.run.path.name} --edit {path.name}"
    lanes: dict[str, list[int]] = {}

    def compare(name: str, _host: Sequence[int], ids: Sequence[int], _decode: Any) -> SimpleNamespace:
        lanes[name] = list(ids)
        return SimpleNamespace()

    monkeypatch.setattr("mxd.lanes.compare", compare)
    monkeypatch.setattr("mxd.tables.lanes_table", lambda *_, **__: "")
    options = ["--prompt", PROMPT, "--new-tokens", "20", "--temperature", "0.7", "--seed", "12", "--students", MXD, "--device", "cpu"]
    assert cli.main(["generate", str(lab.run.path), "--edit", str(path), *options]) == 0
    assert lanes[f"{MXD}, {path.stem}"] == steered
    assert lanes[MXD] == [token["id"] for token in made.tokens("replaced")]
    with lab.host.replace({HOOKPOINT: mxd.load_edit(path, lab.run)}):
        assert lab.host.generate(PROMPT, new_tokens=20, temperature=0.7, seed=12).new_ids == steered


# ---- 11: several tabs ---------------------------------------------------------------------------------------------------------------


def test_a_fifth_piece_of_work_is_refused_in_words(server: Served, tabs: Tabs) -> None:
    together = tabs.context()
    first = bench(tabs, server, e="3:add:6:generated", n=256, inside=together)
    second = bench(tabs, server, e="3:add:6:generated", n=4, inside=together)
    third = bench(tabs, server, e="3:add:6:generated", n=4, inside=together, expects=("status of 429",))
    with slowed(server, 0.1):
        first.start()
        first.page.wait_for_function("() => document.querySelector('.lane .t')")
        second.start()
        for one in (first, second):
            with one.page.expect_request("**/api/dose"):
                one.page.get_by_role("button", name="Dose sweep").click()
        until(lambda: server.site.worker.status()["queue"] == MOST_WAITING - 1)
        assert second.page.locator("#main").get_by_text("waiting for the host…").count() == 1
        third.start()
        alert = third.page.get_by_role("alert").filter(has_text="too much")
        assert " ".join(alert.inner_text().split()) == (
            f"too much is waiting for the host expected at most {MOST_WAITING} at once next wait, or stop one Try again"
        )
        assert server.site.worker.status()["queue"] == MOST_WAITING - 1 and third.page.locator("button:has(kbd)").is_disabled()
        first.page.keyboard.press("Escape")
        second.page.wait_for_function("() => document.querySelectorAll('.lane .t').length > 2")
        assert "cancelled" in first.foot("host")
    for one in (first, second):
        one.tab.says("The five tokens that move most")
    alert.get_by_role("button", name="Try again").click()
    third.ended()
    assert len(third.drawn("steered")) == 4 and alert.count() == 0
    assert third.tokens("steered") == second.tokens("steered")
    until(lambda: idle(server))


def test_who_waits_can_give_up(server: Served, tabs: Tabs) -> None:
    together = tabs.context()
    first, second = (bench(tabs, server, n=256, inside=together) for _ in range(2))
    with slowed(server, 0.1):
        first.start()
        first.page.wait_for_function("() => document.querySelector('.lane .t')")
        second.start()
        until(lambda: server.site.worker.status()["queue"] == 1)
        second.page.keyboard.press("Escape")
        until(lambda: server.site.worker.status()["queue"] == 0)
        second.tab.says("stopped")
        assert server.site.worker.status()["job"] is not None, "the other goes on"
        first.page.keyboard.press("Escape")
        until(lambda: idle(server))


SAVED = "[aria-label='your note'] small:text-matches('^saved')"


def note_of(server: Served, page: Page, unit: int) -> dict[str, Any]:
    """The note as the server has it."""
    return page.evaluate("([s, u]) => mxd.source.note(s, u)", [MXD, unit])


def write_note(tab: Tab, text: str, *, saved: bool = True) -> None:
    area = tab.page.get_by_label("note", exact=True)
    area.fill(text)
    area.press("Tab")
    if saved:
        tab.page.wait_for_selector(SAVED)


def test_two_notes_on_one_unit_are_both_kept(server: Served, tabs: Tabs) -> None:
    together, unit = tabs.context(), 20
    first, second = (tabs.open(server, f"#/{MXD}/unit/{unit}", inside=together, expects=("status of 409",)) for _ in range(2))
    write_note(first, "what the first saw")
    write_note(second, "what the second saw", saved=False)
    dialog = second.page.get_by_role("dialog")
    for text in ("changed elsewhere", "what the first saw", "what the second saw"):
        assert text in dialog.inner_text()
    assert note_of(server, first.page, unit)["text"] == "what the first saw", "nothing is written before it is asked"
    second.page.keyboard.press("Escape")
    second.page.wait_for_selector("text=not saved: it was changed elsewhere")
    assert second.page.get_by_label("note", exact=True).input_value() == "what the second saw", "not lost either"
    write_note(second, "what the second saw now", saved=False)
    dialog.get_by_role("button", name="Join both").click()
    second.page.wait_for_selector(SAVED)
    joined = "what the first saw\nwhat the second saw now"
    assert note_of(server, first.page, unit)["text"] == joined == second.page.get_by_label("note", exact=True).input_value()
    first.page.get_by_role("button", name="star").first.click()
    dialog = first.page.get_by_role("dialog")
    assert joined.split("\n")[1] in dialog.inner_text()
    dialog.get_by_role("button", name="Keep the other").click()
    first.page.wait_for_selector("dialog", state="detached")
    until(lambda: first.page.get_by_label("note", exact=True).input_value() == joined)
    assert note_of(server, first.page, unit)["text"] == joined
    write_note(first, joined + "\nand more")
    assert note_of(server, second.page, unit)["text"].endswith("and more"), "after that it is saved without asking"


class Program:
    """``mxd explore`` as a process of its own."""

    def __init__(self, run: Run) -> None:
        command = [sys.executable, "-m", "mxd", "explore", str(run.path), "--port", "0", "--no-browser", "--device", "cpu"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout
        self.link = re.findall(r"http://\S+", self.process.stdout.readline())[0]

    def kill(self) -> None:
        """As the kernel does when memory runs out."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(20)
        assert self.process.stdout
        self.process.stdout.close()


@pytest.fixture
def started() -> Iterator[Callable[[Run], Program]]:
    made: list[Program] = []

    def start(run: Run) -> Program:
        made.append(Program(run))
        return made[-1]

    yield start
    for program in made:
        program.kill()


def test_notes_survive_a_killed_server_and_a_collection_from_the_start(
    lab: Lab, tabs: Tabs, tmp_path: Path, started: Callable[[Run], Program]
) -> None:
    run = Run.open(shutil.copytree(lab.run.path, tmp_path / "run", ignore=shutil.ignore_patterns("notes.sqlite*")))
    program = started(run)
    tab = tabs.open(program.link, expects=("ERR_CONNECTION_REFUSED",))
    tab.go(f"#/{MXD}/unit/31")
    write_note(tab, "kept through everything\n日🙂 <b>")
    tab.page.get_by_label("tags").fill("law; peace")
    tab.page.get_by_label("tags").press("Tab")
    tab.page.get_by_role("button", name="star").first.click()
    until(lambda: (note := tab.page.evaluate("u => mxd.source.note('mxd-k4', u)", 31))["star"] and note["tags"] == ["law", "peace"])
    tab.page.wait_for_selector(SAVED)
    program.kill()
    write_note(tab, "typed when nobody answered", saved=False)
    tab.page.wait_for_selector("[aria-label='your note'] small:has-text('not saved')")
    assert tab.page.get_by_label("note", exact=True).input_value() == "typed when nobody answered"
    assert "The server does not answer." in tab.text()
    tab.page.wait_for_selector("#gone:not([hidden])")
    before = units_path(run, MXD).stat().st_mtime_ns
    collect.collect(run, replace(COLLECTED, overwrite=True), lambda: reopen(run))
    assert units_path(run, MXD).stat().st_mtime_ns > before
    again = tabs.open(started(run).link)
    again.go(f"#/{MXD}/unit/31")
    assert again.page.get_by_label("note", exact=True).input_value() == "kept through everything\n日🙂 <b>"
    assert again.page.get_by_label("tags").input_value() == "law; peace"
    assert again.page.get_by_role("button", name="star").first.get_attribute("aria-pressed") == "true"
    again.go(f"#/{MXD}/notes")
    (row,) = again.page.locator("tbody tr").all_inner_texts()
    assert "kept through everything" in row and MXD in row and "31" in row
    again.go(f"#/{MXD}/units?star=1")
    assert "1 of 91" in again.text()


# ---- 12: keys alone, and axe --------------------------------------------------------------------------------------------------------


def test_from_search_to_stop_by_keys_alone(server: Served, tabs: Tabs) -> None:
    keys = Keys(tabs.open(server, f"#/{MXD}/overview"))
    page, tab = keys.page, keys.tab
    keys.press("/")
    assert page.evaluate("document.activeElement.id") == "find-text"
    page.keyboard.type("treaties", delay=5)
    keys.press("Enter")
    tab.says("1 of 91")
    keys.until("[role=grid]")
    keys.press("ArrowDown")
    keys.press("Enter")
    tab.says(f"expert {LETTER}")
    tab.settled()
    star = page.get_by_role("button", name="star").first
    assert star.get_attribute("aria-pressed") == "false"
    keys.press("f")
    until(lambda: note_of(server, page, LETTER)["star"])
    assert star.get_attribute("aria-pressed") == "true"
    keys.press("n")
    page.keyboard.type("fires on treaties: f, x and [ are letters here", delay=2)
    keys.press("Tab")
    until(lambda: note_of(server, page, LETTER)["text"].startswith("fires on treaties: f, x and ["))
    assert note_of(server, page, LETTER)["star"] is True
    keys.until("a, button")
    keys.press("x")
    tab.settled()
    assert f"/bench?e={LETTER}" in page.url
    with slowed(server, 0.1):
        keys.until("button.primary")
        keys.press("Enter")
        page.wait_for_function("() => document.querySelectorAll('.lane[aria-label=steered] .t').length > 2")
        keys.press("Escape")
        until(lambda: idle(server))
        tab.says("stopped")
        keys.press("Enter")
        page.wait_for_function("() => !document.querySelector('button:has(kbd)').disabled && document.querySelector('.lane .t')")
        keys.until("button:has(kbd)")
        keys.press("Enter")
        until(lambda: idle(server))
        tab.says("stopped")
        tab.frame()
        assert page.evaluate("document.activeElement.closest('#main') !== null"), "the focus is not lost with the button that it was on"
    keys.press("g", "n")
    tab.says("fires on treaties")
    assert "/notes" in page.url


def views(lab: Lab) -> dict[str, str]:
    """Routes of the seven views, with something in each."""
    text = TEXT.replace(" ", "+")
    return {
        "overview": f"#/{MXD}/overview",
        "units": f"#/{MXD}/units",
        "unit": f"#/{MXD}/unit/{LETTER}",
        "sentence": f"#/{MXD}/sentence?text={text}&at=5",
        "bench": f"#/{MXD}/bench?e=3:add:6:generated,5:scale:2:all&greedy=0&n=12&control=1",
        "compare": f"#/{MXD}/compare?with={TRANSCODER},{PERFECT}&text={text}&unit={LETTER}",
        "notes": f"#/{MXD}/notes",
    }


def fill_view(tab: Tab, view: str) -> None:
    """What needs a hand to be there."""
    page = tab.page
    if view == "bench":
        page.locator("button[form=bench-form]").click()
        page.get_by_role("button", name="Keep this run").click()
        page.get_by_role("button", name="Dose sweep").click()
        tab.says("The five tokens that move most")
    elif view == "compare":
        page.get_by_role("button", name="contexts side by side").click()
        tab.settled()
    elif view == "unit":
        page.get_by_label("your own sentence").fill(TEXT)
        page.get_by_label("your own sentence").press("Enter")
        page.wait_for_selector(".sent")
    elif view == "units":
        for name in ("Filters", "Columns"):
            page.locator("summary", has_text=name).click()
    elif view == "notes":
        page.evaluate(
            "s => mxd.source.note(s, 40).then(old => mxd.source.saveNote(s, 40, {...old, star: true, text: 'a note', tags: ['law']}))", MXD
        )
        tab.says("a note")


AXE = """async tags => (await axe.run(document, {runOnly: {type: "tag", values: tags}})).violations
    .map(found => `${found.id}: ${found.help}: ${found.nodes.slice(0, 4).map(n => n.target.join(" ") + " " + n.any.concat(n.all, n.none)
        .map(check => check.message).join("; ").slice(0, 200)).join(" | ")}`)"""
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]


@pytest.fixture(scope="module")
def axe_source() -> str:
    """axe-core, as the extra for development brings it along."""
    found = importlib.util.find_spec("axe_playwright_python")
    if found is None or found.origin is None:
        (pytest.fail if os.environ.get("MXD_REQUIRE_BROWSER") == "1" else pytest.skip)("no axe here (pip install axe-playwright-python)")
    return (Path(found.origin).parent / "axe.min.js").read_text(encoding="utf-8")


def violations(page: Page, source: str) -> list[str]:
    """What axe objects to. First the pointer goes away and the page to its top: what is half below a tooltip or the bar is too small."""
    page.mouse.move(0, 0)
    page.evaluate("() => window.scrollTo(0, 0)")
    page.wait_for_function("() => document.getElementById('tip').hidden")
    if not page.evaluate("() => 'axe' in window"):
        page.evaluate(source)
    return page.evaluate(AXE, RULES)


def test_axe_is_let_in_by_the_browser_only(server: Served, tabs: Tabs, axe_source: str) -> None:
    tab = tabs.open(server, f"#/{MXD}/overview", expects=("Content Security Policy", "TrustedScript"))
    with pytest.raises(Exception, match=r"(?i)script"):
        tab.page.add_script_tag(content=axe_source)
    assert not tab.page.evaluate("() => 'axe' in window"), "no page may add a script, not for tests either"
    tab.page.evaluate(
        "() => { const img = document.createElement('img'); img.src = 'data:,'; document.getElementById('main').append(img); }"
    )
    assert any("image-alt" in found for found in violations(tab.page, axe_source)), "axe sees what is wrong"


THEMES: tuple[Theme, ...] = ("light", "dark")


@pytest.mark.parametrize("view", ["overview", "units", "unit", "sentence", "bench", "compare", "notes"])
def test_a_view_can_be_walked_by_tab_and_axe_has_nothing_against_it(
    view: str, lab: Lab, server: Served, tabs: Tabs, axe_source: str
) -> None:
    tab = tabs.open(server, views(lab)[view])
    fill_view(tab, view)
    stops = Keys(tab).walk()
    assert len(stops) > 14 and stops[0]["name"] == "a mxd", [stop["name"] for stop in stops]
    for theme in THEMES:
        tab.page.emulate_media(color_scheme=theme)
        tab.frame()
        assert violations(tab.page, axe_source) == [], theme
    assert tab.page.evaluate("() => getComputedStyle(document.body).colorScheme") == "dark"
    for width in (420, 320):  # a phone, and 1,280 pixels at 400 %
        tab.page.set_viewport_size({"width": width, "height": 640})
        tab.frame()
        beyond = tab.page.evaluate("() => document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert beyond <= 0, f"{beyond} pixels to scroll sideways at {width}"
        assert violations(tab.page, axe_source) == [], width


def test_a_unit_is_printed_without_controls_and_dark_on_white(lab: Lab, server: Served, tabs: Tabs) -> None:
    tab = tabs.open(server, views(lab)["unit"])
    fill_view(tab, "unit")
    tab.page.emulate_media(color_scheme="dark", media="print")
    tab.frame()
    shown = "all => all.filter(el => el.checkVisibility()).length"
    assert tab.page.locator(".frame, main button, main input, main select").evaluate_all(shown) == 0
    assert tab.page.locator("main .ctx").evaluate_all(shown) > 10 and tab.page.locator("main .facts, main .bars").evaluate_all(shown) > 1
    assert tab.page.evaluate("() => getComputedStyle(document.body).color") == "rgb(26, 26, 26)"
    assert tab.page.evaluate("() => getComputedStyle(document.body).backgroundColor") in ("rgb(255, 255, 255)", "rgba(0, 0, 0, 0)")
    pages = re.findall(rb"/Type\s*/Page\b", tab.page.pdf(format="A4", print_background=True))
    assert 1 <= len(pages) <= 8


def open_dialog(tab: Tab, name: str) -> None:
    page = tab.page
    if name == "keys":
        page.keyboard.press("?")
    elif name == "host":
        page.get_by_role("button", name="host:").click()
    elif name == "edit a note":
        fill_view(tab, "notes")
        page.get_by_role("button", name=f"Edit: {MXD} 40").click()
    elif name == "conflict":
        page.evaluate("() => void mxd.conflict({star: true, text: 'mine', tags: ['a']}, {star: false, text: 'theirs', tags: ['b']})")
    elif name == "text to copy":
        page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(); return mxd.ui.copy('a link'); }")
    elif name == "export":
        tab.go(f"#/{MXD}/units")
        page.get_by_role("button", name="Export").click()


def test_axe_has_nothing_against_dialogs_and_the_focus_stays_in_them(server: Served, tabs: Tabs, axe_source: str) -> None:
    tab = tabs.open(server, f"#/{MXD}/notes")
    for name in ("keys", "host", "edit a note", "conflict", "text to copy", "export"):
        open_dialog(tab, name)
        tab.page.wait_for_selector("dialog[open]")
        tab.page.wait_for_load_state("networkidle")
        for theme in THEMES:
            tab.page.emulate_media(color_scheme=theme)
            assert violations(tab.page, axe_source) == [], (name, theme)
        for _ in range(12):
            tab.page.keyboard.press("Tab")
            inside = "() => document.activeElement === document.body || document.querySelector('dialog').contains(document.activeElement)"
            assert tab.page.evaluate(inside), name
        tab.page.keyboard.press("Escape")
        tab.page.wait_for_selector("dialog", state="detached")
