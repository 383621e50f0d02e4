"""What a report says of the anatomy of its students: tables, plots, and words, from the figures alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...recipes import published
from ..figures import MARGIN, WIDTH, label
from ..parts import Section, Student, Table, measured
from ..svg import NAMES, Axis, Figure, number

MISSING = "–"
PART_NAME = "anatomy"


def show(students: Sequence[Student]) -> list[Section]:
    """Sections: firing, experts' weights, what each unit does, Jacobians; only those that there are figures for."""
    have = measured(students, PART_NAME)
    if not have:
        return []
    with_units = [s for s in have if s[PART_NAME].get("firing")]
    sections = [_jacobian(have)]
    if with_units:
        sections = [_firing(with_units), _contributions(with_units), *sections]
    ranked = [s for s in with_units if s[PART_NAME].get("rank")]
    if ranked:
        sections.insert(1, _weights(ranked))
    return sections


def _value(found: Mapping[str, Any] | None, digits: int = 3) -> str:
    """``.0252 [.0240, .0263]`` of a {value, ci95}."""
    value = (found or {}).get("value")
    if found is None or value is None:
        return MISSING
    low, high = found.get("ci95") or [None, None]
    return (
        number(value, digits) if low is None or high is None else f"{number(value, digits)} [{number(low, digits)}, {number(high, digits)}]"
    )


def _plain(value: float | None, digits: int = 3) -> str:
    return MISSING if value is None else number(value, digits)


def _percent(value: float | None, decimals: int = 0) -> str:
    return MISSING if value is None else f"{100 * value:.{decimals}f} %"


def _rows(students: Sequence[Student], cells: Callable[[Student, Mapping[str, Any]], Sequence[str]]) -> list[list[str]]:
    return [[label(s, students), *cells(s, s[PART_NAME])] for s in students]


def _firing(students: Sequence[Student]) -> Section:
    first = students[0][PART_NAME]

    def cells(_: Student, a: Mapping[str, Any]) -> list[str]:
        f, c, t = a["firing"], a["coactivation"], a["token_types"]
        chance = f"{_percent(c['share_above_chance'], 1)} ({_percent(c['share_shifted'], 1)})"
        spread = f"{_plain(t['distinct']['median'])} ({_plain(t['any_distinct'])})"
        even = f"{_plain(t['effective']['median'])} ({_plain(t['any_effective'])})"
        return [_plain(f["l0"]), _percent(f["dead_fraction"]), _percent(f["max_frequency"]), str(f["n_above_half"]), chance, spread, even]

    heads = ["student", "L0", "dead", "busiest", "> ½", "pairs above chance (shifted)", "units per token type (any)", "effective (any)"]
    pairs: list[list[str]] = []
    tokens: list[list[str]] = []
    for s in students:
        for pair in s[PART_NAME]["coactivation"]["top"][:3]:
            i, j = pair["units"]
            pairs.append([label(s, students), f"{i} + {j}", _plain(pair["phi"], 2), _plain(pair["lift"]), f"{pair['tokens']:,}"])
        for example in s[PART_NAME]["token_types"]["examples"][:4]:
            tokens.append(
                [
                    label(s, students),
                    repr(example["token"]),
                    f"{example['occurrences']:,}",
                    str(example["distinct"]),
                    _plain(example["effective"]),
                ]
            )
    shared = [_shared_words(s, students) for s in students]
    return Section(
        "When units fire",
        [*shared],
        [
            Table(f"Over {first['window_tokens']:,} held-out tokens", heads, _rows(students, cells)),
            Table("Pairs that fire together most (correlation phi)", ["student", "units", "phi", "lift", "tokens"], pairs, folded=True),
            Table("Frequent tokens", ["student", "token", "occurrences", "distinct units", "effective units"], tokens, folded=True),
        ],
        [(f"{label(s, students)}: units by firing frequency", _histogram(s)) for s in students],
        notes=[
            f"Dead: fires on none of the {first['window_tokens']:,} tokens of the window (--anatomy-tokens). The paper's window is about "
            "4 M "
            "tokens: a longer window finds fewer dead units.",
            "Pairs above chance: share of the pairs, expected together at least once, that are together more than 6 standard deviations "
            "more "
            "often than independence lets expect; in brackets the same with one unit's firings taken from other sequences, which is what "
            "frequencies and positions alone give.",
            "Units per token type: distinct units over 20 occurrences of the same token, median over types; in brackets over 20 tokens "
            "of any "
            "type. Effective: exp of the entropy of which unit fires. Fewer than for any token means that units follow the token's "
            "identity; "
            "it does not say that they follow nothing else.",
        ],
    )


