"""The suite: which parts there are, and how each is measured for each student, kept, and taken up again after a stop.

Every finished measurement is a file of its own, ``RUN/evals/PART/STUDENT.json``, with the settings it was made under. The same
command goes on where it stopped; other settings, other weights or a newer version of the part measure again.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint import Run, StudentRecord
from ..config import PARTS, EvalConfig
from ..errors import ConfigError, LayerError, MxdError, RunError, nearest
from ..sealed import read_json, write_sealed
from .parts import Part, Section, Shared, Student, Subject, finite, missing

if TYPE_CHECKING:
    from ..host import Host
    from ..layers import SparseLayer
    from ..text import Corpus

log = logging.getLogger("mxd")

SUITES: dict[str, tuple[str, ...]] = {"quick": (), "full": PARTS, "paper": PARTS}
"""The parts of each suite; faithfulness and routing belong to all of them."""
_MODULES = {
    "generation_agreement": "generation",
    "probes": "probing",
    "steering": "steering",
    "anatomy": "anatomy",
    "selectivity": "selectivity",
    "cost": "cost",
}

Progress = Callable[[float, str], None]


def part(name: str) -> Part:
    """The part of that name."""
    return import_module(f".{_MODULES[name]}", __package__).PART


_BOUNDS: tuple[tuple[str, str, float, float], ...] = (
    ("generation_agreement", "agreement_prompts", 1, math.inf),
    ("generation_agreement", "agreement_tokens", 1, math.inf),
    ("generation_agreement", "agreement_temperature", 0, 1e6),
    ("probes", "probe_samples_per_class", 1, math.inf),
    ("steering", "steer_units", 2, math.inf),
    ("steering", "steer_samples", 2, math.inf),
    ("steering", "steer_scale", -1e6, 1e6),
    ("anatomy", "anatomy_tokens", 1, math.inf),
    ("anatomy", "jacobian_tokens", 1, math.inf),
    ("selectivity", "selectivity_units", 1, math.inf),
    ("selectivity", "selectivity_documents", 2, math.inf),
)


def check(config: EvalConfig) -> None:
    """Refuse before anything is measured what no part could be measured with.

    Raises:
        ConfigError: unknown suite or part, or a number out of its bounds.
    """
    parts = wanted(config)
    for name, option, low, high in _BOUNDS:
        value = getattr(config, option)
        if name in parts and value is not None and not low <= value <= high:
            least = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
            raise ConfigError(f"--{option.replace('_', '-')} makes no sense", expected=least, got=f"{value}")


def wanted(config: EvalConfig) -> tuple[str, ...]:
    """The parts that a configuration asks for: those of its suite, or its own choice.

    Raises:
        ConfigError: an unknown suite or part.
    """
    if config.suite not in SUITES:
        raise ConfigError("unknown --suite", expected=", ".join(SUITES), got=config.suite)
    for name in config.parts:
        if name not in PARTS:
            raise ConfigError("unknown part in --parts", expected=f"{nearest(name, PARTS)}; all: {', '.join(PARTS)}", got=name)
    return config.parts or SUITES[config.suite]


def ending(split: str, edit: str | None) -> str:
    """What the names of files end in, so that figures on validation text or of an edited student leave the plain ones untouched."""
    return ("" if split == "test" else f"-{split}") + (f"-edit-{edit}" if edit else "")


class Kept:
    """The measurements kept in a run folder, for one configuration."""

    def __init__(self, run: Run, config: EvalConfig, fingerprint: str) -> None:
        self.run, self.config, self.fingerprint = run, config, fingerprint
        self._end = ending(config.split, config.edit.stem if config.edit else None)

    def settings(self, name: str, version: int, options: Sequence[str], record: StudentRecord | None) -> dict[str, Any]:
        """What a measurement depends on. Of the suite only whether it is the paper's, and not even that for what has one protocol."""
        config = self.config
        always = ("split", "seed", "bootstrap")
        return {
            "part": name,
            "version": version,
            "paper": self._paper(name),
            **{key: finite(_plain(getattr(config, key))) for key in dict.fromkeys((*always, *options))},
            "edit": hashlib.sha256(config.edit.read_bytes()).hexdigest() if config.edit else None,
            "weights": self.run.weights_sha256(record.name) if record else None,
            "host": self.fingerprint,
            "text": self.run.info.get("text"),
        }

    def path(self, name: str, student: str) -> Path:
        """Where a measurement lies."""
        return self.run.path / "evals" / name / f"{student}{'-paper' if self._paper(name) else ''}{self._end}.json"

    def _paper(self, name: str) -> bool:
        return name in PARTS and self.config.suite == "paper"

    def read(self, name: str, student: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """The figures measured under these settings; None if there are none, or the file is damaged."""
        path = self.path(name, student)
        if not path.is_file():
            return None
        try:
            found = read_json(path)
        except RunError as error:
            log.warning("%s; measured again", error)
            return None
        return found.get("figures") if isinstance(found, dict) and found.get("settings") == settings else None

    def write(self, name: str, student: str, settings: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, Any]:
        """Keep figures; returns them as JSON would give them back."""
        clean = finite(figures)
        write_sealed(self.path(name, student), {"settings": dict(settings), "figures": clean})
        return clean


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


def measure(
    kept: Kept,
    records: Sequence[StudentRecord],
    load: Callable[[StudentRecord], SparseLayer],
    host: Host,
    corpus: Corpus,
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """Figures of every part that is wanted, for every student: {student: {part: figures}}.

    A part that cannot be measured for a student (an `MxdError`) is reported as missing, said as a warning, and tried again next time.

    Args:
        kept: what is there already, and where new figures go.
        records: the students.
        load: gives a student's layer, on the host's device.
        host, corpus: as in `Subject`.
        progress: called with the number of measurements done so far (a fraction of the present one included), and a word.
    """
    found: dict[str, dict[str, Any]] = {record.name: {} for record in records}
    number = 0
    for name in wanted(kept.config):
        shared = Shared()
        own = part(name)
        for record in records:
            settings = part_settings(kept, own, record, host)
            figures = kept.read(name, record.name, settings)
            if figures is None or figures.get("incomplete"):  # something from outside was not to be had: try again

                def say(share: float, note: str, name: str = name, record: StudentRecord = record, number: int = number) -> None:
                    progress(number + min(max(share, 0.0), 1.0), f"{name} of {record.name}: {note}")

                say(0.0, "starting")
                try:
                    subject = Subject(kept.run, record, _sound(load(record)), host, corpus, kept.config, shared, say)
                    figures = kept.write(name, record.name, settings, own.measure(subject))
                except MxdError as error:
                    log.warning("%s of %s is missing: %s", name, record.name, error)
                    figures = missing(str(error))
            found[record.name][name] = figures
            number += 1
            progress(number, f"{name} of {record.name}")
    return found


def part_settings(kept: Kept, own: Part, record: StudentRecord, host: Host) -> dict[str, Any]:
    """What a part's figures of one student depend on; for times, the machine as well."""
    settings = kept.settings(own.name, own.version, own.options, record)
    machine = {"device": str(host.device), "dtype": str(host.dtype), "threads": torch.get_num_threads()}
    return settings | ({"machine": machine} if own.on_machine else {})


def _sound(layer: SparseLayer) -> SparseLayer:
    """The layer, if its weights are numbers.

    Raises:
        LayerError: they are not, as after a training that diverged.
    """
    broken = [name for name, value in layer.state_dict().items() if not bool(value.isfinite().all())]
    if broken:
        raise LayerError("this student diverged", expected="finite weights", got=f"others in {', '.join(broken)}", next="train it again")
    return layer


def already(kept: Kept, record: StudentRecord, host: Host) -> dict[str, Any]:
    """Figures of the parts that are not wanted this time but were measured under the same settings."""
    found: dict[str, Any] = {}
    for name in PARTS:
        if name not in wanted(kept.config) and kept.path(name, record.name).is_file():
            figures = kept.read(name, record.name, part_settings(kept, part(name), record, host))
            if figures is not None:
                found[name] = figures
    return found


def sections(students: Sequence[Student]) -> list[Section]:
    """What the report shows of the parts measured for these students."""
    shown: list[Section] = []
    for name in PARTS:
        have = [s for s in students if s.get(name)]
        if have:
            own = list(part(name).show(have))
            why = {s["name"]: s[name]["missing"] for s in have if "missing" in s[name]}
            if why and own:
                own[-1] = own[-1]._replace(
                    notes=[*own[-1].notes, *(f"{student}: not measured: {reason}" for student, reason in why.items())]
                )
            elif why:
                own = [Section(name.replace("_", " "), [f"{student}: not measured: {reason}" for student, reason in why.items()])]
            shown += own
    return shown
