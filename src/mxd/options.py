"""What can stand on the command line behind each verb: the typed configurations of `mxd.config`, and which run or host they are about.

Every field is an option of the same name; its docstring is the help text.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from .config import BenchConfig, EditConfig, EvalConfig, GenerateConfig, HarvestConfig, StudyConfig, TrainConfig
from .errors import ConfigError, nearest
from .unit_config import CollectConfig, ExploreConfig, ExportConfig, LabelConfig

Config = TypeVar("Config")
RunFolder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]


@dataclass(frozen=True)
class DemoOptions:
    """Decompose one MLP of the built-in language model: four kinds and two controls, trained, measured in the model, reported.

    A finished demo is not run again: its table is printed.
    """

    out: Path = Path("runs/demo")
    """Run folder to write."""
    tokens: int | None = None
    """Training tokens to read from the host; default: the demo's."""
    passes: int | None = None
    """Times each token of the shuffle buffer is trained on; default: the demo's."""
    seed: int | None = None
    """Seed of everything random; default: 0."""
    overwrite: bool = False
    """Train anew, replacing the run in the same folder."""


@dataclass(frozen=True, kw_only=True)
class EvalOptions(EvalConfig):
    """Evaluate every student of a run in the host, on held-out text; writes report.json, report.md, report.html, frontier.svg."""

    run: RunFolder
    """Run folder that `mxd train` wrote."""


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(GenerateConfig):
    """Continue a prompt by the host and by the host with each student in place, side by side, differences marked."""

    run: RunFolder
    """Run folder that `mxd train` wrote."""


@dataclass(frozen=True, kw_only=True)
class EditOptions(EditConfig):
    """Write down an edit of one student (units ablated, scaled or added to) as a small file that mxd generate and mxd eval take."""

    run: RunFolder
    """Run folder that `mxd train` wrote."""


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Write report.md, report.html and frontier.svg again from report.json, without measuring anything."""

    run: RunFolder
    """Run folder that `mxd eval` wrote a report into."""
    split: str = "test"
    """Which of its reports: on test or on validation text."""
    edit: Path | None = None
    """Which of its reports: that of the student as this edit changed it."""


@dataclass(frozen=True, kw_only=True)
class InfoOptions:
    """Of a run folder: its students. Of cached activations: what they were made of. Of a host: its MLPs."""

    what: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN|HOST")]
    """A run folder, a folder of cached activations, or a host: `smollm2`, a Hugging Face id, a local folder, or a .gguf file."""
    revision: str | None = None
    """Git revision of a Hugging Face host (branch, tag or commit)."""


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Check that every file of a run, or of cached activations, is what was written; names those that are not."""

    what: Annotated[Path, tyro.conf.Positional]
    """Run folder, or folder that `mxd harvest` wrote."""


@dataclass(frozen=True, kw_only=True)
class FetchOptions:
    """Fetch built-in assets ahead, for use without a network: the host (converted as well) and texts."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[NAME ...]")] = ("smollm2", "sotu", "wiki-en")
    """The host `smollm2` and corpora (sotu, wiki-en, wiki-fr, wiki-es, news), labelled texts (sentiment, code); `all` for
    all of them. Default: what the demo needs."""


@dataclass(frozen=True, kw_only=True)
class StudyOptions(StudyConfig):
    """Run one of the studies behind docs/results.md: a question, the students that answer it, one table."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[NAME]")] = ""
    """Which study; without a name, all are listed:
    tuning, comparison, routing, meaning, topk-or-l1, encoder, rank, random-k, n-or-k, mode-2."""


@dataclass(frozen=True, kw_only=True)
class BenchOptions(BenchConfig):
    """Measure speed against the dense reference maths and other libraries: each result verified, then timed in turn; tables and JSON."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[NAME ...]")] = ()
    """Benchmarks to run: gemm, ops, train_step, scaling, gate, frontier, cache, whole, generation, peers. Default: all that can run
    here."""


@dataclass(frozen=True, kw_only=True)
class CollectOptions(CollectConfig):
    """Read held-out text once and keep in the run what every unit does; `mxd explore` shows it. Goes on where it was stopped."""

    run: RunFolder
    """Run folder that `mxd train` wrote."""


@dataclass(frozen=True, kw_only=True)
class ExploreOptions(ExploreConfig):
    """Look at what the units of a run do, in the browser: texts, effects, sentences, steering, notes; nothing leaves this machine."""

    run: RunFolder
    """Run folder that `mxd train` wrote; what `mxd collect` has not read yet is read in the background."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions(ExportConfig):
    """Write what was collected about units for others: the page in one HTML file, dashboards for Neuronpedia, or firings for delphi."""

    run: RunFolder
    """Run folder that `mxd collect` has read."""


@dataclass(frozen=True, kw_only=True)
class LabelOptions(LabelConfig):
    """Give every unit that `mxd collect` has seen a name and a score, statistical ones or those of a language model behind an endpoint."""

    run: RunFolder
    """Run folder that `mxd collect` has read."""


OPTIONS: dict[str, type[Any]] = {
    "demo": DemoOptions,
    "harvest": HarvestConfig,
    "train": TrainConfig,
    "eval": EvalOptions,
    "report": ReportOptions,
    "generate": GenerateOptions,
    "edit": EditOptions,
    "collect": CollectOptions,
    "explore": ExploreOptions,
    "label": LabelOptions,
    "export": ExportOptions,
    "info": InfoOptions,
    "verify": VerifyOptions,
    "fetch": FetchOptions,
    "study": StudyOptions,
    "bench": BenchOptions,
}
"""Verb -> its options, in the order of the help."""


def narrowed(options: Any, config: type[Config]) -> Config:
    """The configuration inside `options`, without what the command line adds to it."""
    names = [field.name for field in dataclasses.fields(config)]  # pyright: ignore[reportArgumentType]
    return config(**{name: getattr(options, name) for name in names})


def parse(verb: str, args: Sequence[str], default: Any = None) -> Any:
    """The options of a verb.

    Args:
        verb: a key of `OPTIONS`.
        args: the command line behind it.
        default: options that hold where `args` say nothing; by default those of the class.

    Raises:
        ConfigError: whatever does not fit, on one line, with the nearest option.
        SystemExit: after ``--help``.
    """
    options = OPTIONS[verb]
    known = ["--" + field.name.replace("_", "-") for field in dataclasses.fields(options)] + ["--help"]
    for token in args:
        name = token.split("=", 1)[0].replace("_", "-")
        if name.startswith("--") and name not in known:
            raise ConfigError(f"unknown option of mxd {verb}", expected=nearest(name, known), got=name, next=f"mxd {verb} --help")
    said = io.StringIO()
    stated: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(options, prog=f"mxd {verb}", args=list(args), config=(tyro.conf.FlagCreatePairsOff,), **stated)
    except SystemExit as stop:
        if stop.code in (None, 0):
            raise
    raise ConfigError(_unboxed(said.getvalue()), next=f"mxd {verb} --help") from None


def given(args: Sequence[str], name: str) -> str | None:
    """The value of an option on a command line, as ``--name value`` or ``--name=value``; None where it is not there."""
    for token, following in zip(args, (*args[1:], ""), strict=False):
        if token == name or token.startswith(f"{name}="):
            return token.partition("=")[2] or following
    return None


def _unboxed(box: str) -> str:
    """The message inside tyro's box, up to its first rule, on one line."""
    rows: list[str] = []
    for line in box.splitlines():
        row = line.strip("│ ").strip()
        if row.startswith("──"):
            break
        if row and not line.startswith(("╭", "╰")):
            rows.append(row)
    return " ".join(rows) or "the command line does not fit"
