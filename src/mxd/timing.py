"""Taking turns: every rival once per round, so that what changes on the machine meanwhile meets all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def in_turns(rivals: Mapping[str, Callable[[], object]], *, runs: int, device: torch.device, warm_up: int = 1) -> dict[str, float]:
    """Median milliseconds of each rival over `runs` rounds, after `warm_up` rounds that are not counted.

    On CUDA every call is waited for before and after, so that a time holds all the work of its call and nothing of another's.
    """
    return {name: statistics.median(found) for name, found in rounds(rivals, runs=runs, device=device, warm_up=warm_up).items()}


def rounds(rivals: Mapping[str, Callable[[], object]], *, runs: int, device: torch.device, warm_up: int = 1) -> dict[str, list[float]]:
    """As `in_turns`, with the milliseconds of every round that counts."""
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in range(warm_up + runs):
        for name, rival in rivals.items():
            milliseconds = timed(rival, device)
            if turn >= warm_up:
                times[name].append(milliseconds)
    return times


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call."""
    wait(device)
    began = time.perf_counter()
    call()
    wait(device)
    return 1e3 * (time.perf_counter() - began)


def wait(device: torch.device) -> None:
    """Until everything given to `device` is done; nothing to wait for on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
