"""The product-key gate: its K largest are those of all sums written out, and its number of experts is a square."""

from __future__ import annotations

import pytest
import torch

from mxd.errors import LayerError
from mxd.layers import MxDConfig, MxDProductKey
from mxd.layers.product_key import largest_sums


@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 9), (7, 5), (40, 32), (40, 64), (9, 81), (100, 256)])
def test_the_largest_sums_are_those_of_all_pairs(n: int, k: int) -> None:
    torch.manual_seed(n)
    u, v = torch.randn(11, n, dtype=torch.float64), torch.randn(11, n, dtype=torch.float64)
    values, indices = largest_sums(u, v, k)
    every = (u[:, :, None] + v[:, None, :]).flatten(1)
    assert torch.equal(values.sort(1).values, every.topk(k, dim=1).values.sort(1).values)
    assert torch.equal(every.gather(1, indices), values)
    assert all(len(set(row)) == k for row in indices.tolist())


def test_equal_keys_and_ties() -> None:
    values, indices = largest_sums(torch.zeros(2, 5), torch.zeros(2, 5), 7)
    assert not values.any()
    assert all(len(set(row)) == 7 for row in indices.tolist())


def test_no_tensor_of_all_pairs_is_made() -> None:
    from torch.profiler import ProfilerActivity, profile

    n, tokens = 1000, 8
    u, v = torch.randn(tokens, n, requires_grad=True), torch.randn(tokens, n, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        largest_sums(u, v, 32)[0].sum().backward()
    assert max(event.cpu_memory_usage for event in seen.events() or []) < 4 * tokens * n * n / 20


def test_a_number_of_experts_that_is_no_square_is_refused() -> None:
    with pytest.raises(LayerError, match=r"must be a square \| expected 9 or 16 \| got 11"):
        MxDProductKey(MxDConfig(4, 4, 11, 2, 3))


def test_expert_and_number_of_an_expert() -> None:
    layer = MxDProductKey(MxDConfig(4, 4, 9, 2, 3))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-1, 1)
        layer.b_1[2], layer.b_2[1] = 100.0, 100.0
        output = layer(torch.randn(1, 4))
    assert 2 * 3 + 1 in output.code.indices[0].tolist()
    assert torch.allclose(layer.expert(7), layer.D * layer.C[7])
    with pytest.raises(LayerError, match="no expert 9"):
        layer.expert(9)
