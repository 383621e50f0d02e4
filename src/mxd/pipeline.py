"""The whole way from a configuration to a run folder, and from a run folder to its report.

    text -> tokens -> activations (x, y) -> sparse layers, trained side by side -> run folder -> evaluation

Each step is a module of its own; this one only joins them. `train` is ``mxd.train``, `evaluate` is ``mxd.evaluate``.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from . import cache as activation_cache
from .cache import Cache, CacheWriter
from .checkpoint import Run
from .config import EvalConfig, HarvestConfig
from .feed import HostFeed
from .host import Host
from .locks import only_writer
from .plan import check_harvest, check_space
from .progress import Bar
from .run_info import made_with
from .text import Corpus
from .training import train as train
from .typed import plain
from .unit_config import CollectConfig


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


def collect(run: str | Path | Run, config: CollectConfig | None = None, *, quiet: bool = False) -> str:
    """Keep in ``runs/NAME/explore`` what every unit of a run does on held-out text; what is there already is not collected again.

    Returns a line on what is there now. Raises the errors of `Run.open`, `Host.load`, `Corpus` and `mxd.explore.collect.collect`.
    """
    from .explore import collect as collecting
    from .explore.store import folder

    opened = run if isinstance(run, Run) else Run.open(run)
    config = config or CollectConfig()
    begun = time.monotonic()
    with only_writer(folder(opened)), Bar("collecting", config.tokens, "tokens", quiet=quiet) as bar:
        made = collecting.collect(opened, config, lambda: reopen(opened, device=config.device), bar.update)
    if not made:
        return f"{folder(opened)} is collected already (--overwrite collects anew)"
    return f"{folder(opened)}: {', '.join(made)} in {time.monotonic() - begun:,.0f} s"


def reopen(run: Run, *, device: str = "auto") -> tuple[Host, Corpus]:
    """The host and the texts that a run was trained on."""
    made = run.info["config"]
    host = Host.load(made["host"], revision=made["revision"], device=device, dtype=made["dtype"])
    # From a cache, the order of the text is the harvest's, whatever the seed of the training.
    corpus = Corpus(tuple(made["text"]), column=made["text_column"], seed=run.info["text"]["seed"])
    corpus.pin(run.info["text"])
    return host, corpus