def _shared_words(student: Student, students: Sequence[Student]) -> str:
    a = student[PART_NAME]
    f, s = a["firing"], a["shared"]
    name, unit = label(student, students), f"#{s['unit']}"
    if s["found"]:
        text = f"{name}: {unit} fires on {_percent(s['frequency'])} of the tokens, a shared unit"
        text += f" (one of {f['n_above_half']})" if f["n_above_half"] > 1 else ""
    else:
        text = f"{name}: no unit fires on more than half of the tokens (busiest {unit}, {_percent(s['frequency'])})"
    if student["kind"].startswith("mxd") and s["found"] and not a["random_k"]:
        text += "; by the paper random K in training removes it (mxd train --random-k)"
    return text + (", trained with random K." if a["random_k"] else ".")


def _weights(students: Sequence[Student]) -> Section:
    def cells(_: Student, a: Mapping[str, Any]) -> list[str]:
        r, s = a["rank"], a["shared"]
        d = s["distances"] or {}
        return [
            f"{r['experts']:,}",
            f"{_plain(r['rank']['mean'])} ({_plain(r['rank']['low'])} to {_plain(r['rank']['high'])})",
            _plain(r["rank_D"]),
            _plain(r["effective"]["mean"]),
            _plain(r["stable"]["mean"]),
            f"#{s['unit']}: {_plain(d.get('expert'))} ({_plain(d.get('expert_scaled'))})",
            f"{_plain(d.get('D'))} ({_plain(d.get('D_scaled'))})",
            _plain(d.get("host")),
        ]

    heads = ["student", "experts", "rank / min(H, O)", "rank of D", "effective rank", "stable rank"]
    heads += ["‖W_busiest − D*‖ (scaled)", "‖D − D*‖ (scaled)", "‖D*‖"]
    ranks = published()["normalised_expert_rank"]
    hosts = ", ".join(f"{host} {value}" for host, value in ranks.items())
    return Section(
        "What the experts are made of",
        [
            "A high rank follows from that of D, which all experts share (Lemma 1: the same rank wherever c_n has no zero). It shows that "
            "experts are not low-rank maps; it shows nothing of what they are used for."
        ],
        [Table("Ranks as shares of min(H, O): mean (least to most); distances in the Frobenius norm", heads, _rows(students, cells))],
        [(f"{label(s, students)}: experts by rank", _rank_histogram(s)) for s in students],
        notes=[
            "Rank counts singular values above max(H, O) ε σ_1 in float32: for a matrix with noise in it that is nearly always full. "
            "Effective rank: exp of the entropy of σ / Σσ; stable rank: ‖W‖_F² / σ_1²; both as shares of min(H, O).",
            f"Published normalised rank (first 2,000 experts): {hosts}. --suite paper takes the first 2,000, dead ones too; else live "
            "ones at random.",
            "Distances compare neuron by neuron with the host's decoder: that has a meaning only where the encoder is the host's own. "
            "Scaled: "
            "the least over multiples; equal to ‖D*‖ where there is nothing in common. Published for GPT-2, K = 64: 208.08 and 221.69.",
        ],
    )


