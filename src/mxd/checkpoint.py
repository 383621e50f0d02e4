"""The run folder: written atomically, read with checks. No pickles: JSON and safetensors only.

::

    runs/NAME/run.json                       the whole configuration, host, text, versions
    runs/NAME/metrics.jsonl                  one line per logged step and student
    runs/NAME/STUDENT/HOOKPOINT/cfg.json     the layer's description and its training record
    runs/NAME/STUDENT/HOOKPOINT/*.safetensors
    runs/NAME/report.json .md .html, frontier.svg

What is known of a run is read without PyTorch, which takes seconds to import: only layers need it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from safetensors import SafetensorError

from .config import TrainConfig
from .errors import RunError, nearest
from .sealed import MEND, check_sum, check_version, read_json, write_atomic, write_sealed
from .typed import leads_out, options, wrong

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .layers import SparseLayer

FORMAT_VERSION = 1
"""Version of the run folder; a newer one is refused."""


@dataclass(frozen=True)
class StudentRecord:
    """What a run knows of one of its students."""

    name: str
    """Unique in the run: ``mxd-k32``, or ``mxd-k32@layers.6.mlp`` where the run has several layers."""
    hookpoint: str
    """The MLP it stands in for."""
    kind: str
    """Kind of layer."""
    k: int
    """Units active per token; 0 for the dense control."""
    d_in: int
    """Width it reads."""
    d_out: int
    """Width it returns."""
    n_units: int
    """Experts or latents."""
    params: int
    """Parameters, biases included."""
    recipe: str
    """Recipe it was trained under."""
    seed: int
    """The run's seed."""
    tokens_trained: int
    """Token-steps: tokens seen by the optimiser, repeats counted."""
    steps: int
    """Optimiser steps."""
    train_seconds: float
    """Time spent on this student alone."""
    tokens_per_second: float
    """tokens_trained / train_seconds."""
    is_control: bool
    """True for dense and additive."""
    stopped: str | None = None
    """Why training ended early, if it did."""

    @classmethod
    def read(cls, about: Any) -> StudentRecord:
        """The record in a file.

        Raises:
            TypeError, ValueError: it is none, or its folder would lie outside the run.
        """
        record = cls(**about)
        unfit = wrong(cls, about)
        if unfit or leads_out(record.folder):
            raise ValueError(", ".join(unfit) or f"a folder {record.folder}")
        return record

    @property
    def folder(self) -> str:
        """Where its files lie, relative to the run."""
        return f"{self.name.split('@')[0]}/{self.hookpoint}"


STATE = "state"
"""Folder of a run in which `mxd.resume` keeps what going on needs."""


def save_layer(folder: Path, layer: SparseLayer, record: StudentRecord | None = None) -> None:
    """Write one layer: weights first, then the cfg.json that names their checksum, so that a half-written folder is refused.

    Raises:
        RunError: the layer is an edited one: an edit is a file beside the weights.
    """
    from safetensors.torch import save

    from .interop import sparsify
    from .layers import Edited

    if isinstance(layer, Edited):
        raise RunError(
            "an edited layer is not saved", expected="the layer itself", got="Edited", next="keep the edit: mxd edit RUN --out FILE"
        )
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in layer.state_dict().items()}
    shared = layer.kind in sparsify.KINDS
    weights = save(sparsify.to_names(state) if shared else state, metadata={"format": "pt"})
    cfg: dict[str, Any] = sparsify.config(layer) if shared else {}
    cfg["mxd"] = {
        "format_version": FORMAT_VERSION,
        "layer": layer.describe(),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "record": dataclasses.asdict(record) if record else None,
    }
    write_atomic(folder / _weights_name(layer.kind), weights)
    write_sealed(folder / "cfg.json", cfg)


