"""From report.json to what people read: report.md, report.html and frontier.svg, and the table that the terminal shows.

Everything here is made from the report and the metrics alone, so that a report can be drawn again without measuring again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoint import Run
from ..errors import RunError
from ..recipes import counterpart
from ..sealed import read_json, sealed, write_atomic
from . import figures, sections, suite
from .figures import Report, Student, at_hookpoint, hookpoints, students_at
from .parts import finite
from .svg import NAMES, number

FORMAT_VERSION = 1
"""Version of report.json."""
MISSING = "–"


def files(run: Run, split: str, edit: str | None = None) -> dict[str, Path]:
    """Where the report on a split lies: ``json``, ``md``, ``html``, ``svg``. Only the test split, unedited, has the plain names."""
    end = suite.ending(split, edit)
    return {**{kind: run.path / f"report{end}.{kind}" for kind in ("json", "md", "html")}, "svg": run.path / f"frontier{end}.svg"}


def read(run: Run, split: str = "test", edit: str | None = None) -> dict[str, Any]:
    """The report.json of a run.

    Raises:
        RunError: it was not evaluated yet, the file is damaged, or of a newer format.
    """
    path = files(run, split, edit)["json"]
    if not path.is_file():
        end = ("" if split == "test" else f" --split {split}") + (f" --edit {edit}.json" if edit else "")
        raise RunError(f"{run.path} was not evaluated yet", expected=str(path), next=f"mxd eval {run.path}{end}")
    found = read_json(path)
    version = found.get("format_version") if isinstance(found, dict) else None
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise RunError(
            f"{path} is not a report that this mxd can read",
            expected=f"format_version up to {FORMAT_VERSION}",
            got=str(version),
            next="pip install --upgrade mxd, or evaluate again",
        )
    return found


def write(run: Run, report: Report) -> dict[str, Path]:
    """Write report.json, .md, .html and frontier.svg of `report` into the run folder, each atomically; returns their paths."""
    from .page import page

    report, metrics = finite(report), run.metrics()
    paths = files(run, report["split"], report.get("edit"))
    # Drawn before anything is written: a report that cannot be drawn leaves the old files as they are.
    contents = {
        "md": markdown(report, paths["svg"].name),
        "html": page(report, metrics),
        "svg": figures.frontier_file(report),
    }
    sums = {paths[kind].name: hashlib.sha256(content.encode()).hexdigest() for kind, content in contents.items()}
    for kind, content in {**contents, "json": sealed({**report, "files": sums})}.items():
        write_atomic(paths[kind], content)
    return paths


def write_report(path: str | Path, split: str = "test", edit: str | None = None) -> dict[str, Path]:
    """Draw a run's report again from its report.json and metrics.jsonl, without measuring again; returns the files' paths.

    Raises:
        RunError: no run there, it was not evaluated yet, or the report is none that mxd wrote.
    """
    run = Run.open(path)
    found = read(run, split, edit)
    with understood(files(run, split, edit)["json"]):
        return write(run, found)


@contextmanager
def understood(path: Path) -> Iterator[None]:
    """Raise `RunError` for what stumbles over the content of a report that someone else may have written."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise RunError(f"{path} is damaged", expected="what mxd eval writes", got=repr(error), next=f"mxd eval {path.parent}") from error


class Column(NamedTuple):
    """One column of the table."""

    head: str
    """Heading."""
    help: str
    """What it says, with its unit."""
    cell: Callable[[Student], str]
    """The text for a student."""


def _plain(key: str, digits: int = 3) -> Callable[[Student], str]:
    return lambda s: MISSING if s.get(key) is None else number(s[key], digits)


def _percent(key: str, decimals: int) -> Callable[[Student], str]:
    return lambda s: MISSING if s.get(key) is None else f"{100 * s[key]:.{decimals}f} %".replace("-", "−")


def _whole(key: str) -> Callable[[Student], str]:
    return lambda s: MISSING if s.get(key) is None or (not s[key] and key in ("k", "n_units")) else f"{s[key]:,.0f}"


def interval(value: float | None, ci95: Sequence[float | None] | None, digits: int = 3) -> str:
    """``.0252 [.0240, .0263]``, with a dash for what is missing."""
    if value is None:
        return MISSING
    if not ci95 or ci95[0] is None or ci95[1] is None:
        return number(value, digits)
    return f"{number(value, digits)} [{number(ci95[0], digits)}, {number(ci95[1], digits)}]"


def _name(student: Student, others: Sequence[Student]) -> str:
    recipe = f" · {student['recipe']}" if figures.several_recipes(student, others) else ""
    return f"{NAMES[student['kind']]}{recipe}{' (stopped early)' if student.get('stopped') else ''}"


