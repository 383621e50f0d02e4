"""The whole way from a configuration to a run folder, and from a run folder to its report.

    text -> tokens -> activations (x, y) -> sparse layers, trained side by side -> run folder -> evaluation

Each step is a module of its own; this one only joins them. `train` is ``mxd.train``, `evaluate` is ``mxd.evaluate``.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from . import cache as activation_cache
from . import ops
from .cache import Cache, CacheWriter
from .checkpoint import Run, RunWriter, check_writable
from .clock import Clock
from .config import EvalConfig, HarvestConfig, TrainConfig
from .evals import routing
from .feed import Feed, HostFeed, open_feed, until
from .harvest import Batch
from .host import Host
from .locks import only_writer
from .plan import check, check_disk, check_harvest, check_space, op_settings, plan, settled, total_train_steps
from .progress import Bar
from .run_info import describe, made_with, plain, record
from .shuffle import shuffled
from .text import Corpus
from .tracking import Metrics
from .train import SAMPLE_TOKENS, Student, StudentSpec
from .train import train as train_students

log = logging.getLogger("mxd")

PROBES_PER_RUN = 12


def train(config: TrainConfig, *, quiet: bool = False) -> Run:
    """Train every kind x K x layer of `config` in one pass of the host, or of cached activations, and write the run folder.

    Everything that can be wrong with the configuration is found before the host reads its first token, and before anything
    in the run folder is touched.

    Raises:
        ConfigError, TextError, HostError, LayerError, RunError, AssetError: see their messages.
        KeyboardInterrupt: after Ctrl-C, with a message; what was trained so far is saved.
    """
    cache = Cache.open(config.activations) if config.activations is not None else None
    config = settled(dataclasses.replace(config, out=Path(config.out)), cache.info["config"] if cache else None)
    check(config)
    check_writable(config.out, overwrite=config.overwrite)
    with only_writer(config.out):
        return _train(config, cache, quiet)


def _train(config: TrainConfig, cache: Cache | None, quiet: bool) -> Run:
    clock = Clock()
    with clock("text and host"):
        feed = open_feed(config, cache)
        specs = plan(config, feed.sites)
        feed.prepare()
    check_disk(config.out, specs)
    writer = RunWriter(config.out, overwrite=config.overwrite)
    try:
        return _train_into(writer, config, feed, specs, clock, quiet)
    except BaseException:
        writer.abandon()
        raise


def _train_into(
    writer: RunWriter,
    config: TrainConfig,
    feed: Feed,
    specs: list[StudentSpec],
    clock: Clock,
    quiet: bool,
) -> Run:
    total_steps = total_train_steps(config)
    students = [Student(spec, total_steps=total_steps, device=feed.device) for spec in specs]
    info = describe(config, feed.device, feed.describe())
    writer.write_info({**info, "students": [], "finished": False})
    metrics = Metrics(writer.path / "metrics.jsonl")
    with clock("probe text"):
        held_out = feed.held_out()
    stopped: BaseException | None = None
    try:
        total = total_steps * config.tokens_per_step
        with ops.using(**op_settings(config)), Bar("training", total, "tokens", quiet=quiet) as bar:
            _run_loop(config, feed, students, held_out, metrics, bar, clock)
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
        writer.save([s.layer for s in students], [record(s) for s in students], info, finished=stopped is None)
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
    feed: Feed,
    students: list[Student],
    held_out: dict[str, Batch] | None,
    metrics: Metrics,
    bar: Bar,
    clock: Clock,
) -> None:
    """Harvest, shuffle, start the students on the first buffer, train."""
    generator = torch.Generator().manual_seed(config.seed)
    with closing(feed.batches()) as batches:
        harvested = clock.timed("harvest", batches)
        first = list(until(harvested, min(SAMPLE_TOKENS, config.buffer_tokens, config.tokens)))
        with clock("warm start"):
            _start(students, first, feed)
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
            bar.update(step * config.tokens_per_step, lambda: _losses(students))

        train_students(
            students,
            steps,
            metrics=metrics,
            log_every_steps=config.log_every_steps,
            probe=probe if held_out else None,
            probe_every_steps=every,
            on_step=on_step,
        )


def _losses(students: list[Student]) -> str:
    return "  ".join(f"{s.name} {'stopped' if s.stopped else format(s.last_loss, '.3f')}" for s in students[:8])


def _start(students: list[Student], first: list[dict[str, Batch]], feed: Feed) -> None:
    """Set up every student from the batches at the front of the text."""
    sample = {h: Batch(*(torch.cat(parts) for parts in zip(*(batch[h] for batch in first), strict=True))) for h in first[0]}
    for student in students:
        needs_host = student.spec.recipe.encoder != "fresh"
        student.start(sample[student.spec.hookpoint], feed.weights(student.spec.hookpoint) if needs_host else None)


def harvest(config: HarvestConfig, *, quiet: bool = False) -> Cache:
    """Write what the MLPs of `config` receive and return on training text into a folder, for ``TrainConfig(activations=...)``.

    Everything that can be wrong, a full disk included, is found before anything in the folder is touched.

    Raises:
        ConfigError, TextError, HostError, RunError, AssetError: see their messages.
        KeyboardInterrupt: after Ctrl-C, with a message; whole shards are kept.
    """
    config = dataclasses.replace(config, out=Path(config.out))
    check_harvest(config)
    activation_cache.check_writable(config.out, overwrite=config.overwrite)
    with only_writer(config.out):
        return _harvest(config, quiet)


def _harvest(config: HarvestConfig, quiet: bool) -> Cache:
    feed = HostFeed(config)
    feed.prepare()
    per_read = config.tokens_per_sequence * config.sequences_per_read
    planned = -(-config.tokens // per_read) * per_read  # the host reads whole blocks, and training from it takes whole ones
    needed = activation_cache.disk_bytes(feed.sites, config.store, planned + feed.held_out_tokens)
    if not quiet:
        print(f"mxd: {_size_line(config, feed, planned, needed)}", file=sys.stderr, flush=True)
    check_space(
        config.out,
        needed,
        what="these activations",
        advice="lower --tokens, or --store bfloat16",
        reclaimed=activation_cache.bytes_in(config.out),
    )
    info = {"config": plain(config), **feed.describe(), **made_with(feed.device)}
    shard = max(config.tokens_per_shard // per_read, 1) * per_read
    writer = CacheWriter(config.out, sites=feed.sites, store=config.store, tokens=planned, tokens_per_shard=shard, info=info)
    try:
        with Bar("harvesting", planned, "tokens", quiet=quiet) as bar:
            _harvest_into(writer, feed, bar)
    except BaseException as error:
        kept = writer.stop()
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(_stopped_line(config, kept)) from None
        raise
    return Cache.open(config.out)


def _harvest_into(writer: CacheWriter, feed: HostFeed, bar: Bar) -> None:
    for site in feed.sites:
        writer.add_weights(site.hookpoint, feed.weights(site.hookpoint))
    writer.add_validation(feed.held_out() or {})
    done = 0
    with closing(feed.batches()) as stream:
        for batches in stream:
            writer.add(batches)
            done += len(next(iter(batches.values())).y)
            bar.update(done)
    writer.finish()


def _size_line(config: HarvestConfig, feed: HostFeed, tokens: int, needed: int) -> str:
    widths = " + ".join(f"({site.d_in:,} + {site.d_out:,})" for site in feed.sites)
    return f"{config.out} will take {needed / 2**20:,.0f} MiB: {tokens:,} tokens x {widths} numbers, {config.store}"


def _stopped_line(config: HarvestConfig, kept: int) -> str:
    if not kept:
        return "stopped before the first shard was full; nothing was kept | next: a smaller --tokens-per-shard loses less"
    return (
        f"stopped; {kept:,} tokens in whole shards are kept | next: mxd train --activations {config.out} --tokens {kept}, "
        "or the same command with --overwrite to harvest from the start"
    )


def evaluate(run: str | Path | Run, config: EvalConfig | None = None, *, quiet: bool = False) -> dict[str, Any]:
    """Evaluate every student of a run in its host on held-out text; writes report.json/.md/.html and frontier.svg.

    Returns the report. Raises the errors of `Run.open`, `Host.load` and `Corpus`, and `RunError` while another process writes into the run.
    """
    from .evals.evaluate import evaluate as evaluate_run

    opened = run if isinstance(run, Run) else Run.open(run)
    config = config or EvalConfig()
    host, corpus = reopen(opened, device=config.device)
    with only_writer(opened.path), Bar("evaluating", 100, "%", quiet=quiet) as bar:
        return evaluate_run(opened, host, corpus, config, progress=lambda done, note: bar.update(int(100 * done), note))


def reopen(run: Run, *, device: str = "auto") -> tuple[Host, Corpus]:
    """The host and the texts that a run was trained on."""
    made = run.info["config"]
    host = Host.load(made["host"], revision=made["revision"], device=device, dtype=made["dtype"])
    # From a cache, the order of the text is the harvest's, whatever the seed of the training.
    return host, Corpus(tuple(made["text"]), column=made["text_column"], seed=run.info["text"]["seed"])
