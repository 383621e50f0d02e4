"""The tables and the plane of docs/results.md that come from studies: docs/results/studies/NAME.json, copied from where ``mxd study NAME``
writes them (runs/studies/). A study that is not finished has no table."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mxd.evals.bootstrap import ratio_interval
from mxd.evals.svg import NAMES, Axis, Figure, log_axis, number

DOCS = Path(__file__).parent.parent / "docs"
FOLDER = DOCS / "results" / "studies"
PLANES = DOCS / "img"
KINDS = ("mxd", "mxd-pk", "mov", "cp-mumoe", "transcoder", "skip-transcoder", "topk-sae", "dense", "additive")
T_95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}
"""97.5th percentile of Student's t with n − 1 degrees of freedom, by number of seeds n."""
SKIP = " minus the skip transcoder's, paired |"
"""Head of the column that `_against_skip` fills."""
Row = dict[str, Any]


def read(name: str) -> dict[str, Any] | None:
    """What a study found; None where it was not run yet."""
    path = FOLDER / f"{name}.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return found if found and found["finished"] else None


def tables() -> dict[str, str]:
    """Mark of docs/results.md -> table."""
    small = ("topk-or-l1", "encoder", "rank", "random-k", "n-or-k", "mode-2")
    return {
        "tuning": _tuning(),
        "comparison": _comparison(8),
        "comparison-16": _comparison(16),
        "comparison-routing": _routing("comparison"),
        "routing-all": _small("routing"),
        "routing-search": _routing("routing"),
        "meaning-probes": _probes(),
        "meaning-selectivity": _selectivity(),
        "meaning-rest": _meaning(),
        "commands": _commands(),
        **{name: _small(name) for name in small},
    }


def plots() -> dict[Path, str]:
    """The plane of faithfulness against routing, with every MxD on it: one for each number of tokens."""
    figures = {PLANES / f"routing-plane-{name}.svg": _plane(name) for name in ("comparison", "routing")}
    return {path: figure.svg(standalone=True) + "\n" for path, figure in figures.items() if figure}


def combined(rows: Sequence[Row], key: str) -> tuple[float, tuple[float, float]]:
    """Mean over seeds and a 95 % interval for seeds and text together.

    The same held-out text serves every seed, so its error does not average out: half widths are added in quadrature, that of the text
    (the mean of the seeds' bootstrap intervals) and that of the seeds (Student's t).
    """
    values = [row[key] for row in rows]
    text = statistics.mean((row[f"{key}_ci95"][1] - row[f"{key}_ci95"][0]) / 2 for row in rows)
    seeds = T_95[len(rows)] * statistics.stdev(values) / math.sqrt(len(rows)) if len(rows) > 1 else 0.0
    mean, half = statistics.mean(values), math.hypot(text, seeds)
    return mean, (mean - half, mean + half)


def paired(rows: Sequence[Row], others: Sequence[Row], sequences: Sequence[int]) -> tuple[float, tuple[float, float]]:
    """Mean difference in excess cross-entropy, nats, document by document and seed by seed; the interval as in `combined`.

    Args:
        rows, others: two students, a row for each seed, the same seeds in both.
        sequences: sequences of each document.
    """
    each = np.array([a["excess_ce_sums"] for a in rows]) - np.array([b["excess_ce_sums"] for b in others])
    text = ratio_interval(each.mean(0), np.array(sequences, dtype=float), resamples=2000, seed=0)
    values = each.sum(1) / sum(sequences)
    seeds = T_95[len(rows)] * float(values.std(ddof=1)) / math.sqrt(len(rows)) if len(rows) > 1 else 0.0
    half = math.hypot((text.high - text.low) / 2, seeds)
    return text.value, (text.value - half, text.value + half)


def _against_skip(found: dict[str, Any], group: Sequence[Row], rows: Sequence[Row]) -> str:
    """Difference to the skip transcoder of the same K and seeds (for kinds without K: to that of K = 32)."""
    first, wanted = group[0], {row["seed"] for row in group}
    mine = [r for r in rows if r["kind"] == "skip-transcoder" and r["k"] == (first["k"] or 32) and r["recipe"].split("+lr=")[0] == "ours"]
    by_seed = {row["seed"]: row for row in mine}
    if not wanted <= set(by_seed) or first in mine:
        return "–"
    return _interval(*paired(group, [by_seed[row["seed"]] for row in group], found["document_sequences"]), 4)


