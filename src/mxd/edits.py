"""An edit of a student as a small JSON file: units ablated, scaled or added to.

::

    {"format_version": 1, "kind": "mxd-edit", "host": "smollm2", "student": "mxd-k32", "hookpoint": "layers.8.mlp",
     "weights_sha256": "…", "scale": {"17": 0.0}, "add": {"4711": 3.5}}
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from .checkpoint import Run, StudentRecord
from .config import EditConfig
from .errors import ConfigError, RunError
from .sealed import write_json

if TYPE_CHECKING:
    import torch

    from .layers import Edited, SparseLayer

FORMAT_VERSION = 1
"""Version of the file; a newer one is refused."""
KIND = "mxd-edit"
"""What the file says it is."""

Value = TypeVar("Value")


@dataclass(frozen=True)
class Edit:
    """What is changed in one student's activations, after its gate: a_n ← s_n a_n + λ_n."""

    student: str
    """Name of the student in its run."""
    hookpoint: str
    """The MLP it stands in for."""
    weights_sha256: str
    """Checksum of its weights: unit numbers mean nothing in another layer."""
    host: str = ""
    """Name of the host it was trained on; for the reader."""
    scale: dict[int, float] = field(default_factory=dict)
    """Factor s_n by unit; 0 ablates."""
    add: dict[int, float] = field(default_factory=dict)
    """λ_n by unit: what is added to the unit's activation at every token, in the units of the activation."""

    def apply(self, layer: SparseLayer) -> Edited:
        """The edited layer; `layer` stays as it is, and the two share their weights.

        Raises:
            LayerError: `layer` has no such unit.
        """
        from .layers import Edited

        return Edited(layer, scale=self.scale, add=self.add)

    def summary(self) -> str:
        """What it does, in a line."""
        ablated = sorted(unit for unit, factor in self.scale.items() if factor == 0)
        parts = [f"ablates {_listed(str(unit) for unit in ablated)}"] if ablated else []
        scaled = [f"{unit} by {factor:g}" for unit, factor in sorted(self.scale.items()) if factor not in (0, 1)]
        parts += [f"scales {_listed(scaled)}"] if scaled else []
        added = [f"{value:g} to {unit}" for unit, value in sorted(self.add.items()) if value]
        parts += [f"adds {_listed(added)}"] if added else []
        return f"{self.student} at {self.hookpoint}: {'; '.join(parts)}"


def make(config: EditConfig, run: Run) -> Edit:
    """The edit that a configuration describes, for a student of `run`.

    Raises:
        RunError: no such student.
        ConfigError: no such unit, a unit named twice, a number that is not one, or nothing that changes anything.
    """
    record = _chosen(run, config.student)
    scale = _once([*((unit, 0.0) for unit in config.ablate), *_pairs("--scale", config.scale)], "--ablate and --scale")
    add = _once(_pairs("--add", config.add), "--add")
    edit = Edit(record.name, record.hookpoint, run.weights_sha256(record.name), run.info["host"]["name"], scale, add)
    _check_units(edit, record)
    _check_changes(edit, "nothing to edit")
    return edit


def write(path: Path, edit: Edit, *, overwrite: bool = False) -> None:
    """Write an edit, atomically.

    Raises:
        RunError: there is a file of that name already, or a folder.
    """
    if path.is_dir() or (path.exists() and not overwrite):
        what = "is a folder" if path.is_dir() else "exists already"
        raise RunError(f"{path} {what}", expected="a new file", next="choose another --out, or add --overwrite to replace a file")
    write_json(path, as_json(edit))


def as_json(edit: Edit) -> dict[str, Any]:
    """What stands in the file of an edit."""
    return {"format_version": FORMAT_VERSION, "kind": KIND, **asdict(edit)}


def read(path: str | Path) -> Edit:
    """The edit in a file.

    Raises:
        RunError: there is none, it is damaged, of a newer format, or changes nothing.
    """
    path = Path(path)
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=lambda pairs: _once(pairs, path.name))
    except (FileNotFoundError, IsADirectoryError):
        raise RunError(f"there is no edit at {path}", expected="a file that mxd edit wrote", next=f"mxd edit RUN --out {path}") from None
    except (UnicodeDecodeError, json.JSONDecodeError, ConfigError) as error:
        raise _damaged(path, str(error)) from None
    if not isinstance(found, dict) or cast("dict[str, Any]", found).get("kind") != KIND:
        raise _damaged(path, f'no "kind": "{KIND}"')
    fields = cast("dict[str, Any]", found)
    version = fields.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= FORMAT_VERSION:
        raise RunError(
            f"{path} is not of a format that this mxd can read",
            expected=f"format_version up to {FORMAT_VERSION}",
            got=str(version),
            next="pip install --upgrade mxd, or make the edit again",
        )
    try:
        names = [fields[name] for name in ("student", "hookpoint", "weights_sha256", "host")]
        edit = Edit(*names, *(_numbers(fields.get(name, {})) for name in ("scale", "add")))
    except KeyError as error:
        raise _damaged(path, f"no {error}") from None
    except (TypeError, ValueError) as error:
        raise _damaged(path, str(error)) from None
    if not all(isinstance(name, str) for name in names):
        raise _damaged(path, "a name that is not a text")
    _check_changes(edit, f"{path} changes nothing")
    return edit


