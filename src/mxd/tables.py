"""What the command line prints: tables of hosts, students and results, and lanes of text. Made with rich, nothing computed here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .lanes import Lane


def console() -> Console:
    """Standard output; wide enough for the tables where it is not a terminal."""
    made = Console(highlight=False)
    if not made.is_terminal:
        made.width = max(made.width, 160)
    return made


def _table(columns: Sequence[tuple[str, str]], *, title: str | None = None) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold", title_style="", box=box.SIMPLE_HEAD)
    for name, side in columns:
        table.add_column(name, justify="right" if side == "right" else "left", no_wrap=side != "wrap")
    return table


def host_table(name: str, sites: Iterable[Any], *, d_model: int) -> Table:
    """The MLPs of a host: one row per `MLPSite`."""
    rows = list(sites)
    table = _table(
        [("hookpoint", "left"), ("layer", "right"), ("d_in", "right"), ("d_hidden", "right"), ("d_out", "right"), ("encoder", "left")],
        title=f"{name}: {len(rows)} MLPs, d_model = {d_model}",
    )
    for site in rows:
        encoder = f"{site.activation}, gated" if site.glu else site.activation
        table.add_row(site.hookpoint, str(site.layer), *(f"{n:,}" for n in (site.d_in, site.d_hidden, site.d_out)), encoder)
    return table


def run_table(title: str, students: Iterable[Any]) -> Table:
    """The students of a run: one row per `StudentRecord`."""
    table = _table(
        [
            ("student", "left"),
            ("hookpoint", "left"),
            ("kind", "left"),
            ("K", "right"),
            ("units", "right"),
            ("parameters", "right"),
            ("recipe", "left"),
            ("token-steps", "right"),
            ("tokens/s", "right"),
            ("", "wrap"),
        ],
        title=title,
    )
    for s in students:
        note = f"stopped: {s.stopped}" if s.stopped else "control" if s.is_control else ""
        table.add_row(
            s.name,
            s.hookpoint,
            s.kind,
            _count(s.k),
            _count(s.n_units),
            f"{s.params:,}",
            s.recipe,
            f"{s.tokens_trained:,}",
            f"{s.tokens_per_second:,.0f}",
            note,
        )
    return table


LEAVE_OUT = ("tokens/s", "nmse", "> ½", "busiest", "units", "KL", "top-1", "L0", "dead", "params", "FVU [95 %]", "recipe")
"""Columns of the report's table in the order in which a narrow terminal goes without them."""


def report_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], *, width: int) -> Table:
    """The report's table, as many of its columns as `width` characters hold without cutting any."""
    shown = list(range(len(heads)))

    def needed() -> int:
        return 1 + sum(3 + max(len(row[n]) for row in [heads, *rows]) for n in shown)

    for head in LEAVE_OUT:
        if needed() <= width:
            break
        shown = [n for n in shown if heads[n] != head]
    table = _table([(heads[n], "right" if n else "left") for n in shown], title=title)
    for row in rows:
        table.add_row(*(row[n] for n in shown))
    return table


def lane_text(lane: Lane, *, colour: bool) -> Text:
    """A continuation; what differs from the host is coloured, or stands between {+ and +}; a new line shows as ↵."""
    text = Text()
    for piece in lane.pieces:
        shown = piece.text.replace("\n", "↵")
        if piece.differs and not colour:
            text.append("{+" + shown + "+}")
        else:
            text.append(shown, style="bold yellow" if piece.differs else "")
    return text


def lanes_table(lanes: Iterable[Lane], *, colour: bool) -> Table:
    """The host's continuation (the first lane) and each student's, with where it leaves the host's."""
    table = _table([("written by", "left"), ("leaves the host's text", "left"), ("continuation", "wrap")])
    table.show_lines = True
    for number, lane in enumerate(lanes):
        where = "never" if lane.split is None else f"at token {lane.split} ({lane.agreement:.0%} alike)"
        table.add_row(lane.name, where if number else "", lane_text(lane, colour=colour))
    return table


def bench_table(name: str, rows: Iterable[Mapping[str, Any]]) -> Table:
    """The rows of one benchmark; ratios are ours / rival, below 1 where ours needs less."""
    columns = [("case", "left"), ("ours with", "left"), ("shape", "wrap"), ("rival", "wrap"), ("ours, ms", "right"), ("rival, ms", "right")]
    columns += [("time", "right"), ("memory", "right"), ("runs", "right")]
    table = _table(columns, title=f"{name}: medians, every result verified first; time and memory are ours / rival")
    for row in rows:
        shape = " ".join(f"{key}={value}" for key, value in row["shape"].items())
        numbers = (_number(row[key]) for key in ("ours_ms", "rival_ms", "time_ratio", "memory_ratio", "runs"))
        table.add_row(row["case"], row.get("setting") or "", shape, row["rival"] or "", *numbers)
    return table


def study_table(title: str, rows: Iterable[Mapping[str, Any]]) -> Table:
    """What a study found: a line per student."""
    numbers = [(head, "right") for head in ("FVU", "L0", "N_r", "G_r", "ID")]
    table = _table([("run", "left"), ("student", "left"), ("excess CE", "right"), ("95 %", "left"), *numbers], title=title)
    for row in rows:
        routing = row["routing"] or {}
        measures = [(routing.get(key) or {}).get("value") for key in ("n_r", "g_r", "id")]
        low, high = row["excess_ce_ci95"]
        cells = [_number(row["excess_ce"]), f"[{_number(low)}, {_number(high)}]", _number(row["fvu"]), _number(row["l0"])]
        table.add_row(row["run"], row["name"], *cells, *(_number(value) for value in measures))
    return table


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def time_line(seconds: Mapping[str, float]) -> str:
    """``time: harvest 120 s · training 200 s · … · 400 s in all``."""
    return "time: " + " · ".join(f"{part} {value:.0f} s" for part, value in seconds.items()) + f" · {sum(seconds.values()):.0f} s in all"


def _count(value: int) -> str:
    return f"{value:,}" if value else "–"
