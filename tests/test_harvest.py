from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from mxd.errors import ConfigError, HostError, TextError
from mxd.harvest import Batch, collect, read_blocks, shuffled
from mxd.host import Host
from mxd.text import TokenBlock

from .conftest import VOCAB

pytestmark = pytest.mark.usefixtures("one_thread")

HOOKPOINTS = ["layers.0.mlp", "layers.2.mlp"]


def token_blocks(blocks: int = 3, sequences: int = 2, positions: int = 7) -> list[TokenBlock]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCAB, (blocks, sequences, positions), generator=generator)
    return [TokenBlock(ids[i], torch.arange(sequences)) for i in range(blocks)]


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


# reading


def test_read_blocks_gives_what_the_host_reads_in_text_order(tiny_host: Callable[..., Host]) -> None:
    host, blocks = tiny_host(), token_blocks()
    made = list(read_blocks(host, iter(blocks), HOOKPOINTS))
    assert len(made) == 3
    for block, batches in zip(blocks, made, strict=True):
        read = host.read(block.ids, HOOKPOINTS)
        assert list(batches) == HOOKPOINTS
        for name, batch in batches.items():
            assert torch.equal(batch.x, read[name].x.reshape(14, 32))
            assert torch.equal(batch.y, read[name].y.reshape(14, 32))
            assert batch.x.dtype == batch.y.dtype == torch.float32
            assert batch.first.nonzero().flatten().tolist() == [0, 7]


def test_read_blocks_reads_only_what_is_asked_for(tiny_host: Callable[..., Host]) -> None:
    host, taken = tiny_host(), 0

    def blocks() -> Iterator[TokenBlock]:
        nonlocal taken
        for block in token_blocks():
            taken += 1
            yield block

    stream = read_blocks(host, blocks(), ["1"])
    assert taken == 0
    assert list(next(stream)) == ["layers.1.mlp"]  # named by hookpoint, however it was asked for
    assert taken == 1


def test_unknown_hookpoint_is_an_error_at_once(tiny_host: Callable[..., Host]) -> None:
    with pytest.raises(HostError, match=r"has no MLP at layers.9.mlp \| expected layers"):
        read_blocks(tiny_host(), token_blocks(), ["layers.9.mlp"])


def test_batches_can_be_trained_on(tiny_host: Callable[..., Host]) -> None:
    (batches,) = read_blocks(tiny_host(), token_blocks(1), ["layers.1.mlp"])
    x, y, _ = batches["layers.1.mlp"]
    layer = nn.Linear(32, 32)
    (layer(x) - y).square().mean().backward()
    assert layer.weight.grad is not None and bool(layer.weight.grad.any())


# collecting


@pytest.mark.parametrize("tokens", [1, 14, 20, 42])
def test_collect_gives_exactly_as_many_tokens_as_asked(tiny_host: Callable[..., Host], tokens: int) -> None:
    host, blocks = tiny_host(), token_blocks()
    whole = list(read_blocks(host, blocks, HOOKPOINTS))
    made = collect(host, blocks, HOOKPOINTS, tokens)
    for name in HOOKPOINTS:
        for i, part in enumerate(made[name]):
            assert torch.equal(part, torch.cat([batches[name][i] for batches in whole])[:tokens])


def test_collect_reads_no_more_than_it_takes(tiny_host: Callable[..., Host]) -> None:
    stream = iter(token_blocks())
    collect(tiny_host(), stream, HOOKPOINTS, 28)
    assert len(list(stream)) == 1


def test_collect_says_how_much_text_there_is(tiny_host: Callable[..., Host]) -> None:
    with pytest.raises(TextError, match=r"too little text for what is asked \| expected 43 tokens \| got 42"):
        collect(tiny_host(), token_blocks(), HOOKPOINTS, 43)
    with pytest.raises(TextError, match=r"expected 1 tokens \| got 0"):
        collect(tiny_host(), [], HOOKPOINTS, 1)
    with pytest.raises(ConfigError, match="nothing to collect"):
        collect(tiny_host(), token_blocks(), HOOKPOINTS, 0)


# shuffling


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
