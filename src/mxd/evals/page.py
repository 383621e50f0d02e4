"""report.html: one self-contained page, light and dark, readable on a phone. No scripts and no requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import figures, report, sections, suite
from .figures import Report, Student, hookpoints, students_at
from .svg import STYLE, Figure, escape, number

_CSS = """
*{box-sizing:border-box}html{color-scheme:light dark;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif}
main{max-width:1260px;margin:0 auto;padding:36px 20px 64px}
h1{font-size:27px;line-height:1.2;margin:0 0 4px;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:20px;margin:44px 0 6px;padding-top:18px;border-top:1px solid var(--rule);overflow-wrap:anywhere}
h3{font-size:16px;margin:26px 0 4px}
p{max-width:46em;margin:6px 0 12px}.soft{color:var(--soft)}small{font-size:13px}
.facts{display:flex;flex-wrap:wrap;gap:10px 34px;margin:20px 0 6px;padding:0}.facts div{margin:0}
.facts dt{font-size:13px;color:var(--soft)}.facts dd{margin:0;font-size:21px;font-variant-numeric:tabular-nums}
.lead{font-size:18px;line-height:1.5;margin:18px 0 8px;max-width:42em}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr));gap:26px 36px;margin:16px 0}
figure{margin:0;min-width:0}figure svg{display:block;width:100%;height:auto}figcaption{font-weight:600;font-size:15px;margin-bottom:6px}
.scroll{overflow-x:auto;margin:10px 0 4px;border-block:1px solid var(--rule)}.scroll:focus-visible{outline:2px solid var(--mxd)}
table{border-collapse:collapse;font-size:13.5px;font-variant-numeric:tabular-nums;white-space:nowrap;width:100%}
td small{display:block;color:var(--soft);font-size:12px;line-height:1.3}
th,td{padding:6px 8px;text-align:right;border-bottom:1px solid var(--rule)}tr:last-child td,tr:last-child th{border-bottom:0}
thead th{font-weight:500;color:var(--soft);vertical-align:bottom}tbody th{font-weight:600;text-align:left}
th:first-child{text-align:left;position:sticky;left:0;background:var(--paper);padding-left:2px}td:last-child,th:last-child{text-align:left}
table.part{width:auto}table.part td:last-child,table.part thead th:last-child{text-align:right}
details{margin:10px 0}summary{cursor:pointer;font-size:15px}details[open] summary{margin-bottom:6px}
summary:focus-visible{outline:2px solid var(--mxd)}
tr.control th,tr.control td{font-style:italic}tr.control+tr:not(.control) td{border-top:0}
.key{display:inline-block;width:11px;height:11px;margin-right:8px;vertical-align:-1px}.key svg{display:block;overflow:visible}
th[title]{text-decoration:underline dotted var(--rule);text-underline-offset:4px;cursor:help}
dl.measures{display:grid;grid-template-columns:max-content max-content 1fr;gap:4px 20px;margin:8px 0 10px}
dl.measures dt{font-weight:600}dl.measures dd{margin:0;font-variant-numeric:tabular-nums}dl.measures dd+dd{color:var(--soft)}
ul{padding-left:20px;max-width:50em}li{margin:5px 0}code{font-size:.92em;overflow-wrap:anywhere}
@media(max-width:560px){main{padding-top:22px}h1{font-size:22px}.lead{font-size:16px}
dl.measures{grid-template-columns:max-content 1fr}dl.measures dd+dd{grid-column:1/-1;margin-bottom:6px}
.facts{gap:8px 22px}.facts dd{font-size:18px}}
@media print{.scroll{overflow:visible}table{font-size:9px}th,td{padding:3px 4px}}
"""


def page(result: Report, metrics: Sequence[Mapping[str, Any]]) -> str:
    """The whole page, from report.json and the rows of metrics.jsonl."""
    body = [_head(result)]
    for hookpoint in hookpoints(result):
        body.append(_section(result, metrics, hookpoint))
    body += ["<h2>How to read this</h2><ul>", *(f"<li>{escape(note)}</li>" for note in report.notes(result)), "</ul>", _foot(result)]
    title = f"mxd · {result['host']} · {', '.join(hookpoints(result))}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{_CSS}</style></head>\n<body><main>{''.join(body)}</main></body></html>\n"
    )


def _head(result: Report) -> str:
    where = ", ".join(hookpoints(result))
    facts = {
        "host cross-entropy": f"{_or_dash(result.get('base_ce'), 4)} nats",
        "held-out text": f"{result['eval_tokens']:,} tokens",
        "training text": f"{result.get('train_tokens') or 0:,} tokens",
        "students": str(len(result["students"])),
        "seed": str(result.get("seed", report.MISSING)),
    }
    items = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items())
    return (
        f'<h1>{escape(result["host"])}, <span class="soft">{escape(where)}</span></h1>'
        '<p class="soft">Sparse layers trained in the place of an MLP, measured in the model on held-out text.</p>'
        f'<dl class="facts">{items}</dl>'
    )


def _or_dash(value: float | None, digits: int) -> str:
    return report.MISSING if value is None else number(value, digits)


def _section(result: Report, metrics: Sequence[Mapping[str, Any]], hookpoint: str) -> str:
    students = students_at(result, hookpoint)
    several = len(hookpoints(result)) > 1
    parts = [f"<h2>{escape(hookpoint)}</h2>" if several else "", f'<p class="lead">{escape(_lead(result, students))}</p>']
    parts.append(f'<p class="soft">{escape(report.headline(result, hookpoint))}</p>')
    parts.append(
        _plots(
            ("What replacing the MLP costs", figures.cost(result, hookpoint)),
            ("Sparsity and accuracy", figures.frontier(result, hookpoint)),
        )
    )
    parts.append(_table(students))
    experts = [s for s in students if s.get("routing")]
    if experts:
        parts.append("<h2>What the experts contribute</h2>")
        parts += [_routing(result, student) for student in experts]
        histories = [(s, figures.routing_history(metrics, s)) for s in experts[:6]]
        parts.append(_plots(*((f"{s['name']}: routing during training", figure) for s, figure in histories if figure)))
    parts += [sections.html(section) for section in suite.sections(students)]
    rest = [("Training loss", figures.losses(result, metrics, hookpoint)), ("How often units fire", figures.firing(result, hookpoint))]
    if any(figure for _, figure in rest):
        parts += ["<h2>Training and firing</h2>", _plots(*((name, figure) for name, figure in rest if figure))]
    return "".join(parts)


def _lead(result: Report, students: Sequence[Student]) -> str:
    """The outcome in a sentence or two, whoever leads."""
    ranked = sorted((s for s in students if s["excess_ce"] is not None), key=lambda s: s["excess_ce"])
    sparse = [s for s in ranked if not s["is_control"]]
    if not sparse:
        return "No sparse student has a cross-entropy to show."
    best = sparse[0]
    text = (
        f"Lowest excess cross-entropy of a sparse layer: {figures.label(best, students)}, "
        f"{report.interval(best['excess_ce'], best.get('excess_ce_ci95'))} nats"
    )
    if best.get("ce_recovered") is not None:
        text += f", {100 * best['ce_recovered']:.1f} % of the MLP's cross-entropy recovered"
    controls = [s for s in ranked if s["is_control"] and s["excess_ce"] <= best["excess_ce"]]
    if controls:
        name = figures.label(controls[0], students)
        text += f". The {name[0].lower()}{name[1:]} has {number(controls[0]['excess_ce'])}"
    return text + "."


def _plots(*plots: tuple[str, Figure]) -> str:
    inner = "".join(f"<figure><figcaption>{escape(name)}</figcaption>{figure.svg()}</figure>" for name, figure in plots)
    return f'<div class="plots">{inner}</div>' if plots else ""


def _table(students: Sequence[Student]) -> str:
    heads = "".join(f'<th scope="col" title="{escape(c.help)}">{escape(c.head)}</th>' for c in report.COLUMNS)
    rows: list[str] = []
    for student, row in zip(students, report.table_rows(students), strict=True):
        cells = [escape(cell) for cell in row]
        mark = Figure(11, 11, "")
        mark.marker(5.5, 5.5, student["kind"], size=4.5)
        drawn = f'<svg class="figure" viewBox="0 0 11 11" width="11" height="11" aria-hidden="true">{"".join(mark.parts)}</svg>'
        key = f'<span class="key">{drawn}</span>'
        css = ' class="control"' if student["is_control"] else ""
        rows.append(
            f'<tr{css}><th scope="row">{key}{cells[0]}</th>{"".join(f"<td>{sections.two_lines(cell)}</td>" for cell in cells[1:])}</tr>'
        )
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="All students"><table>'
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        '<p class="soft"><small>Controls in italics, hollow marks. Point at a heading for its meaning and unit.</small></p>'
    )


def _routing(result: Report, student: Student) -> str:
    routing = student["routing"]
    rows = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(report.measure_text(routing, key))}</dd><dd>{escape(what)}</dd>"
        for key, name, what in report.MEASURES
    )
    extra = "".join(f"<p>{escape(note)}.</p>" for note in routing.get("notes", []))
    return (
        f"<h3>{escape(student['name'])}</h3><p>{escape(report.verdict(student))} {escape(report.against_controls(result, student))}</p>"
        f'<dl class="measures">{rows}</dl><p class="soft">{escape(report.fvu_line(routing))}</p>{extra}'
    )


def _words(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _foot(result: Report) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in (result.get("versions") or {}).items())
    machine = ", ".join(f"{name} {value}" for name, value in (result.get("machine") or {}).items())
    sources = (result.get("text") or {}).get("sources") if isinstance(result.get("text"), Mapping) else None
    names = ", ".join(str(s.get("name") or s.get("path")) for s in sources or [] if isinstance(s, Mapping))
    facts = [
        f"Text: {names}" if names else "",
        f"budget {result['budget']}" if result.get("budget") else "",
        f"recipe {_words(result['recipe'])}" if result.get("recipe") else "",
        versions,
        machine,
        f"host {str(result['host_fingerprint'])[:12]}" if result.get("host_fingerprint") else "",
    ]
    text = " · ".join(filter(None, facts))
    return f'<p class="soft"><small>{escape(text)}. The figures are in report.json, the trained layers beside it.</small></p>'
