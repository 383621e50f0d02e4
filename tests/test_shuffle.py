"""The shuffle buffer: every token as often as it should be, in an order that the generator alone settles and that can be gone on with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mxd.errors import ConfigError
from mxd.harvest import Batch
from mxd.shuffle import resumed, shuffled

pytestmark = pytest.mark.usefixtures("one_thread")


def numbered(tokens: int, per_batch: int, *, sequence: int = 4) -> Iterator[dict[str, Batch]]:
    """Batches for two hookpoints in which every value names its token: x = n, y = -n (b: 10 n, -10 n); widths 1, 2 and 3, 1."""
    for start in range(0, tokens, per_batch):
        n = torch.arange(start, min(start + per_batch, tokens), dtype=torch.float32)[:, None]
        first = (n[:, 0] % sequence) == 0
        yield {"a": Batch(n, -n.expand(-1, 2), first), "b": Batch(10 * n.expand(-1, 3), -10 * n, first)}


def order(tokens: int, per_batch: int = 10, *, step: int = 8, buffer: int = 64, passes: int = 1, seed: int = 0) -> Tensor:
    """Numbers of the tokens in each step, [step, token]."""
    generator = torch.Generator().manual_seed(seed)
    steps = shuffled(numbered(tokens, per_batch), tokens_per_step=step, buffer_tokens=buffer, passes=passes, generator=generator)
    numbers = [batches["a"].x[:, 0] for batches in steps]
    return torch.stack(numbers).long() if numbers else torch.zeros((0, step), dtype=torch.int64)


@pytest.mark.parametrize("passes", [1, 2, 3])
@pytest.mark.parametrize("tokens", [64, 200, 163, 30, 8])
@pytest.mark.parametrize("per_batch", [1, 10, 100])
def test_every_token_comes_exactly_passes_times(tokens: int, per_batch: int, passes: int) -> None:
    made = order(tokens, per_batch, passes=passes)
    counts = torch.bincount(made.flatten(), minlength=tokens)
    assert len(counts) == tokens and int(counts.max()) == passes
    assert all(len(set(step.tolist())) == 8 for step in made)  # no token twice in a step
    missing = passes - counts
    assert int(missing.count_nonzero()) < 8  # fewer tokens than a step are dropped
    assert int(missing.sum()) < 8  # … each of them once
    if tokens * passes % 8 == 0:
        assert int(missing.sum()) == 0


def test_text_smaller_than_a_step_gives_nothing() -> None:
    assert len(order(7, passes=5)) == 0
    assert len(order(0)) == 0


def test_order_depends_on_the_generator_and_on_nothing_else() -> None:
    first = order(200, passes=2, seed=3)
    torch.manual_seed(99)
    assert torch.equal(first, order(200, passes=2, seed=3))
    assert torch.equal(first, order(200, per_batch=33, passes=2, seed=3))  # how the text came in does not matter
    assert not torch.equal(first, order(200, passes=2, seed=4))


def test_parts_and_hookpoints_stay_aligned() -> None:
    generator = torch.Generator().manual_seed(0)
    steps = list(shuffled(numbered(100, 7), tokens_per_step=8, buffer_tokens=32, passes=2, generator=generator))
    assert len(steps) == 25
    for batches in steps:
        a, b = batches["a"], batches["b"]
        assert a.x.shape == (8, 1) and a.y.shape == (8, 2) and b.x.shape == (8, 3) and b.y.shape == (8, 1)
        assert torch.equal(a.y, -a.x.expand(-1, 2))
        assert torch.equal(b.x, 10 * a.x.expand(-1, 3)) and torch.equal(b.y, -10 * a.x)
        assert torch.equal(a.first, a.x[:, 0] % 4 == 0) and torch.equal(b.first, a.first)


def test_earlier_steps_are_not_overwritten_by_later_refills() -> None:
    generator = torch.Generator().manual_seed(0)
    steps = shuffled(numbered(200, 10), tokens_per_step=8, buffer_tokens=16, passes=1, generator=generator)
    kept = [(batches["a"].x, batches["a"].x.clone()) for batches in steps]
    assert len(kept) == 25 and all(torch.equal(held, copy) for held, copy in kept)


def test_a_step_mixes_the_buffer_and_refills_mix_with_what_is_left() -> None:
    made = order(4000, per_batch=40, step=50, buffer=1000)
    # before the first refill, a step is a sample of the whole buffer: 50 of 1,000 tokens
    assert made[0].min() < 150 and made[0].max() > 850
    # half the buffer goes out at a time: 500 tokens, then 500 new ones come in among 500 old ones
    assert bool((made[:10] < 1000).all())
    later = made[10:20].flatten()
    assert 200 < int((later >= 1000).sum()) < 300
    assert later.max() < 1500
    # neighbours in the text part ways: tokens 0 to 39, one batch, are spread over many steps
    steps = (made < 40).any(dim=1).nonzero().flatten()
    assert len(steps) > 15


def test_passes_draw_a_new_order_each_time() -> None:
    made = order(64, step=64, buffer=64, passes=3)
    assert len(made) == 3
    assert not torch.equal(made[0], made[1]) and not torch.equal(made[1], made[2])
    assert torch.equal(made.sort(dim=1).values, torch.arange(64).expand(3, -1))


def test_shuffled_waits_for_the_first_step_before_it_reads() -> None:
    taken = 0

    def batches() -> Iterator[dict[str, Batch]]:
        nonlocal taken
        for batch in numbered(1000, 10):
            taken += 10
            yield batch

    steps = shuffled(batches(), tokens_per_step=8, buffer_tokens=64, passes=1, generator=torch.Generator())
    assert taken == 0
    next(steps)
    assert 64 <= taken <= 80  # the buffer and no more than the batch that did not fit


@pytest.mark.parametrize(
    "numbers", [{"tokens_per_step": 0}, {"passes": 0}, {"buffer_tokens": 7}, {"buffer_tokens": 0}, {"tokens_per_step": 65}]
)
def test_impossible_buffers_are_refused_before_anything_is_read(numbers: dict[str, int]) -> None:
    options = {"tokens_per_step": 8, "buffer_tokens": 64, "passes": 1, **numbers}
    with pytest.raises(ConfigError, match="the shuffle buffer cannot work"):
        shuffled(iter(()), generator=torch.Generator(), **options)


# going on


def goes_on(tokens: int, per_batch: int, steps: int, **options: Any) -> tuple[list[dict[str, Batch]], list[int]]:
    """What comes behind `steps` steps of `numbered`, and the numbers of the batches read for it."""
    made, asked = list(numbered(tokens, per_batch)), []

    def read(wanted: Callable[[int], bool]) -> Iterable[dict[str, Batch]]:
        for number, batch in enumerate(made):
            if wanted(number):
                asked.append(number)
                yield batch

    lengths = [len(batch["a"].y) for batch in made]
    return list(resumed(lengths, read, steps, **options)), asked


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize(("tokens", "per_batch"), [(200, 10), (163, 7), (400, 64), (64, 1)])
def test_a_stream_broken_off_anywhere_goes_on_with_the_same_bits(tokens: int, per_batch: int, passes: int) -> None:
    def options() -> dict[str, Any]:
        return {"tokens_per_step": 8, "buffer_tokens": 64, "passes": passes, "generator": torch.Generator().manual_seed(7)}

    whole = list(shuffled(numbered(tokens, per_batch), **options()))
    for steps in range(len(whole) + 1):
        rest, asked = goes_on(tokens, per_batch, steps, **options())
        assert len(rest) == len(whole) - steps
        assert asked == sorted(set(asked)), "each batch is read once, in order"
        for got, expected in zip(rest, whole[steps:], strict=True):
            for name in ("a", "b"):
                assert all(torch.equal(g, e) for g, e in zip(got[name], expected[name], strict=True))


def test_what_the_steps_before_have_used_up_is_not_read_again() -> None:
    options = {"tokens_per_step": 8, "buffer_tokens": 64, "passes": 1}
    rest, asked = goes_on(4000, 8, 450, **options, generator=torch.Generator().manual_seed(7))
    assert len(rest) == 50
    # 3,600 tokens are used up and at most 64 are held: the oldest of them came in a few half buffers ago.
    assert 50 <= len(asked) < 80 and asked[-1] == 499


def test_a_text_that_has_become_shorter_is_an_error() -> None:
    options = {"tokens_per_step": 8, "buffer_tokens": 64, "passes": 1, "generator": torch.Generator()}
    with pytest.raises(ConfigError, match=r"too little text to go on \| expected more than 30 steps \| got 25"):
        goes_on(200, 10, 30, **options)
