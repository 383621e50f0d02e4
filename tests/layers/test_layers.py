"""Each kind against its formula worked out by hand, and the promises of the interface over all kinds."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from mxd.errors import LayerError
from mxd.layers import (
    LAYERS,
    Additive,
    CPMuMoE,
    Dense,
    MoV,
    MxD,
    MxDConfig,
    MxDProductKey,
    Sizes,
    SkipTranscoder,
    SparseLayer,
    TopKSAE,
    Transcoder,
    build,
    encoder,
    from_description,
)
from mxd.layers.encoder import ACTIVATIONS
from mxd.ops import using
from mxd.ops.expert_mix.naive import mixture_of_decoders
from mxd.ops.topk_gate.naive import topk_gate_dense

SIZES = Sizes(d_in=6, d_out=5, n_units=16, k=3, d_hidden=7, activation="gelu", glu=False, rank=4)


def random_layer(kind: str, **changes: object) -> SparseLayer:
    """A layer whose every parameter is random, so that no term of its formula is hidden by a zero."""
    layer = build(kind, SIZES._replace(**changes))  # pyright: ignore[reportArgumentType]
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer.double()


def naive(layer: SparseLayer, x: Tensor) -> Tensor:
    """The formula of each kind, in dense float64."""
    if isinstance(layer, (MxD, MxDProductKey, CPMuMoE, MoV, Additive, Dense)):
        e = layer.encoder
        z = e.phi(x @ e.E + e.b_E) if e.E_gate is None or e.b_gate is None else e.phi(x @ e.E_gate + e.b_gate) * (x @ e.E + e.b_E)
        if isinstance(layer, Dense):
            return z @ layer.D + layer.b
        if isinstance(layer, MxDProductKey):
            u, v = x @ layer.G_1.T + layer.b_1, x @ layer.G_2.T + layer.b_2
            scores = torch.relu((u[:, :, None] + v[:, None, :]).flatten(1))
            kept = torch.zeros_like(scores).scatter(1, scores.topk(layer.k, dim=1).indices, 1.0)
            return mixture_of_decoders(scores * kept, z, layer.C, layer.D) + layer.b
        a = topk_gate_dense(x, layer.G, layer.b_G, layer.k)
        if isinstance(layer, MxD):
            return mixture_of_decoders(a, z, layer.C, layer.D) + layer.b
        if isinstance(layer, CPMuMoE):  # every W[n, h, o] written out
            return torch.einsum("tn,th,nho->to", a, z, torch.einsum("nr,hr,or->nho", layer.C, layer.D, layer.W)) + layer.b
        if isinstance(layer, MoV):
            return torch.einsum("tn,th,nho->to", a, z, torch.einsum("nh,ho->nho", layer.C, layer.D)) + layer.b
        return a @ layer.C + z @ layer.D + layer.b
    if isinstance(layer, TopKSAE):
        a = topk_gate_dense(x - layer.b_dec, layer.W_enc, layer.b_enc, layer.k)
        return a @ layer.W_dec + layer.b_dec
    assert isinstance(layer, (Transcoder, SkipTranscoder))
    out = topk_gate_dense(x, layer.W_enc, layer.b_enc, layer.k) @ layer.W_dec + layer.b_dec
    return out + x @ layer.W_skip.T if isinstance(layer, SkipTranscoder) else out


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_output_and_gradients_equal_the_formula(kind: str, glu: bool, recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "PIECE_TOKENS", 4)
    layer = random_layer(kind, glu=glu)
    x = torch.randn(9, layer.d_in, dtype=torch.float64, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    with using(recompute=recompute):
        output = layer(x)
    assert (output.code.hidden is None) is (recompute or not hasattr(layer, "encoder"))
    found, right = output.y, naive(layer, twin)
    assert torch.allclose(found, right, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(right)
    mine = torch.autograd.grad(found, [x, *layer.parameters()], upstream)
    exact = torch.autograd.grad(right, [twin, *layer.parameters()], upstream)
    for a, b in zip(mine, exact, strict=True):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", LAYERS)
def test_leading_dimensions_are_free_and_encode_then_decode_is_forward(kind: str) -> None:
    layer = random_layer(kind)
    x = torch.randn(2, 4, layer.d_in, dtype=torch.float64)
    out = layer(x)
    assert out.y.shape == (2, 4, layer.d_out)
    assert out.code.values.shape == out.code.indices.shape == (2, 4, layer.k)
    again = layer.decode(layer.encode(x), x).y
    assert torch.equal(again, out.y)
    assert torch.equal(layer(x[0, 1]).y, layer(x[0, 1][None]).y[0])


@pytest.mark.parametrize("kind", LAYERS)
def test_a_description_rebuilds_the_layer(kind: str) -> None:
    layer = random_layer(kind).float()
    twin = from_description(layer.describe())
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(3, layer.d_in)
    assert torch.equal(twin(x).y, layer(x).y)
    assert twin.describe() == layer.describe()


@pytest.mark.parametrize("kind", LAYERS)
def test_the_published_start(kind: str) -> None:
    layer = build(kind, SIZES._replace(n_units=100, d_in=16, d_out=16, d_hidden=32), generator=torch.Generator().manual_seed(0))
    with_d = {name: {"D"} for name in ("mxd", "mxd-pk", "cp-mumoe", "mov", "dense", "additive")}
    zero = {**with_d, "skip-transcoder": {"W_dec", "W_skip"}}.get(kind, set())
    for name, parameter in layer.named_parameters():
        short = name.split(".")[-1]
        if short in zero or short.startswith("b"):
            assert not parameter.any(), name
        else:
            bound = (100 if short in ("C", "W_dec") else 4 if short == "W" else 16) ** -0.5
            assert 0.9 * bound < parameter.abs().max() <= bound, name


def test_the_seed_decides_the_start() -> None:
    first, second, other = (build("mxd", SIZES, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.get_parameter("G"), other.get_parameter("G"))


def test_an_mxd_by_hand() -> None:
    # x = (1, 2); z = relu(x) = (1, 2); scores (1, 2, 3) - expert 2 wins with a = 3; C[2] = (1, -1); D = [[1, 0], [0, 1]]
    layer = MxD(MxDConfig(d_in=2, d_out=2, n_units=3, k=1, d_hidden=2, activation="relu"))
    with torch.no_grad():
        layer.encoder.E.copy_(torch.eye(2))
        layer.G.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
        layer.C.copy_(torch.tensor([[9.0, 9.0], [9.0, 9.0], [1.0, -1.0]]))
        layer.D.copy_(torch.eye(2))
        layer.b.copy_(torch.tensor([0.5, 0.0]))
    out = layer(torch.tensor([[1.0, 2.0]]))
    assert out.code.indices.tolist() == [[2]] and out.code.values.tolist() == [[3.0]]
    assert out.y.tolist() == [[3.5, -6.0]]  # (3 * 1 * 1 + .5, 3 * -1 * 2)
    assert layer.expert(2).tolist() == [[1.0, 0.0], [0.0, -1.0]]


def test_an_expert_is_a_full_rank_map_and_the_sum_over_experts_is_the_output() -> None:
    layer = random_layer("mxd")
    assert isinstance(layer, MxD)
    assert torch.linalg.matrix_rank(layer.expert(4)) == min(layer.d_out, 7)
    x = torch.randn(1, 6, dtype=torch.float64)
    code = layer.encode(x)
    assert code.hidden is not None
    total = layer.b.clone()
    for value, index in zip(code.values[0], code.indices[0], strict=True):
        total = total + value * (layer.expert(int(index)).T @ code.hidden[0])
    assert torch.allclose(total, layer(x).y[0], rtol=1e-12)


def test_the_host_is_contained_in_an_mxd_with_one_open_expert() -> None:
    layer = random_layer("mxd", k=1, n_units=1)
    assert isinstance(layer, MxD)
    with torch.no_grad():
        layer.G.zero_()
        layer.b_G.fill_(1)
        layer.C.fill_(1)
    x = torch.randn(4, 6, dtype=torch.float64)
    e = layer.encoder
    assert torch.allclose(layer(x).y, e.phi(x @ e.E + e.b_E) @ layer.D + layer.b, rtol=1e-12)


@pytest.mark.parametrize("kind", ["transcoder", "skip-transcoder", "topk-sae"])
def test_a_latent_is_its_row_of_the_decoder(kind: str) -> None:
    layer = random_layer(kind)
    assert isinstance(layer, (Transcoder, SkipTranscoder, TopKSAE))
    assert torch.equal(layer.latent(4), layer.W_dec[4])
    with pytest.raises(LayerError, match=r"no latent 16 .*0 to 15"):
        layer.latent(16)


def test_k_can_be_overridden_for_one_call_and_is_kept_in_range() -> None:
    layer = random_layer("transcoder")
    x = torch.randn(2, 6, dtype=torch.float64)
    assert layer.encode(x, 5).values.shape == (2, 5)
    assert layer.encode(x, 99).values.shape == (2, 16)
    assert layer.encode(x, 0).values.shape == (2, 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": 17}, r"expected 1 <= k <= 16 \| got k = 17"),
        ({"k": 0}, r"got k = 0"),
        ({"n_units": 0}, "too few units"),
        ({"d_in": 0}, "d_in must be positive"),
        ({"activation": "gleu"}, r"unknown activation \| expected gelu"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(LayerError, match=words):
        build("mxd", SIZES._replace(**change))  # pyright: ignore[reportArgumentType]


def test_wrong_inputs_are_named() -> None:
    layer = build("skip-transcoder", SIZES)
    with pytest.raises(LayerError, match=r"expected \[..., 6\] \| got \[2, 5\]"):
        layer(torch.zeros(2, 5))
    with pytest.raises(LayerError, match="decodes with its input"):
        layer.decode(layer.encode(torch.zeros(2, 6)))
    with pytest.raises(LayerError, match="hidden"):
        mxd = build("mxd", SIZES)
        mxd.decode(mxd.encode(torch.zeros(2, 6))._replace(hidden=None))
    with pytest.raises(LayerError, match=r"unknown kind of layer \| expected mxd"):
        build("mdx", SIZES)
    with pytest.raises(LayerError, match="missing"):
        from_description({"kind": "mxd", "d_in": 3})


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_the_ones_transformers_uses(name: str) -> None:
    from transformers.activations import ACT2FN

    theirs = {"gelu_tanh": "gelu_pytorch_tanh", "identity": "linear"}.get(name, name)
    u = torch.linspace(-4, 4, 41, dtype=torch.float64)
    assert torch.allclose(ACTIVATIONS[name](u), ACT2FN[theirs](u), rtol=1e-12)


def test_configurations_are_frozen() -> None:
    layer = build("mxd", SIZES)
    with pytest.raises(dataclasses.FrozenInstanceError):
        layer.config.k = 5


@pytest.mark.parametrize("kind", ["mxd", "mxd-pk", "dense", "additive"])
def test_hidden_vectors_that_are_made_again_are_not_held(kind: str) -> None:
    layer = build(kind, Sizes(d_in=8, d_out=8, n_units=64, k=2, d_hidden=512))
    x = torch.randn(2048, 8)
    held: dict[bool, int] = {}
    for recompute in (False, True):
        sizes: list[int] = []

        def keep(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with using(recompute=recompute), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            layer(x)
        held[recompute] = max(sizes)
    assert held[False] == 2048 * 512 and held[True] < 2048 * 512 / 4


def test_a_code_without_hidden_vector_needs_x() -> None:
    layer = random_layer("mxd")
    x = torch.randn(4, 6, dtype=torch.float64)
    code = layer.encode(x)
    bare = code._replace(hidden=None)
    assert torch.allclose(layer.decode(bare, x).y, layer.decode(code).y, rtol=1e-12)
    with pytest.raises(LayerError, match=r"no hidden vector \| expected the code of encode\(x\), or decode\(code, x\)"):
        layer.decode(bare)