COLUMNS: tuple[Column, ...] = (
    Column("student", "kind of layer; controls make no claim to sparsity", lambda s: _name(s, [s])),
    Column("K", "units active per token", _whole("k")),
    Column("units", "experts or latents", _whole("n_units")),
    Column("params", "parameters, biases included", _whole("params")),
    Column(
        "excess CE [95 %]",
        "cross-entropy with the MLP replaced minus the host's, nats per token; paired bootstrap over documents",
        lambda s: interval(s["excess_ce"], s.get("excess_ce_ci95")),
    ),
    Column("CE recovered", "(CE zero-ablated − CE) / (CE zero-ablated − CE host)", _percent("ce_recovered", 1)),
    Column("KL", "KL(host ‖ replaced), nats per token", _plain("kl")),
    Column("top-1", "share of positions with the host's most probable next token", _percent("top1_agreement", 1)),
    Column("FVU [95 %]", "Σ‖y − ŷ‖² / Σ‖y − ȳ‖², first positions left out", lambda s: interval(s["fvu"], s.get("fvu_ci95"))),
    Column("nmse", "Σ‖y − ŷ‖² / Σ‖y‖², first positions left out", _plain("nmse")),
    Column("L0", "units active per token, measured", _plain("l0")),
    Column("dead", "units that fired on none of the held-out tokens", _percent("dead_fraction", 0)),
    Column("busiest", "firing frequency of the busiest unit", _percent("max_firing_frequency", 0)),
    Column("> ½", "units that fire on more than half of the tokens", lambda s: _plain("n_units_above_half", 1)(s)),
    Column("tokens/s", "training tokens per second of this student alone", _whole("tokens_per_second")),
    Column("recipe", "how it was started and optimised", lambda s: str(s.get("recipe", MISSING))),
)
"""The table of students, the same in report.md and report.html."""


def table_rows(students: Sequence[Student]) -> list[list[str]]:
    """One row per student, a cell per column."""
    return [[_name(student, students), *(column.cell(student) for column in COLUMNS[1:])] for student in students]


def table(report: Report, hookpoint: str) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the table of one hookpoint's students."""
    return [column.head for column in COLUMNS], table_rows(students_at(report, hookpoint))


MEASURES: tuple[tuple[str, str, str], ...] = (
    ("n_r", "N_r", "gain over the best routing-free readout of z"),
    ("g_r", "G_r", "gain over the dense control"),
    ("id", "ID", "loss of FVU when it no longer matters which expert fired"),
    ("r_c", "R_c", "loss of FVU under the best constant modulation"),
)


def measure_text(routing: Mapping[str, Any], key: str) -> str:
    """One routing measure with its interval; very negative ones as ``< −100``."""
    found = routing.get(key) or {}
    value = found.get("value")
    if value is None:
        return MISSING
    return "< −100" if value < -100 else interval(value, found.get("ci95"))


def verdict(student: Student) -> str:
    """What the three measures say about one MxD's experts, in a sentence."""
    routing = student["routing"]
    missing = [name for key, name, _ in MEASURES[:3] if (routing.get(key) or {}).get("value") is None]
    if missing:
        reasons = "; ".join(filter(None, (str((routing.get(key) or {}).get("reason", "")) for key, _, _ in MEASURES[:3])))
        return f"Undecided: {', '.join(missing)} could not be measured{f' ({reasons})' if reasons else ''}."
    if routing.get("experts_matter"):
        return "N_r, G_r and ID all exceed 0 with their intervals: the experts matter (one seed)."
    failed = {
        "n_r": "N_r is not above 0: a linear readout of the same z, without any routing, does as well or better",
        "g_r": "G_r is not above 0: the dense control, without experts, does as well or better",
        "id": "ID is not above 0: it does not matter which expert fires",
    }
    # An interval that is missing counts as not above 0.
    why = [text for key, text in failed.items() if ((routing[key].get("ci95") or [None])[0] or 0) <= 0]
    held = [name for key, name, _ in MEASURES[:3] if failed[key] not in why]
    also = f" ({' and '.join(held)} {'is' if len(held) == 1 else 'are'} above 0.)" if held else ""
    return f"Not shown that the experts matter. {'; '.join(why)}.{also}"


def against_controls(report: Report, student: Student) -> str:
    """How an MxD's excess cross-entropy compares with the controls' at its hookpoint and K."""
    own = student["excess_ce"]
    parts: list[str] = []
    for kind, what in (("dense", "experts"), ("additive", "product")):
        found = [
            s
            for s in students_at(report, student["hookpoint"])
            if s["kind"] == kind and s["k"] in (0, student["k"]) and s["recipe"] == counterpart(student["recipe"], kind)
        ]
        other = found[0]["excess_ce"] if found else None
        if other is None or own is None:
            continue
        # A share of something that is not positive says nothing.
        share = f"{abs(1 - own / other):.0%} ".replace("%", " %") if other > 0 else ""
        parts.append(f"{share}{'less' if own < other else 'more'} than the {kind} control ({number(other)}), which has no {what}")
    return f"Excess CE {number(own)} nats: {'; '.join(parts)}." if parts and own is not None else ""


