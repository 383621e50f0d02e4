"""Losses of a host on a few sequences, and how they depend on what its MLPs return: one forward and one backward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ..host import Host


class Seen(NamedTuple):
    """What one MLP, or what stands in for it, did with a block of sequences; float32."""

    x: Float[Tensor, "sequence position d_in"]
    """What it received."""
    y: Float[Tensor, "sequence position d_out"]
    """What it returned."""
    gradient: Float[Tensor, "sequence position d_out"]
    """Of the summed loss of each sequence by `y`, in nats."""


class Tapped(nn.Module):
    """An MLP, or a stand-in for one, that remembers what it was given, and to whose output something can be added."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        # Not as submodules: the host's own MLP must not be registered at two places.
        self._inner: list[nn.Module] = [inner]
        self._like = [p for p in inner.parameters() if p.is_floating_point()][:1]
        self.reads = getattr(inner, "reads", "input")
        self.x = self.y = self.added = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self._like[0]) if self._like else x  # a layer in a host of another number format
        with torch.no_grad():
            made: Any = self._inner[0](x)
            y = made.y if hasattr(made, "y") else made
        self.x, self.y = x.detach(), y.detach()
        self.added = torch.zeros_like(self.y, requires_grad=True)
        return self.y + self.added


def losses(logits: Float[Tensor, "sequence position vocab"], ids: Int64[Tensor, "sequence position"]) -> Float[Tensor, "sequence position"]:
    """−log p of every token given those before it, nats; NaN for the first."""
    each = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return nn.functional.pad(each.view(len(ids), -1), (1, 0), value=float("nan"))


def read(
    host: Host, ids: Int64[Tensor, "sequence position"], hookpoints: Sequence[str], stand_ins: Mapping[str, nn.Module] | None = None
) -> tuple[Float[Tensor, "sequence position"], dict[str, Seen]]:
    """The losses (NaN at the first token) and what was seen at each hookpoint.

    Args:
        ids: token ids, on any device.
        hookpoints: MLPs to look at.
        stand_ins: what takes the place of the host's MLP at some of them.
    """
    ids = ids.to(host.device)
    taps = {hookpoint: Tapped((stand_ins or {}).get(hookpoint, host.mlp(hookpoint))) for hookpoint in hookpoints}
    with ExitStack() as open, torch.enable_grad():
        open.enter_context(host.replace(taps))
        logits = host.model(ids, use_cache=False).logits.float()
        each = losses(logits, ids)
        # The losses of one sequence depend on that sequence alone: the gradient of the sum is each one's own.
        gradients = torch.autograd.grad(each[:, 1:].sum(), [tap.added for tap in taps.values()])
    found = {
        hookpoint: Seen(tap.x.float(), tap.y.float(), gradient.detach().float())
        for (hookpoint, tap), gradient in zip(taps.items(), gradients, strict=True)
    }
    return each.detach(), found
