"""Edits of a student: the file, what it refuses, and its way through generate, eval, report and Python."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import mxd
from mxd import cli, edits
from mxd.checkpoint import Run
from mxd.config import EditConfig
from mxd.edits import Edit
from mxd.errors import ConfigError, LayerError, RunError
from mxd.evals import report, suite
from mxd.host import Host
from tests import small

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = ("--sequences", 8, "--fit-tokens", 1024, "--bootstrap", 20, "--permutations", 1)


class Said(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three students on a tiny host."""
    folder = tmp_path_factory.mktemp("edits")
    host, texts, out = small.save_host(folder / "host", layers=3), small.save_texts(folder / "texts"), folder / "run"
    command: list[object] = ["train", "--out", out, "--host", host, "--text", texts, "--kinds", "mxd", "transcoder", "dense"]
    command += ["--tokens", 2048, "--tokens-per-step", 256, "--buffer-tokens", 2048, "--k", 4, "--layers", 1]
    assert cli.main([str(arg) for arg in command]) == 0
    return out


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    def command(*args: object) -> Said:
        capsys.readouterr()
        code = cli.main([str(arg) for arg in args])
        said = capsys.readouterr()
        return Said(code, said.out, said.err)

    return command


def error_of(said: Said) -> str:
    assert said.code == 1, said
    lines = [line for line in said.err.splitlines() if not line.startswith("evaluating:")]
    assert len(lines) == 1 and lines[0].startswith("mxd: error: "), said.err
    return lines[0].removeprefix("mxd: error: ")


def written(run: Path, path: Path, **changes: Any) -> Path:
    """An edit of mxd-k4 as a file, with some of its fields replaced; those set to None are left out."""
    opened = Run.open(run)
    whole: dict[str, Any] = {
        "format_version": 1,
        "kind": "mxd-edit",
        "student": "mxd-k4",
        "hookpoint": "layers.1.mlp",
        "weights_sha256": opened.weights_sha256("mxd-k4"),
        "host": "tiny",
        "scale": {"3": 0.0},
        "add": {"5": 2.5},
        **changes,
    }
    path.write_text(json.dumps({key: value for key, value in whole.items() if value is not None}))
    return path


# the file


def test_the_command_writes_a_small_file_that_reads_back(say: Callable[..., Said], run: Path, tmp_path: Path) -> None:
    out = tmp_path / "french.json"
    said = say("edit", run, "--student", "mxd-k4", "--ablate", 3, 4, "--scale", "6=0.5", "7=-2", "--add", "8=3.5", "3=1e1", "--out", out)
    assert said.code == 0 and said.err == ""
    assert said.out.splitlines()[0] == f"{out}: mxd-k4 at layers.1.mlp: ablates 3, 4; scales 6 by 0.5, 7 by -2; adds 10 to 3, 3.5 to 8"
    assert f"next: mxd generate {run} --edit {out}" in said.out
    found = json.loads(out.read_text())
    assert found == {
        "format_version": 1,
        "kind": "mxd-edit",
        "student": "mxd-k4",
        "hookpoint": "layers.1.mlp",
        "weights_sha256": Run.open(run).weights_sha256("mxd-k4"),
        "host": Run.open(run).info["host"]["name"],
        "scale": {"3": 0.0, "4": 0.0, "6": 0.5, "7": -2.0},
        "add": {"8": 3.5, "3": 10.0},
    }
    assert out.stat().st_size < 500
    edit = edits.read(out)
    assert edit.scale == {3: 0.0, 4: 0.0, 6: 0.5, 7: -2.0} and edit.add == {8: 3.5, 3: 10.0}
    edits.write(tmp_path / "again.json", edit)
    assert (tmp_path / "again.json").read_bytes() == out.read_bytes()


def test_an_edit_is_never_overwritten_unasked(say: Callable[..., Said], run: Path, tmp_path: Path) -> None:
    out = tmp_path / "edit.json"
    command = ("edit", run, "--student", "mxd-k4", "--out", out, "--ablate")
    assert say(*command, 1).code == 0
    before = out.read_bytes()
    assert "exists already | expected a new file" in error_of(say(*command, 2))
    assert out.read_bytes() == before
    assert say(*command, 2, "--overwrite").code == 0 and edits.read(out).scale == {2: 0.0}
    assert "is a folder" in error_of(say("edit", run, "--student", "mxd-k4", "--out", tmp_path, "--ablate", 2, "--overwrite"))


