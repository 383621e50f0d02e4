"""Which implementation runs: Triton's kernels on a GPU where Triton is installed, PyTorch's operators everywhere else."""

from __future__ import annotations

import functools
from importlib.util import find_spec

import torch

from ..errors import ConfigError
from .settings import current


def takes_triton(device: torch.device) -> bool:
    """Whether the Triton version is to run on tensors of `device`, as ``Settings.backend`` says.

    Inside torch.compile the eager version is traced: the compiler makes its own kernels of it.

    Raises:
        ConfigError: Triton is asked for and not installed.
    """
    wish = current().backend
    if wish == "eager" or torch.compiler.is_compiling():
        return False
    if wish == "triton" and not has_triton():
        raise ConfigError("backend triton needs the triton package", next='pip install "mxd[triton]", or backend eager')
    return wish == "triton" or (device.type == "cuda" and has_triton())


@functools.cache
def has_triton() -> bool:
    """Whether Triton can be imported; found out without importing it."""
    return find_spec("triton") is not None
