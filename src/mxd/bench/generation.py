"""Generation by a host with one MLP replaced, against the host itself: tokens per second with the KV cache, alone and in a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import MxdError
from ..host import Generated, Host, MLPSite
from ..layers import Sizes, SparseLayer, build
from ..layers.sizing import match_budget, parse_budget
from .rows import Row, row
from .timing import in_turns, verify

PROMPT = "The President of the United States"
MODES: dict[str, dict[str, bool]] = {"dynamic": {}, "static": {"static": True}, "compiled": {"compiled": True}}
"""Ways to take a step (see `mxd.decoding`): name -> options of `Host.generate_batch`."""
SHORTFALL = 1e-3
"""Largest gap, over the spread of the scores, between the best next token and the one taken, when scored again without a cache."""


def rows(
    *,
    device: torch.device,
    threads: int,
    runs: int,
    quick: bool = False,
    host_name: str = "smollm2",
    kinds: Sequence[str] = ("mxd", "transcoder"),
    batch: Sequence[int] = (1, 32),
    new_tokens: int = 64,
    layer: int = 8,
    budget: str = "16x",
    k: int = 32,
    modes: Sequence[str] = ("dynamic",),
) -> Iterator[Row]:
    """A row for each kind, batch size (sequences) and mode; fresh layers whose every parameter counts, float32, greedy.

    A time holds `new_tokens` tokens for each sequence, the reading of the prompts included. Ours is the replaced host, the
    rival the host in the same mode.

    Raises:
        MxdError: what was generated is not what a full forward without cache says.
    """
    if quick:
        batch, new_tokens, k = (1, 3), 6, 4
    host = Host.load(host_name, device=str(device))
    host.model.generation_config.eos_token_id = [-1]  # every sequence gets all its tokens
    site = host.site(layer)
    for kind in kinds:
        stand_in = fresh(kind, site, budget=budget, k=k).to(device)
        for size in batch:
            prompts = [PROMPT] if size == 1 else [f"{PROMPT}, number {1 + 7 * i}:" for i in range(size)]
            for mode in modes:
                yield _row(host, stand_in, site, prompts, new_tokens, mode, budget=budget, threads=threads, runs=runs)


def fresh(kind: str, site: MLPSite, *, budget: str, k: int) -> SparseLayer:
    """A layer of `kind` at `budget` for an MLP, started as published, but with nothing left at 0: its product is not skipped."""
    sizes = Sizes(site.d_in, site.d_out, k, k, site.d_hidden, site.activation, site.glu)
    matched = match_budget(kind, sizes, parse_budget(budget, d_in=site.d_in, d_out=site.d_out))
    generator = torch.Generator().manual_seed(0)
    made = build(kind, matched, generator=generator)
    with torch.no_grad():
        for parameter in made.parameters():
            if not parameter.any():
                parameter.uniform_(-0.02, 0.02, generator=generator)
    return made.eval().requires_grad_(False)


def _row(
    host: Host,
    stand_in: SparseLayer,
    site: MLPSite,
    prompts: list[str],
    new_tokens: int,
    mode: str,
    *,
    budget: str,
    threads: int,
    runs: int,
) -> Row:
    def own() -> list[Generated]:
        return host.generate_batch(prompts, new_tokens=new_tokens, **MODES[mode])

    def replaced() -> list[Generated]:
        with host.replace({site.hookpoint: stand_in}):
            return own()

    check = _verify(host, stand_in, site, replaced())
    taken = in_turns({"ours": replaced, "rival": own}, runs=runs, device=host.device)
    made = len(prompts) * new_tokens
    shape: dict[str, Any] = {"kind": stand_in.kind, "sequences": len(prompts), "new_tokens": new_tokens, "budget": budget}
    shape |= {"n": stand_in.n_units, "k": stand_in.k, "layer": site.layer, "host": Path(host.name).name, "threads": threads}
    return row(
        "generation with one MLP replaced",
        "the host itself",
        device=host.device.type,
        shape=shape,
        dtype=str(host.dtype).removeprefix("torch."),
        ours_ms=taken["ours"],
        rival_ms=taken["rival"],
        check=check,
        runs=runs,
        **({} if mode == "dynamic" else {"setting": mode}),
        ours_tokens_per_second=round(1e3 * made / taken["ours"], 1),
        rival_tokens_per_second=round(1e3 * made / taken["rival"], 1),
        throughput_ratio=float(f"{taken['rival'] / taken['ours']:.4g}"),
    )


def _verify(host: Host, stand_in: SparseLayer, site: MLPSite, made: list[Generated]) -> str:
    """Check up to four sequences: every token is the best one by a full forward of the replaced host, and the layer matters."""
    worst = 0.0
    for one in made[:: max(1, len(made) // 4)][:4]:
        ids = torch.tensor([one.prompt_ids + one.new_ids])
        with host.replace({site.hookpoint: stand_in}):
            scores = host.logits(ids)
        if torch.equal(scores, host.logits(ids)):
            raise MxdError("the replaced host computes what the host does", expected="a layer that changes its scores")
        scores = scores[0, len(one.prompt_ids) - 1 : -1]
        chosen = torch.tensor(one.new_ids, device=scores.device)[:, None]
        gap = scores.amax(-1) - scores.gather(1, chosen)[:, 0]
        worst = max(worst, float((gap / scores.std(-1)).max()))
    return verify("tokens generated with the cache and the best ones of a full forward without it", worst, SHORTFALL)