def _tuning() -> str:
    found = read("tuning")
    if found is None:
        return "Not measured."
    rates = list(dict.fromkeys(_word(row["command"], "--lr") for row in found["rows"]))
    names = list(dict.fromkeys(row["name"] for row in found["rows"]))
    lines = ["| student | " + " | ".join(f"lr {rate}" for rate in rates) + " |", "|---|" + "---|" * len(rates)]
    for name in sorted(names, key=lambda n: (n.endswith("host-encoder"), KINDS.index(_kind(found["rows"], n)))):
        cells = {_word(row["command"], "--lr"): row for row in found["rows"] if row["name"] == name}
        best = min(cells.values(), key=lambda row: row["fvu"])
        shown = [_bold(f"{cells[r]['fvu']:.3f} / {cells[r]['excess_ce']:.4f}", cells[r] is best) if r in cells else "–" for r in rates]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines).replace("-0.", "−0.")


def _kind(rows: Sequence[Row], name: str) -> str:
    return next(row["kind"] for row in rows if row["name"] == name)


def _bold(text: str, yes: bool) -> str:
    return f"**{text}**" if yes else text


def _word(command: str, option: str) -> str:
    words = command.split()
    return words[words.index(option) + 1] if option in words else "–"


def _groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that differ only in their seed, in the order of the tables. A control that several runs trained alike counts once."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        group = found.setdefault((row["recipe"] == "host-encoder", row["recipe"], KINDS.index(row["kind"]), row["k"]), [])
        if row["seed"] not in [other["seed"] for other in group]:
            group.append(row)
    return [found[key] for key in sorted(found)]


