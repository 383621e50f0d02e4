"""CP-μMoE and the mode-2 variant: what they share with an MxD, their experts, and worked cases."""

from __future__ import annotations

import pytest
import torch

from mxd.errors import LayerError
from mxd.layers import CPMuMoE, CPMuMoEConfig, MoV, MxD, MxDConfig, SparseLayer


def randomise(layer: SparseLayer) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def test_at_full_rank_with_an_identity_it_is_an_mxd() -> None:
    mxd, cp = MxD(MxDConfig(6, 5, 16, 3, 7)).double(), CPMuMoE(CPMuMoEConfig(6, 5, 16, 3, 7, rank=5)).double()
    randomise(mxd)
    with torch.no_grad():
        cp.W.copy_(torch.eye(5))
        cp.load_state_dict(mxd.state_dict(), strict=False)
    x = torch.randn(9, 6, dtype=torch.float64)
    assert torch.allclose(cp(x).y, mxd(x).y, rtol=1e-13)
    assert torch.allclose(cp.expert(4), mxd.expert(4), rtol=1e-13)
    assert cp.budget() == mxd.budget() + 25


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_no_expert_has_more_than_the_rank(rank: int) -> None:
    layer = CPMuMoE(CPMuMoEConfig(6, 5, 16, 3, 7, rank=rank)).double()
    randomise(layer)
    assert [int(torch.linalg.matrix_rank(layer.expert(n))) for n in (0, 7)] == [rank, rank]


@pytest.mark.parametrize("layer", [CPMuMoE(CPMuMoEConfig(6, 5, 16, 3, 7, rank=4)), MoV(MxDConfig(6, 5, 16, 3, 7))], ids=lambda x: x.kind)
def test_the_output_is_the_sum_over_the_active_experts(layer: CPMuMoE | MoV) -> None:
    randomise(layer)
    layer = layer.double()
    x = torch.randn(1, 6, dtype=torch.float64)
    code = layer.encode(x)
    assert code.hidden is not None
    total = layer.b.clone()
    for value, index in zip(code.values[0], code.indices[0], strict=True):
        total = total + value * (layer.expert(int(index)).T @ code.hidden[0])
    assert torch.allclose(total, layer(x).y[0], rtol=1e-12)
    with pytest.raises(LayerError, match="no expert 16"):
        layer.expert(16)


def test_by_hand() -> None:
    # x = (1, 2): z = relu(x) = (1, 2), expert 2 wins with a = 3
    gate = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    x = torch.tensor([[1.0, 2.0]])
    cp = CPMuMoE(CPMuMoEConfig(2, 2, 3, 1, 2, rank=1, activation="relu"))
    mov = MoV(MxDConfig(2, 2, 3, 1, 2, activation="relu"))
    with torch.no_grad():
        for layer in (cp, mov):
            layer.encoder.E.copy_(torch.eye(2))
            layer.G.copy_(gate)
            layer.b.copy_(torch.tensor([0.5, 0.0]))
        cp.C.copy_(torch.tensor([[9.0], [9.0], [2.0]]))
        cp.D.copy_(torch.tensor([[1.0], [1.0]]))
        cp.W.copy_(torch.tensor([[1.0], [-1.0]]))
        mov.C.copy_(torch.tensor([[9.0, 9.0], [9.0, 9.0], [1.0, -1.0]]))
        mov.D.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    assert cp(x).y.tolist() == [[18.5, -18.0]]  # 3 * 2 * (1 + 2) times (1, -1), and b
    assert mov(x).y.tolist() == [[3.5, -12.0]]  # (3 * 1 * 1) * 1, (3 * -1 * 2) * 2, and b
    assert cp.expert(2).tolist() == [[2.0, -2.0], [2.0, -2.0]]
    assert mov.expert(2).tolist() == [[1.0, 0.0], [0.0, -2.0]]


def test_a_rank_of_zero_is_refused() -> None:
    with pytest.raises(LayerError, match=r"cp-mumoe: rank must be positive \| expected at least 1 \| got 0"):
        CPMuMoE(CPMuMoEConfig(6, 5, 16, 3, 7, rank=0))