def load_layer(folder: Path, device: str | torch.device = "cpu") -> SparseLayer:
    """The layer in `folder`, in evaluation mode.

    Raises:
        RunError: not a layer folder, of a newer format, or its weights are truncated or not those that were saved.
    """
    from .interop import sparsify
    from .layers import from_description

    cfg = read_json(folder / "cfg.json")
    about = cfg.get("mxd") if isinstance(cfg, dict) else None
    if not isinstance(about, dict):
        got = ", ".join(sorted(cfg)[:6]) if isinstance(cfg, dict) else type(cfg).__name__
        raise RunError(f"{folder} was not saved by mxd", expected="cfg.json with an 'mxd' entry", got=got)
    check_version(about.get("format_version"), folder, FORMAT_VERSION)
    if not isinstance(about.get("layer"), dict) or not isinstance(about.get("weights_sha256"), str):
        raise RunError(f"{folder / 'cfg.json'} is damaged", expected="a layer and the checksum of its weights", next=MEND)
    layer = from_description(about["layer"], device="meta")
    path = folder / _weights_name(layer.kind)
    tensors = _read_weights(path, about["weights_sha256"])
    if layer.kind in sparsify.KINDS:
        tensors = sparsify.from_names(tensors)
    expected = {name: tuple(t.shape) for name, t in layer.state_dict().items()}
    got = {name: tuple(t.shape) for name, t in tensors.items()}
    if expected != got:
        raise RunError(f"{path} does not fit its cfg.json", expected=str(expected), got=str(got))
    layer.load_state_dict(tensors, assign=True)
    return layer.to(device).eval().requires_grad_(False)


def _read_weights(path: Path, sha256: str) -> dict[str, Tensor]:
    from safetensors.torch import load as tensors_of

    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise RunError("a weight file is missing", expected=str(path), next=MEND) from None
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise RunError(
            f"{path} is truncated or was changed", expected=f"sha256 {sha256[:12]}…", got=f"{found[:12]}…, {len(data):,} bytes", next=MEND
        )
    try:
        return tensors_of(data)
    except SafetensorError as error:
        raise RunError(f"{path} cannot be read", expected="safetensors", got=str(error), next=MEND) from None


def _weights_name(kind: str) -> str:
    from .interop import sparsify

    return sparsify.WEIGHTS_FILE if kind in sparsify.KINDS else "mxd.safetensors"


class _Info(TypedDict):
    """What of run.json is read again; `mxd.run_info` describes it."""

    students: list[dict[str, Any]]
    host: dict[str, Any]
    text: dict[str, Any]
    activations: dict[str, Any] | None
    finished: bool
    train_tokens: int
    metrics_sha256: str
    seconds: dict[str, float]
    versions: dict[str, str]
    machine: dict[str, Any]
    recipes: dict[str, list[dict[str, Any]]]
    legs: list[list[int]]
    adding: list[str]
    resumed: list[int]


class _Host(TypedDict):
    name: str
    revision: str | None
    fingerprint: str


class _Text(TypedDict):
    seed: int
    sources: list[dict[str, Any]]


def check_origin(info: Mapping[str, Any]) -> None:
    """Raise ValueError or KeyError unless a file's records of host and text are of the types that are read again."""
    for name, record in (("host", _Host), ("text", _Text)):
        if unfit := wrong(record, info[name]):
            raise ValueError(", ".join(unfit))
    _ = info["host"]["name"], info["text"]["seed"]  # the rest may be missing


def read_info(path: Path) -> dict[str, Any]:
    """run.json of the run folder at `path`.

    Raises:
        RunError: there is none, it is not a run, of a newer format, or not of the types that `mxd train` writes.
    """
    if not (path / "run.json").is_file():
        what = "is not a run folder" if path.exists() else "does not exist"
        raise RunError(f"{path} {what}", expected="a folder with run.json", next="mxd train --out " + str(path))
    info = read_json(path / "run.json")
    if not isinstance(info, dict):
        raise RunError(f"{path / 'run.json'} is damaged", expected="a JSON object", got=type(info).__name__)
    check_version(info.get("format_version"), path, FORMAT_VERSION)
    try:
        if unfit := wrong(_Info, info):
            raise ValueError(", ".join(unfit))
        check_origin(info)
        return {**info, "config": options(TrainConfig, info["config"], ("host", "text", "tokens_per_sequence"))}
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path / 'run.json'} is damaged", expected="what mxd train writes", got=str(error), next=MEND) from None


