"""mxd: decompose the MLPs of a pretrained language model into sparse layers, trained side by side and measured in the model.

The public names below are imported when first used, so that ``import mxd`` stays light.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .cache import Cache
    from .checkpoint import Run, load
    from .config import EvalConfig, GenerateConfig, HarvestConfig, TrainConfig
    from .edits import load_edit
    from .errors import MxdError
    from .host import Host
    from .layers import Additive, Dense, MxD, SkipTranscoder, SparseLayer, TopKSAE, Transcoder
    from .pipeline import evaluate, harvest, train
    from .text import Corpus

__all__ = [
    "Additive",
    "Cache",
    "Corpus",
    "Dense",
    "EvalConfig",
    "GenerateConfig",
    "HarvestConfig",
    "Host",
    "MxD",
    "MxdError",
    "Run",
    "SkipTranscoder",
    "SparseLayer",
    "TopKSAE",
    "TrainConfig",
    "Transcoder",
    "__version__",
    "evaluate",
    "harvest",
    "load",
    "load_edit",
    "train",
]

_HOME = {
    **dict.fromkeys(("Additive", "Dense", "MxD", "SkipTranscoder", "SparseLayer", "TopKSAE", "Transcoder"), "layers"),
    **dict.fromkeys(("EvalConfig", "GenerateConfig", "HarvestConfig", "TrainConfig"), "config"),
    **dict.fromkeys(("Run", "load"), "checkpoint"),
    **dict.fromkeys(("evaluate", "harvest", "train"), "pipeline"),
    "Cache": "cache",
    "Corpus": "text",
    "Host": "host",
    "load_edit": "edits",
    "MxdError": "errors",
}
"""Public name -> the module it comes from."""


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mxd' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """``mxd.train`` is the function, whether or not the module of the same name has been imported.

    The import system sets every submodule as an attribute of its package; for a public name that would hide the function.
    The module itself remains reachable: ``from mxd.train import Student``.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
