"""From a kind's name and sizes to a layer, and from a saved description back."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch

from ..errors import LayerError, nearest
from ..typed import wrong
from .base import SparseLayer
from .controls import Additive, Dense, DenseConfig
from .cp import CPMuMoE, CPMuMoEConfig
from .mov import MoV
from .mxd import MxD, MxDConfig
from .product_key import MxDProductKey
from .sae import TopKSAE, TopKSAEConfig
from .transcoder import SkipTranscoder, Transcoder, TranscoderConfig

LAYERS: dict[str, tuple[Any, Any]] = {
    "mxd": (MxD, MxDConfig),
    "mxd-pk": (MxDProductKey, MxDConfig),
    "cp-mumoe": (CPMuMoE, CPMuMoEConfig),
    "mov": (MoV, MxDConfig),
    "transcoder": (Transcoder, TranscoderConfig),
    "skip-transcoder": (SkipTranscoder, TranscoderConfig),
    "topk-sae": (TopKSAE, TopKSAEConfig),
    "dense": (Dense, DenseConfig),
    "additive": (Additive, MxDConfig),
}
"""Every kind: its class and the dataclass of its sizes. A new kind is one line here."""


class Sizes(NamedTuple):
    """All that any kind may need to know; each takes the fields its own configuration names."""

    d_in: int
    """Width of the MLP's input."""
    d_out: int
    """Width of the MLP's output."""
    n_units: int
    """Experts or latents."""
    k: int
    """Units active per token."""
    d_hidden: int
    """Width of the dense hidden vector of MxD and the controls."""
    activation: str = "gelu"
    """φ of the dense encoder."""
    glu: bool = False
    """Whether the dense encoder is gated."""
    rank: int = 1
    """Rank of a CP-μMoE."""


def layer_class(kind: str) -> tuple[Any, Any]:
    """The class and configuration class of `kind`.

    Raises:
        LayerError: no such kind; names the nearest.
    """
    if kind not in LAYERS:
        raise LayerError("unknown kind of layer", expected=nearest(kind, LAYERS), got=kind)
    return LAYERS[kind]


def build(kind: str, sizes: Sizes, *, generator: torch.Generator | None = None, device: str | torch.device | None = None) -> SparseLayer:
    """A freshly initialised layer (as published) of this kind and these sizes.

    Raises:
        LayerError: unknown kind, or sizes that make no sense (k > n_units, a width below 1).
    """
    cls, config_cls = layer_class(kind)
    wanted = {field.name for field in dataclasses.fields(config_cls)}
    config = config_cls(**{name: value for name, value in sizes._asdict().items() if name in wanted})
    return cls(config, generator=generator, device=device)


def from_description(description: dict[str, Any], *, device: str | torch.device | None = None) -> SparseLayer:
    """The layer that `SparseLayer.describe` described, freshly initialised: load its weights next.

    Raises:
        LayerError: unknown kind, missing or unknown fields.
    """
    cls, config_cls = layer_class(str(description.get("kind")))
    fields = {field.name: field for field in dataclasses.fields(config_cls)}
    given = {name: value for name, value in description.items() if name != "kind"}
    unknown = sorted(set(given) - set(fields))
    missing = sorted(n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in given)
    if unknown or missing:
        raise LayerError(
            f"the description of this {description['kind']} does not fit",
            expected=", ".join(fields),
            got=f"missing {missing}, unknown {unknown}",
        )
    if unfit := wrong(config_cls, given):
        raise LayerError(f"the description of this {description['kind']} does not fit", got=", ".join(unfit))
    try:
        return cls(config_cls(**given), device=device)
    except (OverflowError, RuntimeError, TypeError) as error:  # sizes that no tensor has
        raise LayerError(f"there is no {description['kind']} of these sizes", got=" ".join(str(error).split())[:200]) from None
