"""What a report shows of steering: the table, the scatter with an ellipse for each kind as in the paper, examples, and words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...recipes import published, published_host
from ..figures import label
from ..parts import Section, Student, Table, measured
from ..svg import NAMES, Axis, Figure, escape, number
from .coherence import ellipse

_DASH = "–"
_WIDTH, _HEIGHT, _LABELS = 460.0, 330.0, 132.0


def show(students: Sequence[Student]) -> list[Section]:
    """See `Part.show`."""
    have = measured(students, "steering")
    if not have:
        return []
    first = have[0]["steering"]
    tables = [_table(have), *_judge_tables(have), *_published(have)]
    figures = [("Coherence and the host's loss: one point a unit, ellipses one standard deviation around the mean", _scatter(have))]
    figures += [
        (f"The two axes of judge {model}: one point a unit, ellipses one standard deviation around the mean", _judge_scatter(have, model))
        for model in _models(have)
    ]
    return [Section("Steering", [_words(s, have) for s in have] + _between(have), tables, figures, _examples(have), _notes(first, have))]


def _cell(found: Mapping[str, Any] | None, percent: bool = False) -> str:
    if not found or found.get("value") is None:
        return _DASH
    values = [found["value"], *found["ci95"]]
    texts = [_DASH if v is None else f"{100 * v:.0f} %" if percent else number(v) for v in values]
    return texts[0] if _DASH in texts[1:] else f"{texts[0]} [{texts[1]}, {texts[2]}]"


def _p(found: Mapping[str, Any]) -> str:
    return _DASH if found.get("value") is None or found.get("p") is None else number(found["p"])


def _table(have: Sequence[Student]) -> Table:
    heads = [
        "student", "units that change anything", "tokens changed", "KL, nats", "push / |y|", "coherence [95 %]", "p", "over random push",
        "word coherence", "host's loss, nats", "different tokens",
    ]  # fmt: skip
    rows: list[list[str]] = []
    for student in have:
        f, r = student["steering"], student["steering"]["random"]
        over = f["over_random"]["coherence"]
        rows.append(
            [label(student, have), _cell(f["changed"], True), _cell(f["tokens_changed"], True), _cell(f["kl"]), _cell(f["push"]),
             _cell(f["coherence"]), _p(f["coherence"]), _cell(over), _cell(f["word_coherence"]), _cell(f["loss"]),
             _cell(f["distinct"], True)]
        )  # fmt: skip
        rows.append(
            ["  random push of the same size", _cell(r["changed"], True), _cell(r["tokens_changed"], True), _DASH, _cell(f["push"]),
             _cell(r["coherence"]), _p(r["coherence"]), _DASH, _cell(r["word_coherence"]), _cell(r["loss"]),
             _cell(r["distinct"], True)]
        )  # fmt: skip
        rows.append(
            ["  not steered", *[_DASH] * 8, _cell(f["unsteered_loss"]), _cell({"value": f["unsteered_distinct"], "ci95": [None] * 2}, True)]
        )
    rows.append(["the host itself", *[_DASH] * 8, _cell(have[0]["steering"]["host_loss"]), _DASH])
    return Table(
        "Means over units, with 95 % intervals over units (of the units that change anything: Wilson's; of unsteered texts: over texts)",
        heads,
        rows,
    )


def _models(have: Sequence[Student]) -> list[str]:
    return list(dict.fromkeys(one["model"] for s in have for one in s["steering"].get("judges", [])))


def _judge_of(student: Student, model: str) -> Mapping[str, Any]:
    return next((one for one in student["steering"].get("judges", []) if one["model"] == model), {})


def _judge_tables(have: Sequence[Student]) -> list[Table]:
    rows: list[list[str]] = []
    for student in have:
        for one in student["steering"].get("judges", []):
            said = f"{len(one['verdicts']) - one['missing']} of {len(one['verdicts'])}"
            rows.append([label(student, have), one["model"], _cell(one.get("coherence")), _cell(one.get("fluency")), said])
    heads = ["student", "judge", "concept coherence", "fluency", "units judged"]
    return (
        [Table("Verdicts of language models, 0 to 1, means over the units judged with 95 % intervals over units", heads, rows)]
        if rows
        else []
    )


def _published(have: Sequence[Student]) -> list[Table]:
    """The paper's means, beside a run on its host."""
    if published_host(have[0]["steering"]["host"]) != "gpt2":
        return []
    means: Mapping[str, Any] = published()["steering_means_gpt2"]
    names = {**NAMES, "sae": NAMES["topk-sae"]}
    rows = [[names[key], *(number(value) for value in means[key])] for key in means if key in names]
    return [Table("Published for GPT-2 (arXiv 2505.21364; two judges, without intervals)", ["kind", "concept coherence", "fluency"], rows)]


