"""What a report shows of generation agreement: the heat map, a table with intervals, and continuations side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ...recipes import PAPER_HOSTS, published, published_host
from ..bootstrap import Interval, interval_of_sums
from ..figures import label
from ..parts import Found, Section, Student, Table, measured
from ..svg import Figure, escape, number

NAME = "generation_agreement"
PUBLISHED = {"prompts": 512, "new_tokens": 16, "temperature": 0.0}
"""The published sizes; greedy decoding is our reading, the paper does not say."""
RESAMPLES = 2000
"""Bootstrap resamples behind the comparison of two students."""
COLUMNS = 16
"""Columns of the heat map, at most; of longer continuations some n are left out."""
CELL = 21.0
ROW = 23.0
FAINT = 0.04
"""Opacity of a cell of share 0; that of share 1 is 1."""
DARK_FROM, PAPER_FROM = 0.64, 0.79
"""Opacity from which the number in a cell is dark in both themes, and from which it has the colour of the paper: what reads best on
a tint of --mxd over --paper, in the light theme and in the dark one."""
DARK = "#14171a"


class Row(NamedTuple):
    """One row of the heat map."""

    name: str
    """Its label."""
    kind: str
    """Whose hue the label has."""
    shares: Sequence[float]
    """Share of samples identical up to n tokens, n = 0, 1, .."""
    paper: bool
    """Whether the numbers are the published ones."""


def show(students: Sequence[Student]) -> list[Section]:
    """The section of one hookpoint's students; nothing where none was measured."""
    found = measured(students, NAME)
    if not found:
        return []
    rows = [Row(label(s, found), s["kind"], s[NAME]["shares"], paper=False) for s in found]
    reference = published_rows(found[0][NAME]["host"])
    caption = "Share of samples identical up to n tokens" + (" (dotted: published)" if reference else "")
    return [
        Section(
            "Generation agreement",
            _words(found),
            [_table(found, reference)],
            [(caption, heat_map([*rows, *reference]))],
            _samples(found),
            _notes(found[0][NAME], bool(reference)),
        )
    ]


def published_rows(host: str) -> list[Row]:
    """The paper's own rows for a host of the paper's; none for another."""
    key = published_host(host)
    curves = published()["generation_agreement"]["hosts"].get(key, {}) if key else {}
    names = {"mxd": "MxD", "skip-transcoder": "Skip tr.", "transcoder": "Transcoder", "sae": "SAE"}
    return [Row(f"{names[kind]}, paper", "topk-sae" if kind == "sae" else kind, shares, paper=True) for kind, shares in curves.items()]


def heat_map(rows: Sequence[Row]) -> Figure:
    """A cell for every row and n: its tint is the share (opacity of one hue, so that it holds in both themes and for the colour-blind),
    and the share stands in it. Published rows are framed with dots."""
    longest = max(len(row.shares) for row in rows) - 1
    columns = list(range(1, longest + 1))
    if longest > COLUMNS:
        columns = sorted({round(1 + i * (longest - 1) / (COLUMNS - 1)) for i in range(COLUMNS)})
    left = max([60.0, *(6.6 * len(row.name) + 12 for row in rows)])
    top, width = 34.0, left + CELL * len(columns) + 4
    description = "Rows are students, columns numbers of tokens; a cell is the share of samples that are the host's up to there."
    figure = Figure(width, top + ROW * len(rows) + 6, "Share of samples identical to the host's up to n tokens", description)
    figure.text(left, 13, "n, new tokens", css="soft")
    for j, n in enumerate(columns):
        figure.text(left + CELL * (j + 0.5), top - 6, n, anchor="middle", css="soft")
    for i, row in enumerate(rows):
        y = top + ROW * i
        figure.text(left - 8, y + 15, row.name, anchor="end", css="hue", kind=row.kind)
        for j, n in enumerate(columns):
            if n < len(row.shares):
                figure.parts.append(_cell(left + CELL * j, y, row.shares[n], f"{row.name}, n = {n}: {row.shares[n]:.3f}"))
        if row.paper:
            right, low = left + CELL * sum(n < len(row.shares) for n in columns), y + ROW - 1
            figure.line([(left, y + 1), (right, y + 1), (right, low), (left, low), (left, y + 1)], "axis dots")
    return figure


