"""The curves of `scaling` drawn from its rows, each with its exponent. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..evals.svg import Axis, Figure, log_axis

AXES = {"n": "N, experts", "k": "K, active experts per token", "students": "students on the same batch", "tokens": "tokens per step"}
"""What a sweep's axis is called; in the order of the panels."""
WIDTH, HEIGHT = 420.0, 280.0


def points(rows: Sequence[Mapping[str, Any]], what: str, device: str) -> list[tuple[int, float]]:
    """(size, milliseconds) of one sweep on one device, ascending."""
    found = [r for r in rows if r.get("sweep") == what and r["device"] == device]
    return sorted((r["shape"][what], r["ours_ms"]) for r in found)


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """Slope of the least-squares line through (log size, log cost); None for fewer than two sizes."""
    if len({size for size, _ in points}) < 2:
        return None
    xs, ys = ([math.log(value) for value in column] for column in zip(*points, strict=True))
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True)) / sum((x - x_mean) ** 2 for x in xs)


def figure(rows: Sequence[Mapping[str, Any]], device: str) -> str | None:
    """An SVG file with one panel per sweep, two beside each other; None where no sweep has two points."""
    panels = [panel for what in AXES if (panel := _panel(rows, what, device))]
    if not panels:
        return None
    whole = Figure(2 * WIDTH, HEIGHT * math.ceil(len(panels) / 2), "Cost of a training step as one thing grows")
    for number, panel in enumerate(panels):
        place = f'x="{WIDTH * (number % 2):g}" y="{HEIGHT * (number // 2):g}" width="{WIDTH:g}" height="{HEIGHT:g}"'
        whole.parts.append(f"<svg {place}>{''.join(panel.parts)}</svg>")
    return whole.svg(standalone=True)


def _panel(rows: Sequence[Mapping[str, Any]], what: str, device: str) -> Figure | None:
    """Milliseconds over size, both logarithmic; a dotted line through the first point is proportional cost."""
    found = points(rows, what, device)
    slope = exponent(found)
    if slope is None:
        return None
    made = Figure(WIDTH, HEIGHT, f"Milliseconds per step against {AXES[what]}")
    sizes, costs = zip(*found, strict=True)
    x = Axis(min(sizes) / 1.2, max(sizes) * 1.2, 56, WIDTH - 16, 2)
    y = log_axis(costs, HEIGHT - 46, 30)
    made.frame(x, y, f"{AXES[what]} (log)", f"milliseconds per step (log); exponent {slope:.2f} (dotted: 1)", x_ticks=_thinned(sizes))
    # As far as the axis reaches, so that its slope is drawn true.
    start, end = found[0], min(sizes[-1], y.high / costs[0] * sizes[0])
    made.line([(x(start[0]), y(start[1])), (x(end), y(start[1] * end / start[0]))], "axis dots")
    made.line([(x(size), y(cost)) for size, cost in found], "line", "mxd")
    for size, cost in found:
        made.marker(x(size), y(cost), "mxd", note=f"{size:,}: {cost:,.4g} ms", size=4)
    return made


def _thinned(sizes: Sequence[float]) -> list[float]:
    """Ticks that do not run into each other: all sizes, or every second where they are many and long."""
    return list(sizes[:: 2 if len(sizes) > 6 else 1])
