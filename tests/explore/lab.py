"""A run to be explored live whose answers are known, and hands for its page: reading it, running its bench, pressing its keys.

The host is random and tiny, with weights large enough for its MLPs to matter. Four students stand in for its second MLP: a random mixture
of decoders and a random transcoder, a copy of the MLP itself (`PERFECT`), and one that has units but returns 0 (`ZERO`).
"""

from __future__ import annotations

import contextlib
import math
import re
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

import mxd
from mxd.checkpoint import Run, save_layer
from mxd.explore import collect
from mxd.explore.store import units_path
from mxd.host import Host
from mxd.layers import SparseLayer
from mxd.pipeline import reopen
from mxd.unit_config import CollectConfig
from tests.conftest import BOS, EOS, VOCAB, build_tokenizer
from tests.explore.browser import Served, Tab, Tabs
from tests.small import small_run

if TYPE_CHECKING:
    from playwright.sync_api import Page, Response

MXD, TRANSCODER, ZERO, PERFECT = "mxd-k4", "transcoder-k4", "skip-transcoder-k4", "dense"
HOOKPOINT = "layers.1.mlp"
TEXT = "the treaty of peace was signed by the nation"
PROMPT = "law people congress house"
LETTER = 7
"""The unit of MXD that has a label."""
STEP_SECONDS = 0.15
"""What a step takes where tests must come between two of them."""
COLLECTED = CollectConfig(tokens=3200, effect_tokens=640)
"""Sequences are longer than a context is wide."""

# ---- a run with hand-made students ----------------------------------------------------------------------------------------------


class Lab(NamedTuple):
    """A run and its host."""

    run: Run
    host: Host

    def layer(self, name: str) -> SparseLayer:
        return self.run.load(name, "cpu")

    def ids(self, text: str) -> Tensor:
        """Tokens [1, token] with BOS."""
        return torch.tensor([[BOS, *self.host.encode(text)]])

    def losses(self, ids: Tensor, stand_in: nn.Module | None = None) -> list[float]:
        """−log p of every token but the first, nats, with `stand_in` in the MLP's place."""
        with self.host.replace({HOOKPOINT: stand_in} if stand_in is not None else {}):
            scores = self.host.logits(ids)[0].double().log_softmax(-1)
        return (-scores[:-1].gather(1, ids[0, 1:, None])[:, 0]).tolist()

    def activations(self, name: str, ids: Tensor) -> Tensor:
        """Activation of every unit at every token [token, unit]."""
        layer = self.layer(name)
        code = layer.encode(self.host.read(ids, [HOOKPOINT])[HOOKPOINT].x[0])
        return torch.zeros(ids.shape[1], layer.n_units).scatter_add(1, code.indices, code.values)