def _cell(x: float, y: float, share: float, note: str) -> str:
    opacity = tint(share)
    ink = "var(--paper)" if opacity >= PAPER_FROM else DARK if opacity >= DARK_FROM else "var(--ink)"
    return (
        f'<g><title>{escape(note)}</title><rect x="{x + 0.5:.1f}" y="{y + 1:.1f}" width="{CELL - 1:.1f}" height="{ROW - 2:.1f}" '
        f'style="fill:var(--mxd);fill-opacity:{opacity:.3f}"/><text x="{x + CELL / 2:.1f}" y="{y + 15.5:.1f}" text-anchor="middle" '
        f'style="fill:{ink};font-size:10.5px">{escape(short(share))}</text></g>'
    )


def tint(share: float) -> float:
    """Opacity of a cell."""
    return FAINT + (1 - FAINT) * min(max(share, 0.0), 1.0)


def short(share: float) -> str:
    """Two decimals without the leading 0: .94; 1 and 0 only for exactly these, otherwise >.99 would read as 1."""
    if share in (0, 1):
        return f"{share:g}"
    return f"{min(max(share, 0.01), 0.99):.2f}"[1:]


def _table(students: Sequence[Student], reference: Sequence[Row]) -> Table:
    length = students[0][NAME]["new_tokens"]
    at = [n for n in (1, 2, 5, 10, 15) if n < length]
    rows = [
        [
            label(s, students),
            *(_interval(s[NAME]["shares"][n], s[NAME]["shares_ci95"][n]) for n in at),
            _interval(s[NAME]["complete_share"], s[NAME]["complete_share_ci95"]),
            _interval(s[NAME]["mean_identical_tokens"], s[NAME]["mean_identical_tokens_ci95"]),
        ]
        for s in students
    ]
    rows += [[row.name, *(f"{row.shares[n]:g}" if n < len(row.shares) else "–" for n in at), "–", "–"] for row in reference]
    heads = ["student", *(f"n = {n}" for n in at), f"all {length}", "tokens before the first difference"]
    return Table(
        "Share of samples identical to the host's up to n tokens, and the mean number of identical tokens, each [95 %]", heads, rows
    )


def _interval(value: float | None, ends: Sequence[float | None]) -> str:
    if value is None:
        return "–"
    low, high = ends
    return number(value) if low is None or high is None else f"{number(value)} [{number(low)}, {number(high)}]"


def difference(one: Found, other: Found) -> Interval | None:
    """By how many tokens `one` stays with the host longer than `other`, on average over prompts; paired, documents resampled.

    None where the two were not measured on the same prompts.
    """
    same = ("prompts", "new_tokens", "temperature", "host", "documents")
    if any(one[key] != other[key] for key in same) or [s["prompt"] for s in one["samples"]] != [s["prompt"] for s in other["samples"]]:
        return None
    mine, theirs, documents = (
        np.array(text.split(), dtype=np.int64) for text in (one["identical_tokens"], other["identical_tokens"], one["documents"])
    )
    owners = np.unique(documents, return_inverse=True)[1]
    sums = np.stack([np.bincount(owners, weights=values) for values in (mine - theirs, np.ones(len(mine)))], axis=1)
    return interval_of_sums(sums.astype(np.float64), lambda s: s[..., 0] / s[..., 1], resamples=RESAMPLES, seed=0)


