from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from mxd.errors import ConfigError, HostError, TextError
from mxd.harvest import collect, read_blocks
from mxd.host import Host
from mxd.text import TokenBlock

from .conftest import VOCAB

pytestmark = pytest.mark.usefixtures("one_thread")

HOOKPOINTS = ["layers.0.mlp", "layers.2.mlp"]


def token_blocks(blocks: int = 3, sequences: int = 2, positions: int = 7) -> list[TokenBlock]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCAB, (blocks, sequences, positions), generator=generator)
    return [TokenBlock(ids[i], torch.arange(sequences)) for i in range(blocks)]


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