BAD: list[tuple[list[object], list[str]]] = [
    ([], ["nothing to edit", "next: mxd edit --help"]),
    (["--scale", "3=1", "--add", "4=0"], ["nothing to edit", "scaled by other than 1"]),
    (["--ablate", 100_000], ["no unit 100000 in mxd-k4", "expected a number from 0 to "]),
    (["--ablate", -1], ["no unit -1 in mxd-k4"]),
    (["--ablate", 3, 3], ["3 is given twice in --ablate and --scale", "expected each unit once"]),
    (["--ablate", 3, "--scale", "3=2"], ["3 is given twice in --ablate and --scale"]),
    (["--add", "3=1", "3=2"], ["3 is given twice in --add"]),
    (["--scale", "3=nan"], ["cannot edit unit 3 of mxd-k4", "expected a finite number", "got nan"]),
    (["--add", "3=inf"], ["cannot edit unit 3 of mxd-k4", "got inf"]),
    (["--scale", "3"], ["--scale takes UNIT=NUMBER", "such as 17=0.5", "got 3"]),
    (["--add", "three=1"], ["--add takes UNIT=NUMBER", "got three=1"]),
    (["--ablate", "three"], ["three", "next: mxd edit --help"]),
    (["--student", "mxd-k5", "--ablate", 3], ["no student of that name", "expected mxd-k4", "got mxd-k5"]),
    (["--student", "dense", "--ablate", 0], ["dense has no units to edit", "got dense"]),
]


@pytest.mark.parametrize(("args", "words"), BAD, ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "")
def test_what_the_command_refuses(say: Callable[..., Said], trained: Path, tmp_path: Path, args: list[object], words: list[str]) -> None:
    out = tmp_path / "edit.json"
    student = [] if "--student" in args else ["--student", "mxd-k4"]
    line = error_of(say("edit", trained, "--out", out, *student, *args))
    for word in words:
        assert word in line
    assert not out.exists()


def test_the_student_is_asked_for_only_where_there_are_several(trained: Path) -> None:
    opened = Run.open(trained)
    with pytest.raises(ConfigError, match=r"--student is needed: the run has several \| expected mxd-k4, transcoder-k4, dense"):
        edits.make(EditConfig(ablate=(1,)), opened)
    opened.students = opened.students[1:2]
    assert edits.make(EditConfig(ablate=(1,)), opened).student == "transcoder-k4"