def _words(students: Sequence[Student]) -> list[str]:
    ranked = sorted(students, key=lambda s: -s[NAME]["mean_identical_tokens"])
    best, figures = ranked[0], ranked[0][NAME]
    n = min(15, figures["new_tokens"])
    share, (low, high) = figures["shares"][n], figures["shares_ci95"][n]
    words = [
        f"With the {_name(best, students)} in place, {100 * share:.0f} % [{_percent(low)}, {_percent(high)}] of {figures['prompts']:,} "
        f"continuations are the host's for their first {n} tokens; the first difference comes after "
        f"{_interval(figures['mean_identical_tokens'], figures['mean_identical_tokens_ci95'])} of {figures['new_tokens']} tokens, on "
        "average."
    ]
    behind: list[str] = []
    open_: list[str] = []
    for other in ranked[1:]:
        gap = difference(figures, other[NAME])
        if gap is None:
            continue
        if gap.low > 0:
            behind.append(f"{_name(other, students)} by {number(gap.value, 2)} [{number(gap.low, 2)}, {number(gap.high, 2)}]")
        else:
            open_.append(_name(other, students))
    if behind:
        words.append(f"Prompt by prompt it stays with the host longer than the {'; the '.join(behind)} tokens.")
    if open_:
        words.append(f"No difference is shown between it and the {', the '.join(open_)}: the paired 95 % interval reaches 0.")
    words.append(
        "This is about behaviour on these prompts alone: a copy of the MLP scores 1 at every n, so it says nothing of what units mean, "
        "nor whether the experts matter."
    )
    return words


def _name(student: Student, students: Sequence[Student]) -> str:
    name = label(student, students)
    return name[0].lower() + name[1:] if name.split()[0][1:].islower() else name


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f}"


def _notes(figures: Found, reference: bool) -> list[str]:
    sampled = figures["temperature"] > 0
    how = (
        f"sampled at temperature {figures['temperature']:g}, host and students with the same noise, each prompt with its own"
        if sampled
        else "greedy"
    )
    published_sizes = all(figures[key] == value for key, value in PUBLISHED.items())
    notes = [
        f"{figures['prompts']:,} prompts of {figures['prompt_words']} words (runs without white space, at random words of "
        f"{figures['prompt_documents']:,} {figures['split']} documents, which take turns), {figures['new_tokens']} new tokens, {how}.",
        "“Identical up to n” means that the first n new tokens are the host's; at n = 0 every sample is. A continuation that ends with an "
        "end-of-text token agrees from there on with one that ends at the same place, and with no other.",
        "Intervals: bootstrap over the documents of the prompts; they do not cover training with another seed. "
        f"Those of a share of exactly 0 or 1 have no width; up to {number(3 / figures['prompts'], 2)} could hide there (rule of three).",
        "The sizes are the published ones; the paper does not say how it chose tokens, greedy is our reading."
        if published_sizes
        else "The published figures are of 512 prompts and 16 new tokens; the paper does not say how it chose tokens.",
    ]
    if reference:
        key = published_host(figures["host"]) or ""
        notes.append(
            f"Published rows: arXiv 2505.21364, figure 4, layer {PAPER_HOSTS[key][1]}; other prompts and other training text than here. "
            "Their column 0 is 1 in every row, as it is if n counts new tokens, and so it is read here. But their step from 0 to 1 is far "
            "smaller than all later ones, in every row, so that their n may be one ahead: at worst, compare their n + 1 with n here."
        )
    return notes


def _samples(students: Sequence[Student]) -> str:
    """The first prompts, each with the host's continuation and every student's, what differs underlined."""
    first = students[0][NAME]["samples"]
    if not first:
        return ""
    items = "".join(_sample(i, sample, students) for i, sample in enumerate(first))
    return (
        f"<details><summary>{len(first)} continuations side by side; from the first token that is not the host's, text is coloured and "
        f'underlined</summary><ol class="soft">{items}</ol></details>'
    )


def _sample(i: int, sample: Mapping[str, Any], students: Sequence[Student]) -> str:
    lines = [f"<b>{_text(sample['prompt'])}</b>", f"host: {_text(sample['host'])}"]
    for student in students:
        others = student[NAME]["samples"]
        if i < len(others) and others[i]["prompt"] == sample["prompt"]:
            own = others[i]
            # By the count, not by the text: a continuation that ends early differs although nothing is left of it to colour.
            mark = f'<ins class="k-{escape(student["kind"])}" style="color:var(--c)">{_text(own["rest"]) or "⊣"}</ins>'
            differs = own["identical_tokens"] < student[NAME]["new_tokens"]
            lines.append(f"{escape(label(student, students))}: {_text(own['same'])}{mark if differs else ''}")
    return f'<li><p style="max-width:none">{"<br>".join(lines)}</p></li>'


def _text(text: str) -> str:
    return escape(text.replace("\n", " ⏎ "))
