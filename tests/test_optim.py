"""Adam in the backward pass is Adam after it, and holds one gradient at a time."""

from __future__ import annotations

import copy
import gc
import weakref

import torch
from torch import Tensor, nn

from mxd.optim import AdamInBackward


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3))


def first(network: nn.Sequential) -> Tensor:
    return network.get_parameter("0.weight")


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(11, 5, generator=generator) for _ in range(6)]


def loss_of(network: nn.Sequential, x: Tensor) -> Tensor:
    # The first weight is used twice, as the auxiliary loss uses a gate.
    return network(x).square().mean() + 0.1 * (x @ first(network).T).square().mean()


def test_the_steps_are_those_of_adam_bit_for_bit() -> None:
    mine, twin = network(), network()
    adam = torch.optim.Adam(twin.parameters(), fused=True)
    ours = AdamInBackward(mine.parameters(), learning_rate=1.0)
    for number, x in enumerate(batches()):
        ours.learning_rate = adam.param_groups[0]["lr"] = 1e-2 / (number + 1)
        loss_of(mine, x).backward()
        adam.zero_grad()
        loss_of(twin, x).backward()
        adam.step()
    assert not torch.equal(first(network()), first(mine))
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), twin.parameters(), strict=True))


def test_no_gradient_outlives_the_pass_and_few_are_held_within_it() -> None:
    deep = nn.Sequential(*(nn.Linear(6, 6) for _ in range(5)))
    held: list[int] = []
    ours = AdamInBackward(deep.parameters(), learning_rate=1e-3)
    for parameter in deep.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: held.append(sum(p.grad is not None for p in deep.parameters())))
    deep(torch.randn(2, 6)).sum().backward()
    assert len(held) == 10 and max(held) <= 1
    assert all(p.grad is None for p in deep.parameters()) and len(ours.adams) == 10


def test_found_inf_holds_the_weights_still() -> None:
    mine = network()
    before = copy.deepcopy(mine.state_dict())
    ours = AdamInBackward(mine.parameters(), learning_rate=1.0)
    ours.found_inf = torch.ones(())
    (loss_of(mine, batches()[0]) * torch.nan).backward()
    assert all(torch.equal(mine.state_dict()[name], value) for name, value in before.items())
    ours.found_inf = torch.zeros(())
    loss_of(mine, batches()[0]).backward()
    assert not torch.equal(first(mine), before["0.weight"])


def test_closed_it_leaves_gradients_to_others() -> None:
    mine = network()
    ours = AdamInBackward(mine.parameters(), learning_rate=1.0)
    ours.close()
    loss_of(mine, batches()[0]).backward()
    assert all(p.grad is not None for p in mine.parameters())
    assert torch.equal(first(mine), first(network()))


def test_a_dropped_optimiser_frees_its_parameters_at_once() -> None:
    gc.disable()
    try:
        mine = network()
        ours = AdamInBackward(mine.parameters(), learning_rate=1.0)
        loss_of(mine, batches()[0]).backward()
        kept = weakref.ref(first(mine))
        del mine, ours
        assert kept() is None
    finally:
        gc.enable()
