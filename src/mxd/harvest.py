"""From token blocks to training batches: run the host, stream what its MLPs receive and return, shuffle it."""

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
        store = store or _like(batches, tokens)
        filled += _put(store, slice(filled, tokens), batches, 0, tokens - filled)
        if filled == tokens:
            return store
    raise TextError(
        "too little text for what is asked", expected=f"{tokens} tokens", got=f"{filled}", next="add text (--text) or ask for fewer tokens"
    )


def shuffled(
    batches: Iterable[Mapping[str, Batch]], *, tokens_per_step: int, buffer_tokens: int, passes: int, generator: torch.Generator
) -> Iterator[dict[str, Batch]]:
    """Steps of exactly `tokens_per_step` tokens, in random order, each token `passes` times, the same tokens for every hookpoint.

    A buffer of `buffer_tokens` is filled. Then half of it, drawn at random, is yielded; slots whose token has been yielded
    `passes` times are filled anew; and so on, so that neighbours in the text part ways and old tokens mix with new. When
    the text ends, what the buffer holds is yielded too; the fewer than `tokens_per_step` tokens that are left in the end are
    dropped. No step holds a token twice. The order depends on `generator` (a CPU one) and nothing else.

    Raises:
        ConfigError: a number below 1, or a buffer smaller than a step.
    """
    if min(tokens_per_step, passes) < 1 or buffer_tokens < tokens_per_step:
        raise ConfigError(
            "the shuffle buffer cannot work",
            expected="1 <= tokens_per_step <= buffer_tokens and passes >= 1",
            got=f"tokens_per_step {tokens_per_step}, buffer_tokens {buffer_tokens}, passes {passes}",
            next="raise --buffer-tokens or lower --tokens-per-step",
        )
    return _shuffle(batches, tokens_per_step, buffer_tokens, passes, generator)


def _shuffle(
    batches: Iterable[Mapping[str, Batch]], tokens_per_step: int, buffer_tokens: int, passes: int, generator: torch.Generator
) -> Iterator[dict[str, Batch]]:
    source = _Source(batches)
    buffer: dict[str, Batch] = {}
    owed = torch.zeros(buffer_tokens, dtype=torch.int64)  # how often each slot's token has yet to be yielded; 0: the slot is free
    half = max(1, buffer_tokens // 2 // tokens_per_step) * tokens_per_step
    while True:
        if source.pending:
            buffer = buffer or _like(source.pending, buffer_tokens)
            owed[source.fill(buffer, (owed == 0).nonzero().flatten())] = passes
        order = owed.nonzero().flatten()
        order = order[torch.randperm(len(order), generator=generator)]
        if source.pending:
            order = order[:half]
        else:
            # The text has ended: those owed most go first, or the last few would each be owed several times and fill no step.
            order = order[owed[order].argsort(descending=True, stable=True)]
            order = order[: len(order) // tokens_per_step * tokens_per_step]
        if not len(order):
            return
        for rows in order.split(tokens_per_step):
            yield {name: batch.at(rows.to(batch.x.device)) for name, batch in buffer.items()}
        owed[order] -= 1


class _Source:
    """Hands out a stream of batches in portions of any size."""

    def __init__(self, batches: Iterable[Mapping[str, Batch]]) -> None:
        self._batches = iter(batches)
        self._start = 0
        self.pending: Mapping[str, Batch] | None = next(self._batches, None)
        """The batch not yet handed out in full; None once the stream has ended."""

    def fill(self, buffer: dict[str, Batch], slots: Tensor) -> Tensor:
        """Copy as many tokens as there are `slots` into them, or what is left of the stream; returns the slots filled."""
        filled = 0
        while self.pending is not None and filled < len(slots):
            n = _put(buffer, slots[filled:], self.pending, self._start, len(slots) - filled)
            filled, self._start = filled + n, self._start + n
            if self._start == _length(self.pending):
                self.pending, self._start = next(self._batches, None), 0
        return slots[:filled]


def _length(batches: Mapping[str, Batch]) -> int:
    return next(len(batch.y) for batch in batches.values())


def _like(batches: Mapping[str, Batch], tokens: int) -> dict[str, Batch]:
    """Room for `tokens` rows beside each batch, not initialised."""
    return {name: Batch(*(part.new_empty((tokens, *part.shape[1:])) for part in batch)) for name, batch in batches.items()}


def _put(store: Mapping[str, Batch], rows: slice | Tensor, batches: Mapping[str, Batch], start: int, limit: int) -> int:
    """Copy rows from `start` on of `batches`, at most `limit`, to the first of `rows` of `store`; returns how many."""
    n = min(_length(batches) - start, limit)
    for name, batch in batches.items():
        room = store[name]
        index = slice(rows.start, rows.start + n) if isinstance(rows, slice) else rows[:n].to(batch.x.device)
        for kept, given in zip(room, batch, strict=True):
            kept[index] = given[start : start + n]
    return n
