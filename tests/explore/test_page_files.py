"""The files of the explore page: which there are, how long they may get, and what may never stand in them."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import pytest

import mxd.explore

PAGE = Path(mxd.explore.__file__).with_name("page")
SCRIPTS = (
    *("base.js", "source.js", "heat.js", "table.js", "charts.js", "overview.js", "units.js", "unit.js", "sentence.js", "bench.js"),
    *("compare.js", "notes.js"),
)
"""In the order in which they run."""
IN_FILES_ONLY = ("packed.js",)
"""Put into exported files, never served."""
MOST_LINES = 400
MOST_BYTES = 120_000
"""Of markup, styles and scripts together, compressed: what an overhaul has to beat is a whole plotting library."""
SVG = "http://www.w3.org/2000/svg"

FORBIDDEN: dict[str, str] = {
    "markup from text": r"\b(?:innerHTML|outerHTML|insertAdjacentHTML|srcdoc|createContextualFragment|parseFromString)\b|document\.write",
    "text that runs": r"\beval\s*\(|\bnew\s+Function\b|\bset(?:Timeout|Interval)\s*\(\s*[\"'`]|\bjavascript:",
    "another address": r"(?:https?|wss?):\/\/|[\"'(]\/\/\w",
    "styles from text": r"\.cssText\b|setAttribute\(\s*[\"']style",
    "a module": r"^[ \t]*(?:import|export)\b|\bimport\s*\(",
}
"""In any file."""
IN_MARKUP: dict[str, str] = {
    "a handler": r"<[^>]*\son\w+\s*=",
    "a style attribute": r"<[^>]*\sstyle\s*=",
    "a script in the page": r"<script(?![^>]*\bsrc=)",
    "styles in the page": r"<style\b",
}


def texts() -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(PAGE.iterdir()) if path.is_file()}


def findings(name: str, text: str) -> list[str]:
    """What stands in a file of this name that must not."""
    patterns = FORBIDDEN | (IN_MARKUP if name.endswith(".html") else {})
    if name == "base.js":
        text = text.replace(SVG, "", 1)
    found: list[str] = []
    for what, pattern in patterns.items():
        for match in re.finditer(pattern, text, re.MULTILINE | re.IGNORECASE):
            found.append(f"{name}:{text.count(chr(10), 0, match.start()) + 1}: {what}: {match[0].strip()}")
    return found


def test_the_files_are_those_of_the_page() -> None:
    assert set(texts()) == {"index.html", "style.css", *SCRIPTS, *IN_FILES_ONLY}


def test_the_scripts_stand_in_the_markup_in_their_order() -> None:
    markup = texts()["index.html"]
    assert re.findall(r'^<script src="/static/([\w.]+)" defer></script>$', markup, re.MULTILINE) == list(SCRIPTS)
    assert len(re.findall(r"<script\b", markup)) == len(SCRIPTS)
    assert re.findall(r"<link rel=\"stylesheet\" href=\"([^\"]+)\">", markup) == ["/static/style.css"]


def test_nothing_forbidden_stands_in_them() -> None:
    assert [finding for name, text in texts().items() for finding in findings(name, text)] == []


@pytest.mark.parametrize(
    ("name", "line", "what"),
    [
        ("unit.js", "row.innerHTML = text;", "markup from text"),
        ("unit.js", "el.insertAdjacentHTML('beforeend', text);", "markup from text"),
        ("heat.js", "span.outerHTML = text;", "markup from text"),
        ("base.js", 'document.write("x");', "markup from text"),
        ("base.js", "eval (text);", "text that runs"),
        ("base.js", "const f = new Function(text);", "text that runs"),
        ("base.js", "setTimeout('go()', 1);", "text that runs"),
        ("base.js", f'const a = "{SVG}";', "another address"),
        ("charts.js", f'const a = "{SVG}";', "another address"),
        ("source.js", 'fetch("https://example.org");', "another address"),
        ("style.css", "a { background: url(//example.org/x.png); }", "another address"),
        ("bench.js", 'el.setAttribute("style", text);', "styles from text"),
        ("notes.js", 'import x from "./base.js";', "a module"),
        ("index.html", '<p class="a" onclick="go()">x</p>', "a handler"),
        ("index.html", '<p style="color: red">x</p>', "a style attribute"),
        ("index.html", "<script>go()</script>", "a script in the page"),
        ("index.html", "<style>p { color: red }</style>", "styles in the page"),
    ],
)
def test_a_planted_line_is_found(name: str, line: str, what: str) -> None:
    clean = texts()[name]
    found = findings(name, f"{clean}\n{line}\n")
    assert [finding.split(": ")[1] for finding in found] == [what]
    assert found[0].startswith(f"{name}:{clean.count(chr(10)) + 2}:")


def test_no_file_is_long_and_all_together_are_small() -> None:
    found = texts()
    assert {name: lines for name, text in found.items() if (lines := len(text.splitlines())) > MOST_LINES} == {}
    assert sum(len(gzip.compress(text.encode(), mtime=0)) for text in found.values()) <= MOST_BYTES


def test_scripts_are_strict_and_say_what_they_are_for() -> None:
    for name in (*SCRIPTS, *IN_FILES_ONLY):
        first, second, *_ = texts()[name].splitlines()
        assert first.startswith("// ") and second == '"use strict";', name
