"""The suite as a whole: what is finished is kept, whatever is asked for next; a stop goes on; bad input costs nothing finished."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mxd.config import PARTS, EvalConfig
from mxd.errors import ConfigError, TextError
from mxd.evals import suite
from mxd.evals.evaluate import evaluate
from mxd.evals.parts import Found, Part, Section, Student, Subject, Table
from mxd.sealed import read_json, write_sealed
from mxd.text import Corpus

from .hosts import tiny_llama, write_run, write_text

SMALL = EvalConfig(sequences=20, fit_tokens=512, bootstrap=50, permutations=2)
Asked = list[tuple[str, str]]


class World:
    def __init__(self, folder: Path) -> None:
        self.host = tiny_llama()
        text = write_text(folder / "text")
        self.corpus = Corpus(str(text))
        self.run = write_run(folder / "run", text, kinds=("mxd", "transcoder", "dense"))
        self.two_layers = write_run(folder / "two", text, kinds=("transcoder",), hookpoints=("layers.0.mlp", "layers.1.mlp"))

    def evaluate(self, **options: Any) -> dict[str, Any]:
        return evaluate(self.run, self.host, self.corpus, dataclasses.replace(SMALL, **options))


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Asked]:
    """Every part replaced by one that notes what it is asked for and returns a number; anatomy depends on an option of its own."""
    noted: Asked = []

    def part(name: str) -> Part:
        def measure(subject: Subject) -> Found:
            noted.append((name, subject.record.name))
            subject.say(0.5, "half")
            return {"value": len(noted), "prompts": subject.config.agreement_prompts}

        def show(students: list[Student]) -> list[Section]:
            return [
                Section(f"Part {name}", ["words"], [Table("caption", ["student", "value"], [[s["name"], "1 [0, 2]"] for s in students])])
            ]

        return Part(name, 1, ("agreement_prompts",) if name == "generation_agreement" else (), measure, show)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(suite, "part", part)
    yield noted


def test_every_part_is_measured_once_for_every_student_and_shown(world: World, asked: Asked) -> None:
    report = world.evaluate(suite="full")
    names = [s["name"] for s in report["students"]]
    assert asked == [(part, name) for part in PARTS for name in names]
    assert all(set(PARTS) <= set(s) for s in report["students"]) and report["suite"] == "full"
    page, text = ((world.run.path / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "md"))
    assert all(f"Part {name}" in page and f"### Part {name}" in text for name in PARTS)
    assert "1<small>[0, 2]</small>" in page and "1 [0, 2]" in text


def test_nothing_finished_is_measured_again_whatever_is_asked_next(world: World, asked: Asked) -> None:
    first = world.evaluate(suite="full")
    count = len(asked)
    quick = world.evaluate()
    assert [{k: v for k, v in s.items()} for s in quick["students"]] == first["students"], "a quick look keeps what is known"
    world.evaluate(parts=("cost",))
    world.evaluate(suite="full")
    assert len(asked) == count
    world.evaluate(suite="paper")
    assert len(asked) == 2 * count, "the published protocols give other figures"
    world.evaluate(suite="full")
    assert len(asked) == 2 * count, "and leave ours where they are"


def test_faithfulness_is_measured_once(world: World, asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    before = world.evaluate()
    monkeypatch.setattr(type(world.host), "logits", lambda *_: pytest.fail("the host ran again"))
    for options in ({}, {"suite": "full"}, {"suite": "paper"}, {"parts": ("probes",)}):
        assert world.evaluate(**options)["students"][0]["excess_ce"] == before["students"][0]["excess_ce"]


def test_another_option_version_or_weights_measure_again(world: World, asked: Asked) -> None:
    world.evaluate(suite="full")
    asked.clear()
    report = world.evaluate(suite="full", agreement_prompts=7)
    assert {name for name, _ in asked} == {"generation_agreement"} and report["students"][0]["generation_agreement"]["prompts"] == 7
    asked.clear()
    world.evaluate(suite="full", seed=1)
    assert {name for name, _ in asked} == set(PARTS)
    world.evaluate(suite="full", agreement_prompts=7)
    asked.clear()
    changed = world.run.path / world.run.student("transcoder-k4").folder / "cfg.json"
    about = read_json(changed)
    about["mxd"]["weights_sha256"] = "0" * 64
    kept = suite.Kept(world.run, SMALL, world.host.fingerprint)
    before = kept.settings("cost", 1, (), world.run.student("transcoder-k4"))
    write_sealed(changed, about)
    assert kept.settings("cost", 1, (), world.run.student("transcoder-k4")) != before
    assert kept.settings("cost", 2, (), None) != kept.settings("cost", 1, (), None)


def test_after_a_stop_the_same_command_goes_on(world: World, asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    original = suite.part

    def stopping(name: str) -> Part:
        made = original(name)

        def measure(subject: Subject) -> Found:
            if len(asked) == 4:
                raise KeyboardInterrupt
            return made.measure(subject)

        return made._replace(measure=measure)

    monkeypatch.setattr(suite, "part", stopping)
    with pytest.raises(KeyboardInterrupt):
        world.evaluate(suite="full")
    monkeypatch.setattr(suite, "part", original)
    report = world.evaluate(suite="full")
    assert len(asked) == len(set(asked)) == len(PARTS) * len(report["students"])


def test_a_damaged_file_is_measured_again_and_said(world: World, asked: Asked, caplog: pytest.LogCaptureFixture) -> None:
    world.evaluate(suite="full")
    asked.clear()
    (world.run.path / "evals" / "cost" / "dense.json").write_text("{half")
    world.evaluate(suite="full")
    assert asked == [("cost", "dense")] and "is damaged" in caplog.text


def test_a_part_that_cannot_be_measured_is_missing_with_its_reason(
    world: World, asked: Asked, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = suite.part

    def failing(name: str) -> Part:
        def measure(_: Subject) -> Found:
            raise TextError("no such texts", next="fetch them")

        return original(name)._replace(measure=measure) if name == "probes" else original(name)

    monkeypatch.setattr(suite, "part", failing)
    report = world.evaluate(suite="full")
    assert report["students"][0]["probes"] == {"missing": "no such texts | next: fetch them"} and "cost" in report["students"][0]
    assert "probes of mxd-k4 is missing: no such texts" in caplog.text
    assert "mxd-k4: not measured: no such texts" in (world.run.path / "report.md").read_text(encoding="utf-8")
    monkeypatch.setattr(suite, "part", original)
    assert "missing" not in world.evaluate(suite="full")["students"][0]["probes"], "tried again next time"


def test_a_student_that_diverged_is_missing_and_the_others_are_measured(
    world: World, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = type(world.run).load

    def broken(run: Any, name: str, device: Any = "cpu") -> Any:
        layer = load(run, name, device)
        if name == "transcoder-k4":
            with torch.no_grad():
                next(iter(layer.parameters())).fill_(float("nan"))
        return layer

    monkeypatch.setattr(type(world.run), "load", broken)
    students = {s["name"]: s for s in world.evaluate(suite="full")["students"]}
    assert students["transcoder-k4"]["cost"]["missing"].startswith("this student diverged")
    assert "value" in students["mxd-k4"]["cost"]


def test_ablations_of_every_hookpoint_stay_whatever_was_measured_first(world: World, asked: Asked) -> None:
    run, whole = world.two_layers, None
    for names in ((run.students[0].name,), (), ()):
        whole = evaluate(run, world.host, world.corpus, dataclasses.replace(SMALL, students=names))
    assert whole is not None
    assert set(whole["zero_ablation_ce"]) == {"layers.0.mlp", "layers.1.mlp"}
    assert all(isinstance(ce, float) for key in ("zero_ablation_ce", "mean_ablation_ce") for ce in whole[key].values())


def test_figures_that_hold_for_one_machine_depend_on_it(world: World, asked: Asked) -> None:
    record, kept = world.run.students[0], suite.Kept(world.run, SMALL, world.host.fingerprint)
    own = suite.part("cost")
    threads = torch.get_num_threads()
    settings = [suite.part_settings(kept, own._replace(on_machine=flag), record, world.host) for flag in (False, True)]
    try:
        torch.set_num_threads(threads + 1)
        again = [suite.part_settings(kept, own._replace(on_machine=flag), record, world.host) for flag in (False, True)]
    finally:
        torch.set_num_threads(threads)
    assert again[0] == settings[0] and again[1] != settings[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"suite": "ful"}, r"^unknown --suite \| expected quick, full, paper \| got ful$"),
        ({"parts": ("probs",)}, r"^unknown part in --parts \| expected .*probes.*; all: generation_agreement, .* \| got probs$"),
        ({"suite": "full", "steer_units": 1}, r"^--steer-units makes no sense \| expected at least 2 \| got 1$"),
        ({"suite": "full", "steer_scale": float("nan")}, r"^--steer-scale makes no sense \| expected between"),
        ({"parts": ("anatomy",), "jacobian_tokens": 0}, r"^--jacobian-tokens makes no sense"),
        ({"parts": ("selectivity",), "selectivity_units": 0}, r"^--selectivity-units makes no sense"),
        ({"parts": ("generation_agreement",), "agreement_prompts": 0}, r"^--agreement-prompts makes no sense"),
    ],
)
def test_bad_options_are_refused_before_anything_is_measured(
    world: World, asked: Asked, options: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(world.host), "logits", lambda *_: pytest.fail("something was measured"))
    with pytest.raises(ConfigError, match=said):
        world.evaluate(**options)


def test_an_option_of_a_part_that_is_not_asked_for_does_not_matter(world: World, asked: Asked) -> None:
    assert world.evaluate(steer_units=0)["students"]
