"""Studies: a harvest, runs and evaluations on a tiny host; what is finished is kept; every number has its command."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from mxd import pipeline, studies, study
from mxd.cli import main, parse
from mxd.config import EvalConfig, StudyConfig, TrainConfig
from mxd.errors import ConfigError
from mxd.plan import check
from mxd.studies import STUDIES, Study

from .small import save_host, save_texts


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    host, text = save_host(tmp_path / "host"), save_texts(tmp_path / "texts")
    base = TrainConfig(
        host=str(host), text=(str(text),), layers=("1",), kinds=("transcoder", "dense"), k=(2,), budget="4000", tokens=2048,
        tokens_per_step=256, buffer_tokens=512, tokens_per_sequence=128, probe_every_steps=1000,
    )  # fmt: skip
    made = Study(
        "tiny", "Does it run?", (dataclasses.replace(base, out=Path("first")), dataclasses.replace(base, out=Path("second"), seed=1))
    )
    monkeypatch.setitem(STUDIES, "tiny", made)
    evaluate = pipeline.evaluate

    def quicker(run: Any, config: EvalConfig, *, quiet: bool = False) -> Any:
        return evaluate(run, dataclasses.replace(config, fit_tokens=512, bootstrap=50), quiet=quiet)

    monkeypatch.setattr(pipeline, "evaluate", quicker)
    return made


def test_a_study_runs_is_kept_and_goes_on(
    tiny: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = StudyConfig(name="tiny", out=tmp_path / "out", sequences=6)
    trained: list[Path] = []
    harvested: list[Path] = []
    train, harvest = pipeline.train, pipeline.harvest
    monkeypatch.setattr(pipeline, "harvest", lambda config, **how: harvested.append(config.out) or harvest(config, **how))

    def counted(config: TrainConfig, *, quiet: bool = False) -> Any:
        trained.append(config.out)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return train(config, quiet=quiet)

    monkeypatch.setattr(pipeline, "train", counted)
    with pytest.raises(KeyboardInterrupt):
        study.run(config, quiet=True, say=lambda _: None)
    kept = json.loads((tmp_path / "out" / "tiny.json").read_text())
    assert [row["run"] for row in kept["rows"]] == ["first", "first"], "what is finished is written at once"
    found = study.run(config, quiet=True, say=lambda _: None)
    assert [p.name for p in trained] == ["first", "second", "second"], "the first run is not trained again"
    assert len(harvested) == 1, "nor is the text read again"
    assert [row["name"] for row in found["rows"]] == ["transcoder-k2", "dense"] * 2
    assert {row["seed"] for row in found["rows"]} == {0, 1} and found["question"] == "Does it run?"
    assert json.loads((tmp_path / "out" / "tiny.json").read_text()) == found
    assert main(["study", "tiny", "--out", str(tmp_path / "out"), "--sequences", "6"]) == 0
    shown = capsys.readouterr().out
    assert "Does it run?" in shown and shown.count("transcoder-k2") == 2 and len(trained) == 3


def test_the_command_beside_a_row_gives_the_row(tiny: Study, tmp_path: Path) -> None:
    found = study.run(StudyConfig(name="tiny", out=tmp_path / "out", sequences=6), quiet=True, say=lambda _: None)
    row = found["rows"][-1]
    words = shlex.split(row["command"])
    assert words[:2] == ["mxd", "train"] and "--seed" in words
    again = dataclasses.replace(parse("train", words[2:]), out=tmp_path / "again")
    report = pipeline.evaluate(pipeline.train(again, quiet=True), EvalConfig(sequences=6), quiet=True)
    assert report["students"][-1]["excess_ce"] == row["excess_ce"]


def test_fewer_tokens_and_precision_reach_the_runs(tiny: Study, tmp_path: Path) -> None:
    config = StudyConfig(name="tiny", out=tmp_path / "out", sequences=6, tokens=1024, precision="bf16")
    found = study.run(config, quiet=True, say=lambda _: None)
    assert {row["tokens_trained"] for row in found["rows"]} == {1024} and found["precision"] == "bf16"
    assert all("--precision bf16" in row["command"] and "--tokens 1024" in row["command"] for row in found["rows"])


def test_runs_of_another_configuration_are_trained_again(tiny: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = StudyConfig(name="tiny", out=tmp_path / "out", sequences=6)
    study.run(config, quiet=True, say=lambda _: None)
    monkeypatch.setitem(STUDIES, "tiny", tiny._replace(runs=(dataclasses.replace(tiny.runs[0], lr=1e-3), tiny.runs[1])))
    trained: list[str] = []
    train = pipeline.train

    def counted(config: TrainConfig, *, quiet: bool = False) -> Any:
        trained.append(config.out.name)
        return train(config, quiet=quiet)

    monkeypatch.setattr(pipeline, "train", counted)
    study.run(config, quiet=True, say=lambda _: None)
    assert trained == ["first"]


def test_other_activations_in_its_folder_are_left_alone(tiny: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = StudyConfig(name="tiny", out=tmp_path / "out", sequences=6)
    study.run(config, quiet=True, say=lambda _: None)
    manifest = next((tmp_path / "out").glob("activations-*/manifest.json"))
    about = json.loads(manifest.read_text())
    about["config"]["seed"] = 7
    manifest.write_text(json.dumps(about))
    with pytest.raises(ConfigError, match=r"holds other activations.*got seed 7"):
        study.run(config, quiet=True, say=lambda _: None)
    assert json.loads(manifest.read_text()) == about


def test_every_study_is_a_runnable_configuration() -> None:
    for name, found in STUDIES.items():
        assert found.name == name and found.question.endswith(("?", ".")) and found.runs
        assert len({run.out for run in found.runs}) == len(found.runs), "runs need names of their own"
        for run in found.runs:
            check(run)
            assert parse("train", shlex.split(study.command(run))[2:]) == run
    help_text = StudyConfig.__doc__ or ""
    assert help_text and studies.COMPARISON_TOKENS >= 1_000_000


def test_without_a_name_the_studies_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study"]) == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) == len(STUDIES) and all(s.name in shown and s.question in shown for s in STUDIES.values())


def test_unknown_studies_and_impossible_tokens_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "tunning"]) == 1
    said = capsys.readouterr().err
    assert "unknown study" in said and "tuning" in said and "comparison" in said and said.count("\n") == 1
    with pytest.raises(ConfigError, match="--tokens must be at least 1"):
        study.narrowed(STUDIES["tuning"], StudyConfig(name="tuning", tokens=0))
