"""Where to run: from a name on the command line to a torch device that is there."""

from __future__ import annotations

import torch
from torch import nn

from .errors import ConfigError


def find_device(name: str) -> torch.device:
    """The device of that name; ``auto`` is cuda when there is one.

    Raises:
        ConfigError: unknown, or not in this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError("unknown device", expected="auto, cpu, cuda, cuda:N or mps", got=name) from None
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}.get(device.type, 0)
    if (device.index or 0) >= there:
        raise ConfigError(f"this machine has no device {name}", expected="auto, cpu, or a device that is there", next="pass --device cpu")
    return device


def layer_device(layer: nn.Module) -> torch.device:
    """Where a layer's parameters are; the CPU if it has none."""
    return next((p.device for p in layer.parameters()), torch.device("cpu"))
