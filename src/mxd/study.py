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
from .checkpoint import Run, write_json
from .config import EvalConfig, HarvestConfig, StudyConfig, TrainConfig
from .errors import ConfigError, MxdError
from .evals.brief import brief
from .plan import settled
from .run_info import plain
from .studies import Study, study

FORMAT_VERSION = 1
KEPT = (
    *("name", "kind", "k", "recipe", "seed", "hookpoint", "is_control", "n_units", "params", "tokens_trained", "tokens_per_second"),
    *("stopped", "ce", "excess_ce", "excess_ce_ci95", "ce_recovered", "kl", "top1_agreement", "fvu", "fvu_ci95", "nmse"),
    *("l0", "dead_fraction", "max_firing_frequency"),
)
"""What is kept of a student's report."""
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
    cache = _activations(wanted.harvest(config.out), quiet, say)
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {}
    for number, base in enumerate(wanted.runs, 1):
        train = dataclasses.replace(base, out=config.out / wanted.name / base.out, activations=cache, precision=config.precision)
        say(f"{wanted.name}, run {number} of {len(wanted.runs)}: {command(train)}")
        trained = _trained(train, quiet)
        report = pipeline.evaluate(trained, EvalConfig(split=wanted.split, sequences=config.sequences, parts=wanted.parts), quiet=quiet)
        rows += [_row(student, train) for student in report["students"]]
        about = {key: report[key] for key in ("host", "base_ce", "zero_ablation_ce", "eval_tokens", "eval_sequences", "split", "versions")}
        result = _write(config, wanted, rows, about)
    return result


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
    """The finished run of this configuration; trained now if it is not there yet, or was made of another one."""
    try:
        found = Run.open(config.out)
    except MxdError:
        found = None
    if found is not None and found.info.get("finished"):
        cached = Cache.open(config.activations).info["config"] if config.activations else None
        expected = _as_json(settled(config, cached))
        if all(found.info["config"][name] == value for name, value in expected.items() if name != "overwrite"):
            return found
    return pipeline.train(dataclasses.replace(config, overwrite=config.out.exists()), quiet=quiet)


def _as_json(config: TrainConfig | HarvestConfig) -> dict[str, Any]:
    """A configuration as it comes back out of a file: tuples as lists."""
    return json.loads(json.dumps(plain(config)))


def command(config: TrainConfig) -> str:
    """The command line of a training run: every option that is not at its default."""
    words = ["mxd", "train"]
    for field in dataclasses.fields(TrainConfig):
        value = getattr(config, field.name)
        if value == getattr(TrainConfig, field.name) or field.name == "overwrite":
            continue
        words.append("--" + field.name.replace("_", "-"))
        if value is not True:
            words += [shlex.quote(str(v)) for v in (value if isinstance(value, tuple) else (value,))]
    return " ".join(words)


def _row(student: dict[str, Any], config: TrainConfig) -> dict[str, Any]:
    routing = student.get("routing")
    kept = {key: student.get(key) for key in KEPT}
    kept["routing"] = {key: routing.get(key) for key in ROUTING} if routing else None
    kept |= brief(student)
    return {**kept, "run": config.out.name, "command": command(config)}


def _write(config: StudyConfig, wanted: Study, rows: list[dict[str, Any]], about: dict[str, Any]) -> dict[str, Any]:
    result = {
        "format_version": FORMAT_VERSION,
        "study": wanted.name,
        "question": wanted.question,
        "command": f"mxd study {wanted.name}" + (f" --precision {config.precision}" if config.precision != StudyConfig.precision else ""),
        "precision": config.precision,
        **about,
        "rows": rows,
    }
    write_json(config.out / f"{wanted.name}.json", result)
    return result
