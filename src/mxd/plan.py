"""What a configuration comes to before anything runs: whether it can work, its students, their sizes, the disk they need."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

from . import recipes
from .config import CONTROLS, KINDS, TrainConfig
from .errors import ConfigError, nearest
from .layers import Sizes
from .layers.sizing import candidate, match_budget, parse_budget
from .objectives import objective
from .sites import MLPSite
from .train import StudentSpec


def check(config: TrainConfig) -> None:
    """Raise `ConfigError` for whatever is wrong with `config` by itself."""
    for kind in config.kinds:
        if kind not in KINDS:
            raise ConfigError("unknown kind in --kinds", expected=nearest(kind, KINDS), got=kind)
    objective(config.loss)
    for name in ("kinds", "k", "layers", "text", "recipe"):
        values = getattr(config, name)
        if not values or len(set(values)) != len(values):
            raise ConfigError(f"--{name} needs one or more different values", got=" ".join(map(str, values)) or "none")
    for kind in config.kinds:
        recipes.chosen(config, kind)
    positive = ("tokens", "passes", "tokens_per_step", "buffer_tokens", "sequences_per_read", "log_every_steps")
    for name in positive:
        if getattr(config, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1", got=str(getattr(config, name)))
    if config.tokens_per_sequence < 2:
        raise ConfigError("--tokens-per-sequence must be at least 2", got=str(config.tokens_per_sequence))
    for k in config.k:
        if k < 1:
            raise ConfigError("--k must be at least 1", got=str(k))
    if config.buffer_tokens < config.tokens_per_step or config.tokens < config.tokens_per_step:
        raise ConfigError(
            "one step needs more tokens than there are",
            expected=f"--tokens and --buffer-tokens of at least {config.tokens_per_step:,} (--tokens-per-step)",
            got=f"{config.tokens:,} and {config.buffer_tokens:,}",
        )
    if config.sizes not in ("matched", "published"):
        raise ConfigError("unknown --sizes", expected="matched or published", got=config.sizes)
    if config.sizes == "published" and recipes.published_host(config.host) is None:
        raise ConfigError(
            "--sizes published is for the paper's hosts", expected=", ".join(recipes.PAPER_HOSTS), got=config.host, next="--sizes matched"
        )


def plan(config: TrainConfig, sites: list[MLPSite]) -> list[StudentSpec]:
    """The students of a run: every layer x kind x K x recipe (the dense control has no K), sizes settled.

    Raises:
        LayerError: K is larger than the number of units, or the budget too small for one.
    """
    specs: list[StudentSpec] = []
    for site, kind in itertools.product(sites, config.kinds):
        for k, recipe in itertools.product((0,) if kind == "dense" else config.k, recipes.chosen(config, kind)):
            name = kind if kind == "dense" else f"{kind}-k{k}"
            if len(config.recipe) > 1:
                name += f"-{recipe.name}"
            sizes = _sizes(config, site, kind, k)
            candidate(kind, sizes)
            specs.append(
                StudentSpec(
                    name=name if len(sites) == 1 else f"{name}@{site.hookpoint}",
                    hookpoint=site.hookpoint,
                    kind=kind,
                    sizes=sizes,
                    recipe=recipe,
                    loss=config.loss,
                    random_k=config.random_k,
                    seed=config.seed,
                )
            )
    return specs


def _sizes(config: TrainConfig, site: MLPSite, kind: str, k: int) -> Sizes:
    sizes = Sizes(site.d_in, site.d_out, 1, max(k, 1), site.d_hidden, site.activation, site.glu)
    if config.sizes == "published":
        key = recipes.published_host(config.host)
        assert key is not None
        paper = recipes.published()["sizes"][key]
        mxd_like = kind in ("mxd", *CONTROLS)
        return sizes._replace(n_units=paper["mxd_experts" if mxd_like else "transcoder_latents"], d_hidden=paper["mxd_hidden"])
    return match_budget(kind, sizes, parse_budget(config.budget, d_in=site.d_in, d_out=site.d_out))


def total_train_steps(config: TrainConfig) -> int:
    """Optimiser steps of a run: every token `passes` times, in whole steps."""
    return config.tokens * config.passes // config.tokens_per_step


def check_disk(out: Path, specs: list[StudentSpec]) -> None:
    """Refuse before hours of work what the disk cannot hold."""
    needed = 4 * sum(candidate(spec.kind, spec.sizes).budget() for spec in specs)
    place = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise ConfigError(
            f"the disk that holds {place} is too full for this run",
            expected=f"{needed / 2**20:,.0f} MiB free",
            got=f"{free / 2**20:,.0f} MiB",
            next="free some space, choose another --out, or lower --budget",
        )
