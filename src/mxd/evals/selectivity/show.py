"""What a report shows of the selectivity test: words, two tables and a plot, from report.json alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..figures import label
from ..parts import Section, Student, Table, measured
from ..svg import Axis, Figure, number
from ..trained_on import seen_in_training

PART = "selectivity"
WANTED = 5.0
"""Times that the loss must rise more on a class than on the others for its units to count as selective."""
_DASH = "–"
_CONTROLS = {"random": "as many random units", "active": "as many of the most active"}


def show(students: Sequence[Student]) -> list[Section]:
    """The section of the students of one hookpoint; none where nothing was measured."""
    have = measured(students, PART)
    if not have:
        return []
    words = [_words(student) for student in have] + [_caution(have)]
    tables = [_selectivity_table(have), _rises_table(have)]
    return [
        Section("Selectivity: what ablating the units of a language costs", words, tables, [(_CAPTION, figure(have))], notes=_notes(have))
    ]


_CAPTION = "Rise of the loss on a language when the units tied to it are ablated (mark, 95 %), and on the others (tick)"


def interval_text(found: Sequence[float | None] | None) -> str:
    """``0.12 [0.09, 0.15]``; a dash for what is undefined."""
    if not found or any(value is None for value in found):
        return _DASH
    value, low, high = (number(v) for v in found if v is not None)
    return f"{value} [{low}, {high}]"


def ratio_text(found: Mapping[str, Any]) -> str:
    """A selectivity: with its interval; as a lower bound where the rise on the others is too small to divide by; or a dash."""
    if found["ratio"] is not None:
        return interval_text(found["ratio"])
    return f"≥ {number(found['at_least'])}" if found["at_least"] is not None and found["at_least"] > 0 else _DASH


def reaches(found: Mapping[str, Any]) -> bool:
    """Whether the selectivity is at least `WANTED` with its whole interval."""
    return found["at_least"] is not None and found["at_least"] >= WANTED


def above(found: Sequence[float | None] | None) -> bool:
    """Whether an interval lies above 0; one that is missing does not."""
    low = found[1] if found else None
    return low is not None and low > 0


def _main(figures: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return figures["by_class"][name]["tied"][str(figures["units"])]


def _words(student: Student) -> str:
    figures = student[PART]
    parts: list[str] = []
    for name in figures["classes"]:
        main, against = _main(figures, name), figures["by_class"][name]["against"]
        if not above(main["own"]):
            parts.append(f"{name}: no rise of its loss is shown")
            continue
        yes = [_CONTROLS[control] for control in _CONTROLS if above(against[control]["rise"])]
        no = [_CONTROLS[control] for control in _CONTROLS if not above(against[control]["rise"])]
        beats = [f"more than {' and '.join(yes)} cost it"] if yes else []
        beats += [f"not shown to be more than {' or '.join(no)} cost it"] if no else []
        parts.append(f"{name}: +{number(main['own'][0])} nats, selectivity {ratio_text(main)}, {', '.join(beats)}")
    met = [name for name in figures["classes"] if reaches(_main(figures, name))]
    verdict = f"{WANTED:g} or more with the whole interval: {', '.join(met) or 'none'}"
    sizes = f"{figures['units']} of {figures['n_units']:,} units ablated for each language"
    return f"{student['name']}, {sizes}. {'; '.join(parts)}. Selectivity {verdict}."


def _caution(students: Sequence[Student]) -> str:
    figures = students[0][PART]
    neurons = "; ".join(f"{name} {ratio_text(figures['by_class'][name]['neurons'])}" for name in figures["classes"])
    return (
        f"The same with {figures['units']} of the host's own {figures['host_neurons']:,} neurons, chosen by the same rule: {neurons}. "
        "A selective ablation shows that what these units write is used for that class, not that the class is all they stand for. Where "
        "intervals overlap, no difference between kinds is shown."
    )


def _selectivity_table(students: Sequence[Student]) -> Table:
    figures = students[0][PART]
    sizes = sorted(map(int, figures["by_class"][figures["classes"][0]]["tied"]))
    heads = [
        "student",
        "language",
        *(f"{size} units" for size in sizes),
        "random",
        "most active",
        "more specific than random",
        "host neurons",
    ]
    rows: list[list[str]] = []
    for student in students:
        for name, found in student[PART]["by_class"].items():
            ratios = [ratio_text(found["tied"][str(size)]) if str(size) in found["tied"] else _DASH for size in sizes]
            controls = [ratio_text(found["random"]), ratio_text(found["active"]), interval_text(found["against"]["random"]["contrast"])]
            rows.append([student["name"], name, *ratios, *controls, ratio_text(found["neurons"])])
    return Table("Selectivity: rise of the loss on the language over the mean rise on the others [95 %]", heads, rows)


def _rises_table(students: Sequence[Student]) -> Table:
    classes = students[0][PART]["classes"]
    rows: list[list[str]] = []

    def row(student: str, what: str, rises: Mapping[str, Any]) -> None:
        rows.append([student, what, *(interval_text(rises.get(name)) for name in classes)])

    for student in students:
        figures = student[PART]
        for name in figures["classes"]:
            for size, found in figures["by_class"][name]["tied"].items():
                row(
                    student["name"],
                    f"{len(found['units'])} tied to {name}" + (" (no more)" if len(found["units"]) < int(size) else ""),
                    found["rises"],
                )
        row(student["name"], f"{len(figures['active']['units'])} most active", figures["active"]["rises"])
        row(
            student["name"],
            f"{len(figures['random']['units'][0])} random, mean of {len(figures['random']['units'])}",
            figures["random"]["rises"],
        )
    figures = students[0][PART]
    for name in classes:
        row("host", f"{figures['units']} neurons tied to {name}", figures["by_class"][name]["neurons"]["rises"])
    return Table("Rise of the loss on the texts of each language, nats per token [95 %]", ["student", "units ablated", *classes], rows)


def figure(students: Sequence[Student]) -> Figure:
    """One row per language and student: the rise on the language with its interval, and ticks at the rise on the others and under
    random units."""
    classes = students[0][PART]["classes"]
    rows = [(name, student) for name in classes for student in students]
    values = [v for name, s in rows for v in _main(s[PART], name)["own"] + _main(s[PART], name)["others"][:1] if v is not None]
    low, high = min([0.0, *values]), max([1e-3, *values])
    height = 60 + 20 * len(rows) + 22 * len(classes)
    room = max(130.0, 6.3 * max(len(label(s, students)) for s in students) + 24)
    made = Figure(310 + room, height, "Rise of the loss by language and student", "Marks: on the language itself. Ticks: on the others.")
    x = Axis(low - 0.04 * (high - low), high + 0.04 * (high - low), room, room + 295)
    y = 22.0
    made.text(4, 14, "nats per token", css="soft")
    for name in classes:
        y += 20
        made.text(4, y, name)
        for student in students:
            y += 20
            made.text(14, y, label(student, students), css="soft")
            _row(made, x, y, student, name)
        y += 2
    made.line([(x.start, height - 34), (x.end, height - 34)], "axis")
    made.line([(x(0.0), 26), (x(0.0), height - 34)], "rule")
    for tick in x.ticks():
        made.text(x(tick), height - 18, f"{tick:.6g}", anchor="middle", css="soft")
    return made


def _row(made: Figure, x: Axis, y: float, student: Student, name: str) -> None:
    found, kind = _main(student[PART], name), student["kind"]
    own, others = found["own"], found["others"][0]
    if own[1] is not None and own[2] is not None:
        made.line([(x(own[1]), y - 4), (x(own[2]), y - 4)], "bar", kind)
    if others is not None:
        made.line([(x(others), y - 10), (x(others), y + 2)], "bar", kind)
    if own[0] is not None:
        made.marker(
            x(own[0]), y - 4, kind, note=f"{student['name']}, {name}: {interval_text(own)} nats; others {interval_text(found['others'])}"
        )


def _notes(students: Sequence[Student]) -> list[str]:
    figures = students[0][PART]
    texts = "; ".join(f"{name} {n['choose']} and {n['measure']}" for name, n in figures["documents"].items())
    skipped = [f"Left out: {name} ({why})." for name, why in figures["skipped"].items()]
    trained = (
        f"The students' training text: {', '.join(figures['trained_on']) or 'unknown'}. {seen_in_training(figures['trained_on'])} "
        "Units for a language that the training text hardly holds were hardly trained."
    )
    return [
        f"Protocol (ours; the paper has none): texts of {figures['tokens']} tokens of the task {figures['task']}; to choose on and "
        f"to measure on: {texts}. No text is in both. The units of a language are those with the largest standardised difference of mean "
        "activation (sparse code) between its texts and those of the nearest other language; nothing is chosen on the measured texts.",
        "Ablated: the activation is set to 0 at every position, no other unit moves up. The rise is against the same student unedited, "
        "text by text; host neurons against the host itself.",
        f"Selectivity = rise on the language / max(mean rise on the others, {figures['floor']:g} nats). ≥: the rise on the others is not "
        "shown to be above that floor, so only the lower end of the interval is given. –: no rise is shown on the language either. "
        "More specific than random: (rise on the language − rise on the others) minus the same under random units, nats per token.",
        "Intervals are 95 % percentile bootstraps over texts; the choice of units, the random draws and the training seed are held fixed. "
        "The controls ablate as many random units that fire on the texts, and as many of the largest mean activation.",
        trained,
        *skipped,
    ]