Points = Sequence[tuple[float, float, str]]


def _scatter(have: Sequence[Student]) -> Figure:
    def points(student: Student) -> Points:
        rows = student["steering"]["units"]
        return [(r["coherence"], r["loss"], f"{student['steering']['unit_word']} {r['unit']} of {student['name']}") 
            for r in rows if r["coherence"] is not None and r["loss"] is not None
        ]  # fmt: skip

    host = have[0]["steering"]["host_loss"]["value"]
    names = "coherence of the unit's texts", "host's loss on them, nats"
    level = None if host is None else (host, "the host's own")
    return _plane(have, points, "Steered units: coherence and loss", names, level=level)


def _judge_scatter(have: Sequence[Student], model: str) -> Figure:
    def points(student: Student) -> Points:
        rows = zip(student["steering"]["units"], _judge_of(student, model).get("verdicts", []), strict=False)
        word = student["steering"]["unit_word"]
        return [(v["coherence"], v["fluency"], f"{word} {r['unit']} of {student['name']}: {v['concept']}") for r, v in rows if v]

    return _plane(have, points, f"Steered units by judge {model}", ("concept coherence", "fluency"), within=(0.0, 1.0))


def _plane(
    have: Sequence[Student],
    points: Callable[[Student], Points],
    title: str,
    axes: tuple[str, str],
    *,
    level: tuple[float, str] | None = None,
    within: Sequence[float] = (),
) -> Figure:
    """One point a unit, and an ellipse of one standard deviation and a name for each student; a dotted level; both axes over `within`."""
    figure = Figure(_WIDTH, _HEIGHT, title, "One point for each steered unit; ellipses of one standard deviation.")
    sets = {s["name"]: points(s) for s in have}
    edges = {name: ellipse([(px, py) for px, py, _ in own]) for name, own in sets.items()}
    xs = [*within, *(p[0] for own in (*sets.values(), *edges.values()) for p in own)]
    ys = [*within, *([level[0]] if level else []), *(p[1] for own in (*sets.values(), *edges.values()) for p in own)]
    x, y = _axis(xs, 52, _WIDTH - _LABELS), _axis(ys, _HEIGHT - 46, 30)
    figure.frame(x, y, *axes)
    wanted: list[tuple[float, str, str]] = []
    if level:
        figure.line([(x.start, y(level[0])), (x.end, y(level[0]))], "axis dots")
        wanted.append((y(level[0]), level[1], "ink"))
    for student in have:
        kind, own = student["kind"], sets[student["name"]]
        for px, py, note in own:
            figure.marker(x(px), y(py), kind, note=note, size=2.6)
        if edges[student["name"]]:
            figure.line([(x(px), y(py)) for px, py in edges[student["name"]]], "line dash" if student["is_control"] else "line", kind)
        if own:
            wanted.append((y(sum(p[1] for p in own) / len(own)), label(student, have), kind))
    figure.labels(_WIDTH - _LABELS + 12, wanted, 34, _HEIGHT - 50)
    return figure


def _axis(values: Sequence[float], start: float, end: float) -> Axis:
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = 0.06 * (high - low) or 0.5
    return Axis(low - room, high + room, start, end)


def _words(student: Student, have: Sequence[Student]) -> str:
    """What follows from one student's figures."""
    f = student["steering"]
    over, alike = f["over_random"]["coherence"], f["coherence"]
    low, high = over["ci95"]
    share = f"{_cell({'value': f['changed']['value'], 'ci95': [None] * 2}, True)} of the steered units change what is written"
    if low is not None and low > 0:
        said = f"texts of one unit are more alike than under random pushes of the same size, by {_cell(over)}: the direction matters"
    elif high is not None and high < 0:
        said = f"texts of one unit are less alike than under random pushes of the same size, by {_cell(over)}"
    else:
        said = f"that its units make texts more coherent than random pushes of the same size is not shown ({_cell(over)})"
    steered, plain = f["loss"]["value"], f["unsteered_loss"]["value"]
    if steered is None or plain is None:
        cost = "What the host makes of the texts is not known: its loss is no finite number."
    else:
        way = "more" if steered >= plain else "less"
        cost = f"The host finds the steered texts {number(abs(steered - plain))} nats a token {way} surprising than the unsteered ones."
    null = ""
    if alike["value"] is not None and alike["p"] > 0.05:
        null = f" The texts of one unit are no more alike than texts dealt out at random (p = {number(alike['p'])})."
    return f"{label(student, have)}: {share}; {said}. {cost}{null}"


