"""Running a host from the middle gives the bits of running it whole, in every family, and leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mxd import blocks

from .conftest import FAMILIES


class Scaled(nn.Module):
    def __init__(self, mlp: nn.Module, factor: float) -> None:
        super().__init__()
        self.mlp, self.factor = mlp, factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * self.mlp(x)


@pytest.mark.parametrize("family", FAMILIES)
def test_resuming_gives_the_same_bits_and_computes_nothing_below(family: str, tiny_host: Any) -> None:
    host = tiny_host(family)
    ids = torch.randint(0, 250, (2, 9))
    own = host.logits(ids)
    ran: list[int] = []
    hooks = [host.mlp(n).register_forward_hook(lambda *_args, n=n: ran.append(n)) for n in range(3)]
    with host.remember([1, 2]) as memory:
        assert torch.equal(host.logits(ids), own)
    for layer in (1, 2):
        stand_in = {layer: Scaled(host.mlp(layer), 0.5)}
        with host.replace(stand_in):
            expected = host.logits(ids)
        ran.clear()
        with host.resume(memory, layer), host.replace(stand_in):
            assert torch.equal(host.logits(ids), expected)
        assert ran == list(range(layer, 3)), "the blocks below were not computed"
    ran.clear()
    assert torch.equal(host.logits(ids), own) and ran == [0, 1, 2], "afterwards the host runs whole"
    for hook in hooks:
        hook.remove()


def test_what_is_remembered_is_what_was_read_then(tiny_host: Any) -> None:
    # The known pitfall of resuming, shown: other tokens get the answers of those remembered.
    host = tiny_host("llama")
    ids, others = torch.randint(0, 250, (2, 2, 9))
    with host.remember([2]) as memory:
        own = host.logits(ids)
    with host.resume(memory, 2):
        assert torch.equal(host.logits(others), own) and not torch.equal(host.logits(others), host.logits(ids[:, :1]))


def test_the_lowest_layer_and_an_empty_memory_just_run(tiny_host: Any) -> None:
    host = tiny_host("gpt2")
    ids = torch.randint(0, 250, (1, 5))
    with host.remember([0]) as memory:
        own = host.logits(ids)
    assert memory == {}
    with host.resume(memory, 0):
        assert torch.equal(host.logits(ids), own)


def test_blocks_are_given_back_after_a_failure(tiny_host: Any) -> None:
    host = tiny_host("llama")
    ids = torch.randint(0, 250, (1, 5))
    with host.remember([2]) as memory:
        own = host.logits(ids)
    with pytest.raises(ValueError, match="boom"), host.resume(memory, 2):
        raise ValueError("boom")
    assert torch.equal(host.logits(ids), own) and all("forward" not in vars(b) for b in host.model.model.layers)


def test_a_model_without_a_list_of_blocks_has_none_below() -> None:
    assert blocks.below(nn.Sequential(nn.Linear(2, 2)), "0") == []
