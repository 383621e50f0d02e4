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
        f"<h2>{escape(section.title)}</h2>{words}{''.join(map(_table, section.tables))}"
        + (f'<div class="plots">{plots}</div>' if plots else "")
        + section.html
        + (f'<ul class="soft">{notes}</ul>' if notes else "")
    )


def _table(table: Table) -> str:
    heads = "".join(f'<th scope="col">{escape(head)}</th>' for head in table.heads)
    rows = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>' for row in table.rows
    )
    return (
        f'<p class="soft"><small>{escape(table.caption)}</small></p><div class="scroll" tabindex="0" role="region" '
        f'aria-label="{escape(table.caption)}"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def words(sections: Sequence[Section]) -> list[str]:
    """What the terminal says of the sections: their words, titled."""
    return [f"{section.title}: {text}" for section in sections for text in section.words]