def _contributions(students: Sequence[Student]) -> Section:
    def cells(student: Student, a: Mapping[str, Any]) -> list[str]:
        r = a["routing"]
        b, c = r["benefit"], r["causality"]
        best = (student.get("routing") or {}).get("g_r_best")
        return [
            f"{r['tokens']:,}",
            _value(b["shared_share"]),
            _value(b["top1_share"]),
            _plain(b["effective_units"]["value"]),
            _value(r["amplitude"]),
            f"{_percent(c['identity']['share_positive'])} of {c['tested']:,}",
            f"{_percent(c['difference']['share_positive'])} / {_percent(c['difference']['share_negative'])}",
            _value(r["identity"]["fvu"]),
            _value(r["identity"]["nats"]),
            _value(best),
        ]

    heads = ["student", "tokens", "shared share", "best unit's share", "effective units", "amplitude share A", "κ > 0", "δ > 0 / < 0"]
    heads += ["ID, FVU", "ID, nats", "G_r, best dense"]
    return Section(
        "What each unit does",
        [_causal_words(s, students) for s in students],
        [Table("Benefit shares, amplitude and causality [95 % over documents]", heads, _rows(students, cells))],
        [("Benefit earned by the best units (order chosen on validation text)", _concentration(students))],
        notes=[
            "Benefit shares: exact Shapley values of squared error; they add up to what the layer removes of it. Shared share: what all "
            "experts "
            "of an MxD have in common (u_0 = s (c̄ * h)), or the skip or dense path of other kinds: compare kinds with that in mind. "
            "Effective units: exp of the entropy of the positive ones. Noise makes it larger where few units earn most (one that earns "
            "nothing counts half the time), smaller where all earn alike: compare it at one number of tokens only. It has no interval: a "
            "resample is noisier than the sample, and its figures need not lie around the value. Tokens: those "
            "behind shares, A, κ and δ (fewer for kinds whose contributions are decoded one by one); ID is of all of them.",
            "A: how much of the way from a constant code to the layer's own is covered by the summed activation alone; near 1 is a gain "
            "control, below 0 means that scaling a constant code by it does harm.",
            "κ_n: loss where unit n fired and another of like frequency wrote in its place with the same activation; δ_n: loss without n "
            "minus "
            "that loss. δ_n > 0 is also what units that are all alike give, so δ alone does not show that identity matters. Tested: "
            "fired in "
            f"at least {students[0][PART_NAME]['routing']['causality']['min_documents']} documents; t test over documents, "
            "Benjamini–Hochberg at 5 %.",
            "ID here is of one permutation of the live units, output gains and biases refitted on validation text, for every kind; in nats "
            f"the rise of KL(host ‖ student) on {students[0][PART_NAME]['routing']['identity']['nats']['sequences']} sequences.",
        ],
    )


def _causal_words(student: Student, students: Sequence[Student]) -> str:
    r = student[PART_NAME]["routing"]
    name, c = label(student, students), r["causality"]
    low = ((r["identity"]["fvu"] or {}).get("ci95") or [None])[0]
    which = "it matters which unit fires" if low is not None and low > 0 else "it is not shown that it matters which unit fires"
    shared = r["benefit"]["shared_share"]["value"]
    if shared is None:
        earned = "The layer removes nothing of the squared error."
    else:
        earned = f"{_percent(shared)} of the squared error removed is earned by what all its units have in common, or by its dense path."
    if c["tested"]:
        causal = f"{_percent(c['identity']['share_positive'])} of the {c['tested']:,} units tested do worse when replaced."
    else:
        causal = f"No unit fired in {c['min_documents']} documents: none was tested."
    return f"{name}: {which} (ID {_value(r['identity']['fvu'])} in FVU, one seed). {earned} {causal}"


def _jacobian(students: Sequence[Student]) -> Section:
    def cells(_: Student, a: Mapping[str, Any]) -> list[str]:
        j = a["routing"]["jacobian"]
        return [_value(j[key]) for key in ("cosine", "cosine_dense", "routing_norm", "relative_error")]

    first = students[0][PART_NAME]["routing"]["jacobian"]
    words: list[str] = []
    for s in students:
        j = s[PART_NAME]["routing"]["jacobian"]
        low, high = j["cosine"]["ci95"][0], j["cosine_dense"]["ci95"][1]
        if s["kind"] in NAMES and s[PART_NAME].get("rank") and low is not None and high is not None:
            more = "adds to it" if low > high else "is not shown to add to it"
            cosines = f"{_value(j['cosine'])}, of its dense part alone {_value(j['cosine_dense'])}"
            words.append(f"{label(s, students)}: cosine with the MLP's own Jacobian {cosines}; routing {more}.")
    heads = ["student", "cosine", "cosine, dense part", "‖routing‖ / ‖J‖", "‖J − J*‖ / ‖J*‖"]
    return Section(
        "Jacobians",
        words or ["The cosine says whether the stand-in reacts to its input as the MLP does, not only whether its outputs agree."],
        [Table(f"Mean over {first['tokens']:,} held-out tokens [95 % over {first['documents']} documents]", heads, _rows(students, cells))],
        [("Cosine of the Jacobians of stand-in and MLP; small: dense part alone", _cosines(students))],
        notes=[
            "Exact by autograd, the choice of active units held fixed; a SAE is differentiated as x → MLP(x) → SAE, and so owes part of "
            "its "
            "cosine to the MLP itself. Dense part: activations held; routing: everything else held; the two add up to J.",
            "Intervals that overlap show no difference between students; the dense part's is of the same tokens.",
        ],
    )


