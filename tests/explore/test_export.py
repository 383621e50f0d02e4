"""What is exported is what was collected: the page in one file, SAEDashboard's batches, delphi's cache; and nothing in them runs."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file

from mxd import cli
from mxd.checkpoint import Run
from mxd.errors import ConfigError, MxdError, RunError
from mxd.explore import export, features, schema, unit_page
from mxd.explore.answers import COLUMNS, Answers
from mxd.explore.codes import Codes
from mxd.explore.notes import Notes
from mxd.explore.shelf import Shelf
from mxd.explore.store import TextStore
from mxd.unit_config import ExportConfig
from tests.explore import keepsakes
from tests.explore.handmade import make_store

HOSTILE = "</script><script>document.title='ran'</script><img src=x onerror=alert(1)> \u2028\u202e\x00 end"
SENTENCE = f"a treaty {HOSTILE}"


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two students; of the first, units 2 and 7 have a star and unit 2 a hostile note."""
    run = make_store(tmp_path_factory.mktemp("export"), n_units=120)
    notes, weights = Notes(run), run.weights_sha256("mxd-k2")
    notes.put(weights, 2, "mxd-k2", star=True, text=HOSTILE, tags=["<b>"], expected=None)
    notes.put(weights, 7, "mxd-k2", star=True, text="", tags=[], expected=None)
    notes.save_bench("mxd-k2", *keepsakes.bench_run(HOSTILE, HOSTILE, HOSTILE))
    notes.save_bench("mxd-k2", {"prompt": "not whole"}, {"lanes": {}})
    notes.save_sentence({"text": SENTENCE}, SENTENCE, ["mxd-k2", "dense"], keepsakes.sentence(SENTENCE, ("mxd-k2", "dense"), HOSTILE))
    notes.save_sentence({"text": "elsewhere"}, "elsewhere", ["dense"], keepsakes.sentence("elsewhere", ("dense",)))
    notes.close()
    return run


@pytest.fixture
def answers(stored: Run) -> Iterator[Answers]:
    shelf = Shelf(stored.path)
    yield Answers(shelf)
    shelf.close()


def held(unit: dict[str, Any]) -> dict[str, Any]:
    """A unit that has no more contexts than are shown."""
    return {**unit, "bands": [{**band, "kept": len(band["contexts"])} for band in unit["bands"]]}


def data(page: str) -> dict[str, Any]:
    """The block of data of an exported file."""
    (block,) = re.findall(r'<script type="application/octet-stream" id="mxd-data">([\w+/=]*)</script>', page)
    return json.loads(gzip.decompress(base64.b64decode(block)))


