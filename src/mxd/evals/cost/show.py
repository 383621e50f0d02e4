"""What a report shows of cost: students beside the host's MLP, and the paper's table beside what it takes on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..figures import label
from ..parts import Found, Section, Student, Table, measured
from ..svg import NAMES, number

NAME = "cost"
PUBLISHED = {"mxd": {"milliseconds": 1.394, "mib": 386.5}, "transcoder": {"milliseconds": 1.457, "mib": 389.5}}
"""arXiv 2505.21364: latency and peak memory at batch 512 on the authors' GPU; how they were measured is not stated."""
PUBLISHED_WEIGHTS = 18_874_368
"""Parameters of each, biases left out; also its multiply-adds per token, every unit counted."""


def show(students: Sequence[Student]) -> list[Section]:
    """The section of one hookpoint's students; nothing where none was measured."""
    found = measured(students, NAME)
    if not found:
        return []
    figures = found[0][NAME]
    return [Section("Cost", _words(found), [_students(found), _paper(figures["paper"])], notes=_notes(figures))]


def times_host(figures: Found) -> float:
    """Latency of the replaced MLP over the host's: an SAE runs behind the MLP and has its time on top."""
    own, host = figures["student"]["milliseconds"], figures["host_mlp"]["milliseconds"]
    return (own + (host if figures["reads_output"] else 0)) / host


def _students(students: Sequence[Student]) -> Table:
    heads = ["", "params", "MACs/token", "FLOPs/token", "MACs/token, all units", "µs/token [quartiles]", "time in place", "peak MiB"]
    rows = [
        [
            label(s, students),
            *_cells(s[NAME]["student"], s[NAME]["batch_tokens"]),
            f"{number(times_host(s[NAME]))} ×",
            _mib(s[NAME]["student"]),
        ]
        for s in students
    ]
    figures = students[0][NAME]
    rows.append(["host's MLP", *_cells(figures["host_mlp"], figures["batch_tokens"]), "1 ×", _mib(figures["host_mlp"])])
    return Table(
        f"One forward pass of {figures['batch_tokens']:,} held-out tokens; time in place of the MLP over the MLP's own", heads, rows
    )


def _cells(row: Mapping[str, Any], tokens: int) -> list[str]:
    low, high = (1e3 * ms / tokens for ms in row["milliseconds_quartiles"])
    return [
        f"{row['params']:,}",
        f"{row['macs_per_token']:,.0f}",
        f"{row['flops_per_token']:,.0f}",
        f"{row['macs_per_token_all_units']:,.0f}",
        f"{number(row['microseconds_per_token'])} [{number(low)}, {number(high)}]",
    ]


def _mib(row: Mapping[str, Any]) -> str:
    return f"{row['peak_mib']:,.1f}"


def _paper(rows: Mapping[str, Any]) -> Table:
    heads = ["", "params without biases", "MACs/token", "MACs/token, all units", "ms [quartiles]", "ms, paper", "peak MiB", "MiB, paper"]
    cells = [
        [
            NAMES[kind],
            f"{row['weights']:,}",
            f"{row['macs_per_token']:,.0f}",
            f"{row['macs_per_token_all_units']:,.0f}",
            f"{number(row['milliseconds'])} [{', '.join(map(number, row['milliseconds_quartiles']))}]",
            f"{PUBLISHED[kind]['milliseconds']:.3f}",
            _mib(row),
            f"{PUBLISHED[kind]['mib']:.1f}",
        ]
        for kind, row in rows.items()
    ]
    caption = "At the paper's sizes: batch 512, widths of 1024, MxD of 8,192 experts against a transcoder of 9,216 latents, K = 32"
    return Table(caption, heads, cells)


def _words(students: Sequence[Student]) -> list[str]:
    figures = students[0][NAME]
    host = figures["host_mlp"]
    words: list[str] = []
    for student in students:
        own = student[NAME]["student"]
        more = ", on top of the MLP, which still runs" if student[NAME]["reads_output"] else ""
        ratio = number(own["macs_per_token"] / host["macs_per_token"]) if host["macs_per_token"] else "–"
        words.append(
            f"{label(student, students)}: {ratio} times the multiply-adds of the host's MLP{more}, "
            f"{number(own['params'] / host['params'])} times its parameters, {number(times_host(student[NAME]))} times its time in place."
        )
    ours = figures["paper"]
    (low, high), (low_other, high_other) = (ours[kind]["milliseconds_quartiles"] for kind in ("mxd", "transcoder"))
    ratio = ours["mxd"]["milliseconds"] / ours["transcoder"]["milliseconds"]
    published = PUBLISHED["mxd"]["milliseconds"] / PUBLISHED["transcoder"]["milliseconds"]
    apart = high < low_other or high_other < low
    words.append(
        f"At the paper's sizes the MxD takes {number(ratio)} times the time of the transcoder here ({number(published)} published)"
        + ("." if apart else "; their quartiles overlap, so no difference is shown.")
    )
    words.append("A sparse layer replaces an MLP to be read, not to be fast: none of these figures says that a host gets faster.")
    return words


def _notes(figures: Found) -> list[str]:
    return [
        "A MAC is a fused multiply-add of a product with weights, which the paper counts as one FLOP and PyTorch's counter as two "
        "(FLOPs/token). Biases, activations, elementwise products and the search for the K largest are in neither.",
        "MACs/token are those that run: every unit's score, but of the units' rows only the active ones. “All units” counts every row, "
        "as the paper's formulas do.",
        f"Times: medians of forward passes without gradients, student and host's MLP in turn in one process, on {figures['device']} with "
        f"{figures['threads']} CPU threads ({figures['dtype']}; host {figures['host_dtype']}). They hold for "
        "this machine and what else it did.",
        "Peak MiB: parameters, input, and what a forward pass holds at its highest besides; on CUDA by PyTorch's allocator, elsewhere the "
        "tensors alive.",
        f"Published: {PUBLISHED_WEIGHTS:,} parameters each; times and memory are of another machine and another implementation, and how "
        "the memory was measured is not stated: compare rows with each other, not with ours.",
    ]
