"""Sections of a report as Markdown and as HTML."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .parts import Section, Table
from .svg import escape


def markdown(section: Section, clean: Callable[[object], str]) -> list[str]:
    """The lines of a section in report.md; plots and `Section.html` are left to report.html."""
    lines = [f"### {clean(section.title)}", ""]
    for words in section.words:
        lines += [clean(words), ""]
    for table in section.tables:
        lines += [f"*{clean(table.caption)}*", ""]
        lines += ["| " + " | ".join(map(clean, table.heads)) + " |", "|" + "---|" * len(table.heads)]
        lines += ["| " + " | ".join(map(clean, row)) + " |" for row in table.rows]
        lines.append("")
    if section.notes:
        lines += [*(f"- {clean(note)}" for note in section.notes), ""]
    return lines


def html(section: Section) -> str:
    """A section of report.html."""
    words = "".join(f"<p>{escape(text)}</p>" for text in section.words)
    plots = "".join(f"<figure><figcaption>{escape(name)}</figcaption>{figure.svg()}</figure>" for name, figure in section.figures)
    notes = "".join(f"<li>{escape(note)}</li>" for note in section.notes)
    return (
        f"<h2>{escape(section.title)}</h2>{words}{''.join(_table(table) for table in section.tables if not table.folded)}"
        + (f'<div class="plots">{plots}</div>' if plots else "")
        + "".join(_folded(table.caption, _table(table)) for table in section.tables if table.folded)
        + section.html
        + (_folded("How this was measured, and how to read it", f"<ul>{notes}</ul>") if notes else "")
    )


def _folded(summary: str, content: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def _table(table: Table) -> str:
    heads = "".join(f'<th scope="col">{escape(head)}</th>' for head in table.heads)
    rows = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{two_lines(escape(cell))}</td>" for cell in row[1:])}</tr>'
        for row in table.rows
    )
    caption = "" if table.folded else f'<p class="soft"><small>{escape(table.caption)}</small></p>'
    return (
        f'{caption}<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.caption)}">'
        f'<table class="part"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def two_lines(cell: str) -> str:
    """An interval under its value rather than beside it."""
    value, bracket, rest = cell.partition(" [")
    return f"{value}<small>[{rest}</small>" if bracket else cell


def words(sections: Sequence[Section]) -> list[str]:
    """What the terminal says of the sections: their words, titled."""
    return [f"{section.title}: {text}" for section in sections for text in section.words]
