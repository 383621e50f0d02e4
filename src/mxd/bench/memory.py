"""Peak memory of training steps, each rival alone in a process of its own.

On the CPU it is the peak resident size of the process over a few steps, less what was resident just before the layer was made (the batch is
there already, the same for both): parameters, gradients, Adam's two moments, and everything a step holds in between. On CUDA it is
`torch.cuda.max_memory_allocated` less what was allocated at that point.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import MxdError
from . import dense

STEPS = 3
RETURNED_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 20)}
"""glibc otherwise keeps freed tensors of up to 32 MiB resident: hundreds of megabytes that no step needs. The same for every rival."""


class Job(NamedTuple):
    """One rival at one shape; travels to the process as JSON."""

    d: int
    """Width read and written."""
    h: int
    """Width of the dense hidden vector."""
    n: int
    """Experts."""
    k: int
    """Active experts per token."""
    tokens: int
    """Tokens in one step."""
    threads: int
    """Threads of PyTorch."""
    device: str = "cpu"
    """Where it runs."""
    rival: str = "ours"
    """``ours`` or ``dense``."""
    autocast: bool = False
    """Whether the forward pass runs in bfloat16 autocast."""
    settings: Mapping[str, Any] = MappingProxyType({})
    """Changes of `mxd.ops.settings` that ours runs with."""


def peak(job: Job) -> int:
    """Bytes that training `STEPS` steps adds at their highest.

    Raises:
        MxdError: the process failed, for want of memory as a rule.
    """
    source = str(Path(__file__).resolve().parents[2])
    environment = {
        **os.environ,
        **RETURNED_AT_ONCE,
        "OMP_NUM_THREADS": str(job.threads),
        "PYTHONPATH": os.pathsep.join([source, *_paths()]),
    }
    command = [sys.executable, "-m", "mxd.bench.memory", json.dumps({**job._asdict(), "settings": dict(job.settings)})]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise MxdError(
            f"the process that measures memory ended with {done.returncode}", got=last, next="free some memory, or choose other NAMES"
        )
    return int(done.stdout.split()[-1])


def _paths() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def measure(job: Job) -> int:
    """`peak` in this very process: what it did before must not have needed more."""
    torch.set_num_threads(job.threads)
    device = torch.device(job.device)
    # Once at a tiny size: what PyTorch loads and sets up at its first step is not the layer's.
    _train(job._replace(d=8, h=8, n=4 * job.k, tokens=8), *dense.batch(device, d=8, tokens=8))
    batch = dense.batch(device, d=job.d, tokens=job.tokens)
    before = _allocated(device)
    _train(job, *batch)
    return _highest(device) - before


def _train(job: Job, x: Tensor, y: Tensor) -> None:
    layer = dense.make(x.device, d=job.d, h=job.h, n=job.n, k=job.k)
    forward = (lambda x: layer(x).y) if job.rival == "ours" else (lambda x: dense.mxd(layer, x))
    step = dense.step(layer, forward, x, y, ours=job.rival == "ours", autocast=job.autocast, **job.settings)
    for _ in range(STEPS):
        step()


def _allocated(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux: the highest so far stands in, a little more than what is resident
        return _highest(device)


def _highest(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        # Not getrusage's ru_maxrss: on Linux a new process inherits that from the one that started it.
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")))
    except (OSError, StopIteration):
        pass
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    print(measure(Job(**json.loads(sys.argv[1]))))