def _histogram(student: Student) -> Figure:
    a = student[PART_NAME]
    edges, units = a["firing"]["histogram"]["log10_edges"], a["firing"]["histogram"]["units"]
    dead = round(a["firing"]["dead_fraction"] * student["n_units"])
    figure = Figure(WIDTH, 220, "Units by log10 firing frequency", f"{dead} units are dead.")
    x = Axis(edges[0] - 0.75, edges[-1], MARGIN, WIDTH - 16)
    y = Axis(0, max([*units, dead, 1]), 174, 30)
    figure.frame(x, y, "log10 firing frequency", "units", x_ticks=range(-5, 1))
    _bars(figure, x, y, list(zip(edges[:-1], edges[1:], units, strict=True)), student["kind"])
    _bars(figure, x, y, [(edges[0] - 0.6, edges[0] - 0.25, dead)], "ink")
    figure.text(x(edges[0] - 0.42), 191, "dead", anchor="middle", css="soft")
    return figure


def _rank_histogram(student: Student) -> Figure:
    bins = student[PART_NAME]["rank"]["histogram"]
    figure = Figure(WIDTH, 200, "Experts by rank over min(H, O)")
    x, y = Axis(0, 1, MARGIN, WIDTH - 16), Axis(0, max(bins), 154, 30)
    figure.frame(x, y, "rank / min(H, O)", "experts")
    _bars(figure, x, y, [(i / 20, (i + 1) / 20, n) for i, n in enumerate(bins)], student["kind"])
    return figure


def _bars(figure: Figure, x: Axis, y: Axis, bars: Sequence[tuple[float, float, float]], kind: str) -> None:
    for low, high, height in bars:
        if height:
            figure.band(x(low) + 0.5, y(height), x(high) - x(low) - 1, y.start - y(height), kind)
            corners = [(low, 0.0), (low, height), (high, height), (high, 0.0)]
            figure.line([(x(a), y(b)) for a, b in corners], "line thin", kind)


def _concentration(students: Sequence[Student]) -> Figure:
    curves = [(s, s[PART_NAME]["routing"]["benefit"]["curve"]) for s in students]
    curves = [(s, curve) for s, curve in curves if curve]
    most = max((curve[-1][0] for _, curve in curves), default=10)
    figure = Figure(WIDTH, 260, "Share of the units' benefit that the best of them earn")
    x, y = Axis(1, max(most, 2), MARGIN, WIDTH - 130, 10), Axis(0, 1, 214, 30)
    figure.frame(x, y, "units, best first (log)", "share of the units' benefit")
    wanted: list[tuple[float, str, str]] = []
    for student, curve in curves:
        figure.line([(x(max(m, 1)), y(share)) for m, share in curve], "line", student["kind"])
        middle = curve[len(curve) // 2]
        wanted.append((y(middle[1]), label(student, students), student["kind"]))
    figure.labels(WIDTH - 118, wanted, 34, 210)
    return figure


def _cosines(students: Sequence[Student]) -> Figure:
    values = [s[PART_NAME]["routing"]["jacobian"] for s in students]
    low = min([0.0, *(j["cosine"]["value"] or 0.0 for j in values)])
    figure = Figure(WIDTH, 64 + 28 * len(students), "Cosine of the Jacobians, with 95 % intervals")
    x, bottom = Axis(low, 1.0, 150, WIDTH - 20), 30.0 + 28 * len(students)
    for tick in x.ticks():
        figure.line([(x(tick), 18), (x(tick), bottom)], "rule")
        figure.text(x(tick), bottom + 15, f"{tick:.6g}", anchor="middle", css="soft")
    for i, (student, j) in enumerate(zip(students, values, strict=True)):
        y, kind = 34.0 + 28 * i, student["kind"]
        figure.text(140, y + 4, label(student, students), anchor="end", css="hue", kind=kind)
        for key, shift, size in (("cosine", 0.0, 5.0), ("cosine_dense", 10.0, 3.0)):
            value, (left, right) = j[key]["value"], j[key]["ci95"]
            if value is None or (key == "cosine_dense" and not value):
                continue
            if left is not None and right is not None:
                figure.line([(x(left), y + shift), (x(right), y + shift)], "bar", kind)
            figure.marker(x(value), y + shift, kind, note=f"{student['name']}: {_value(j[key])}", size=size)
    return figure