def _comparison(layer: int) -> str:
    found = read("comparison")
    rows = [row for row in (found or {"rows": []})["rows"] if row["hookpoint"] == f"layers.{layer}.mlp"]
    if found is None or not rows:
        return "Not measured."
    lines = [
        "| kind | K | recipe | seeds | excess CE, nats [95 %] | minus the skip transcoder's, paired | CE recovered | KL "
        "| FVU [95 %] | L0 | dead |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for group in _groups(rows):
        first = group[0]
        name = NAMES[first["kind"]]
        lines.append(
            f"| {name} | {first['k'] or '–'} | {first['recipe']} | {len(group)} "
            f"| {_interval(*combined(group, 'excess_ce'), 4)} | {_against_skip(found, group, rows)} "
            f"| {100 * _mean(group, 'ce_recovered'):.1f} % | {_mean(group, 'kl'):.4f} | {_interval(*combined(group, 'fvu'), 3)} "
            f"| {'–' if first['l0'] is None else format(_mean(group, 'l0'), '.1f')} | {_share(group, 'dead_fraction')} |"
        )
    return "\n".join(lines)


def _interval(value: float, ends: Sequence[float], decimals: int) -> str:
    low, high = ends
    return f"{value:.{decimals}f} [{low:.{decimals}f}, {high:.{decimals}f}]".replace("-", "−")


def _mean(rows: Sequence[Row], key: str) -> float:
    return statistics.mean(row[key] for row in rows)


def _share(rows: Sequence[Row], key: str) -> str:
    return "–" if rows[0][key] is None else f"{100 * _mean(rows, key):.0f} %"


def _routing(name: str) -> str:
    found = read(name)
    rows = [row for row in (found or {"rows": []})["rows"] if row["routing"]]
    if not rows:
        return "Not measured."
    lines = [
        "| recipe | K | layer | seed | excess CE | FVU | N_r | G_r | G_r, best dense | ID | experts matter |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        measures = [_measure(row["routing"].get(key)) for key in ("n_r", "g_r", "g_r_best", "id")]
        matter = "–" if row["routing"]["experts_matter"] is None else "yes" if _matter(row["routing"]) else "not shown"
        layer = row["hookpoint"].split(".")[1]
        lines.append(
            f"| {row['recipe']} | {row['k']} | {layer} | {row['seed']} | {row['excess_ce']:.4f} | {row['fvu']:.3f} "
            f"| {' | '.join(measures)} | {matter} |".replace("-0.", "−0.")
        )
    return "\n".join(lines)


def _measure(found: dict[str, Any] | None) -> str:
    if not found or found["value"] is None:
        return "–"
    if found["value"] < -100:  # the routing-free readout is exact up to rounding; how far below 0 means nothing
        return "< −100"
    return _interval(found["value"], found["ci95"], 3)


def _small(name: str) -> str:
    """One line a student."""
    found = read(name)
    if found is None:
        return "Not measured."
    skip = any(_against_skip(found, [row], found["rows"]) != "–" for row in found["rows"])
    lines = [
        f"| student | units | parameters | L0 | excess CE, nats [95 %] |{SKIP if skip else ''} FVU [95 %] | dead | busiest |",
        "|---|---|---|---|---|---|---|---|" + "---|" * skip,
    ]
    for row in found["rows"]:
        difference = f"| {_against_skip(found, [row], found['rows'])} " if skip else ""
        units = format(row["n_units"], ",") if row["n_units"] else "–"
        lines.append(
            f"| {row['name']} | {units} | {row['params'] / 1e6:.1f} M | {_number(row['l0'], '.1f')} "
            f"| {_interval(row['excess_ce'], row['excess_ce_ci95'], 4)} {difference}| {_interval(row['fvu'], row['fvu_ci95'], 3)} "
            f"| {_share([row], 'dead_fraction')} | {_number(row['max_firing_frequency'], '.2f')} |"
        )
    return "\n".join(lines)


TASKS = ("topic", "profession", "profession-masked", "sentiment-movie", "programming-language")
"""Tasks of the probes' table, besides the languages; all of them are in the study's file."""
FEATURE = "code"
"""What its probes read: codes after TopK, the sparser question."""


def _meant() -> list[Row]:
    return [row for row in (read("meaning") or {"rows": []})["rows"] if not row.get("probes", {"missing": ""}).keys() & {"missing"}]


def _probes() -> str:
    """Mean F1 over classes of the best single unit, on test; controls below. Bold: above random units, intervals disjoint."""
    rows = _meant()
    if not rows:
        return "Not measured."
    lines = ["| student | language, best unit | " + " | ".join(("language", *TASKS)) + " |", "|---|" + "---|" * (2 + len(TASKS))]
    for row in rows:
        lines.append(_probed(row["name"], row["probes"]["tasks"], "student", FEATURE))
    last = rows[0]["probes"]["tasks"]
    for source, feature, name in (
        ("neurons", FEATURE, "the host's own neurons"),
        ("random", FEATURE, f"random units, K of {rows[0]['name']}"),
        ("shuffled", FEATURE, f"shuffled labels, {rows[0]['name']}"),
        ("dense", "y", "dense probe on all of y"),
    ):
        lines.append(_probed(f"*{name}*", last, source, feature))
    return "\n".join(lines)


def _probed(name: str, tasks: dict[str, Any], source: str, feature: str) -> str:
    best = tasks["language"]["rows"][source][feature]["best"]
    cells = [f"{best['class']}: {_interval(best['f1'], best['f1_ci95'], 3)}"]
    for task in ("language", *TASKS):
        cell = tasks[task]["rows"][source][feature]
        above = source == "student" and tasks[task]["above"]["random"][feature]["disjoint"]
        cells.append(_bold(_interval(cell["f1"], cell["f1_ci95"], 2), above))
    return f"| {name} | " + " | ".join(cells) + " |"


def _selectivity() -> str:
    """Ratio of the rise on the language to the mean rise on the others, for each number of ablated units."""
    rows = [row for row in _meant() if "by_class" in row.get("selectivity", {})]
    if not rows:
        return "Not measured."
    first = rows[0]["selectivity"]["by_class"]
    sizes = list(next(iter(first.values()))["tied"])
    columns = [(language, size) for language in first for size in sizes]
    lines = ["| student | " + " | ".join(f"{language}, {size} units" for language, size in columns) + " |", "|---|" + "---|" * len(columns)]
    for row in rows:
        found = row["selectivity"]["by_class"]
        lines.append(f"| {row['name']} | " + " | ".join(_selective(found[language]["tied"][size]) for language, size in columns) + " |")
    return "\n".join(lines)


def _selective(cell: dict[str, Any]) -> str:
    """The ratio with its interval, its lower end alone, or a dash; and the rise on the language in thousandths of a nat."""
    rise = f"({1000 * cell['own'][0]:.0f})".replace("-", "−")
    if cell["ratio"]:
        return f"{_interval(cell['ratio'][0], cell['ratio'][1:], 1)} {rise}"
    return f"≥ {cell['at_least']:.1f} {rise}" if cell["at_least"] else f"– {rise}"


def _meaning() -> str:
    """Generation, steering and anatomy of the students of `meaning`."""
    rows = _meant()
    if not rows:
        return "Not measured."
    lines = [
        "| student | excess CE, nats [95 %] | identical up to 1, 5, 15 tokens | texts changed | coherence over a random push "
        "| effective units | κ > 0 | Jacobian cosine [95 %] |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [_interval(row["excess_ce"], row["excess_ce_ci95"], 4), _generated(row), *_steered(row), *_built(row)]
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _generated(row: Row) -> str:
    found = row.get("generation_agreement", {})
    return ", ".join(f"{found['shares'][n]:.2f}" for n in (1, 5, 15)) if "shares" in found else "–"


def _steered(row: Row) -> list[str]:
    found = row.get("steering", {})
    if "changed" not in found:
        return ["–", "–"]
    over = found["over_random"]["coherence"]
    return [f"{100 * found['changed']['value']:.0f} %", _interval(over["value"], over["ci95"], 3)]


def _built(row: Row) -> list[str]:
    found = (row.get("anatomy") or {}).get("routing") or {}
    if "causality" not in found:
        return ["–", "–", "–"]
    cosine = found["jacobian"]["cosine"]
    effective, share = found["benefit"]["effective_units"]["value"], found["causality"]["identity"]["share_positive"]
    return [f"{effective:,.0f}", f"{100 * share:.0f} %", _interval(cosine["value"], cosine["ci95"], 3)]


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _commands() -> str:
    """For every study its own command and those of its runs."""
    lines: list[str] = []
    for path in sorted(FOLDER.glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        lines.append(f"{found['command']}  # {found['question']}")
        lines += [f"    {text}" for text in dict.fromkeys(row["command"] for row in found["rows"])]
    return "<!-- runs: no -->\n```bash\n" + "\n".join(lines) + "\n```" if lines else "Not measured."


def _matter(routing: dict[str, Any]) -> bool:
    """The rule of docs/method.md, with G_r against the best dense student as well as against the one of the same recipe."""
    best: list[float | None] = (routing.get("g_r_best") or {}).get("ci95") or [None]
    return bool(routing["experts_matter"]) and (best[0] or 0.0) > 0


def _plane(name: str) -> Figure | None:
    """Excess cross-entropy across, identity upwards, of one study's students of layer 8; full marks where N_r, G_r and ID exceed 0."""
    rows = [row for row in (read(name) or {"rows": []})["rows"] if row["hookpoint"] == "layers.8.mlp" and row["excess_ce"] > 0]
    points = [row for row in rows if row["routing"] and row["routing"]["id"]["value"] is not None]
    if not points:
        return None
    tokens = f"{rows[0]['tokens_trained'] / 1e6:.0f} M token-steps"
    figure = Figure(760, 430, f"Faithfulness against routing, {tokens}", "Excess cross-entropy of every MxD against its ID")
    x = log_axis([row["excess_ce"] for row in rows if row in points or row["k"] in (0, 32)], 60, 720)
    y = Axis(0, max(row["routing"]["id"]["value"] for row in points) * 1.1, 370, 40)
    figure.frame(x, y, "excess cross-entropy, nats (log)", "ID: loss of FVU when it no longer matters which expert fired")
    for top, kind in ((52, "dense"), (66, "skip-transcoder")):
        own = [
            row["excess_ce"] for row in rows if row["kind"] == kind and row["recipe"] in ("ours", "ours+lr=4e-3") and row["k"] in (0, 32)
        ]
        if own:
            at = x(statistics.mean(own))
            figure.line([(at, 40), (at, 370)], "line dash thin", kind)
            figure.text(at + 4, top, f"{NAMES[kind]}, scratch{'' if kind == 'dense' else ', K = 32'}", css="hue", kind=kind)
    for row in points:
        kind = "mxd" if _matter(row["routing"]) else "dense"
        note = f"{row['recipe']}, K = {row['k']}, seed {row['seed']}: excess CE {number(row['excess_ce'])}"
        at, height = x(row["excess_ce"]), y(row["routing"]["id"]["value"])
        figure.marker(at, height, kind, note=note, size=4)
        if len(points) < 10:
            right = at < 480
            figure.text(at + (8 if right else -8), height + 4, row["recipe"], anchor="start" if right else "end", css="soft")
    figure.text(720, 28, f"{tokens} · full: N_r, G_r and ID all above 0 · hollow: not shown", anchor="end", css="soft")
    return figure
