"""A whole frontier (3 kinds x 5 K on one layer) in one pass of the host, against as many runs of one student each.

Every run is a whole `mxd train`: the separate ones load the host and read the text each for themselves, as they would. A second row leaves
loading out, a third trains all from cached activations.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..config import HarvestConfig, TrainConfig
from ..pipeline import harvest
from .rows import Row, row
from .runs import Timed, same_weights, scratch, timed_train

KINDS = ("mxd", "transcoder", "skip-transcoder")
KS = (16, 32, 64, 128, 256)


def config(host_name: str, text: tuple[str, ...], device: str, quick: bool) -> TrainConfig:
    """The one-pass run: the demo's host, layer and budget."""
    made = TrainConfig(host=host_name, text=text, device=device, kinds=KINDS, k=KS, budget="16x", tokens=20_480)
    # Twelve measurements of the routing, which a run makes however long it is, would outweigh so short a run: one, as in the same stretch
    # of a run of the demo's length.
    made = dataclasses.replace(made, probe_every_steps=made.tokens)
    return dataclasses.replace(made, k=(2, 4), tokens=1024, tokens_per_step=256, buffer_tokens=512) if quick else made


def rows(*, device: torch.device, threads: int, runs: int, quick: bool, host_name: str, text: tuple[str, ...]) -> Iterator[Row]:
    """Three rows: whole commands, the same without loading, and one pass from cached activations."""
    together = config(host_name, text, str(device), quick)
    rounds: list[tuple[Timed, list[Timed], Timed]] = []
    check = ""
    with scratch() as folder:  # not counted: imports, and files that the system then has at hand
        timed_train(dataclasses.replace(together, out=folder / "warm-up", kinds=together.kinds[:1], k=together.k[:1]))
    for _ in range(runs):
        with scratch() as folder:
            one, apart, cached = _round(together, folder)
            check = same_weights(one.run, [part.run for part in apart])
            if device.type == "cpu":  # where a run repeats bit for bit
                check += f", from cache too: {same_weights(one.run, [cached.run])}"
            rounds.append((one, apart, cached))
    students = len(together.kinds) * len(together.k)
    shape: dict[str, Any] = {"students": students, "tokens": together.tokens, "tokens_per_step": together.tokens_per_step}
    shape |= {"budget": together.budget, "host": Path(host_name).name, "threads": threads}
    bound = statistics.median(sum(part.students for part in apart) / sum(part.training for part in apart) for _, apart, _ in rounds)

    def made(case: str, ours: Sequence[float], rival: Sequence[float], **more: Any) -> Row:
        ours_ms, rival_ms = (1e3 * statistics.median(seconds) for seconds in (ours, rival))
        return row(
            case,
            f"{students} separate runs",
            device=device.type,
            shape=shape,
            dtype="float32",
            ours_ms=ours_ms,
            rival_ms=rival_ms,
            check=check,
            runs=runs,
            **more,
        )

    ours, rival = (
        _parts([one for one, _, _ in rounds], 1),
        _parts([part for _, apart, _ in rounds for part in apart], students),
    )
    yield made(
        f"{students} students in one pass, whole command",
        [one.whole for one, _, _ in rounds],
        [sum(part.whole for part in apart) for _, apart, _ in rounds],
        **{f"ours_{name}_ms": value for name, value in ours.items()},
        **{f"rival_{name}_ms": value for name, value in rival.items()},
    )
    yield made(
        f"{students} students in one pass, without loading host and text",
        [one.training for one, _, _ in rounds],
        [sum(part.training for part in apart) for _, apart, _ in rounds],
        students_share=round(bound, 3),
    )
    yield made(
        f"{students} students in one pass from cached activations, without loading",
        [cached.training for _, _, cached in rounds],
        [sum(part.training for part in apart) for _, apart, _ in rounds],
    )


def _round(together: TrainConfig, folder: Path) -> tuple[Timed, list[Timed], Timed]:
    """One pass, the separate runs, and one pass from a cache."""
    one = timed_train(dataclasses.replace(together, out=folder / "one"))
    apart = [
        timed_train(dataclasses.replace(together, out=folder / f"{kind}-{k}", kinds=(kind,), k=(k,)))
        for kind in together.kinds
        for k in together.k
    ]
    store = folder / "activations"
    harvest(cache_config(together, store), quiet=True)
    return one, apart, timed_train(dataclasses.replace(together, out=folder / "cached", activations=store))


def cache_config(config: TrainConfig, out: Path) -> HarvestConfig:
    """The harvest that `config` can be trained from."""
    shared = {field.name for field in dataclasses.fields(HarvestConfig)} & {field.name for field in dataclasses.fields(TrainConfig)}
    given: dict[str, Any] = {name: value for name in shared if (value := getattr(config, name))}  # no layers said: the default of both
    given["out"] = out
    return HarvestConfig(**given)


def _parts(found: Sequence[Timed], at_once: int) -> dict[str, float]:
    """Milliseconds by part, for `at_once` runs together: means over rounds."""
    rounds = len(found) / at_once
    sums = {name: sum(getattr(one, name) for one in found) / rounds for name in ("loading", "harvest", "students")}
    return {name: float(f"{1e3 * seconds:.4g}") for name, seconds in sums.items()}
