"""The shuffle buffer: from activations in the order of the text to training steps in random order.

Which token trains in which step depends on the generator and the lengths of the batches, not on what is in them. So a stream that was
broken off can be gone on with: its order is drawn again on row numbers alone, and then only those batches are read of which the buffer
still holds rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from .errors import ConfigError
from .harvest import Batch, length, like, put


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
    order = _Order(tokens_per_step, buffer_tokens, passes, generator)
    return _data_steps(order, lambda: _Stream(batches, buffer_tokens))


def resumed(
    lengths: Iterable[int],
    read: Callable[[Callable[[int], bool]], Iterable[Mapping[str, Batch]]],
    steps: int,
    *,
    tokens_per_step: int,
    buffer_tokens: int,
    passes: int,
    generator: torch.Generator,
) -> Iterator[dict[str, Batch]]:
    """What `shuffled` yields behind its first `steps` steps, the same bits, without reading what those steps have used up.

    Args:
        lengths: tokens of every batch of the stream, in order.
        read: called with a function of a batch's number that says whether it is wanted; gives the wanted ones in order.
        steps: steps to leave out.
        tokens_per_step, buffer_tokens, passes, generator: those of `shuffled`, the generator in its first state.

    Raises:
        ConfigError: as `shuffled`, or the stream has fewer steps.
    """
    order = _Order(tokens_per_step, buffer_tokens, passes, generator)
    return _data_steps(order, lambda: _again(order, lengths, read, steps, buffer_tokens))


class _Rows(ABC):
    """Where the order of the steps gets rows from, and puts them: batch after batch."""

    start = 0
    """The next row of the batch at hand."""

    @property
    @abstractmethod
    def left(self) -> int | None:
        """Rows of the batch at hand from the next one on; None where the stream has ended."""

    @abstractmethod
    def put(self, slots: Tensor, n: int) -> None:
        """Put the next `n` rows into the first of these slots."""

    @abstractmethod
    def turn(self) -> None:
        """Take the next batch."""

    @property
    def is_at_end(self) -> bool:
        """Whether there are no further rows."""
        return self.left is None

    def fill(self, slots: Tensor) -> Tensor:
        """Put the next rows into these slots, as many as there are of either; returns the slots filled."""
        filled = 0
        while (left := self.left) is not None and filled < len(slots):
            n = min(left, len(slots) - filled)
            self.put(slots[filled:], n)
            filled, self.start = filled + n, self.start + n
            if n == left:
                self.start = 0
                self.turn()
        return slots[:filled]


class _Order:
    """Which slots of the buffer make up each step, and when they are filled anew."""

    def __init__(self, tokens_per_step: int, buffer_tokens: int, passes: int, generator: torch.Generator) -> None:
        if min(tokens_per_step, passes) < 1 or buffer_tokens < tokens_per_step:
            raise ConfigError(
                "the shuffle buffer cannot work",
                expected="1 <= tokens_per_step <= buffer_tokens and passes >= 1",
                got=f"tokens_per_step {tokens_per_step}, buffer_tokens {buffer_tokens}, passes {passes}",
                next="raise --buffer-tokens or lower --tokens-per-step",
            )
        self._step, self._passes, self._generator = tokens_per_step, passes, generator
        self._half = max(1, buffer_tokens // 2 // tokens_per_step) * tokens_per_step
        self._owed = torch.zeros(buffer_tokens, dtype=torch.int64)
        """How often each slot's token has yet to be yielded, this round's not counted; 0: the slot is free."""
        self._left = torch.zeros(0, dtype=torch.int64)
        """Slots that this round has yet to yield."""
        self.rows: _Rows | None = None
        """May be exchanged between two steps."""
        self.steps = self._steps()

    @property
    def held(self) -> Tensor:
        """Slots whose token will be yielded again."""
        held = self._owed > 0
        held[self._left] = True
        return held.nonzero().flatten()

    def _steps(self) -> Iterator[Tensor]:
        owed = self._owed
        while True:
            assert self.rows is not None
            if not self.rows.is_at_end:
                owed[self.rows.fill((owed == 0).nonzero().flatten())] = self._passes
            order = owed.nonzero().flatten()
            order = order[torch.randperm(len(order), generator=self._generator)]
            if not self.rows.is_at_end:
                order = order[: self._half]
            else:
                # The text has ended: those owed most go first, or the last few would each be owed several times and fill no step.
                order = order[owed[order].argsort(descending=True, stable=True)]
                order = order[: len(order) // self._step * self._step]
            if not len(order):
                return
            owed[order] -= 1
            for start in range(0, len(order), self._step):
                self._left = order[start + self._step :]
                yield order[start : start + self._step]


def _data_steps(order: _Order, rows: Callable[[], _Stream]) -> Iterator[dict[str, Batch]]:
    stream = rows()
    order.rows = stream
    for slots in order.steps:
        yield {name: batch.at(slots.to(batch.x.device)) for name, batch in stream.buffer.items()}


def _again(
    order: _Order,
    lengths: Iterable[int],
    read: Callable[[Callable[[int], bool]], Iterable[Mapping[str, Batch]]],
    steps: int,
    buffer_tokens: int,
) -> _Stream:
    """The stream as it was after `steps` steps, the rows that are still to come read again."""
    numbers = _Numbers(lengths, buffer_tokens)
    order.rows = numbers
    for done in range(steps):
        if next(order.steps, None) is None:
            raise ConfigError("there is too little text to go on", expected=f"more than {steps:,} steps", got=f"{done:,}")
    held = order.held
    batch_of, row_of = numbers.batch[held], numbers.row[held]
    wanted = set(batch_of.tolist())
    at, start = numbers.at, numbers.start
    batches = iter(read(lambda number: number in wanted or number >= at))
    stream = _Stream((), buffer_tokens)
    for number in sorted(wanted):
        if number == at:
            break
        stream.place(next(batches), held[batch_of == number], row_of[batch_of == number])
    stream.go_on(batches, start)
    if at in wanted:
        assert stream.pending is not None
        stream.place(stream.pending, held[batch_of == at], row_of[batch_of == at])
    return stream


class _Numbers(_Rows):
    """A buffer that holds no activations: of every slot the batch and the row in it that it stands for."""

    def __init__(self, lengths: Iterable[int], buffer_tokens: int) -> None:
        self._lengths = iter(lengths)
        self.batch = torch.full((buffer_tokens,), -1)
        self.row = torch.full((buffer_tokens,), -1)
        self.at = 0
        """Number of the batch at hand."""
        self._length = next(self._lengths, None)

    @property
    def left(self) -> int | None:
        return None if self._length is None else self._length - self.start

    def put(self, slots: Tensor, n: int) -> None:
        self.batch[slots[:n]], self.row[slots[:n]] = self.at, torch.arange(self.start, self.start + n)

    def turn(self) -> None:
        self.at, self._length = self.at + 1, next(self._lengths, None)


class _Stream(_Rows):
    """A stream of batches and the buffer that it is copied into."""

    def __init__(self, batches: Iterable[Mapping[str, Batch]], buffer_tokens: int) -> None:
        self._slots = buffer_tokens
        self.buffer: dict[str, Batch] = {}
        self.go_on(batches, 0)

    def go_on(self, batches: Iterable[Mapping[str, Batch]], start: int) -> None:
        """Take rows from `batches` from now on, of the first of them from row `start` on."""
        self._batches, self.start = iter(batches), start
        self.pending: Mapping[str, Batch] | None = next(self._batches, None)
        """The batch not yet copied in full; None once the stream has ended."""

    @property
    def left(self) -> int | None:
        return None if self.pending is None else length(self.pending) - self.start

    def put(self, slots: Tensor, n: int) -> None:
        assert self.pending is not None
        self.buffer = self.buffer or like(self.pending, self._slots)
        put(self.buffer, slots, self.pending, self.start, n)

    def turn(self) -> None:
        self.pending = next(self._batches, None)

    def place(self, batches: Mapping[str, Batch], slots: Tensor, rows: Tensor) -> None:
        """Copy single rows of a batch to single slots."""
        self.buffer = self.buffer or like(batches, self._slots)
        for name, batch in batches.items():
            device = batch.x.device
            for kept, given in zip(self.buffer[name], batch.at(rows.to(device)), strict=True):
                kept[slots.to(device)] = given