def _between(have: Sequence[Student]) -> list[str]:
    """Which students' coherence can be told apart."""
    if len(have) < 2:
        return []
    known = [s for s in have if s["steering"]["coherence"]["value"] is not None]
    if len(known) < 2:
        return ["Coherence has no value for all students but one at most: nothing to compare."]
    ordered = sorted(known, key=lambda s: -s["steering"]["coherence"]["value"])
    apart = [
        f"{label(one, have)} above {label(other, have)}"
        for i, one in enumerate(ordered)
        for other in ordered[i + 1 :]
        if _above(one["steering"]["coherence"], other["steering"]["coherence"])
    ]
    unknown = [label(s, have) for s in known if None in s["steering"]["coherence"]["ci95"]]
    if unknown and not apart:
        return [f"No difference between kinds is shown; the coherence of {', '.join(unknown)} has no interval."]
    if not apart:
        return [
            "The intervals of coherence overlap for every two students: no difference between kinds is shown (the published ones "
            "overlap too)."
        ]
    return [
        f"Intervals of coherence that do not overlap: {'; '.join(apart)}. A kind that is pushed harder (see push) is not on equal terms."
    ]


def _above(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether the interval of one lies above that of the other; not shown where an end is missing."""
    low, high = one["ci95"][0], other["ci95"][1]
    return low is not None and high is not None and low > high


def _examples(have: Sequence[Student]) -> str:
    parts: list[str] = []
    for student in have:
        found = student["steering"]["examples"]
        rows = [("not steered", [found["unsteered"]])]
        rows += [(f"{student['steering']['unit_word']} {one['unit']}", one["texts"]) for one in found["units"]]
        cells = "".join(
            f'<tr><th scope="row">{escape(name)}</th><td>{"<br>".join(escape(" ".join(text.split())) for text in texts)}</td></tr>'
            for name, texts in rows
        )
        parts.append(
            f"<details><summary>{escape(NAMES[student['kind']])} ({escape(student['name'])}): the most coherent units</summary>"
            f'<div class="scroll" tabindex="0" role="region" aria-label="Steered texts"><table><tbody>{cells}'
            "</tbody></table></div></details>"
        )
    return "".join(parts)


def _notes(first: Mapping[str, Any], have: Sequence[Student]) -> list[str]:
    p, s = first["protocol"], first["protocol"]["sampling"]
    which = (
        f"the first {p['units']} units, firing or not; λ = {number(p['push'])} (the published protocol)"
        if not p["scaled"]
        else f"up to {p['units']} units that fire on validation text, one drawn at random from each stratum of frequency; "
        f"λ = {number(p['push'])} x the unit's mean activation where it fires ({first['validation_tokens']:,} tokens)"
    )
    found = [
        f"Steered: {which}. λ is added after TopK at every position. {p['samples']} continuations of {s['prompt']!r}, {s['new_tokens']} "
        f"tokens, temperature {number(s['temperature'])}, top-p {number(s['top_p'])}, frequency penalty {number(s['frequency_penalty'])}; "
        "sample i has the same random numbers for every unit, kind and control.",
        "Coherence: mean cosine of texts of one unit minus mean cosine of texts of different units, both with different random numbers; "
        f"−2 to 2, 0 if units do nothing. A text is the mean of what the unsteered host's {first['reader']} receives at its new tokens, as "
        "deviations from the host's own continuations. Word coherence: the same with weighted counts of tokens (tf-idf). p: against texts "
        "dealt out at random.",
        "The host's loss is no fluency on its own: a text that repeats itself is cheap as well; see the share of different tokens. "
        "Coherence rises with the push for the same reason.",
        "Intervals cover the choice of units, not the prompt, the random numbers or the training seed. That of the share of units that "
        "change anything is Wilson's score interval (where all do or none, a bootstrap has no width).",
    ]
    if _models(have):
        found.append("Judges see all texts of a unit at once. A verdict that could not be had is left out, never counted as zero.")
        why = list(dict.fromkeys(reason for s_ in have for one in s_["steering"].get("judges", []) for reason in one["why"]))
        found += [f"Missing verdicts: {reason}" for reason in why]
    return found
