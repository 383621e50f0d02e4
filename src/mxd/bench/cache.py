"""Training one student from cached activations against streaming them from the host."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..config import TrainConfig
from ..pipeline import harvest
from .frontier import cache_config
from .rows import Row, row
from .runs import Timed, same_weights, scratch, timed_train


def config(host_name: str, text: tuple[str, ...], device: str, quick: bool) -> TrainConfig:
    """One MxD, K = 32, on the demo's host, layer, budget and number of tokens, in steps of the default size."""
    made = TrainConfig(host=host_name, text=text, device=device, kinds=("mxd",), k=(32,), tokens=307_200)
    return dataclasses.replace(made, k=(4,), tokens=2048, tokens_per_step=256, buffer_tokens=512) if quick else made


def rows(*, device: torch.device, threads: int, runs: int, quick: bool, host_name: str, text: tuple[str, ...]) -> Iterator[Row]:
    """Two rows: the training loop (what reading costs per token), and the whole command with loading and saving."""
    streaming = config(host_name, text, str(device), quick)
    taken: dict[str, list[Timed]] = {"cached": [], "streamed": []}
    with scratch() as folder:
        store = folder / "activations"
        began = time.perf_counter()
        harvest(cache_config(streaming, store), quiet=True)
        harvested = time.perf_counter() - began
        size = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
        check = ""
        few = min(streaming.tokens, 8 * streaming.tokens_per_step)  # enough to have read every file and made every thread once
        timed_train(dataclasses.replace(streaming, out=folder / "warm-up", tokens=few))
        for turn in range(runs):
            for name, extra in (("streamed", {}), ("cached", {"activations": store})):
                taken[name].append(timed_train(dataclasses.replace(streaming, out=folder / f"{name}-{turn}", **extra)))
            if device.type == "cpu" or not check:
                check = same_weights(taken["streamed"][-1].run, [taken["cached"][-1].run])
    shape: dict[str, Any] = {"tokens": streaming.tokens, "tokens_per_step": streaming.tokens_per_step, "kind": "mxd", "k": streaming.k[0]}
    shape |= {"budget": streaming.budget, "host": Path(host_name).name, "threads": threads}
    for part, case in (
        ("training", "one student from cache: reading, training, saving"),
        ("whole", "one student from cache: whole command"),
    ):
        ours, rival = (statistics.median(getattr(one, part) for one in taken[name]) for name in ("cached", "streamed"))
        yield row(
            case,
            "streaming from the host",
            device=device.type,
            shape=shape,
            dtype="float32",
            ours_ms=1e3 * ours,
            rival_ms=1e3 * rival,
            check=check,
            runs=runs,
            ours_tokens_per_second=round(streaming.tokens / ours),
            rival_tokens_per_second=round(streaming.tokens / rival),
            harvest_ms=round(1e3 * harvested),
            cache_mib=round(size / 2**20, 1),
        )
