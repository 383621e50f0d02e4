"""What the report shows of the probes: tables, plots and words, out of the figures alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..parts import Section, Student, Table, measured
from ..svg import NAMES, Axis, Figure
from ..trained_on import seen_in_training

FEATURES = {"code": "sparse codes (after ReLU and TopK)", "pre": "scores before ReLU and TopK"}
_CONTROLS = {"neurons": "the host's neurons", "shuffled": "shuffled labels"}


def show(students: Sequence[Student]) -> list[Section]:
    """The section of the students of one hookpoint."""
    have = measured(students, "probes")
    if not have:
        return []
    found = {s["name"]: s["probes"] for s in have}
    names = list(dict.fromkeys(task for figures in found.values() for task, t in figures["tasks"].items() if t["figures"]))
    if not names:
        return [Section("Sparse probing", ["No task has enough samples in two classes."], notes=_notes(found))]
    tables = [_means(found, names, feature) for feature in FEATURES] + [_sizes(found, names)]
    tables += [_classes(found, name) for name in names]
    plots = [(f"Mean F1 over classes of single-unit probes: {what}", _plot(have, names, key)) for key, what in FEATURES.items()]
    words = [text for s in have for text in _words(s, names)]
    words.append(
        "A probe shows that a unit and a label go together on these texts, neither that the unit stands for it nor that the host uses it; "
        "what ablating a unit does is measured under selectivity. Overlapping intervals: no difference is shown."
    )
    return [Section("Sparse probing", words, tables, plots, notes=_notes(found))]


def _cell(figures: Mapping[str, Any], source: str, feature: str, size: int = 1) -> Mapping[str, Any] | None:
    return figures["figures"].get(source, {}).get(feature, {}).get(f"k{size}")


def _text(cell: Mapping[str, Any] | None, mark: str = "") -> str:
    if cell is None or cell["f1"] is None:
        return "–"
    low, high = cell["f1_ci95"]
    return f"{cell['f1']:.3f}{mark}" + ("" if low is None or high is None else f" [{low:.3f}, {high:.3f}]")


def _means(found: Mapping[str, Any], names: Sequence[str], feature: str) -> Table:
    """Rows: students, each with its own random units; then what all share."""

    def row(title: str, figures: Mapping[str, Any], source: str, key: str, size: int = 1) -> list[str]:
        cells: list[str] = []
        for name in names:
            task = figures["tasks"].get(name)
            above = task["above"]["random"].get(feature, {}) if task and source == "student" and task["figures"] else {}
            cells.append(_text(_cell(task, source, key, size), " *" if above.get("disjoint") else "") if task else "–")
        return [title, *cells]

    rows: list[list[str]] = []
    for student, figures in found.items():
        rows += [row(student, figures, "student", feature), row(f"random units beside {student}", figures, "random", feature)]
    first_name, first = next(iter(found.items()))
    rows += [row(title if c == "neurons" else f"{title}, {first_name}", first, c, feature) for c, title in _CONTROLS.items()]
    rows.append(row("all of y (ceiling)", first, "dense", "y", 0))
    caption = (
        f"Probes on one unit, {FEATURES[feature]}: mean F1 over classes, 95 % interval over documents. *: above random units, disjoint"
    )
    return Table(caption, ["", *names], rows)


def _sizes(found: Mapping[str, Any], names: Sequence[str]) -> Table:
    rows: list[list[str]] = []
    for student, figures in found.items():
        for source, title in (("student", student), ("random", f"random units beside {student}")):
            for feature in FEATURES:
                cells: list[str] = []
                for name in names:
                    task = figures["tasks"].get(name)
                    made = [_cell(task, source, feature, size) for size in (1, 2, 5)] if task else []
                    cells.append(" / ".join("–" if cell is None else f"{cell['f1']:.3f}" for cell in made) or "–")
                rows.append([f"{title}, {'codes' if feature == 'code' else 'scores'}", *cells])
    return Table("Probes on 1 / 2 / 5 units: mean F1 over classes", ["", *names], rows)


def _classes(found: Mapping[str, Any], name: str) -> Table:
    """The best unit of every class, for every student."""
    cells: dict[str, list[str]] = {}
    heads: list[str] = []
    for student, figures in found.items():
        task = figures["tasks"].get(name)
        for feature in FEATURES:
            cell = _cell(task, "student", feature) if task and task["figures"] else None
            heads.append(f"{student}, {'codes' if feature == 'code' else 'scores'}")
            for own in cell["classes"] if cell else ():
                column = cells.setdefault(own["class"], [])
                column += ["–"] * (len(heads) - 1 - len(column))
                column.append(f"{_text(own)} (unit {own['units'][0]}; balanced {own['balanced_accuracy']:.3f})")
    rows = [[label, *column, *["–"] * (len(heads) - len(column))] for label, column in cells.items()]
    return Table(f"{name}: F1 on test texts of the unit chosen for each class", [name, *heads], rows, folded=True)


def _plot(students: Sequence[Student], names: Sequence[str], feature: str) -> Figure:
    """A row per task: students with their marks, random units hollow grey beneath each, the ceiling as a tick."""
    step = 11
    height = step * (len(students) + 1) + 8
    x = Axis(0.0, 1.0, 170, 650)
    figure = Figure(700, 60 + height * len(names), f"Mean F1 of single-unit probes, {FEATURES[feature]}")
    for tick in x.ticks():
        figure.line([(x(tick), 30), (x(tick), 30 + height * len(names))], "rule")
        figure.text(x(tick), 47 + height * len(names), f"{tick:.1f}", anchor="middle", css="soft")
    figure.text(4, 14, "filled: student; ring: as many random units; dashed: probe on all of y", css="soft")
    for number, name in enumerate(names):
        top = 30 + height * number
        figure.text(160, top + height / 2 + 4, name, anchor="end")
        for i, student in enumerate(students):
            task = student["probes"]["tasks"].get(name)
            cell = _cell(task, "student", feature) if task and task["figures"] else None
            if task is None or cell is None:
                continue
            y = top + 10 + step * i
            ceiling, random = _cell(task, "dense", "y", 0), _cell(task, "random", feature)
            if i == 0 and ceiling:
                figure.line([(x(ceiling["f1"]), top + 3), (x(ceiling["f1"]), top + height - 5)], "axis dash")
            if random:
                figure.marker(x(random["f1"]), y, "dense", size=3, note=f"random units beside {student['name']}: {_text(random)}")
            low, high = cell["f1_ci95"]
            if low is not None and high is not None:
                figure.line([(x(low), y), (x(high), y)], "line thin", student["kind"])
            note = f"{NAMES.get(student['kind'], student['kind'])} ({student['name']}), {name}: {_text(cell)}"
            figure.marker(x(cell["f1"]), y, student["kind"], size=4, note=note)
    return figure


def _words(student: Student, names: Sequence[str]) -> list[str]:
    """One sentence on the controls per kind of feature, and one on language, where it was probed."""
    tasks = {name: student["probes"]["tasks"][name] for name in names if name in student["probes"]["tasks"]}
    words: list[str] = []
    for feature, what in (("code", "codes"), ("pre", "scores")):
        above = {name: t["above"] for name, t in tasks.items() if t["figures"] and feature in t["above"]["random"]}
        if not above:
            continue
        yes = [name for name, a in above.items() if a["random"][feature]["disjoint"]]
        no = [name for name in above if name not in yes]
        neurons = [name for name, a in above.items() if a["neurons"].get(feature, {}).get("disjoint")]
        unshown = f"; not shown on {', '.join(no)}" if no else ""
        words.append(
            f"{student['name']}: single {what} are above as many random units, with disjoint intervals, on "
            f"{', '.join(yes) or 'no task'}{unshown}. "
            f"Above the host's own neurons: {', '.join(neurons) or 'shown on no task'}."
        )
    cell = _cell(tasks["language"], "student", "code") if "language" in tasks else None
    if cell:
        # Chosen by what it was chosen by, never by the test texts.
        best = max(cell["classes"], key=lambda own: own["chosen_f1"])
        words.append(
            f"{student['name']}: the code that tells a language best on validation texts ({best['class']}, unit {best['units'][0]}) has "
            f"F1 {_text(best)} on test texts."
        )
    return words


def _random_k(found: Mapping[str, Any]) -> str:
    """How many random units fire at a token, by student where they differ."""
    ks = {student: figures["protocol"].get("random_k") for student, figures in found.items()}
    if None in ks.values():
        return "the student's K"
    if len(set(ks.values())) == 1:
        return f"K = {next(iter(ks.values()))}"
    return (
        "K = "
        + ", ".join(f"{k} ({student})" for student, k in ks.items())
        + " (a student without TopK: its own mean number of active units)"
    )


def _notes(found: Mapping[str, Any]) -> list[str]:
    first = next(iter(found.values()))
    protocol = first["protocol"]
    if protocol["selection"] == "paper":
        rule = (
            "Published selection (arXiv 2505.21364, released code): of the 100 units with the largest difference of class means the one "
            "with the highest F1 on the test texts themselves, which is optimistic: compare with the controls, chosen alike."
        )
    else:
        rule = (
            "One-against-all logistic regression on one unit; of the 100 units with the largest difference of class means on the fitting "
            "texts, the unit and the threshold with the highest F1 on the choosing texts. Figures are of texts that neither has seen."
        )
    notes = [
        rule,
        f"{protocol['texts']} texts, {protocol['tokens']} tokens; at most {protocol['samples_per_class']} per class; split by document: "
        f"{protocol['split_rule']}; measured on {protocol['measured_on']}. {seen_in_training(protocol.get('trained_on', []))}",
        f"Controls: random units are as many random directions, through TopK with {_random_k(found)}; the host's neurons are those of the "
        "MLP replaced; shuffled labels permute what units are fitted and chosen by. Intervals resample documents, not seeds or choices of "
        "units.",
    ]
    for name, task in first["tasks"].items():
        s = task["samples"]
        text = f"{name}: {task['about']}; {s['fit']} / {s['choose']} / {s['test']} texts to fit, choose, test"
        if task["floor"]:
            text += f"; calling every text positive has mean F1 {sum(task['floor']) / len(task['floor']):.3f}"
        notes.append(text + (f"; {task['warning']}" if task["warning"] else ""))
        notes += [f"{name}: class {label} is skipped: {why}" for label, why in task["skipped"].items()]
    return notes + [f"{name} is skipped: {why}" for name, why in first["skipped"].items()]
