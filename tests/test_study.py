"""Studies: a harvest, runs and evaluations on a tiny host; what is finished is kept; every number has its command."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from mxd import config, pipeline, recipes, studies, study
from mxd.cli import main, parse
from mxd.config import EvalConfig, StudyConfig, TrainConfig
from mxd.errors import ConfigError
from mxd.plan import check, train_steps
from mxd.sealed import read_json, write_sealed
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
    assert [row["run"] for row in kept["rows"]] == ["first", "first"] and not kept["finished"], "what is finished is written at once"
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
    harvested = parse("harvest", shlex.split(found["harvest"])[2:])
    assert (harvested.layers, harvested.tokens) == (("1",), 2048)
    evaluation = parse("eval", shlex.split(row["evaluation"])[2:])
    assert (evaluation.sequences, evaluation.run.name) == (6, "second")
    again_study = parse("study", shlex.split(found["command"])[2:])
    assert (again_study.name, again_study.sequences, again_study.precision) == ("tiny", 6, "fp32"), "auto is settled"
    assert row["zero_ablation_ce"] == report["zero_ablation_ce"]


def test_fewer_tokens_and_precision_reach_the_runs(tiny: Study, tmp_path: Path) -> None:
    config = StudyConfig(name="tiny", out=tmp_path / "out", sequences=6, tokens=1024, precision="bf16")
    found = study.run(config, quiet=True, say=lambda _: None)
    assert {row["tokens_trained"] for row in found["rows"]} == {1024} and found["precision"] == "bf16"
    assert all("--precision bf16" in row["command"] and "--tokens 1024" in row["command"] for row in found["rows"])


def test_a_finished_run_of_another_configuration_is_never_replaced(tiny: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = StudyConfig(name="tiny", out=tmp_path / "out", sequences=6, precision="fp32")
    study.run(config, quiet=True, say=lambda _: None)
    weights = tmp_path / "out" / "tiny" / "first" / "run.json"
    before = weights.read_bytes()
    for changed, got in ((dataclasses.replace(config, precision="bf16"), "precision fp32"), (dataclasses.replace(config, tokens=1024), "")):
        with pytest.raises(ConfigError, match=rf"holds a finished run of another configuration.*{got}|holds other activations"):
            study.run(changed, quiet=True, say=lambda _: None)
    recipe = recipes.RECIPES["ours"]["transcoder"]
    monkeypatch.setitem(recipes.RECIPES["ours"], "transcoder", dataclasses.replace(recipe, learning_rate=1e-5))
    with pytest.raises(ConfigError, match="recipes defined otherwise"):
        study.run(config, quiet=True, say=lambda _: None)
    monkeypatch.setitem(recipes.RECIPES["ours"], "transcoder", recipe)
    about = read_json(weights)
    about["activations"]["manifest_sha256"] = "0" * 64
    write_sealed(weights, about)
    with pytest.raises(ConfigError, match="another harvest"):
        study.run(config, quiet=True, say=lambda _: None)
    weights.write_bytes(before)
    study.run(config, quiet=True, say=lambda _: None)


def test_a_whole_table_is_not_replaced_by_half_a_one(tiny: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = StudyConfig(name="tiny", out=tmp_path / "out", sequences=6)
    whole = study.run(config, quiet=True, say=lambda _: None)
    assert whole["finished"]
    evaluate, seen = pipeline.evaluate, list[Any]()

    def stopping(run: Any, config: EvalConfig, *, quiet: bool = False) -> Any:
        if seen:
            raise KeyboardInterrupt
        seen.append(run)
        return evaluate(run, config, quiet=quiet)

    monkeypatch.setattr(pipeline, "evaluate", stopping)
    with pytest.raises(KeyboardInterrupt):
        study.run(config, quiet=True, say=lambda _: None)
    assert json.loads((tmp_path / "out" / "tiny.json").read_text()) == whole


def test_other_activations_in_its_folder_are_left_alone(tiny: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = StudyConfig(name="tiny", out=tmp_path / "out", sequences=6)
    study.run(config, quiet=True, say=lambda _: None)
    manifest = next((tmp_path / "out").glob("activations-*/manifest.json"))
    about = read_json(manifest)
    about["config"]["seed"] = 7
    write_sealed(manifest, about)
    with pytest.raises(ConfigError, match=r"holds other activations.*got seed 7"):
        study.run(config, quiet=True, say=lambda _: None)
    assert read_json(manifest) == about


def test_every_study_is_a_runnable_configuration() -> None:
    for name, found in STUDIES.items():
        assert found.name == name and found.question.endswith(("?", ".")) and found.runs
        assert len({run.out for run in found.runs}) == len(found.runs), "runs need names of their own"
        for run in found.runs:
            check(run)
            assert parse("train", shlex.split(study.command(run))[2:]) == run
            for recipe in (recipe for kind in run.kinds for recipe in recipes.chosen(run, kind)):
                assert 10 * recipe.warmup_steps <= train_steps(run.tokens, run), f"{name}: {recipe.name} would only warm up"
    assert studies.COMPARISON_TOKENS >= 1_000_000
    for help_page in (cli_docs(), (StudyConfig.__doc__ or "") + Path(config.__file__).read_text(encoding="utf-8")):
        assert all(name in help_page for name in STUDIES), "every study is named in the help"


def cli_docs() -> str:
    return (Path(__file__).parents[1] / "docs" / "cli.md").read_text(encoding="utf-8")


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
