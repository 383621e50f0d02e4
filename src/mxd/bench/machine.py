"""What every result file says about where it was measured."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..ops import gemm

PACKAGES = ("mxd", "torch", "triton", "transformers", "eai-sparsify", "sae-lens")


def machine(device: torch.device) -> dict[str, Any]:
    """Processor, threads, the float32 product in use, and the accelerator if `device` is one."""
    found: dict[str, Any] = {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "float32_product": "onednn" if gemm.uses_onednn() else "pytorch",
    }
    if device.type == "cuda":
        found.update(accelerator=torch.cuda.get_device_name(device), cuda=torch.version.cuda)
    return found


def versions() -> dict[str, str]:
    """Of Python and of the packages that timings depend on, those that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {**found, "torch": torch.__version__}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
