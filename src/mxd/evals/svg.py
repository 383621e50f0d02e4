"""The few pieces of hand-written SVG that the report's figures are made of: axes, markers, direct labels, colours.

Colours are CSS variables, so that one figure serves light and dark pages; every kind also has a marker of its own.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

NAMES = {
    "mxd": "MxD",
    "mxd-pk": "MxD, product keys",
    "cp-mumoe": "CP-μMoE",
    "mov": "MoV (mode 2)",
    "transcoder": "Transcoder",
    "skip-transcoder": "Skip transcoder",
    "topk-sae": "TopK SAE",
    "dense": "Dense control",
    "additive": "Additive control",
}
"""What a kind is called in tables and figures."""

_HUES = {
    "mxd": ("#0a5ea8", "#63b0ee"),
    "mxd-pk": ("#3f51a3", "#9fb0ff"),
    "cp-mumoe": ("#16707f", "#5ec5d6"),
    "mov": ("#a3325a", "#f291b2"),
    "skip-transcoder": ("#00735a", "#43cba0"),
    "transcoder": ("#bf4a04", "#f59a62"),
    "topk-sae": ("#8f3a8c", "#dc97d8"),
    "dense": ("#555b63", "#b3bac4"),
    "additive": ("#75632c", "#d3bd7a"),
}
_INK = {"ink": ("#1c2126", "#e6e9ec"), "soft": ("#5b636c", "#9aa3ad"), "rule": ("#dde1e5", "#32383f"), "paper": ("#ffffff", "#14171a")}


def _variables(theme: int) -> str:
    return "".join(f"--{name}:{pair[theme]};" for name, pair in {**_HUES, **_INK}.items())


STYLE = (
    f":root{{{_variables(0)}}}@media(prefers-color-scheme:dark){{:root{{{_variables(1)}}}}}"
    + "".join(f".k-{kind}{{--c:var(--{kind})}}" for kind in (*_HUES, "ink"))
    + "svg.figure{font:12px/1.3 system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif}"
    "svg.figure text{fill:var(--ink)}svg.figure text.soft{fill:var(--soft)}svg.figure text.hue{fill:var(--c)}"
    "svg.figure .rule{stroke:var(--rule);fill:none}svg.figure .axis{stroke:var(--soft);fill:none}"
    "svg.figure .line{stroke:var(--c);fill:none;stroke-width:1.8;stroke-linejoin:round}"
    "svg.figure .bar{stroke:var(--c);stroke-width:1.6;fill:none}svg.figure .full{fill:var(--c);stroke:var(--paper);stroke-width:.8}"
    "svg.figure .hollow{fill:var(--paper);stroke:var(--c);stroke-width:1.8}svg.figure .band{fill:var(--c);opacity:.13}"
    "svg.figure .dash{stroke-dasharray:5 4}svg.figure .dots{stroke-dasharray:1.5 3.5;stroke-linecap:round}"
    "svg.figure .lead{stroke:var(--c);stroke-width:.8;opacity:.5;fill:none}svg.figure .thin{stroke-width:1.3}"
)
"""CSS of the figures; a page that embeds them includes it once."""


def escape(text: object) -> str:
    """Text made safe inside elements and attributes."""
    return html.escape(str(text), quote=True)


def number(value: float, digits: int = 3) -> str:
    """`digits` significant digits without an exponent where that stays short: 0.0252, 3.68, 1,240, −0.004, 1.2e−07."""
    if value == 0:
        return "0"
    size = float(f"{abs(value):.{digits - 1}e}")
    if size >= 1e7 or size < 1e-4:
        text = f"{size:.{digits - 1}e}".replace("e-", "e−").replace("e+", "e")
    else:
        decimals = max(0, digits - 1 - math.floor(math.log10(size)))
        text = f"{size:,.{decimals}f}"
    return f"−{text}" if value < 0 else text


@dataclass
class Axis:
    """Maps values in [low, high] to pixels; `log` is 0 for a linear axis, else the base of its ticks (2 or 10)."""

    low: float
    high: float
    start: float
    end: float
    log: int = 0

    def __call__(self, value: float) -> float:
        value = min(max(value, self.low), self.high)
        share = math.log(value / self.low, self.high / self.low) if self.log else (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, about: int = 5) -> list[float]:
        """Round values along the axis: powers of 2; 1-2-5 steps (1-10 over more than two decades); or about `about` even ones."""
        if self.log == 2:
            return [2.0**e for e in range(math.ceil(math.log2(self.low) - 1e-9), math.floor(math.log2(self.high) + 1e-9) + 1)]
        if self.log:
            steps = (
                (1, 2, 3, 5, 7)
                if self.high / self.low < 8
                else (1, 2, 5)
                if self.high / self.low < 100
                else (1, 3)
                if self.high / self.low < 1000
                else (1,)
            )
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [step * 10.0**e for e in decades for step in steps]
        else:
            raw = (self.high - self.low) / about
            size = 10.0 ** math.floor(math.log10(raw))
            step = next(size * s for s in (1, 2, 5, 10) if size * s >= raw * 0.999)
            found = [step * i for i in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]
        return [t for t in found if self.low * (1 - 1e-9) <= t <= self.high * (1 + 1e-9)]


def log_axis(values: Sequence[float], start: float, end: float, room: float = 1.3) -> Axis:
    """A log10 axis around the positive ones of `values`, with a factor `room` on both sides."""
    positive = [v for v in values if v > 0] or [0.01, 1.0]
    low, high = min(positive) / room, max(positive) * room
    if high / low < 4:
        middle = math.sqrt(low * high)
        low, high = middle / 2, middle * 2
    return Axis(low, high, start, end, 10)


@dataclass
class Figure:
    """A figure being drawn: `width` x `height` units, elements in order, a title and description for screen readers."""

    width: float
    height: float
    title: str
    description: str = ""
    parts: list[str] = field(default_factory=list)

    def text(self, x: float, y: float, content: object, *, anchor: str = "start", css: str = "", kind: str = "") -> None:
        """Text at a baseline position; `css` holds classes, `kind` sets the hue."""
        classes = " ".join(c for c in (css, f"k-{kind}" if kind else "") if c)
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{classes}">{escape(content)}</text>')

    def line(self, points: Sequence[tuple[float, float]], css: str, kind: str = "") -> None:
        """A polyline."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polyline points="{path}" class="{css}{f" k-{kind}" if kind else ""}"/>')

    def band(self, x: float, y: float, width: float, height: float, kind: str) -> None:
        """A tinted rectangle."""
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{max(height, 0):.1f}" class="band k-{kind}"/>'
        )

    def marker(self, x: float, y: float, kind: str, *, note: str = "", size: float = 5) -> None:
        """The kind's own mark: circle MxD (pentagon with product keys), triangle on its tip CP-μMoE, hexagon MoV, square transcoder,
        triangle skip transcoder, diamond SAE; controls hollow."""
        css = "hollow" if kind in ("dense", "additive") else "full"
        corners = {
            "transcoder": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
            "skip-transcoder": [(0, -1.15), (1.1, 0.85), (-1.1, 0.85)],
            "mxd-pk": [(0, -1.2), (1.15, -0.35), (0.7, 1.0), (-0.7, 1.0), (-1.15, -0.35)],
            "cp-mumoe": [(-1.1, -0.85), (1.1, -0.85), (0, 1.15)],
            "mov": [(0.6, -1.1), (1.2, 0), (0.6, 1.1), (-0.6, 1.1), (-1.2, 0), (-0.6, -1.1)],
            "topk-sae": [(0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)],
            "additive": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
        }.get(kind)
        tip = f"<title>{escape(note)}</title>" if note else ""
        if corners is None:
            self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size}" class="{css} k-{kind}">{tip}</circle>')
        else:
            path = " ".join(f"{x + size * a:.1f},{y + size * b:.1f}" for a, b in corners)
            self.parts.append(f'<polygon points="{path}" class="{css} k-{kind}">{tip}</polygon>')

    def frame(self, x: Axis, y: Axis, x_label: str, y_label: str, *, x_ticks: Sequence[float] | None = None) -> None:
        """Horizontal rules at the ticks of y, an x axis with ticks, and both labels (that of y on top, level)."""
        for tick in y.ticks():
            self.line([(x.start, y(tick)), (x.end, y(tick))], "rule")
            self.text(x.start - 7, y(tick) + 4, f"{tick:.6g}", anchor="end", css="soft")
        self.line([(x.start, y.start), (x.end, y.start)], "axis")
        for tick in x_ticks if x_ticks is not None else x.ticks():
            self.line([(x(tick), y.start), (x(tick), y.start + 4)], "axis")
            self.text(x(tick), y.start + 17, f"{tick:,.6g}", anchor="middle", css="soft")
        self.text((x.start + x.end) / 2, y.start + 34, x_label, anchor="middle", css="soft")
        self.text(4, 14, y_label, css="soft")

    def labels(self, x: float, wanted: Sequence[tuple[float, str, str]], top: float, bottom: float, *, gap: float = 14) -> None:
        """Labels (y, text, kind) in a column at `x`, moved apart so that none overlap, each with a hairline to its place."""
        ordered = sorted(wanted)
        places = spread([y for y, _, _ in ordered], gap, top, bottom)
        for (y, text, kind), place in zip(ordered, places, strict=True):
            self.line([(x - 10, y), (x - 3, place)], "lead", kind)
            self.text(x, place + 4, text, css="hue", kind=kind)

    def svg(self, *, standalone: bool = False) -> str:
        """The figure as an ``<svg>`` element; `standalone` adds namespace and style so that it is a file of its own."""
        head = f'<svg class="figure" viewBox="0 0 {self.width:g} {self.height:g}" role="img" aria-label="{escape(self.title)}"'
        if standalone:
            head += f' xmlns="http://www.w3.org/2000/svg" width="{self.width:g}" height="{self.height:g}"'
            ground = f'<style>{STYLE}</style><rect width="{self.width:g}" height="{self.height:g}" fill="var(--paper)"/>'
        else:
            ground = ""
        about = f"<title>{escape(self.title)}</title>" + (f"<desc>{escape(self.description)}</desc>" if self.description else "")
        return f"{head}>{about}{ground}{''.join(self.parts)}</svg>"


def spread(wanted: Sequence[float], gap: float, top: float, bottom: float) -> list[float]:
    """Positions as near as may be to `wanted` (ascending), at least `gap` apart, inside [top, bottom] if they fit."""
    gap = min(gap, (bottom - top) / max(len(wanted) - 1, 1))
    placed: list[float] = []
    for y in wanted:
        placed.append(max(y, placed[-1] + gap if placed else top))
    limit = bottom
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], limit)
        limit = placed[i] - gap
    return placed