def check(edit: Edit, run: Run) -> StudentRecord:
    """The student of `run` that an edit belongs to.

    Raises:
        RunError: no such student, or its weights or hookpoint are not those the edit was made for.
        ConfigError: it has no such unit.
    """
    record = run.student(edit.student)
    weights = run.weights_sha256(edit.student)
    if (edit.weights_sha256, edit.hookpoint) != (weights, record.hookpoint):
        raise RunError(
            f"this edit was made for another {edit.student}: unit numbers mean nothing in other weights",
            expected=f"sha256 {weights[:12]}… at {record.hookpoint}",
            got=f"{edit.weights_sha256[:12]}… at {edit.hookpoint}",
            next=f"mxd edit {run.path} --student {edit.student}",
        )
    _check_units(edit, record)
    return record


def load_edit(path: str | Path, run: str | Path | Run, device: str | torch.device = "cpu") -> Edited:
    """The edited student, in evaluation mode: ``host.replace({edit.hookpoint: mxd.load_edit("edit.json", "runs/demo")})``.

    Args:
        path: file that ``mxd edit`` wrote.
        run: the run folder of its student.
        device: where the layer goes.

    Raises:
        RunError: no such edit, run or student, or an edit for other weights.
        ConfigError: the student has no such unit.
    """
    edit = read(path)
    opened = run if isinstance(run, Run) else Run.open(run)
    check(edit, opened)
    return edit.apply(opened.load(edit.student, device)).eval()


def _chosen(run: Run, name: str | None) -> StudentRecord:
    if name is not None:
        return run.student(name)
    if len(run.students) > 1:
        names = ", ".join(record.name for record in run.students)
        raise ConfigError("--student is needed: the run has several", expected=names, next=f"mxd info {run.path}")
    return run.students[0]


def _pairs(option: str, texts: Sequence[str]) -> list[tuple[int, float]]:
    """UNIT=NUMBER, parsed."""
    found: list[tuple[int, float]] = []
    for text in texts:
        unit, _, number = text.partition("=")
        try:
            found.append((int(unit), float(number)))
        except ValueError:
            raise ConfigError(f"{option} takes UNIT=NUMBER", expected="such as 17=0.5", got=text) from None
    return found


def _once(pairs: Sequence[tuple[Any, Value]], where: str) -> dict[Any, Value]:
    """A dict of pairs whose keys are all different."""
    found: dict[Any, Value] = {}
    for key, value in pairs:
        if key in found:
            raise ConfigError(f"{key} is given twice in {where}", expected="each unit once")
        found[key] = value
    return found


def _numbers(found: Any) -> dict[int, float]:
    """Numbers by unit, as JSON has them."""
    if not isinstance(found, dict):
        raise TypeError("units and numbers that are not a JSON object")
    numbers: dict[int, float] = {}
    for unit, value in cast("dict[str, Any]", found).items():
        if str(int(unit)) != unit:
            raise ValueError(f"{unit} is not the number of a unit")
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise ValueError(f"{value} for unit {unit} is not a finite number")
        numbers[int(unit)] = float(value)
    return numbers


def _check_units(edit: Edit, record: StudentRecord) -> None:
    for unit, value in [*edit.scale.items(), *edit.add.items()]:
        if not record.n_units:
            raise ConfigError(f"{record.name} has no units to edit", expected="a student of a kind that has units", got=record.kind)
        if not 0 <= unit < record.n_units:
            raise ConfigError(f"no unit {unit} in {record.name}", expected=f"a number from 0 to {record.n_units - 1}", got=str(unit))
        if not math.isfinite(value):
            raise ConfigError(f"cannot edit unit {unit} of {record.name}", expected="a finite number", got=str(value))


def _check_changes(edit: Edit, what: str) -> None:
    if all(factor == 1 for factor in edit.scale.values()) and not any(edit.add.values()):
        raise ConfigError(what, expected="a unit ablated, scaled by other than 1, or added other than 0 to", next="mxd edit --help")


def _damaged(path: Path, why: str) -> RunError:
    expected, again = "the JSON that mxd edit writes", "make it again: mxd edit"
    return RunError(f"{path} is not an edit, or is damaged", expected=expected, got=why, next=again)


def _listed(words: Any) -> str:
    """Words with commas; of many, the first few and a count."""
    found = list(words)
    return ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
