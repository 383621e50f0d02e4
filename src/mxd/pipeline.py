"""The whole way from a configuration to a run folder, and from a run folder to its report.

    text -> tokens -> activations (x, y) -> sparse layers, trained side by side -> run folder -> evaluation

Each step is a module of its own; this one only joins them. `train` is ``mxd.train``, `evaluate` is ``mxd.evaluate``.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import platform
import subprocess
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from . import recipes
from .checkpoint import Run, RunWriter, StudentRecord, check_writable
from .clock import Clock
from .config import EvalConfig, TrainConfig
from .errors import ConfigError, TextError
from .evals import routing
from .harvest import Batch, collect, read_blocks, shuffled
from .host import Host, MLPSite
from .plan import check, check_disk, plan, total_train_steps
from .progress import Bar
from .sources import CORPORA
from .text import Corpus, TokenBlock
from .tracking import Metrics
from .train import SAMPLE_TOKENS, Student, StudentSpec
from .train import train as train_students

log = logging.getLogger("mxd")

PROBE_TOKENS = 4096
"""Validation tokens on which the routing is measured while training."""
PROBES_PER_RUN = 12


def train(config: TrainConfig, *, quiet: bool = False) -> Run:
    """Train every kind x K x layer of `config` in one pass of the host and write the run folder.

    Everything that can be wrong with the configuration is found before the host reads its first token, and before anything
    in the run folder is touched.

    Raises:
        ConfigError, TextError, HostError, LayerError, RunError, AssetError: see their messages.
        KeyboardInterrupt: after Ctrl-C, with a message; what was trained so far is saved.
    """
    config = dataclasses.replace(config, out=Path(config.out))
    check(config)
    check_writable(config.out, overwrite=config.overwrite)
    clock = Clock()
    with clock("text and host"):
        corpus = Corpus(config.text, column=config.text_column, seed=config.seed)
        host = Host.load(config.host, revision=config.revision, device=config.device, dtype=config.dtype)
        sites = _sites(host, config.layers)
        specs = plan(config, sites)
        blocks = _train_blocks(config, corpus, host)
        validation = _probe_block(config, corpus, host)
    check_disk(config.out, specs)
    writer = RunWriter(config.out, overwrite=config.overwrite)
    try:
        return _train_into(writer, config, corpus, host, specs, blocks, validation, clock, quiet)
    except BaseException:
        writer.abandon()
        raise


def _sites(host: Host, layers: tuple[str, ...]) -> list[MLPSite]:
    sites = [host.site(key) for key in layers]
    if len({site.hookpoint for site in sites}) != len(sites):
        raise ConfigError("--layers names an MLP twice", got=" ".join(layers))
    return sites


def _train_blocks(config: TrainConfig, corpus: Corpus, host: Host) -> Iterable[TokenBlock]:
    """Blocks of training tokens; for texts that are at hand, made now, so that too little text is known at once."""
    made = corpus.blocks(
        host.tokenizer, "train", tokens_per_sequence=config.tokens_per_sequence, sequences_per_block=config.sequences_per_read
    )
    per_block = config.tokens_per_sequence * config.sequences_per_read
    wanted = itertools.islice(made, -(-config.tokens // per_block))
    if corpus.streamed:
        return wanted
    blocks = list(wanted)
    found = sum(block.ids.numel() for block in blocks)
    if found < config.tokens:
        raise TextError(
            "too little training text",
            expected=f"{config.tokens:,} tokens (--tokens)",
            got=f"{found:,} in {' '.join(config.text)}",
            next=f"lower --tokens (and raise --passes), or add to --text: {', '.join(CORPORA)}, or files of your own",
        )
    return blocks


def _probe_block(config: TrainConfig, corpus: Corpus, host: Host) -> TokenBlock | None:
    """Validation text on which the routing is followed in training: about `PROBE_TOKENS`, fewer where there is less, or none."""
    sequences = max(1, PROBE_TOKENS // config.tokens_per_sequence)
    while sequences:
        try:
            return corpus.sample(
                host.tokenizer, "validation", sequences=sequences, tokens_per_sequence=config.tokens_per_sequence, seed=config.seed
            )
        except TextError:
            sequences //= 2
    log.warning("no validation text: the routing is not followed while training")
    return None


def _train_into(
    writer: RunWriter,
    config: TrainConfig,
    corpus: Corpus,
    host: Host,
    specs: list[StudentSpec],
    blocks: Iterable[TokenBlock],
    validation: TokenBlock | None,
    clock: Clock,
    quiet: bool,
) -> Run:
    hookpoints = list(dict.fromkeys(spec.hookpoint for spec in specs))
    total_steps = total_train_steps(config)
    students = [Student(spec, total_steps=total_steps, device=host.device) for spec in specs]
    info = _describe(config, host, corpus)
    writer.write_info({**info, "students": [], "finished": False})
    metrics = Metrics(writer.path / "metrics.jsonl")
    with clock("probe text"):
        held_out = collect(host, [validation], hookpoints, validation.ids.numel()) if validation else None
    stopped: BaseException | None = None
    try:
        with Bar("training", total_steps * config.tokens_per_step, "tokens", quiet=quiet) as bar:
            _run_loop(config, host, students, blocks, hookpoints, held_out, metrics, bar, clock)
    except (Exception, KeyboardInterrupt) as error:
        stopped = error
    finally:
        metrics.close()
    done = max(student.steps for student in students)
    if isinstance(stopped, KeyboardInterrupt) and not done:
        raise KeyboardInterrupt("stopped before the first step; nothing was written")
    if stopped is not None and (not done or (writer.replaces and not isinstance(stopped, KeyboardInterrupt))):
        raise stopped  # nothing worth keeping, or a finished run to put back
    info["seconds"] = clock.seconds
    info["train_tokens"] = min(config.tokens, max(student.tokens for student in students))
    with clock("saving"):
        writer.save([s.layer for s in students], [_record(s) for s in students], info, finished=stopped is None)
    writer.finish()
    if isinstance(stopped, KeyboardInterrupt):
        raise KeyboardInterrupt(
            f"stopped at step {done:,} of {total_steps:,}; the students are saved as they are | "
            f"next: mxd eval {writer.path}, or the same command with --overwrite to train from the start"
        )
    if stopped is not None:
        log.warning("stopped at step %s of %s; the students are saved as they are in %s", f"{done:,}", f"{total_steps:,}", writer.path)
        raise stopped
    return Run.open(writer.path)


def _run_loop(
    config: TrainConfig,
    host: Host,
    students: list[Student],
    blocks: Iterable[TokenBlock],
    hookpoints: list[str],
    held_out: dict[str, Batch] | None,
    metrics: Metrics,
    bar: Bar,
    clock: Clock,
) -> None:
    """Harvest, shuffle, start the students on the first buffer, train."""
    generator = torch.Generator().manual_seed(config.seed)
    harvested = clock.timed("harvest", read_blocks(host, blocks, hookpoints))
    first = list(_until(harvested, min(SAMPLE_TOKENS, config.buffer_tokens, config.tokens)))
    sample = {h: Batch(*(torch.cat(parts) for parts in zip(*(batch[h] for batch in first), strict=True))) for h in hookpoints}
    with clock("warm start"):
        for student in students:
            needs_host = student.spec.recipe.encoder != "fresh"
            student.start(sample[student.spec.hookpoint], host.weights(student.spec.hookpoint) if needs_host else None)
    del sample
    stream = shuffled(
        itertools.chain(first, harvested),
        tokens_per_step=config.tokens_per_step,
        buffer_tokens=config.buffer_tokens,
        passes=config.passes,
        generator=generator,
    )
    steps = itertools.islice(stream, total_train_steps(config))
    every = config.probe_every_steps or max(1, total_train_steps(config) // PROBES_PER_RUN)

    def probe(student: Student) -> dict[str, Any]:
        assert held_out is not None
        batch = held_out[student.spec.hookpoint]
        with clock("probes"):
            keep = ~batch.first
            return routing.probe(student.layer, batch.x[keep], batch.y[keep])

    def on_step(step: int, students: list[Student]) -> None:
        losses = "  ".join(f"{s.name} {'stopped' if s.stopped else format(s.last_loss, '.3f')}" for s in students[:8])
        bar.update(step * config.tokens_per_step, losses)

    train_students(
        students,
        steps,
        metrics=metrics,
        log_every_steps=config.log_every_steps,
        probe=probe if held_out else None,
        probe_every_steps=every,
        on_step=on_step,
    )


def _until(batches: Iterator[dict[str, Batch]], tokens: int) -> Iterator[dict[str, Batch]]:
    seen = 0
    while seen < tokens:
        batch = next(batches, None)
        if batch is None:
            return
        seen += len(next(iter(batch.values())).x)
        yield batch


def _record(student: Student) -> StudentRecord:
    layer, spec = student.layer, student.spec
    return StudentRecord(
        name=spec.name,
        hookpoint=spec.hookpoint,
        kind=spec.kind,
        k=layer.k,
        d_in=layer.d_in,
        d_out=layer.d_out,
        n_units=layer.n_units,
        params=layer.budget(),
        recipe=spec.recipe.name,
        seed=spec.seed,
        tokens_trained=student.tokens,
        steps=student.steps,
        train_seconds=round(student.seconds, 3),
        tokens_per_second=round(student.tokens / student.seconds, 1) if student.seconds else 0.0,
        is_control=layer.is_control,
        stopped=student.stopped,
    )


def _describe(config: TrainConfig, host: Host, corpus: Corpus) -> dict[str, Any]:
    plain = dataclasses.asdict(config)
    return {
        "config": {name: str(value) if isinstance(value, Path) else value for name, value in plain.items()},
        "recipes": {kind: [dataclasses.asdict(recipe) for recipe in recipes.chosen(config, kind)] for kind in config.kinds},
        "host": {"name": host.name, "revision": host.revision, "fingerprint": host.fingerprint},
        "text": corpus.describe(),
        "versions": versions(),
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads(), "device": str(host.device)},
        "git_commit": _git_commit(),
        "seed": config.seed,
    }


def versions() -> dict[str, str]:
    """Versions of mxd and of what its numbers depend on."""
    packages = ("mxd", "torch", "transformers", "safetensors", "numpy")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}


def _git_commit() -> str | None:
    """The commit of mxd's own source tree, where it is one."""
    try:
        here = Path(__file__).resolve().parent
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def evaluate(run: str | Path | Run, config: EvalConfig | None = None, *, quiet: bool = False) -> dict[str, Any]:
    """Evaluate every student of a run in its host on held-out text; writes report.json/.md/.html and frontier.svg.

    Returns the report. Raises the errors of `Run.open`, `Host.load` and `Corpus`.
    """
    from .evals.evaluate import evaluate as evaluate_run

    opened = run if isinstance(run, Run) else Run.open(run)
    config = config or EvalConfig()
    host, corpus = reopen(opened, device=config.device)
    with Bar("evaluating", config.sequences, "sequences", quiet=quiet) as bar:
        return evaluate_run(opened, host, corpus, config, progress=bar.update)


def reopen(run: Run, *, device: str = "auto") -> tuple[Host, Corpus]:
    """The host and the texts that a run was trained on."""
    made = run.info["config"]
    host = Host.load(made["host"], revision=made["revision"], device=device, dtype=made["dtype"])
    return host, Corpus(tuple(made["text"]), column=made["text_column"], seed=made["seed"])
