"""The figures of a report, drawn from report.json and metrics.jsonl: what each student costs, frontier, loss, routing, firing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..recipes import published, published_host
from .svg import NAMES, Axis, Figure, log_axis, number

Report = Mapping[str, Any]
Student = Mapping[str, Any]
WIDTH = 460.0
MARGIN = 52.0
LABELS = 122.0
"""Room for direct labels on the right."""


def hookpoints(report: Report) -> list[str]:
    """The hookpoints of a report, one or several."""
    value = report["hookpoint"]
    return [value] if isinstance(value, str) else list(value)


def students_at(report: Report, hookpoint: str) -> list[Student]:
    """The students of one hookpoint, in the order of the report."""
    return [s for s in report["students"] if s["hookpoint"] == hookpoint]


def at_hookpoint(report: Report, key: str, hookpoint: str) -> float | None:
    """A run-level figure that is a dict by hookpoint where a run has several."""
    value = report.get(key)
    return value.get(hookpoint) if isinstance(value, Mapping) else value


def several_recipes(student: Student, others: Sequence[Student]) -> bool:
    """Whether the student's kind comes under more than one recipe among `others`."""
    return len({s["recipe"] for s in others if s["kind"] == student["kind"]}) > 1


def series(student: Student, others: Sequence[Student]) -> str:
    """What a student's curve is called among `others`: its kind, with the recipe where that kind comes under several."""
    name = NAMES[student["kind"]]
    if several_recipes(student, others):
        return f"{name.removesuffix(' control')} · {student['recipe']}"
    return name


def label(student: Student, others: Sequence[Student]) -> str:
    """What a student is called among `others`: as its curve, with K where they have different ones."""
    several = len({s["k"] for s in others if s["k"]}) > 1
    return f"{series(student, others)} {student['k']}" if several and student["k"] else series(student, others)


def _room(texts: Iterable[str], least: float) -> float:
    """Pixels that the longest of `texts` takes, at least `least`."""
    return max([least, *(6.3 * len(text) + 16 for text in texts)])


def middle_k(students: Sequence[Student]) -> int:
    """The K nearest the usual 32 among `students`."""
    return min({s["k"] for s in students if s["k"]}, key=lambda k: abs(math.log2(k / 32)), default=0)


def cost(report: Report, hookpoint: str) -> Figure:
    """One row per student (of one K if they are many), best first: excess cross-entropy with its 95 % interval."""
    students = sorted((s for s in students_at(report, hookpoint) if s["excess_ce"] is not None), key=lambda s: s["excess_ce"])
    if len(students) > 12:
        k = middle_k(students)
        students = [s for s in students if s["k"] in (0, k)]
    zero = _zero_ablation(report, hookpoint)
    values = [s["excess_ce"] for s in students] + ([zero] if zero else [])
    figure = Figure(WIDTH, 70 + 25 * len(students), "Excess cross-entropy of each student, in nats, lower is better")
    x = log_axis(values, _room((label(s, students) for s in students), 132), WIDTH - 22, room=1.6)
    top, bottom = 30.0, 34.0 + 25 * len(students)
    for tick in x.ticks():
        figure.line([(x(tick), top), (x(tick), bottom)], "rule")
        figure.text(x(tick), bottom + 15, f"{tick:.6g}", anchor="middle", css="soft")
    figure.text((x.start + x.end) / 2, bottom + 32, "excess cross-entropy, nats per token (log)", anchor="middle", css="soft")
    if zero:
        figure.line([(x(zero), top - 4), (x(zero), bottom)], "axis dots")
        figure.text(x(zero) + 4, top - 9, "zero ablation", anchor="end", css="soft")
    for i, student in enumerate(students):
        y, kind, value = top + 16 + 25 * i, student["kind"], student["excess_ce"]
        low, high = _ends(student, "excess_ce_ci95", value)
        note = f"{student['name']}: {number(value)} nats [{number(low)}, {number(high)}]"
        figure.text(x.start - 10, y + 4, label(student, students), anchor="end", css="hue", kind=kind)
        figure.line([(x(max(low, x.low)), y), (x(max(high, x.low)), y)], "bar", kind)
        figure.marker(x(max(value, x.low)), y, kind, note=note)
        near = max(x(max(high, x.low)), x(max(value, x.low)) + 5) + 7
        room = near < WIDTH - 60
        left = min(x(max(low, x.low)), x(max(value, x.low)) - 5) - 7
        figure.text(near if room else left, y + 4, number(value), anchor="start" if room else "end")
    return figure


