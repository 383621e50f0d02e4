"""What a configuration comes to before anything runs: whether it can work, its students, their sizes, the disk they need."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import recipes
from .config import CONTROLS, KINDS, STORES, HarvestConfig, TrainConfig
from .errors import ConfigError, nearest
from .layers import Sizes
from .layers.sizing import candidate, match_budget, parse_budget
from .objectives import objective
from .ops import Settings
from .sites import MLPSite
from .train import StudentSpec

DEAD_AFTER_TOKENS = 10_000_000
"""Tokens without firing after which a unit counts as dead, as in Gao et al. 2024; short runs take a tenth of their length."""


CACHED = ("host", "revision", "dtype", "text", "text_column", "tokens_per_sequence", "sequences_per_read")
"""Options of a training run that a cache of activations has settled already."""


UNPUBLISHED = ("mxd-pk", "cp-mumoe", "mov")
"""Kinds of which the paper gives no sizes."""


def settled(config: TrainConfig, cached: Mapping[str, Any] | None = None) -> TrainConfig:
    """`config` with its open layers filled in and, where activations are cached, with what they were made of.

    Args:
        config: as given.
        cached: the configuration of the harvest, out of the manifest; None to read from the host.

    Raises:
        ConfigError: an option is set to another value than the cache's (one left at its default counts as not set).
    """
    if cached is None:
        return dataclasses.replace(config, layers=config.layers or HarvestConfig.layers)
    made = {name: tuple(cached[name]) if isinstance(cached[name], list) else cached[name] for name in (*CACHED, "layers")}
    for name in CACHED:
        given = getattr(config, name)
        if given != getattr(TrainConfig, name) and given != made[name]:
            raise ConfigError(
                f"--{name.replace('_', '-')} contradicts --activations {config.activations}",
                expected=_words(made[name]),
                got=_words(given),
                next="leave it out, or harvest again",
            )
    made["layers"] = config.layers or made["layers"]
    return dataclasses.replace(config, **made)


def _words(value: Any) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value)


def check_harvest(config: HarvestConfig) -> None:
    """Raise `ConfigError` for whatever is wrong with `config` by itself."""
    for name in ("layers", "text"):
        _check_different(name, getattr(config, name))
    for name in ("tokens", "sequences_per_read", "tokens_per_shard"):
        _check_positive(name, getattr(config, name))
    if config.tokens_per_sequence < 2:
        raise ConfigError("--tokens-per-sequence must be at least 2", got=str(config.tokens_per_sequence))
    if config.store not in STORES:
        raise ConfigError("unknown --store", expected=nearest(config.store, STORES), got=config.store)


def _check_different(name: str, values: tuple[Any, ...]) -> None:
    if not values or len(set(values)) != len(values):
        raise ConfigError(f"--{name} needs one or more different values", got=" ".join(map(str, values)) or "none")


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"--{name.replace('_', '-')} must be at least 1", got=str(value))


def check(config: TrainConfig) -> None:
    """Raise `ConfigError` for whatever is wrong with `config` (as `settled`) by itself."""
    for kind in config.kinds:
        if kind not in KINDS:
            raise ConfigError("unknown kind in --kinds", expected=nearest(kind, KINDS), got=kind)
    objective(config.loss)
    for name in ("kinds", "k", "layers", "text", "recipe"):
        _check_different(name, getattr(config, name))
    for kind in config.kinds:
        recipes.chosen(config, kind)
    _check_modifiers(config)
    positive = ("tokens", "passes", "tokens_per_step", "buffer_tokens", "sequences_per_read", "log_every_steps")
    for name in positive:
        _check_positive(name, getattr(config, name))
    for name, least in (("save_every_minutes", 0), ("save_every_tokens", 1), ("aux_weight", 0), ("aux_k", 1), ("dead_after_tokens", 1)):
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}", got=str(value))
    op_settings(config)
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
    unpublished = [kind for kind in config.kinds if kind in UNPUBLISHED]
    if config.sizes == "published" and unpublished:
        raise ConfigError(f"there are no --sizes published for {unpublished[0]}", next="--sizes matched")
    if config.sizes == "published" and recipes.published_host(config.host) is None:
        raise ConfigError(
            "--sizes published is for the paper's hosts", expected=", ".join(recipes.PAPER_HOSTS), got=config.host, next="--sizes matched"
        )


def _check_modifiers(config: TrainConfig) -> None:
    idle = recipes.without_effect(config)
    if idle is not None:
        raise ConfigError(
            f"--recipe {idle[0]}: +{idle[1]} has no effect on any of --kinds",
            expected="a modifier that does something",
            got=" ".join(config.kinds),
        )
    for name in config.recipe:
        sized = next((m.text for m in recipes.modifiers(name) if m.field in recipes.SIZING), None)
        if config.sizes == "published" and sized is not None:
            raise ConfigError(f"--sizes published settles what +{sized} would change", got=name, next="--sizes matched")


def plan(config: TrainConfig, sites: list[MLPSite]) -> list[StudentSpec]:
    """The students of a run: every layer x kind x K x recipe (neither the dense control nor a gate with l1 has one), sizes settled.

    Raises:
        LayerError: K is larger than the number of units, or the budget too small for one.
    """
    specs: list[StudentSpec] = []
    for site, kind in itertools.product(sites, config.kinds):
        for k, recipe in itertools.product((0,) if kind == "dense" else config.k, recipes.chosen(config, kind)):
            if recipe.l1 and k != config.k[0]:
                continue  # its gate has no K: one student for all of them
            name = kind if kind == "dense" else f"{kind}-relu" if recipe.l1 else f"{kind}-k{k}"
            if len(config.recipe) > 1:
                name += f"-{recipe.name}"
            sizes = _sizes(config, site, kind, k, recipe)
            candidate(kind, sizes)
            specs.append(
                StudentSpec(
                    name=name if len(sites) == 1 else f"{name}@{site.hookpoint}",
                    hookpoint=site.hookpoint,
                    kind=kind,
                    sizes=sizes,
                    recipe=recipe,
                    loss=config.loss,
                    random_k=(config.random_k and not recipe.l1) or recipe.random_k,
                    aux_weight=recipe.aux_weight if config.aux_weight is None else config.aux_weight,
                    aux_k=config.aux_k or max(1, site.d_in // 2),
                    dead_after_tokens=config.dead_after_tokens or min(DEAD_AFTER_TOKENS, config.tokens * config.passes // 10),
                    seed=config.seed,
                )
            )
    return specs


def _sizes(config: TrainConfig, site: MLPSite, kind: str, k: int, recipe: recipes.Recipe) -> Sizes:
    width = max(1, round(recipe.width * site.d_hidden))
    phi = site.activation if recipe.phi == "host" else recipe.phi
    glu = site.glu if recipe.shape == "host" else recipe.shape == "glu"
    rank = max(1, round(recipe.rank * site.d_out))
    sizes = Sizes(site.d_in, site.d_out, 1, max(k, 1), width, phi, glu, rank)
    if config.sizes == "published":
        key = recipes.published_host(config.host)
        assert key is not None
        paper = recipes.published()["sizes"][key]
        mxd_like = kind in ("mxd", *CONTROLS)
        sizes = sizes._replace(n_units=paper["mxd_experts" if mxd_like else "transcoder_latents"], d_hidden=paper["mxd_hidden"])
    else:
        sizes = sizes._replace(k=1) if recipe.l1 else sizes
        sizes = match_budget(kind, sizes, parse_budget(config.budget, d_in=site.d_in, d_out=site.d_out))
    return sizes._replace(k=sizes.n_units) if recipe.l1 else sizes


def op_settings(config: TrainConfig) -> dict[str, Any]:
    """What `mxd.ops.using` is to hold while this run trains.

    Raises:
        ConfigError: an unknown precision or gate, or a slice of no size.
    """
    wanted = {name: getattr(config, name) for name in ("precision", "gate", "scores_mib", "recompute", "deterministic")}
    Settings(**wanted)
    return wanted


def train_steps(tokens: int, config: TrainConfig) -> int:
    """Optimiser steps that so many tokens come to: every token `passes` times, in whole steps."""
    return tokens * config.passes // config.tokens_per_step


def check_disk(out: Path, specs: list[StudentSpec]) -> None:
    """Refuse before hours of work what the disk cannot hold: the weights, and a state of three times their size (a short run writes none
    but where it is stopped)."""
    weights = 4 * sum(candidate(spec.kind, spec.sizes).budget() for spec in specs)
    check_space(out, weights * (1 + 3), what="this run", advice="lower --budget")


def check_space(out: Path, needed: int, *, what: str, advice: str, reclaimed: int = 0) -> None:
    """Raise `ConfigError` if the disk that will hold `out` has fewer than `needed` bytes, `reclaimed` ones counted as free."""
    place = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free + reclaimed
    if needed > free:
        raise ConfigError(
            f"the disk that holds {place} is too full for {what}",
            expected=f"{needed / 2**20:,.0f} MiB free",
            got=f"{free / 2**20:,.0f} MiB",
            next=f"free some space, choose another --out, or {advice}",
        )
