"""Runs a study: one harvest, its runs trained from it and evaluated, and one JSON file of what came out, a command beside every number.

What is finished is not run again: stopped with Ctrl-C, the same command goes on.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import pipeline
from .cache import Cache
from .checkpoint import STATE, Run
from .config import EvalConfig, HarvestConfig, StudyConfig, TrainConfig
from .course import changes
from .devices import find_device
from .errors import ConfigError, MxdError
from .evals.brief import brief
from .ops import current, using
from .plan import settled
from .recipes import Recipe, chosen
from .sealed import read_json, write_json
from .studies import Study, study
from .typed import plain

FORMAT_VERSION = 1
KEPT = (
    *("name", "kind", "k", "recipe", "seed", "hookpoint", "is_control", "n_units", "params", "tokens_trained", "tokens_per_second"),
    *("stopped", "ce", "excess_ce", "excess_ce_ci95", "excess_ce_sums", "ce_recovered", "kl", "top1_agreement", "fvu", "fvu_ci95", "nmse"),
    *("l0", "dead_fraction", "max_firing_frequency"),
)
"""What is kept of a student's report."""
ABOUT = ("host", "base_ce", "eval_tokens", "eval_sequences", "document_sequences", "split", "versions", "machine")
"""What is kept of a report besides its students."""
ROUTING = ("n_r", "g_r", "g_r_best", "id", "r_c", "fvu_null", "fvu_dense", "fvu_best_constant", "modulation_cv", "experts_matter")
"""What is kept of its routing."""