DAMAGED: dict[str, tuple[dict[str, Any], str]] = {
    "newer": ({"format_version": 2}, r"not of a format that this mxd can read \| expected format_version up to 1 \| got 2 \| next: pip"),
    "no version": ({"format_version": None}, "format_version up to 1 | got None"),
    "another kind": ({"kind": "sae"}, 'no "kind": "mxd-edit"'),
    "no student": ({"student": None}, "got no 'student'"),
    "a name that is a number": ({"student": 7}, "a name that is not a text"),
    "a list": ({"scale": [3]}, "units and numbers that are not a JSON object"),
    "not a unit": ({"scale": {"three": 0.0}}, "three"),
    "a unit in two ways": ({"scale": {"03": 0.0}}, "03 is not the number of a unit"),
    "a text": ({"scale": {"3": "0"}}, "0 for unit 3 is not a finite number"),
    "not finite": ({"add": {"3": float("nan")}}, "nan for unit 3 is not a finite number"),
    "nothing": ({"scale": {"3": 1.0}, "add": {}}, "changes nothing"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_files_that_are_no_edit(say: Callable[..., Said], trained: Path, tmp_path: Path, name: str) -> None:
    changes, words = DAMAGED[name]
    path = written(trained, tmp_path / "edit.json", **changes)
    with pytest.raises((RunError, ConfigError)) as caught:
        edits.read(path)
    assert words.replace("\\|", "|") in str(caught.value) and str(path) in str(caught.value)
    assert error_of(say("generate", trained, "--edit", path)) == str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"kind": "mxd-edit", "kind": "mxd-edit"}', '"text"', "\x00"])
def test_damaged_json(trained: Path, tmp_path: Path, content: str) -> None:
    path = tmp_path / "edit.json"
    path.write_text(content)
    with pytest.raises(RunError, match=r"edit.json is not an edit, or is damaged \| expected the JSON that mxd edit writes"):
        mxd.load_edit(path, trained)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(RunError, match="damaged"):
        mxd.load_edit(path, trained)


def test_a_unit_twice_in_a_file_written_by_hand(trained: Path, tmp_path: Path) -> None:
    path = written(trained, tmp_path / "edit.json")
    path.write_text(path.read_text().replace('"3": 0.0', '"3": 0.0, "3": 2.0'))
    with pytest.raises(RunError, match=r"3 is given twice in edit\.json"):
        edits.read(path)


@pytest.mark.parametrize("verb", ["generate", "eval"])
def test_edits_that_belong_elsewhere(say: Callable[..., Said], trained: Path, tmp_path: Path, verb: str) -> None:
    cases = {
        "made for another mxd-k4: unit numbers mean nothing in other weights": {"weights_sha256": "0" * 64},
        "expected sha256": {"hookpoint": "layers.2.mlp"},
        "no student of that name": {"student": "mxd-k8"},
        "no unit 99999 in mxd-k4": {"scale": {"99999": 0.0}},
        "dense has no units": {"student": "dense", "weights_sha256": Run.open(trained).weights_sha256("dense")},
    }
    for words, changes in cases.items():
        assert words in error_of(say(verb, trained, "--edit", written(trained, tmp_path / "edit.json", **changes)))
    assert f"there is no edit at {tmp_path / 'none.json'}" in error_of(say(verb, trained, "--edit", tmp_path / "none.json"))
    assert "there is no edit at" in error_of(say(verb, trained, "--edit", tmp_path))


# use


def test_in_python_and_in_the_host(trained: Path, tmp_path: Path) -> None:
    path = written(trained, tmp_path / "edit.json", add={"5": 40.0})
    opened = Run.open(trained)
    host, layer = Host.load(opened.info["config"]["host"]), opened.load("mxd-k4")
    ids = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
    with host.replace({1: mxd.load_edit(path, trained)}):
        ours = host.logits(ids)
    with host.replace({1: mxd.load_edit(str(path), opened)}):
        again = host.logits(ids)
    with host.replace({1: Edit("", "", "", scale={3: 0.0}, add={5: 40.0}).apply(layer)}):
        by_hand = host.logits(ids)
    with host.replace({1: layer}):
        plain = host.logits(ids)
    assert torch.equal(ours, by_hand) and torch.equal(ours, again)
    assert (ours - plain).abs().max() > 1e-5
    assert not mxd.load_edit(path, trained).training
    with pytest.raises(LayerError, match="no expert 99999"):
        Edit("", "", "", scale={99999: 0.0}).apply(layer)


def test_generate_shows_one_more_lane(say: Callable[..., Said], trained: Path, tmp_path: Path) -> None:
    path = written(trained, tmp_path / "louder.json", add={"5": 1e6})
    plain = say("generate", trained, "--new-tokens", 6).out
    said = say("generate", trained, "--new-tokens", 6, "--edit", path)
    assert said.code == 0, said.err
    rows = [line for line in said.out.splitlines() if "louder" in line]
    assert len(rows) == 1 and "mxd-k4" in said.out and "transcoder-k4" in said.out
    assert "louder" not in plain
    only = say("generate", trained, "--new-tokens", 6, "--edit", path, "--students", "transcoder-k4").out
    assert "louder" in only and "transcoder-k4" in only


def test_eval_measures_the_edited_student_and_leaves_the_plain_report(say: Callable[..., Said], run: Path, tmp_path: Path) -> None:
    assert say("eval", run, *QUICK).code == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    plain = report.read(Run.open(run))
    edit = written(run, tmp_path / "louder.json", add={"5": 1e4})
    said = say("eval", run, *QUICK, "--edit", edit)
    assert said.code == 0, said.err
    assert "report-edit-louder.html" in said.out
    assert {path: path.read_bytes() for path in before} == before
    names = {path.name for path in run.iterdir() if path.is_file()} - {path.name for path in before}
    assert names == {f"report-edit-louder.{kind}" for kind in ("json", "md", "html")} | {"frontier-edit-louder.svg"}
    found = report.read(Run.open(run), "test", "louder")
    assert found["edit"] == "louder" and [s["name"] for s in found["students"]] == ["mxd-k4"]
    own = next(s for s in plain["students"] if s["name"] == "mxd-k4")
    assert found["base_ce"] == plain["base_ce"]
    assert found["students"][0]["fvu"] > 100 * own["fvu"] and found["students"][0]["ce"] != own["ce"]
    assert found["students"][0]["max_firing_frequency"] == 1.0, "the unit that is added to fires at every token, once"
    for kind in ("md", "html"):
        assert "Edited (louder): mxd-k4 at layers.1.mlp: ablates 3; adds 10000 to 5" in (run / f"report-edit-louder.{kind}").read_text()
    # Drawn again by its name; the student that the edit is for cannot be another.
    (run / "report-edit-louder.md").unlink()
    assert say("report", run, "--edit", edit).code == 0 and (run / "report-edit-louder.md").is_file()
    assert "another student" in error_of(say("eval", run, *QUICK, "--edit", edit, "--students", "transcoder-k4"))
    assert f"next: mxd eval {run} --edit quiet.json" in error_of(say("report", run, "--edit", "quiet.json"))


def test_another_edit_of_the_same_name_is_measured_again(say: Callable[..., Said], run: Path, tmp_path: Path) -> None:
    figures: list[float] = []
    for value in (1e4, 1e5):
        edit = written(run, tmp_path / "louder.json", add={"5": value})
        assert say("eval", run, *QUICK, "--edit", edit).code == 0
        figures.append(report.read(Run.open(run), "test", "louder")["students"][0]["fvu"])
    assert figures[1] > 10 * figures[0]


def test_file_endings_never_meet() -> None:
    assert suite.ending("test", None) == ""
    found = [suite.ending(split, edit) for split in ("test", "validation") for edit in (None, "validation", "paper", "a")]
    assert len(set(found)) == len(found)