def context(tables: dict[str, Any], packed: dict[str, Any]) -> dict[str, Any]:
    """A context with its text, by what `mxd.explore.packing` says."""
    first, letters, *odd = tables["sequences"][str(packed["seq"])]
    places = [code - 0x20 if code < 0xD800 else code - 0x800 - 0x20 for code in map(ord, letters)]
    ids, texts = ([tables["vocabulary"][name][place] for place in places] for name in ("ids", "texts"))
    for at, text in odd[0] if odd else []:
        texts[at] = text
    shown = slice(packed["start"] - first, packed["start"] - first + packed["n"])
    cuts = [0, *itertools.accumulate(len(text.encode("utf-16-le")) // 2 for text in texts[shown])]
    known = {name: value for name, value in packed.items() if name != "n"}
    document = dict(zip(("name", "source"), tables["docs"][packed["doc"]], strict=True))
    return {**known, "text": "".join(texts[shown]), "cuts": cuts, "ids": ids[shown], "doc": document}


def unit_of(tables: dict[str, Any], packed: dict[str, Any]) -> dict[str, Any]:
    bands = [{**band, "contexts": [context(tables, c) for c in band["contexts"]]} for band in packed["bands"]]
    return {**packed, "bands": bands}


def plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


# ---- the page -------------------------------------------------------------------------------------------------------------------


def test_the_file_holds_what_the_server_answers(stored: Run, answers: Answers) -> None:
    found = data(export.html(stored, top=40, by="fires", contexts=3))
    assert found["format"] == 1 and found["run"] == plain(export.portable(answers.run(), stored.path))
    assert set(found["students"]) == {"mxd-k2", "transcoder-k2"}
    for name, part in found["students"].items():
        units = part["columns"]["units"]
        assert len(units) == part["columns"]["n"] == len(part["units"]) == len(part["rows"]) == 40
        assert part["columns"]["names"] == list(COLUMNS)
        columns = np.frombuffer(base64.b64decode(part["columns"]["data"]), "<f4").reshape(len(COLUMNS), 40)
        np.testing.assert_array_equal(columns, answers.columns(name, COLUMNS)[1][:, units])
        for unit in units:
            assert unit_of(found, part["units"][str(unit)]) == plain(held(unit_page.unit(answers, name, unit, n=3)))
        rows = [part["rows"][str(unit)] for unit in units]
        assert [{**row, "best": context(found, row["best"])} for row in rows] == plain(answers.rows(name, units)["units"])
        assert part["matches"] == plain(answers.matches(name))
    assert found["notes"] == plain(answers.notes()["notes"]) and found["bench"] == plain(answers.benches())
    assert [one["request"]["prompt"] for one in found["bench"]] == [HOSTILE], "what is not whole is left out"
    (kept,) = found["sentences"]
    assert kept["request"] == {"text": SENTENCE} and kept["students"] == ["mxd-k2"], "of the students in the file"
    assert kept["answer"] == keepsakes.sentence(SENTENCE, ("mxd-k2",), HOSTILE)


def test_the_file_says_nothing_of_this_machine_s_folders(stored: Run) -> None:
    page = export.html(stored, students=["mxd-k2"], units=[2])
    about = data(page)["run"]
    assert about["host"] == "host" and [text["name"] for text in about["text"]] == ["texts"]
    assert about["report_why"]["next"] == "mxd eval run"
    assert str(stored.path.parent) not in json.dumps(data(page)) and str(stored.path.parent) not in page
    assert export.portable(["smollm2", "org/name", 3, None, "1 / 2"], stored.path) == ["smollm2", "org/name", 3, None, "1 / 2"]


def test_units_are_the_first_by_a_column(stored: Run, answers: Answers) -> None:
    fires = answers.shelf.units("mxd-k2").store.columns(("fires",))["fires"]
    part = data(export.html(stored, students=["mxd-k2"], top=5, by="fires"))["students"]["mxd-k2"]
    units = part["columns"]["units"]
    assert fires[units].tolist() == sorted(fires.tolist(), reverse=True)[:5] and units[0] == 1


def test_dead_units_are_not_among_the_first(stored: Run, answers: Answers) -> None:
    fires = answers.shelf.units("mxd-k2").store.columns(("fires",))["fires"]
    all_that_fired = export.size(stored, students=["mxd-k2"], top=10_000, by="fires").units
    assert fires[0] == 0 and all_that_fired == (fires > 0).sum() > 80


def test_units_by_number_and_by_star(stored: Run) -> None:
    numbered = data(export.html(stored, students=["transcoder-k2"], units=[5, 0, 5]))
    assert numbered["students"]["transcoder-k2"]["columns"]["units"] == [5, 0]
    assert numbered["notes"] == [] and numbered["bench"] == [], "these are of the other student"
    starred = data(export.html(stored, units="starred"))["students"]
    assert starred["mxd-k2"]["columns"]["units"] == [2, 7] and starred["transcoder-k2"]["columns"]["units"] == []


def test_contexts_are_at_most_so_many(stored: Run) -> None:
    for contexts in (1, 4):
        unit = data(export.html(stored, students=["mxd-k2"], units=[2], contexts=contexts))["students"]["mxd-k2"]["units"]["2"]
        assert max(len(band["contexts"]) for band in unit["bands"]) == contexts


@pytest.mark.parametrize("choice", [{"top": 70, "by": "fires"}, {"top": 40, "by": "max_a", "contexts": 2}, {"units": "starred"}])
def test_the_size_is_known_before(stored: Run, choice: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "SAMPLE", 16)
    monkeypatch.setattr(export, "SAMPLE_TEXTS", 40)
    text, foreseen = export.html(stored, **choice), export.size(stored, **choice)
    assert foreseen.bytes == pytest.approx(len(text.encode()), rel=0.05)
    assert foreseen.units == sum(part["columns"]["n"] for part in data(text)["students"].values())


def test_only_the_one_script_and_the_one_style_may_run(stored: Run) -> None:
    page = export.html(stored, students=["mxd-k2"], units=[2])
    (policy,) = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', page)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:" and rules["base-uri"] == rules["form-action"] == "'none'"
    for name, tag in (("script", "script"), ("style", "style")):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, flags=re.S)
        assert rules[f"{name}-src"] == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    assert page.index(policy) < page.index("<style>") < page.index("<script")
    assert page.count("<script") == page.count("</script") == 2, "the data and the program"
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', page.split("<script>")[0]), "nothing is loaded"
    assert HOSTILE not in page and "onerror=alert" not in page
    (note,) = [note for note in data(page)["notes"] if note["unit"] == 2]
    assert note["text"] == HOSTILE, "what is hostile is kept, as text"


def test_all_scripts_are_there_in_their_order(stored: Run) -> None:
    index = (export.PAGE / "index.html").read_text(encoding="utf-8")
    names = re.findall(r'src="/static/(\w+\.js)"', index)
    page = export.html(stored, students=["mxd-k2"], units=[2])
    at = [page.index((export.PAGE / name).read_text(encoding="utf-8").splitlines()[0]) for name in names]
    unpacks = page.index((export.PAGE / export.UNPACK).read_text(encoding="utf-8").splitlines()[0])
    assert len(names) > 10 and at == sorted(at) and at[0] < unpacks < at[1]


def test_what_would_end_the_script_is_escaped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text(
        '<html><head>\n<meta charset="utf-8">\n<title>x</title>\n<link rel="stylesheet" href="/static/style.css">\n'
        '<script src="/static/a.js" defer></script>\n<script src="/static/b.js" defer></script>\n</head><body></body></html>'
    )
    (tmp_path / "style.css").write_text("p { color: red }")
    (tmp_path / "a.js").write_text('const a = "</script><!-- \\\\1";')
    (tmp_path / "b.js").write_text("const b = a;")
    (tmp_path / export.UNPACK).write_text("unpack();")
    monkeypatch.setattr(export, "PAGE", tmp_path)
    page = export.assemble({"text": HOSTILE}, "<run> & \\1")
    assert r'<script>const a = "<\/script><\!-- \\1";' + "\nunpack();\nconst b = a;</script>" in page
    assert "<title>&lt;run&gt; &amp; \\1</title>" in page and data(page) == {"text": HOSTILE}


def test_the_same_file_twice(stored: Run) -> None:
    assert export.html(stored, top=20, by="fires") == export.html(stored, top=20, by="fires")


def test_a_file_is_replaced_only_when_asked(stored: Run, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    size = export.write_html(stored, path, students=["mxd-k2"], units=[2])
    assert size == (path.stat().st_size, 1)
    with pytest.raises(RunError, match=r"exists already .*--overwrite"):
        export.write_html(stored, path, students=["mxd-k2"], units=[3])
    export.write_html(stored, path, students=["mxd-k2"], units=[3], overwrite=True)
    assert list(data(path.read_text(encoding="utf-8"))["students"]["mxd-k2"]["units"]) == ["3"]
    with pytest.raises(RunError, match="is a folder"):
        export.write_html(stored, tmp_path, overwrite=True)
    assert not list(tmp_path.glob("*.writing"))


def test_a_file_too_large_is_refused(stored: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "LARGEST", 100_000)
    with pytest.raises(ConfigError, match=r"too large .* next: fewer units"):
        export.html(stored, top=50, by="fires")


# ---- other tools ----------------------------------------------------------------------------------------------------------------


def test_delphi_gets_every_firing(stored: Run, tmp_path: Path) -> None:
    features.write(stored, ExportConfig(format="delphi", out=tmp_path / "raw"))
    for record in stored.students:
        folder = tmp_path / "raw" / record.name / "latents" / record.hookpoint
        codes, text = Codes(stored, record.name), TextStore(stored)
        edges: list[tuple[int, int]] = []
        for path in sorted(folder.glob("*.safetensors"), key=lambda path: int(path.stem.split("_")[0])):
            start, end = (int(word) for word in path.stem.split("_"))
            edges.append((start, end))
            found = load_file(path)
            assert all((found["tokens"][seq] == text.sequence(seq).ids).all() for seq in range(codes.sequences))
            token = found["locations"][:, 0].astype(int) * codes.tokens_per_sequence + found["locations"][:, 1]
            for unit in range(start, end + 1):
                of = found["locations"][:, 2] == unit - start
                tokens, values = codes.active(unit)
                assert (token[of] == tokens).all()
                np.testing.assert_allclose(found["activations"][of].astype(float), values, rtol=1e-3)
        assert edges[0][0] == 0 and edges[-1][1] == record.n_units - 1
        assert all(before[1] + 1 == after[0] for before, after in itertools.pairwise(edges))
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        assert config["mxd"]["weights_sha256"] == stored.weights_sha256(record.name) and config["n_splits"] == len(edges)
        assert config["cache_ctx_len"] == codes.tokens_per_sequence and config["n_tokens"] == codes.tokens


def test_delphi_gets_the_units_asked_for(stored: Run, tmp_path: Path) -> None:
    features.write(stored, ExportConfig(format="delphi", out=tmp_path, students=("mxd-k2",), units=(2, 9)))
    folder = tmp_path / "mxd-k2/latents/layers.1.mlp"
    latents = [load_file(path)["locations"][:, 2].astype(int) + int(path.stem.split("_")[0]) for path in folder.glob("*.safetensors")]
    assert set(np.concatenate(latents).tolist()) == {2, 9}
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["mxd"]["units"] == [2, 9]


def test_neuronpedia_gets_what_the_page_shows(stored: Run, answers: Answers, tmp_path: Path) -> None:
    features.write(stored, ExportConfig(format="neuronpedia", out=tmp_path, students=("mxd-k2",), contexts=2))
    folder = tmp_path / "mxd-k2/layers.1.mlp"
    batches = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("batch-*.json"))]
    found = {feature["feature_index"]: feature for batch in batches for feature in batch["features"]}
    store = answers.shelf.units("mxd-k2").store
    fires = store.columns(("fires",))["fires"]
    assert sorted(found) == np.flatnonzero(fires > 0).tolist() and {batch["layer"] for batch in batches} == {1}
    assert (
        json.loads((folder / "skipped_indexes.json").read_text(encoding="utf-8"))["skipped_indexes"] == np.flatnonzero(fires == 0).tolist()
    )
    assert found[2]["n_tokens_in_prompt"] == 32 and found[2]["n_prompts_total"] == Codes(stored, "mxd-k2").sequences
    letter, shown = found[2], unit_page.unit(answers, "mxd-k2", 2, n=2)
    assert letter["frac_nonzero"] == pytest.approx(fires[2] / store.tokens)
    assert sum(letter["freq_hist_data_bar_heights"]) == fires[2] and len(letter["freq_hist_data_bar_values"]) == schema.BINS
    contexts = [context for band in shown["bands"][:6] if band["band"] != schema.TWINS for context in band["contexts"]]
    assert len(letter["activations"]) == len(contexts)
    for activation, context in zip(letter["activations"], contexts, strict=True):
        assert "".join(activation["tokens"]) == context["text"] and len(activation["values"]) == len(context["ids"])
        assert activation["values"][activation["qualifying_token_index"]] == pytest.approx(context["a"], rel=1e-4)
        inside = [i for i, value in enumerate(activation["values"]) if value]
        assert inside == sorted(offset for offset, _ in context["levels"])
        # Unit 2 fires on the letter t with 1 + its position.
        for i in inside:
            assert activation["tokens"][i] == "t"
            assert activation["values"][i] == pytest.approx(1 + context["start"] + i, abs=shown["hist"]["max"] / 255)
    top = letter["activations"][0]
    assert (top["bin_min"], top["bin_contains"]) == (-1, -1) and top["bin_max"] == max(top["values"])
    for activation in letter["activations"][2:]:
        assert activation["bin_min"] <= activation["values"][activation["qualifying_token_index"]] * 1.0001
        assert activation["values"][activation["qualifying_token_index"]] <= activation["bin_max"] * 1.0001


