"""From token blocks to activations: run the host, stream what its MLPs receive and return."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .errors import ConfigError, TextError
from .host import Host
from .text import TokenBlock


class Batch(NamedTuple):
    """Inputs and outputs of one MLP for a run of tokens, row by row; all on the host's device."""

    x: Float[Tensor, "token d_in"]
    """What the MLP received, float32."""
    y: Float[Tensor, "token d_out"]
    """What it returned, float32."""
    first: Bool[Tensor, " token"]
    """True where the token is the first of its sequence; its activations are tens of times larger than the others'."""

    def at(self, index: slice | Tensor) -> Batch:
        """The rows at `index`."""
        return Batch(self.x[index], self.y[index], self.first[index])

    def to(self, device: torch.device) -> Batch:
        """The rows on `device`; from page-locked memory the copy runs beside what the device is doing."""
        return Batch(*(part.to(device, non_blocking=True) for part in self))


def read_blocks(host: Host, blocks: Iterable[TokenBlock], hookpoints: Sequence[str]) -> Iterator[dict[str, Batch]]:
    """One batch per block and hookpoint, tokens in the order of the text. Lazy: the host reads when the next batch is asked for.

    Raises:
        HostError: a hookpoint that the host does not have.
    """
    names = [host.site(key).hookpoint for key in hookpoints]
    return (_read(host, block, names) for block in blocks)


def _read(host: Host, block: TokenBlock, hookpoints: list[str]) -> dict[str, Batch]:
    first = torch.zeros(block.ids.shape, dtype=torch.bool, device=host.device)
    first[:, 0] = True
    activations = host.read(block.ids, hookpoints)
    return {name: Batch(a.x.flatten(0, 1), a.y.flatten(0, 1), first.flatten()) for name, a in activations.items()}


def collect(host: Host, blocks: Iterable[TokenBlock], hookpoints: Sequence[str], tokens: int) -> dict[str, Batch]:
    """The first `tokens` tokens of `blocks`; reads no block more than that takes.

    Raises:
        TextError: the text ends before.
        HostError: a hookpoint that the host does not have.
    """
    if tokens < 1:
        raise ConfigError("nothing to collect", expected="at least 1 token", got=str(tokens))
    store: dict[str, Batch] = {}
    filled = 0
    for batches in read_blocks(host, blocks, hookpoints):
        store = store or like(batches, tokens)
        filled += put(store, slice(filled, tokens), batches, 0, tokens - filled)
        if filled == tokens:
            return store
    raise TextError(
        "too little text for what is asked", expected=f"{tokens} tokens", got=f"{filled}", next="add text (--text) or ask for fewer tokens"
    )


def length(batches: Mapping[str, Batch]) -> int:
    """Tokens in batches that hold the same ones for every hookpoint."""
    return next(len(batch.y) for batch in batches.values())


def like(batches: Mapping[str, Batch], tokens: int) -> dict[str, Batch]:
    """Room for `tokens` rows beside each batch, not initialised."""
    return {name: Batch(*(part.new_empty((tokens, *part.shape[1:])) for part in batch)) for name, batch in batches.items()}


def put(store: Mapping[str, Batch], rows: slice | Tensor, batches: Mapping[str, Batch], start: int, limit: int) -> int:
    """Copy rows from `start` on of `batches`, at most `limit`, to the first of `rows` of `store`; returns how many."""
    n = min(length(batches) - start, limit)
    for name, batch in batches.items():
        room = store[name]
        index = slice(rows.start, rows.start + n) if isinstance(rows, slice) else rows[:n].to(batch.x.device)
        for kept, given in zip(room, batch, strict=True):
            kept[index] = given[start : start + n]
    return n