def run(config: StudyConfig, *, quiet: bool = False, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run a study, or what is missing of it, and write ``OUT/NAME.json``.

    Args:
        config: which study, where, and how its runs are computed.
        quiet: no progress bars.
        say: told in a line what is done next.

    Returns:
        What was written: question, protocol, and one row per student with the command that trains it.

    Raises:
        ConfigError: unknown study.
        MxdError: those of harvesting, training and evaluating.
    """
    wanted = narrowed(study(config.name), config)
    config = dataclasses.replace(config, precision=resolved(config.precision))
    cache = _activations(wanted.harvest(config.out), quiet, say)
    path = config.out / f"{wanted.name}.json"
    rows: list[dict[str, Any]] = []
    about: dict[str, Any] = {}
    for number, base in enumerate(wanted.runs, 1):
        train = dataclasses.replace(base, out=config.out / wanted.name / base.out, activations=cache, precision=config.precision)
        say(f"{wanted.name}, run {number} of {len(wanted.runs)}: {command(train)}")
        evaluation = EvalConfig(split=wanted.split, sequences=config.sequences, parts=wanted.parts)
        report = pipeline.evaluate(_trained(train, quiet), evaluation, quiet=quiet)
        rows += [_row(student, report, train, evaluation) for student in report["students"]]
        about |= {key: report[key] for key in ABOUT}
        finished = number == len(wanted.runs)
        # A table that was whole stays until there is a whole one again.
        if finished or not _is_finished(path):
            write_json(path, _result(config, wanted, rows, about, finished=finished))
    return _result(config, wanted, rows, about, finished=True)


def resolved(precision: str) -> str:
    """What ``auto`` comes to on this machine, so that a table says what its numbers were made with."""
    with using(precision=precision):
        return current().product(find_device("auto"))


def _is_finished(path: Path) -> bool:
    try:
        return bool(read_json(path).get("finished"))
    except (MxdError, AttributeError):
        return False


def narrowed(found: Study, config: StudyConfig) -> Study:
    """The study with fewer tokens, where --tokens asks for that: to see that everything runs, not for its numbers."""
    if config.tokens is None:
        return found
    if config.tokens < 1:
        raise ConfigError("--tokens must be at least 1", got=str(config.tokens))
    tokens = config.tokens
    runs = (
        dataclasses.replace(r, tokens=tokens, buffer_tokens=min(r.buffer_tokens, tokens), tokens_per_step=min(r.tokens_per_step, tokens))
        for r in found.runs
    )
    return found._replace(runs=tuple(runs))


def _activations(wanted: HarvestConfig, quiet: bool, say: Callable[[str], None]) -> Path:
    """The folder of the study's activations, harvested first if they are not there."""
    names = ("host", "text", "tokens_per_sequence", "layers", "tokens", "seed", "store", "dtype")
    if (wanted.out / "manifest.json").is_file():
        cache = Cache.open(wanted.out)
        made, asked = cache.info["config"], _as_json(wanted)
        different = [name for name in names if made[name] != asked[name]]
        if different or not cache.info["finished"]:
            got = ", ".join(f"{name} {made[name]}" for name in different) or "a harvest that was stopped"
            raise ConfigError(f"{wanted.out} holds other activations", expected="this study's", got=got, next="move or remove that folder")
        return wanted.out
    say(f"harvesting {wanted.tokens:,} tokens of layers {', '.join(wanted.layers)}")
    return pipeline.harvest(wanted, quiet=quiet).path


def _trained(config: TrainConfig, quiet: bool) -> Run:
    """The finished run of this configuration, trained now if it is not there yet.

    Raises:
        ConfigError: its folder holds a finished run of another configuration, recipe or harvest, which is never replaced.
    """
    try:
        found = Run.open(config.out)
    except MxdError:
        found = None
    if found is None or not found.info.get("finished"):
        goes_on = (config.out / STATE).is_dir()
        return pipeline.train(dataclasses.replace(config, overwrite=config.out.exists() and not goes_on), quiet=quiet)
    assert config.activations is not None
    cache = Cache.open(config.activations)
    made = found.info["config"]
    different = [f"{name} {made.get(name)}" for name in changes(made, settled(config, cache.info["config"]))]
    # A recipe's name can come to stand for other numbers, and a folder for another harvest.
    defaults = {field.name: field.default for field in dataclasses.fields(Recipe)}
    recipes = {kind: [defaults | recipe for recipe in own] for kind, own in found.info.get("recipes", {}).items()}
    if recipes != json.loads(json.dumps({kind: [dataclasses.asdict(recipe) for recipe in chosen(config, kind)] for kind in config.kinds})):
        different.append("recipes defined otherwise")
    if (found.info.get("activations") or {}).get("manifest_sha256") != cache.sha256:
        different.append("another harvest")
    if different:
        raise ConfigError(
            f"{config.out} holds a finished run of another configuration",
            expected="what the study asks for now",
            got=", ".join(different),
            next="move that folder, or choose another --out",
        )
    return found


def _as_json(config: TrainConfig | HarvestConfig) -> dict[str, Any]:
    """A configuration as it comes back out of a file: tuples as lists."""
    return json.loads(json.dumps(plain(config)))


def command(config: TrainConfig | HarvestConfig | EvalConfig | StudyConfig, run: Path | None = None) -> str:
    """The command line of a stage: every option that is not at its default. `run` is the folder that ``mxd eval`` is about."""
    verb = {TrainConfig: "train", HarvestConfig: "harvest", EvalConfig: "eval", StudyConfig: "study"}[type(config)]
    words = ["mxd", verb, *([str(run)] if run else [])]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == getattr(type(config), field.name) or field.name == "overwrite":
            continue
        # The name of a study stands by itself.
        words += ["--" + field.name.replace("_", "-")] if (verb, field.name) != ("study", "name") else []
        if value is not True:
            words += [shlex.quote(str(v)) for v in (value if isinstance(value, tuple) else (value,))]
    return " ".join(words)


def _row(student: dict[str, Any], report: dict[str, Any], config: TrainConfig, evaluation: EvalConfig) -> dict[str, Any]:
    routing, hookpoint = student.get("routing"), student["hookpoint"]
    kept = {key: student.get(key) for key in KEPT}
    zero = report["zero_ablation_ce"]
    kept["zero_ablation_ce"] = zero.get(hookpoint) if isinstance(zero, dict) else zero
    kept["routing"] = {key: routing.get(key) for key in ROUTING} if routing else None
    commands = {"run": config.out.name, "command": command(config), "evaluation": command(evaluation, config.out)}
    return {**kept, **brief(student), **commands}


def _result(config: StudyConfig, wanted: Study, rows: list[dict[str, Any]], about: dict[str, Any], *, finished: bool) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "study": wanted.name,
        "question": wanted.question,
        "finished": finished,
        "command": command(config),
        "harvest": command(wanted.harvest(config.out)),
        "precision": config.precision,
        **about,
        "rows": rows,
    }
