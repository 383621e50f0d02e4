"""What is left to train: a run folder as it is against the run that is asked for.

A run goes on where it was broken off, takes more students, or is prolonged; each of these gives the same bits however often it is broken
off in between.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import resume
from .checkpoint import StudentRecord, read_info, records
from .config import TrainConfig
from .errors import ConfigError, RunError
from .plan import train_steps
from .resume import State
from .run_writer import check_writable
from .train import StudentSpec
from .typed import plain

log = logging.getLogger("mxd")

FREE = ("out", "overwrite", "resume", "activations", "save_every_minutes", "save_every_tokens", "keep_state")
"""Options that may differ from those that a run was begun with: they change none of its numbers. Which activations they are is checked by
their checksum."""
ADDING = ("kinds", "k")
"""Options by which students are added to a finished run."""


class Leg(NamedTuple):
    """A stretch of training text with a shuffle buffer of its own; a run has one, and one more each time it is prolonged."""

    tokens: int
    """Tokens of text."""
    steps: int
    """Optimiser steps."""


class Course(NamedTuple):
    """What is left to train."""

    config: TrainConfig
    """Of the whole run."""
    legs: tuple[Leg, ...]
    """All of them, also those that lie behind."""
    state: State | None = None
    """Where to go on; None from the start."""
    info: dict[str, Any] | None = None
    """run.json of the run that is gone on with; None for a new one."""
    kept: tuple[StudentRecord, ...] = ()
    """Students that are finished and stay as they are."""

    @property
    def step(self) -> int:
        """Steps done."""
        return self.state.step if self.state else 0

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return sum(leg.steps for leg in self.legs)

    def left(self, specs: Sequence[StudentSpec]) -> list[StudentSpec]:
        """Those that are still to be trained."""
        kept = {record.name for record in self.kept}
        return [spec for spec in specs if spec.name not in kept]


def merged(config: TrainConfig) -> TrainConfig:
    """The configuration of the run that ``--resume`` names, changed by the options that were given beside it.

    Raises:
        RunError: there is no run.
    """
    assert config.resume is not None
    made = options_of(Path(config.resume))
    given: dict[str, Any] = {
        f.name: value for f in dataclasses.fields(config) if (value := getattr(config, f.name)) != f.default and f.name != "out"
    }
    return dataclasses.replace(made, **given)


def options_of(path: Path) -> TrainConfig:
    """The options that the run at `path` was begun with, and ``out`` and ``resume`` where it lies now.

    Raises:
        RunError: there is no run.
    """
    made = read_info(path)["config"]
    values: dict[str, Any] = {f.name: made[f.name] for f in dataclasses.fields(TrainConfig) if f.name in made}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    for name in ("out", "activations"):
        values[name] = None if values.get(name) is None else Path(values[name])
    return dataclasses.replace(TrainConfig(**values), out=path, resume=path, overwrite=False)


def course(config: TrainConfig, *, going_on: bool) -> Course | None:
    """What is left of the run that `config` (as `plan.settled`) asks for, by what lies in its folder; None if nothing is.

    Args:
        config: of the whole run.
        going_on: the user named the run to go on with (``--resume``); without it, a finished run is left alone.

    Raises:
        RunError: the folder holds another run, or one that cannot be gone on with.
    """
    new = Course(config, (Leg(config.tokens, train_steps(config.tokens, config)),))
    path = config.out
    if config.overwrite or not (path / "run.json").is_file():
        check_writable(path, overwrite=config.overwrite)
        return new
    info = read_info(path)
    if info.get("finished") and not going_on:
        check_writable(path, overwrite=False)
    state = resume.newest(path)
    made = info["config"]
    changed = changes(made, config)
    if not info.get("finished") and not info.get("students") and state is None:
        return new  # broken off before anything was kept
    legs = _legs(info) or (Leg(made["tokens"], train_steps(made["tokens"], config)),)
    training = set(state.numbers if state else info.get("adding", ()))
    found = Course(config, legs, state, info, tuple(record for record in records(path, info) if record.name not in training))
    if state is None and not info.get("finished") and not info.get("adding"):
        raise RunError(f"{path} holds an interrupted run without a state to go on from", next="add --overwrite to train it from the start")
    if not changed:
        return None if info.get("finished") else found
    if changed == ["tokens"] and config.tokens > sum(leg.tokens for leg in legs):
        return _prolonged(found)
    if set(changed) <= set(ADDING) and info.get("finished"):
        return _with_more_students(found)
    if not going_on:
        check_writable(path, overwrite=False)
    words = ", ".join(f"--{name.replace('_', '-')} {info['config'].get(name)}" for name in changed)
    raise RunError(
        f"{path} was begun with other options",
        expected=words,
        got=", ".join(str(plain(config)[name]) for name in changed),
        next="leave them out, or choose another --out; only --tokens can grow, and --kinds and --k of a finished run",
    )


def _legs(info: Mapping[str, Any]) -> tuple[Leg, ...]:
    try:
        return tuple(Leg(*leg) for leg in info.get("legs", ()))
    except TypeError as error:
        raise RunError("run.json is damaged", expected="legs of (tokens, steps)", got=str(error)) from None


def changes(made: Mapping[str, Any], config: TrainConfig) -> list[str]:
    """The options by which `config` asks for other numbers than those that a run with the options `made` (of its run.json) has."""
    return [name for name, value in plain(config).items() if name not in FREE and not _same(made[name], value)]


def _prolonged(found: Course) -> Course:
    """One more leg: the text behind that of the others, in a shuffle buffer of its own; the schedule is that of all steps together."""
    if found.state is None:
        raise RunError(
            f"{found.config.out} cannot be prolonged",
            expected="the state of its students",
            got="their weights alone",
            next="train it with --keep-state, or the whole of it anew",
        )
    if found.kept:
        raise RunError(f"{found.config.out} cannot be prolonged", expected="the state of every student", got="students added later")
    tokens = found.config.tokens - sum(leg.tokens for leg in found.legs)
    if tokens < found.config.tokens_per_step:
        raise ConfigError("--tokens grows by less than a step", expected=f"{found.config.tokens_per_step:,} more", got=f"{tokens:,} more")
    return found._replace(legs=(*found.legs, Leg(tokens, train_steps(tokens, found.config))))


def _with_more_students(found: Course) -> Course:
    """The new ones take the whole pass from its beginning, as if they had trained beside the others."""
    if len(found.legs) > 1:
        raise RunError(
            f"{found.config.out} was prolonged", expected="a run in one leg to add students to", next="train them with another --out"
        )
    assert found.info is not None
    return found._replace(state=None, kept=tuple(records(found.config.out, found.info)))


def check_students(found: Course, specs: Sequence[StudentSpec]) -> None:
    """Raise `RunError` unless every student of the run so far is among `specs`, and the state is of those that are left."""
    names = [spec.name for spec in specs]
    gone = [record.name for record in found.kept if record.name not in names]
    if gone:
        raise RunError(
            f"{found.config.out} holds students that are not asked for",
            expected="--kinds and --k that cover them",
            got=", ".join(gone),
            next="name all of --kinds and --k, those that are there and the new ones",
        )
    if found.state and {spec.name for spec in found.left(specs)} != set(found.state.numbers):
        raise RunError(f"{found.state.path} is of other students", expected=", ".join(names), got=", ".join(found.state.numbers))


def check_source(found: Course, source: dict[str, Any]) -> None:
    """Raise `RunError` if host, text or activations are not those of the run so far."""
    if found.info is None:
        return
    for name in ("host", "text", "activations"):
        was, now = (dict(about.get(name) or {}) for about in (found.info, source))
        for about in (was, now):
            about.pop("path", None)
        if not _same(was, now):
            different = list(_different(was, now))
            raise RunError(
                f"{found.config.out} was begun with another {name}",
                expected=", ".join(f"{key} {str(value)[:60]}" for key, value, _ in different),
                got=", ".join(f"{key} {str(value)[:60]}" for key, _, value in different),
                next="put back what was there, or choose another --out",
            )


def warn_of_other_bits(found: Course, made: dict[str, Any]) -> None:
    """Say so if versions or threads are not those of the run so far: rounding may differ then."""
    if found.info is None:
        return
    was = {**found.info.get("versions", {}), **found.info.get("machine", {})}
    now = {**made["versions"], **made["machine"]}
    names = [name for name in ("torch", "transformers", "processor", "threads", "device") if was.get(name) != now.get(name)]
    if names:
        changes = ", ".join(f"{name} {was.get(name)} is now {now.get(name)}" for name in names)
        log.warning("the bits may differ from those of a run that was never stopped: %s", changes)


def _different(was: Any, now: Any, at: str = "") -> Iterator[tuple[str, Any, Any]]:
    """What differs between two values out of JSON, as deep as it can be named: (where, was, is now)."""
    if isinstance(was, dict) and isinstance(now, dict):
        for key in sorted(was.keys() | now.keys()):
            yield from _different(was.get(key), now.get(key), f"{at}.{key}" if at else key)
    elif isinstance(was, (list, tuple)) and isinstance(now, (list, tuple)) and len(was) == len(now):
        for number, (one, other) in enumerate(zip(was, now, strict=True), 1):
            yield from _different(one, other, f"{at} {number}")
    elif was != now:
        yield at, was, now


def _same(a: Any, b: Any) -> bool:
    """Equal, where one has been through a file."""
    return _listed(a) == _listed(b)


def _listed(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_listed(item) for item in value]
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in value.items()}
    return value