@pytest.mark.parametrize("kind", ["delphi", "neuronpedia"])
def test_an_export_takes_the_place_of_another_only_when_asked(stored: Run, tmp_path: Path, kind: str) -> None:
    config = ExportConfig(format=kind, out=tmp_path, students=("mxd-k2",), units=(1, 2, 3))
    features.write(stored, config)
    stale = next(tmp_path.rglob("batch-0.json" if kind == "neuronpedia" else "0_*.safetensors"))
    shutil.copy(stale, stale.with_name("batch-77.json" if kind == "neuronpedia" else "77_99.safetensors"))
    with pytest.raises(RunError, match="holds an export already"):
        features.write(stored, config)
    features.write(stored, dataclasses.replace(config, overwrite=True))
    assert not list(tmp_path.rglob("*77*")), "of another number of files, none is left"


# ---- errors, and the command line -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"format": "htm"}, "unknown --format .*html, neuronpedia, delphi .*got htm"),
        ({"starred": True, "top": 3}, "one way .*--starred and --top"),
        ({"top": 0}, "--top is a number .*got 0"),
        ({"format": "delphi", "by": "fires"}, "--top with --by"),
        ({"contexts": 0}, "--contexts .*1 to 100"),
        ({"format": "delphi", "contexts": 5}, "every firing"),
        ({"units": (3,)}, "those of one student"),
        ({"by": "fire"}, "no such column .*expected fires"),
        ({"students": ("mxd",)}, "no student of that name .*mxd-k2"),
        ({"students": ("mxd-k2",), "units": (99_999,)}, "no unit 99999"),
        ({"students": ("transcoder-k2",), "starred": True}, "no unit of transcoder-k2 is starred .*mxd explore"),
        ({"by": "score"}, "score is not known of any unit .*--by fires"),
    ],
)
def test_what_does_not_fit_is_told_in_a_line(stored: Run, tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises((ConfigError, RunError), match=said) as caught:
        given: dict[str, Any] = {"out": tmp_path / "out.html", **options}
        features.write(stored, ExportConfig(**given))
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_a_run_of_which_nothing_was_collected(stored: Run, tmp_path: Path) -> None:
    shutil.copytree(stored.path, tmp_path / "run", ignore=shutil.ignore_patterns("explore"))
    run = Run.open(tmp_path / "run")
    for call in (lambda: export.html(run), lambda: export.size(run), lambda: features.write(run, ExportConfig(format="delphi"))):
        with pytest.raises(MxdError, match=r"nothing was collected .*next: mxd collect .*run"):
            call()
    with pytest.raises(MxdError, match=r"nothing was collected about mxd-k2.*next: mxd collect"):
        export.html(run, students=["mxd-k2"])


def test_the_verb(stored: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", str(stored.path), "--top", "3", "--by", "fires", "--students", "mxd-k2"]) == 0
    assert capsys.readouterr().out.startswith("run.html: 3 units, ")
    assert len(data((tmp_path / "run.html").read_text(encoding="utf-8"))["students"]["mxd-k2"]["units"]) == 3
    assert cli.main(["export", str(stored.path), "--format", "delphi", "--students", "mxd-k2"]) == 0
    assert (tmp_path / "run-delphi/mxd-k2/latents/layers.1.mlp/config.json").is_file()
    assert capsys.readouterr().err.startswith("mxd: mxd-k2: ")
    assert cli.main(["export", str(stored.path), "--format", "delphi", "--contexts", "2"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("mxd: error: ") and error.count("\n") == 1


# ---- in a browser ---------------------------------------------------------------------------------------------------------------


class Opened(NamedTuple):
    """A page in Chromium, without a network."""

    page: Any
    said: list[str]
    """On the console, and errors."""
    asked: list[str]
    """Addresses that something was asked of."""


@pytest.fixture
def opens(browser: Any) -> Iterator[Callable[..., Opened]]:
    """Opens a file at a route."""
    context = browser.new_context(offline=True, viewport={"width": 1280, "height": 900})

    def opened(path: Path, route: str) -> Opened:
        found = Opened(context.new_page(), [], [])
        found.page.on("console", lambda message: found.said.append(message.text))
        found.page.on("pageerror", lambda error: found.said.append(str(error)))
        found.page.on("request", lambda request: found.asked.append(request.url))
        found.page.goto(f"{path.as_uri()}{route}")
        return found

    yield opened
    context.close()


@pytest.mark.browser
def test_every_view_opens_from_a_file_and_asks_for_nothing(stored: Run, tmp_path: Path, opens: Callable[..., Opened]) -> None:
    path = tmp_path / "page.html"
    export.write_html(stored, path, units="starred")
    views = {"": "mxd-k2", "#/mxd-k2/units": "2 of 2", "#/mxd-k2/unit/2": "expert 2", "#/mxd-k2/sentence": "exported file"}
    views |= {"#/mxd-k2/bench": "exported file", "#/mxd-k2/compare": "transcoder-k2", "#/mxd-k2/notes": "Notes"}
    for route, text in views.items():
        found = opens(path, route)
        found.page.wait_for_function("text => document.getElementById('main').innerText.includes(text)", arg=text, timeout=10_000)
        found.page.wait_for_timeout(200)
        assert found.said == [] and {url.split("#")[0] for url in found.asked} <= {path.as_uri()}, route
        assert found.page.title() != "ran"
        found.page.close()


@pytest.mark.browser
def test_kept_sentences_are_read_without_the_model(stored: Run, tmp_path: Path, opens: Callable[..., Opened]) -> None:
    path = tmp_path / "page.html"
    export.write_html(stored, path, units="starred")
    found = opens(path, "#/mxd-k2/sentence")
    found.page.get_by_role("button", name="read: a treaty").click()
    found.page.wait_for_selector(".sent")
    text = found.page.inner_text("#main")
    assert "host 1.00, replaced 2.00, Δ +1.00" in text.replace("\u2009", " ") and "img src=x" in text, text
    assert found.page.get_by_role("button", name="Keep this sentence").count() == 0
    assert found.page.title() != "ran"
    other = opens(path, "#/transcoder-k2/sentence")
    other.page.get_by_role("button", name="read: a treaty").click()
    other.page.wait_for_function("document.getElementById('main').innerText.includes('did not read this sentence')")
    assert found.said == [] == other.said


@pytest.mark.browser
def test_the_unit_page_shows_the_numbers_of_the_store(stored: Run, answers: Answers, tmp_path: Path, opens: Callable[..., Opened]) -> None:
    path = tmp_path / "page.html"
    export.write_html(stored, path, students=["mxd-k2"], units=[2])
    page = opens(path, "#/mxd-k2/unit/2").page
    page.wait_for_function("document.getElementById('main').innerText.includes('expert 2')")
    row = answers.shelf.units("mxd-k2").store.row(2)
    text = page.inner_text("#main")
    assert f"{row['fires']:.0f} of {answers.shelf.units('mxd-k2').store.tokens:,} tokens" in text and f"{row['max_a']:.1f}" in text
    assert page.evaluate("mxd.source.unit('mxd-k2', 2)") == plain(unit_page.unit(answers, "mxd-k2", 2))
    assert page.evaluate("mxd.source.rows('mxd-k2', [2])") == plain(answers.rows("mxd-k2", [2]))
    cut = page.evaluate("mxd.source.unit('mxd-k2', 2, {band: 1, from: 2, n: 3})")
    assert cut == plain(
        {**unit_page.unit(answers, "mxd-k2", 2), "bands": unit_page.unit(answers, "mxd-k2", 2, band=1, start=2, n=3)["bands"]}
    )
    assert page.evaluate("async () => (await mxd.source.columns('mxd-k2', ['fires'])).fires[2]") == row["fires"]
    note = page.evaluate("async () => (await mxd.source.note('mxd-k2', 2)).text")
    assert note == HOSTILE and page.input_value("textarea") == HOSTILE, "as text, to the last character"


PLANTED = {
    "a second script": "<script>document.title = 'ran'</script>",
    "a handler": "<img src='data:,' onerror=\"document.title = 'ran'\">",
    "a script from elsewhere": "<script src='data:text/javascript,document.title=1'></script>",
    "a style": "<style>body { display: none }</style>",
    "a form": "<form id='away' action='https://example.invalid/'><input name='q'></form><base href='https://example.invalid/'>",
}


@pytest.mark.browser
@pytest.mark.parametrize("what", PLANTED)
def test_what_is_planted_in_the_file_is_refused(what: str, stored: Run, tmp_path: Path, opens: Callable[..., Opened]) -> None:
    path = tmp_path / "page.html"
    page = export.html(stored, students=["mxd-k2"], units=[2])
    path.write_text(page.replace("</header>", f"</header>{PLANTED[what]}", 1), encoding="utf-8")
    found = opens(path, "#/mxd-k2/unit/2")
    found.page.wait_for_function("document.getElementById('main').innerText.includes('expert 2')")
    if what == "a form":
        found.page.evaluate("document.getElementById('away').submit()")
    found.page.wait_for_timeout(300)
    assert any("Content Security Policy" in text for text in found.said), found.said
    assert found.page.title() not in ("ran", "1") and found.page.is_visible("#main")
    assert not any(url.startswith("http") for url in found.asked)
