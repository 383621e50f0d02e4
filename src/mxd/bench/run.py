"""Runs the benchmarks by name and keeps what they return."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..config import BenchConfig
from ..errors import ConfigError, nearest
from . import BENCHMARKS
from .machine import machine, versions
from .rows import Row, complete, merge, read, write

RESULTS = Path("benchmarks/results")
"""Where results go unless --out says otherwise, in the working folder."""


def run(config: BenchConfig, on_rows: Callable[[str, list[Row]], None] | None = None, *, quiet: bool = False) -> dict[str, list[Row]]:
    """Run the benchmarks that `config` names, all of them by default, and return their rows.

    A row is in its file as soon as it is measured, so that stopping loses none.

    Args:
        config: what to run, where, and how often.
        on_rows: called after each benchmark with its name and rows, to show them.
        quiet: no line on standard error after each row.

    Raises:
        ConfigError: an unknown name or device, or a number below 1.
        MxdError: a result is wrong (nothing of it is timed), or what a benchmark needs is not installed.
        KeyboardInterrupt: after Ctrl-C, with a message.
    """
    names = check(config)
    device = _device(config.device)
    found: dict[str, list[Row]] = {}
    with _threads(config.threads):
        options = {
            "device": device,
            "threads": config.threads,
            "runs": config.runs,
            "quick": config.quick,
            "host_name": config.host,
            "text": config.text,
        }
        for name in names:
            found[name] = []
            place = _place(config, name, device)
            try:
                for row in _rows(name, options):
                    found[name].append(complete(row))
                    if not quiet:
                        print(f"mxd: {name}: {line(found[name][-1])}", file=sys.stderr, flush=True)
                    if place is not None:
                        write(place, merge(read(place), machine(device), versions(), found[name]))
            except KeyboardInterrupt:
                where = f" in {place.parent}" if place is not None else ""
                raise KeyboardInterrupt(f"stopped in {name}; {sum(map(len, found.values()))} rows measured{where}") from None
            if on_rows is not None:
                on_rows(name, found[name])
    return found


def check(config: BenchConfig) -> list[str]:
    """The names to run; raises `ConfigError` for whatever is wrong with `config`."""
    for name in config.names:
        if name not in BENCHMARKS:
            raise ConfigError("unknown benchmark", expected=nearest(name, BENCHMARKS), got=name, next="mxd bench --help")
    for option in ("threads", "runs"):
        if getattr(config, option) < 1:
            raise ConfigError(f"--{option} must be at least 1", got=str(getattr(config, option)))
    # The peers are installed beside ours only where `make bench-peers` put them; asked for by name, their absence is an error.
    return list(dict.fromkeys(config.names)) or [name for name in BENCHMARKS if name != "peers" or _peers_installed()]


def line(row: Row) -> str:
    """One row in one line."""
    shape = " ".join(f"{name} {value:,}" if isinstance(value, int) else f"{name} {value}" for name, value in row["shape"].items())
    case = " · ".join(part for part in (row["case"], row.get("setting"), shape) if part)
    if row["rival_ms"] is None:
        return f"{case}: {milliseconds(row['ours_ms'])}"
    return f"{case}: {milliseconds(row['ours_ms'])} against {milliseconds(row['rival_ms'])} ({row['rival']}), ratio {row['time_ratio']:.3g}"


def milliseconds(value: float | None) -> str:
    """``1,240 ms``, ``3.1 ms``; an en dash for what was not measured."""
    if value is None:
        return "–"
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _rows(name: str, options: dict[str, Any]) -> Iterator[Row]:
    """The rows of a benchmark, given the options that its function names."""
    function = importlib.import_module(f".{name}", __package__).rows
    known = inspect.signature(function).parameters
    yield from function(**{option: value for option, value in options.items() if option in known})


def _place(config: BenchConfig, name: str, device: torch.device) -> Path | None:
    """The file of a benchmark's rows; None for a quick run, whose figures say nothing, unless a folder is asked for."""
    if config.out is None and config.quick:
        return None
    return (config.out or RESULTS) / f"{name}-{device.type}.json"


def _device(name: str) -> torch.device:
    there = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if there else "cpu")
    if name not in ("cpu", "cuda"):
        raise ConfigError("unknown --device", expected="auto, cpu or cuda", got=name)
    if name == "cuda" and not there:
        raise ConfigError("this machine has no device cuda", expected="auto or cpu", next="pass --device cpu")
    return torch.device(name)


def _peers_installed() -> bool:
    from importlib.util import find_spec

    return find_spec("sparsify") is not None or find_spec("sae_lens") is not None


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