class Nothing(nn.Module):
    """0 in the place of an MLP: zero ablation."""

    def __init__(self) -> None:
        super().__init__()
        self.like = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def save_host(folder: Path) -> Path:
    """As that of `tests.small`, with weights 25 times as large."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    more: dict[str, Any] = {"num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.5}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, bos_token_id=BOS, eos_token_id=EOS, **sizes, **more)).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def hand_made(run: Run, host: Host) -> None:
    """Give the students of a run other weights."""
    mlp, dice = host.weights(HOOKPOINT), torch.Generator().manual_seed(1)
    for record in run.students:
        layer: Any = run.load(record.name, "cpu").requires_grad_(False)
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=dice) * 0.5)
        if record.name == ZERO:
            for parameter in (layer.W_dec, layer.W_skip, layer.b_dec):
                parameter.zero_()
        if record.name == PERFECT:
            layer.encoder.E.copy_(mlp.E)
            layer.encoder.E_gate.copy_(mlp.E_gate)
            layer.D.copy_(mlp.D)
            for parameter in (layer.encoder.b_E, layer.encoder.b_gate, layer.b):
                parameter.zero_()
        save_layer(run.path / record.folder, layer, record)


def make_lab(folder: Path) -> Lab:
    """The run in ``folder/run``, collected, with a label."""
    kinds = ("mxd", "transcoder", "skip-transcoder", "dense")
    sizes: dict[str, Any] = {"tokens": 1280, "tokens_per_step": 320, "buffer_tokens": 1280, "tokens_per_sequence": 160}
    config = small_run(folder, kinds=kinds, number=60, budget="8x", k=(4,), **sizes)
    save_host(folder / "host")
    run = mxd.train(config, quiet=True)
    host = Host.load(str(folder / "host"), device="cpu")
    hand_made(run, host)
    run = Run.open(run.path)
    collect.collect(run, COLLECTED, lambda: reopen(run))
    with sqlite3.connect(units_path(run, MXD)) as database:
        row = (LETTER, "me", "treaties of the nation", "manual", "", None, None, None, None, "2026-01-01")
        database.execute(f"INSERT INTO label VALUES ({', '.join('?' * 10)})", row)
    database.close()
    return Lab(run, host)


# ---- looking at the page --------------------------------------------------------------------------------------------------------

TOKENS = "el => [...el.querySelectorAll('.t')].map(t => ({i: Number(t.dataset.i), text: t.textContent, css: t.className}))"
TIPS = """el => [...el.querySelectorAll('.t')].map(t => {
    mxd.ui.showTip(t);
    return document.getElementById('tip').innerText;
})"""
HEAR = """() => {
    if (window.heard) return;
    window.heard = [];
    const plain = mxd.source.stream;
    mxd.source.stream = (body, on, signal) => {
        window.heard.push(["ask", body]);
        return plain(body, (name, data) => (window.heard.push([name, data]), on(name, data)), signal);
    };
}"""


def answer(page: Page, path: str, act: Callable[[], Any]) -> Any:
    """What the server says to the next request of this path, which `act` has the page make."""

    def fits(response: Response) -> bool:
        return response.url.partition("?")[0].endswith(path)

    with page.expect_response(fits) as waiting:
        act()
    return waiting.value.json()


def number(text: str) -> float:
    """A number as the page writes it."""
    return float(text.strip().replace("−", "-").replace(",", "").replace("–", "nan"))


def numbers(text: str) -> list[float]:
    """All numbers in a text of the page."""
    return [number(found) for found in re.findall(r"[−+]?(?:\d[\d,]*)?\.?\d+(?:e[−-]?\d+)?", text)]


def colour(value: float | None, scale: float) -> str:
    """The class of a value's step."""
    if not value:
        return ""
    size = math.ceil(6 * abs(value) / scale - 1e-3)
    return f"{'h' if value > 0 else 'm'}{min(6, max(1, size))}{' clip' if size > 6 else ''}"


def colours(tokens: Sequence[dict[str, Any]]) -> list[str]:
    """The classes of steps of tokens in the page."""
    return [" ".join(re.findall(r"\b(?:[hm][1-6]|clip)\b", token["css"])) for token in tokens]


def read_sentence(tab: Tab, text: str) -> Any:
    """Have a text read by the view that is open; what the server made of it."""
    area = tab.page.get_by_label("text to read")
    area.fill(text)
    found = answer(tab.page, "/api/sentence", lambda: area.press("Control+Enter"))
    tab.page.wait_for_selector(".sent")
    tab.frame()
    return found


def sent(tab: Tab) -> list[dict[str, Any]]:
    """Tokens of the sentence that is shown."""
    return tab.page.locator(".sent").first.evaluate(TOKENS)