def frontier(report: Report, hookpoint: str) -> Figure:
    """Excess cross-entropy (log) over K (log2) with 95 % bars; controls hollow or a dashed level; the paper's curves dotted."""
    students = [_at_its_l0(s) for s in students_at(report, hookpoint) if s["excess_ce"] is not None]
    paper = _paper(report)
    ks = sorted({s["k"] for s in students if s["k"]}) or [1]
    shown = ks + (paper[0] if paper else [])
    values = [s["excess_ce"] for s in students] + [v for curve in (paper[1].values() if paper else []) for v in curve]
    figure = Figure(WIDTH, 320, "Sparsity and accuracy: excess cross-entropy over K", "Lower is better; bars are 95 % intervals.")
    alone = 2 if len(set(shown)) == 1 else 1.15
    end = WIDTH - _room((series(s, students) + _below(s) for s in students), LABELS)
    x = Axis(min(shown) / alone, max(shown) * alone, MARGIN, end, 2)
    y = log_axis(values, 320 - 46, 30, room=1.5)
    figure.frame(x, y, "K, units active per token (log)", "excess cross-entropy, nats (log)", x_ticks=sorted(set(shown)))
    wanted: list[tuple[float, str, str]] = []
    for kind, curve in (paper[1] if paper else {}).items():
        points = [(x(k), y(v)) for k, v in zip(paper[0] if paper else [], curve, strict=True)]
        figure.line(points, "line dots thin", kind)
        wanted.append((points[-1][1], f"{_SHORT[kind]}, paper", kind))
    groups: dict[str, list[Student]] = {}
    for student in sorted(students, key=lambda s: s["k"]):
        groups.setdefault(series(student, students), []).append(student)
    for i, (name, own) in enumerate(groups.items()):
        place = _curve(figure, x, y, own, 7.0 * (i - (len(groups) - 1) / 2))
        wanted.append((place, name + _below(own[-1]), own[0]["kind"]))
    figure.labels(end + 12, wanted, 34, 320 - 50)
    return figure


def _at_its_l0(student: Student) -> Student:
    """A student whose gate has no TopK (K is all its units) stands where it has as many active as it has on average."""
    return {**student, "k": max(1, round(student["l0"] or 1))} if student["k"] and student["k"] == student["n_units"] else student


def _below(student: Student) -> str:
    """Said behind the name of what a logarithmic axis cannot show."""
    return ", ≤ 0" if student["excess_ce"] <= 0 else ""


_SHORT = {"mxd": "MxD", "transcoder": "Transcoder", "skip-transcoder": "Skip tr."}


def _curve(figure: Figure, x: Axis, y: Axis, own: Sequence[Student], shift: float) -> float:
    """One series' points, joined where there are several K, moved sideways by `shift` so that bars do not hide each other.

    Returns the height at which its label belongs.
    """
    kind = own[0]["kind"]
    if not own[0]["k"]:
        value = own[0]["excess_ce"]
        low, high = _ends(own[0], "excess_ce_ci95", value)
        figure.band(x.start, y(max(high, y.low)), x.end - x.start, y(max(low, y.low)) - y(max(high, y.low)), kind)
        figure.line([(x.start, y(max(value, y.low))), (x.end, y(max(value, y.low)))], "line dash", kind)
        return y(max(value, y.low))
    points = [(x(s["k"]) + (shift if len(own) == 1 else shift / 3), y(max(s["excess_ce"], y.low))) for s in own]
    if len(points) > 1:
        figure.line(points, "line dash" if own[0]["is_control"] else "line", kind)
    for student, (px, py) in zip(own, points, strict=True):
        low, high = _ends(student, "excess_ce_ci95", student["excess_ce"])
        figure.line([(px, y(max(low, y.low))), (px, y(max(high, y.low)))], "bar", kind)
        note = f"{student['name']}: {number(student['excess_ce'])} nats [{number(low)}, {number(high)}]"
        figure.marker(px, py, kind, note=note)
    return points[-1][1]