def notes(report: Report) -> list[str]:
    """What a reader must know to read the figures rightly."""
    split = report["split"]
    found = [
        f"Held out: {report['eval_sequences']:,} sequences ({report['eval_tokens']:,} tokens) of {split} documents, never trained on. "
        "Documents are split by a hash of their id (1 in 20 test, 1 in 20 validation).",
        "Cross-entropy counts every predicted position. FVU, nmse and the routing measures leave out the first position of each sequence, "
        "whose norm is tens of times the others' (it is trained on, and with it they are fvu_all and nmse_all in report.json).",
        "Intervals are 95 % percentile bootstraps over documents, excess CE paired with the host's. They cover the choice of text, not the "
        "training seed. N_r and ID are measured for mxd and mxd-pk.",
        "Controls make no claim to sparsity: dense is MxD's dense path alone, additive adds what MxD multiplies. Only what MxD has beyond "
        "dense is owed to its experts, and only what it has beyond additive to the product. K counts experts; MxD's z is dense besides.",
        f"Dead means: fired on none of the {report['eval_tokens']:,} held-out tokens.",
    ]
    if report["eval_sequences"] < 200:
        found.insert(0, f"Only {report['eval_sequences']} sequences were evaluated; below 200 the intervals mean little (--sequences).")
    if report.get("edit"):
        found.insert(0, f"Edited ({report['edit']}): {report.get('edit_summary')}. Everything here is measured with this edit in place.")
    if split != "test":
        found.insert(0, "These are validation figures, for choosing a recipe; what is chosen by them is biased upwards.")
    kinds = [NAMES[kind] for kind in NAMES if any(s["kind"] == kind and s["recipe"] == "host-encoder" for s in report["students"])]
    if kinds:
        found.insert(
            0,
            f"Recipe host-encoder: {_list(kinds)} started from the host MLP's own encoder, the others from scratch. Read such an MxD as a "
            "decomposition of the host's decoder into experts over the host's own neurons, not as a new code for the layer.",
        )
    paper = figures.published_host_figures(report)
    if paper:
        found.append(
            f"Dotted curves: the paper's (arXiv 2505.21364, layer {paper['layer']}, 480 M tokens of OpenWebText, 32x budget, one seed), as "
            "excess over its own host; its text and evaluation differ from those here."
        )
    stopped = [f"{s['name']} ({s['stopped']})" for s in report["students"] if s.get("stopped")]
    if stopped:
        found.append(f"Stopped early: {'; '.join(stopped)}.")
    return found


def _list(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def headline(report: Report, hookpoint: str) -> str:
    """Host and ablations in one line."""
    zero, mean = (at_hookpoint(report, key, hookpoint) for key in ("zero_ablation_ce", "mean_ablation_ce"))
    base = report.get("base_ce")
    texts = [MISSING if v is None else number(v, 4) for v in (base, zero, mean)]
    return f"Host cross-entropy {texts[0]} nats; MLP zero-ablated {texts[1]}, mean-ablated {texts[2]}."


def markdown(report: Report, frontier: str = "frontier.svg") -> str:
    """report.md: the table, what the experts contribute, and the notes."""
    lines = [f"# {_md(report['host'])}: sparse layers in the place of an MLP", ""]
    for hookpoint in hookpoints(report):
        heads, rows = table(report, hookpoint)
        lines += [f"## {_md(hookpoint)}", "", headline(report, hookpoint), ""]
        lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
        lines += ["| " + " | ".join(_md(cell) for cell in row) + " |" for row in rows]
        lines.append("")
        for student in students_at(report, hookpoint):
            if student.get("routing"):
                lines += [*_routing_markdown(report, student), ""]
        for section in suite.sections(students_at(report, hookpoint)):
            lines += sections.markdown(section, _md)
    lines += [f"![Sparsity and accuracy]({frontier})", "", "## How to read this", ""]
    lines += [f"- {_md(note)}" for note in notes(report)]
    versions = ", ".join(f"{name} {version}" for name, version in (report.get("versions") or {}).items())
    lines += ["", f"Seed {report.get('seed')}; {report.get('train_tokens') or 0:,} training tokens; {_md(versions)}."]
    return "\n".join(lines) + "\n"


def _routing_markdown(report: Report, student: Student) -> list[str]:
    routing = student["routing"]
    lines = [
        f"**What the experts of {_md(student['name'])} contribute.** {verdict(student)} {against_controls(report, student)}".rstrip(),
        "",
    ]
    lines += [f"- {name} = {measure_text(routing, key)}: {what}" for key, name, what in MEASURES]
    return [*lines, f"- {fvu_line(routing)}", *(f"- {_md(note)}" for note in routing.get("notes", []))]


def fvu_line(routing: Mapping[str, Any]) -> str:
    """The FVUs behind the measures, in one line."""
    names = {
        "fvu": "as trained",
        "fvu_null": "best routing-free readout",
        "fvu_dense": "dense control",
        "fvu_best_constant": "best constant modulation",
        "fvu_mean_a": "a at its mean",
    }
    parts = [f"{name} {MISSING if routing.get(key) is None else number(routing[key])}" for key, name in names.items()]
    cv = routing.get("modulation_cv")
    return f"FVU: {', '.join(parts)}. Coefficient of variation of Cᵀa: {MISSING if cv is None else number(cv)}."


def _md(text: object) -> str:
    """Text that cannot break a Markdown table or bring in HTML."""
    return str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("|", "\\|").replace("\n", " ")