def records(path: Path, info: Mapping[str, Any]) -> list[StudentRecord]:
    """The students that the run.json of `path` names.

    Raises:
        RunError: they are not as `mxd train` writes them.
    """
    try:
        return [StudentRecord.read(record) for record in info["students"]]
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path / 'run.json'} is damaged", expected="a list of students", got=str(error)) from None


class Run:
    """A run folder, opened for reading. Attributes: `path`, `info` (run.json), `students`."""

    def __init__(self, path: Path, info: dict[str, Any], students: list[StudentRecord]) -> None:
        self.path, self.info, self.students = path, info, students

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Open a run folder.

        Raises:
            RunError: there is none, it is not a run, of a newer format, or incomplete.
        """
        path = Path(path)
        info = read_info(path)
        students = records(path, info)
        if not students:
            how = "--resume" if (path / STATE).is_dir() else "--out"
            raise RunError(f"{path} holds no student yet", expected="a run that got as far as saving", next=f"mxd train {how} {path}")
        return cls(path, info, students)

    def student(self, name: str) -> StudentRecord:
        """The record of one student.

        Raises:
            RunError: no such student; names the nearest.
        """
        for record in self.students:
            if record.name == name:
                return record
        raise RunError(f"no student of that name in {self.path}", expected=nearest(name, [s.name for s in self.students]), got=name)

    def load(self, name: str, device: str | torch.device = "cpu") -> SparseLayer:
        """The trained layer of one student, in evaluation mode."""
        return load_layer(self.path / self.student(name).folder, device)

    def weights_sha256(self, name: str) -> str:
        """The checksum of a student's weight file, as its cfg.json states it."""
        about = read_json(self.path / self.student(name).folder / "cfg.json")
        return str(about["mxd"]["weights_sha256"]) if isinstance(about, dict) and "mxd" in about else ""

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl; a last line cut short by a crash is left out."""
        path = self.path / "metrics.jsonl"
        if not path.is_file():
            return []
        expected = self.info.get("metrics_sha256")
        data = check_sum(path, expected) if expected else path.read_bytes()
        rows: list[dict[str, Any]] = []
        lines = data.decode("utf-8").splitlines()
        for number, line in enumerate(lines, 1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                if number < len(lines):
                    raise RunError(f"{path}:{number} is damaged", expected="one JSON object a line", got=str(error)) from None
        return rows


def load(path: str | Path, device: str | torch.device = "cpu") -> SparseLayer:
    """The layer saved in ``runs/NAME/STUDENT`` or ``runs/NAME/STUDENT/HOOKPOINT``, in evaluation mode.

    Of a ``.pt`` file, the reference MxD's layer as it was trained: `mxd.interop.reference` says what that means and can do more.

    Raises:
        RunError: there is none, there are several hookpoints to choose from, or the files are damaged.
    """
    from .interop import reference

    path = Path(path)
    if path.suffix == ".pt":
        return reference.load(path).to(device)
    if (path / "cfg.json").is_file():
        return load_layer(path, device)
    inside = sorted(p.parent for p in path.glob("*/cfg.json")) if path.is_dir() else []
    if len(inside) == 1:
        return load_layer(inside[0], device)
    options = ", ".join(str(p) for p in inside) if inside else "runs/NAME/STUDENT"
    raise RunError(f"{path} holds {len(inside)} layers", expected=f"a folder with one: {options}", next=f"mxd info {path.parent}")