def losses(report: Report, metrics: Sequence[Mapping[str, Any]], hookpoint: str) -> Figure | None:
    """Training loss (log) over token-steps, mean of five logged steps."""
    students = students_at(report, hookpoint)
    curves: list[tuple[Student, list[tuple[float, float]]]] = []
    for student in students:
        rows = [r for r in metrics if r.get("student") == student["name"] and isinstance(r.get("loss"), float)]
        smooth = [
            (rows[i]["tokens"], sum(r["loss"] for r in rows[max(0, i - 4) : i + 1]) / len(rows[max(0, i - 4) : i + 1]))
            for i in _thin(len(rows), 160)
        ]
        if len(smooth) > 1:
            curves.append((student, [(t, v) for t, v in smooth if v > 0]))
    if not curves:
        return None
    figure = Figure(WIDTH, 300, "Training loss of each student over token-steps")
    last = max(t for _, curve in curves for t, _ in curve)
    unit, word = (1e6, "million ") if last >= 2e6 else (1e3, "thousand ")
    end = WIDTH - _room((label(s, students) for s in students), LABELS)
    x = Axis(0, last / unit, MARGIN, end)
    y = log_axis([v for _, curve in curves for _, v in curve], 300 - 46, 30, room=1.08)
    squared = report.get("loss") == "squared"
    figure.frame(
        x, y, f"{word}token-steps", "training loss, mean of ‖y − ŷ‖² (log)" if squared else "training loss, mean of ‖y − ŷ‖² / ‖y‖ (log)"
    )
    wanted: list[tuple[float, str, str]] = []
    for student, curve in curves:
        figure.line([(x(t / unit), y(v)) for t, v in curve], "line thin dash" if student["is_control"] else "line thin", student["kind"])
        wanted.append((y(curve[-1][1]), label(student, students), student["kind"]))
    figure.labels(end + 12, wanted, 34, 300 - 50)
    return figure


_PROBES = (
    ("fvu", "FVU", "mxd", ""),
    ("fvu_best_constant", "best constant", "mxd", " dash"),
    ("fvu_mean_a", "a at its mean", "mxd", " dots"),
    ("id", "ID", "ink", ""),
)


def routing_history(metrics: Sequence[Mapping[str, Any]], student: Student) -> Figure | None:
    """FVU of an MxD during training, with its experts at work and with routing taken away, and ID, on validation text."""
    rows = [r for r in metrics if r.get("student") == student["name"] and isinstance(r.get("probe"), Mapping)]
    found = {key: [(r["tokens"], r["probe"][key]) for r in rows if (r["probe"].get(key) or 0) > 0] for key, *_ in _PROBES}
    if len(found["fvu"]) < 2:
        return None
    figure = Figure(WIDTH, 300, f"Routing of {student['name']} during training")
    last = max(t for t, _ in found["fvu"])
    unit, word = (1e6, "million ") if last >= 2e6 else (1e3, "thousand ")
    x = Axis(0, last / unit, MARGIN, WIDTH - LABELS)
    y = log_axis([max(v, 1e-4) for curve in found.values() for _, v in curve], 300 - 46, 30, room=1.15)
    figure.frame(x, y, f"{word}token-steps", "share of the variance of y (log), validation text")
    wanted: list[tuple[float, str, str]] = []
    for key, name, hue, dash in _PROBES:
        points = [(x(t / unit), y(v)) for t, v in found[key]]
        if points:
            figure.line(points, f"line{dash}", hue)
            wanted.append((points[-1][1], name, hue))
    figure.labels(WIDTH - LABELS + 12, wanted, 34, 300 - 50)
    return figure