def mean_and_half(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its 95 % half-width."""
    mean = sum(values) / len(values)
    return mean, 1.96 * math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


# ---- its bench -------------------------------------------------------------------------------------------------------------------


class Bench:
    """The bench in a tab."""

    def __init__(self, tab: Tab) -> None:
        self.tab, self.page = tab, tab.page
        self.page.evaluate(HEAR)

    def start(self) -> None:
        self.page.evaluate("() => { window.heard.length = 0 }")
        self.page.locator("button[form=bench-form]").click()

    def ended(self) -> None:
        """Wait until nothing runs."""
        self.page.wait_for_function("() => document.querySelector('button:has(kbd)').disabled")
        self.tab.frame()

    def run(self) -> list[list[Any]]:
        """Run it; the request and the events."""
        self.start()
        self.ended()
        return self.page.evaluate("window.heard")

    def heard(self, name: str) -> list[Any]:
        return [data for kind, data in self.page.evaluate("window.heard") if kind == name]

    def tokens(self, lane: str) -> list[dict[str, Any]]:
        """The tokens of a lane without its name, as the server told of them."""
        return [{k: v for k, v in data.items() if k != "lane"} for data in self.heard("token") if data["lane"] == lane]

    def drawn(self, lane: str) -> list[str]:
        """The tokens of a lane as they are drawn."""
        return self.page.locator(f".lane[aria-label='{lane}'] .lane-text .t").evaluate_all("all => all.map(t => t.textContent)")

    def foot(self, lane: str) -> str:
        return self.page.locator(f".lane[aria-label='{lane}'] .lane-foot").inner_text()


def bench(tabs: Tabs, server: Served, student: str = MXD, *, expects: tuple[str, ...] = (), inside: Any = None, **query: Any) -> Bench:
    """The bench with settings from its address."""
    asked = {"p": PROMPT, "greedy": 0, "seed": 3, "n": 16, **query}
    route = "&".join(f"{name}={str(value).replace(' ', '+')}" for name, value in asked.items())
    return Bench(tabs.open(server, f"#/{student}/bench?{route}", expects=expects, inside=inside))


@contextlib.contextmanager
def slowed(server: Served, seconds: float = STEP_SECONDS) -> Iterator[list[float]]:
    """Every pass of the host takes so long; when each began."""
    begun: list[float] = []

    def wait(*_: Any) -> None:
        begun.append(time.monotonic())
        time.sleep(seconds)

    model = server.site.worker.model
    assert model is not None
    hook = model.host.model.register_forward_pre_hook(wait)
    try:
        yield begun
    finally:
        hook.remove()


def idle(server: Served) -> bool:
    status = server.site.worker.status()
    return status["job"] is None and status["queue"] == 0


# ---- its keys --------------------------------------------------------------------------------------------------------------------

FOCUS = """() => {
    const el = document.activeElement;
    if (!el || el === document.body || el === document.documentElement) return null;
    const shown = el.getAttribute('role') === 'grid' ? el.querySelector('.at') || el : el;
    const style = getComputedStyle(shown), box = shown.getBoundingClientRect();
    const inside = [.5, .1, .9].flatMap(x => [.5, .1, .9].map(y => [box.left + x * box.width, box.top + y * box.height]));
    const hit = ([x, y]) => {
        const there = document.elementFromPoint(x, y);
        return there && (shown.contains(there) || there.contains(shown));
    };
    return {
        name: `${el.tagName.toLowerCase()} ${el.getAttribute('aria-label') || el.innerText || el.id || el.className}`.slice(0, 60),
        place: [...document.querySelectorAll('*')].indexOf(el),
        outline: style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2 ? style.outlineColor : null,
        shadow: el.id === 'main' && style.boxShadow !== 'none',
        small: box.width < 4 || box.height < 4,
        uncovered: inside.some(hit),
    };
}"""
REACHABLE = """() => {
    const all = [...document.querySelectorAll('*')];
    const can = all.filter(el => el.tabIndex >= 0 && !el.disabled && el.checkVisibility({visibilityProperty: true}));
    return can.map(el => [all.indexOf(el), el.tabIndex]);
}"""


class Keys:
    """A page used without a pointer: after every key, what has the focus shows it and can be seen."""

    def __init__(self, tab: Tab) -> None:
        self.tab, self.page = tab, tab.page

    def focus(self) -> dict[str, Any] | None:
        found = self.page.evaluate(FOCUS)
        if found:
            assert found["shadow"] or (found["outline"] and found["outline"] != "rgba(0, 0, 0, 0)"), f"no ring: {found}"
            assert not found["small"] and found["uncovered"], f"out of sight: {found}"
        return found

    def press(self, *keys: str) -> dict[str, Any] | None:
        for key in keys:
            self.page.keyboard.press(key)
        self.tab.frame()
        return self.focus()

    def until(self, selector: str, key: str = "Tab", most: int = 60) -> None:
        """Press a key until what matches has the focus."""
        for _ in range(most):
            if self.page.evaluate("css => document.activeElement.matches(css)", selector):
                return
            self.press(key)
        raise AssertionError(f"{key} never came to {selector}")

    def walk(self, most: int = 150) -> list[dict[str, Any]]:
        """Every stop of Tab after the link to the content, until it leaves the page: in the order of the page, all that can be used."""
        self.page.locator(".skip").focus()
        reachable: list[list[int]] = self.page.evaluate(REACHABLE)
        assert {order for _, order in reachable} == {0}
        stops: list[dict[str, Any]] = []
        for _ in range(most):
            stop = self.press("Tab")
            if stop is None or (stops and stop["place"] == stops[0]["place"]):
                assert {place for place, _ in reachable[1:]} <= {stop["place"] for stop in stops}
                return stops
            stops.append(stop)
            assert len(stops) < 2 or stop["place"] > stops[-2]["place"], f"after {stops[-2]} came {stop}"
        raise AssertionError(f"Tab does not leave the page: {[stop['name'] for stop in stops]}")