def firing(report: Report, hookpoint: str) -> Figure | None:
    """Share of each student's units by firing frequency; how many never fired stands with the name below."""
    students = [s for s in students_at(report, hookpoint) if s.get("firing_histogram") and s["n_units"]]
    if not students:
        return None
    k = middle_k(students)
    students = [s for s in students if s["k"] == k]
    edges = students[0]["firing_histogram"]["log10_edges"]
    shares = {s["name"]: [100 * n / s["n_units"] for n in s["firing_histogram"]["units"]] for s in students}
    figure = Figure(WIDTH, 310 + 17 * len(students), f"Firing frequency of the units at K = {k}")
    x = Axis(10 ** edges[0], 10 ** edges[-1], MARGIN - 8, WIDTH - 24, 10)
    y = Axis(0, max(1.0, 1.08 * max(max(v) for v in shares.values())), 300 - 46, 30)
    figure.frame(x, y, "share of tokens on which a unit fires (log)", f"% of units per quarter decade, K = {k}")
    for i, student in enumerate(students):
        values = shares[student["name"]]
        points = [p for left, right, v in zip(edges, edges[1:], values, strict=False) for p in ((x(10**left), y(v)), (x(10**right), y(v)))]
        figure.line(points, "line thin dash" if student["is_control"] else "line thin", student["kind"])
        dead = f"{100 * (student['dead_fraction'] or 0):.0f} % never fired"
        top = 316 + 17.0 * i
        figure.line([(x.start, top), (x.start + 18, top)], "line thin dash" if student["is_control"] else "line thin", student["kind"])
        figure.text(x.start + 26, top + 4, f"{series(student, students)}, {dead}", css="hue", kind=student["kind"])
    return figure


def frontier_file(report: Report) -> str:
    """frontier.svg: one panel per hookpoint, one below the other."""
    panels = [(h, frontier(report, h)) for h in hookpoints(report)]
    if len(panels) == 1:
        return panels[0][1].svg(standalone=True)
    height = sum(panel.height + 24 for _, panel in panels)
    whole = Figure(WIDTH, height, "Sparsity and accuracy at each hookpoint")
    top = 0.0
    for hookpoint, panel in panels:
        whole.text(4, top + 16, hookpoint)
        inner = f'<svg y="{top + 24:g}" height="{panel.height:g}" width="{WIDTH:g}">{"".join(panel.parts)}</svg>'
        whole.parts.append(inner)
        top += panel.height + 24
    return whole.svg(standalone=True)


def _paper(report: Report) -> tuple[list[int], dict[str, list[float]]] | None:
    """The paper's K and excess cross-entropy by kind, if the host is one of the paper's; of its main layer, whatever ours is."""
    host = published_host_figures(report)
    if host is None:
        return None
    kinds = [kind for kind in ("mxd", "skip-transcoder", "transcoder") if kind in host]
    return list(published()["cross_entropy_nats"]["k"]), {kind: [round(ce - host["original"], 5) for ce in host[kind]] for kind in kinds}


def published_host_figures(report: Report) -> dict[str, Any] | None:
    """The paper's cross-entropies for this report's host: ``layer``, ``original`` and one list per kind; None for other hosts."""
    key = published_host(str(report["host"]))
    return published()["cross_entropy_nats"]["hosts"].get(key) if key else None


def _zero_ablation(report: Report, hookpoint: str) -> float | None:
    """Excess cross-entropy of zero ablation, if it is above 0."""
    base, zero = report.get("base_ce"), at_hookpoint(report, "zero_ablation_ce", hookpoint)
    return zero - base if base is not None and zero is not None and zero > base else None


def _ends(student: Student, key: str, value: float) -> tuple[float, float]:
    low, high = student[key]
    return (value if low is None else low), (value if high is None else high)


def _thin(n: int, most: int) -> list[int]:
    """At most `most` indices of 0 .. n − 1, evenly, the last one among them."""
    return sorted({round(i * (n - 1) / (most - 1)) for i in range(most)}) if n > most else list(range(n))
