"""Edited layers: what an ablation, a factor and an addition do to the output, exactly, for every kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mxd import ops
from mxd.errors import LayerError
from mxd.layers import LAYERS, Edited, MxD, Sizes, SparseLayer, Transcoder, build
from mxd.layers.base import Code

pytestmark = pytest.mark.usefixtures("one_thread")

UNITS = 25
WITH_UNITS = [kind for kind in LAYERS if kind != "dense"]


def layer_of(kind: str, *, k: int = 4, dtype: torch.dtype = torch.float64) -> SparseLayer:
    generator = torch.Generator().manual_seed(5)
    layer = build(kind, Sizes(6, 6, UNITS, k, 10, "silu", True), generator=generator)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return layer.to(dtype).requires_grad_(False)


def inputs(tokens: int = 40, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(tokens, 6, generator=torch.Generator().manual_seed(1)).to(dtype)


def dense_code(layer: SparseLayer, x: Tensor) -> Tensor:
    code = layer.encode(x)
    return x.new_zeros(len(x), layer.n_units).scatter_add_(1, code.indices, code.values)


def written(layer: SparseLayer, x: Tensor) -> Tensor:
    """What one unit of activation adds to the output [token, unit, d_out], from the layer's own parameters."""
    parameters: Any = layer
    if layer.kind not in ("mxd", "mxd-pk", "transcoder", "skip-transcoder", "topk-sae", "additive"):
        hidden = layer.encode(x).hidden
        codes = [
            Code(x.new_full((len(x), 1), value), torch.full((len(x), 1), unit), hidden)
            for unit in range(layer.n_units)
            for value in (1.0, 0.0)
        ]
        outputs = [layer.decode(code, x).y for code in codes]
        return torch.stack([one - none for one, none in zip(outputs[::2], outputs[1::2], strict=True)], 1)
    table = parameters.C if hasattr(layer, "C") else parameters.W_dec
    if layer.kind in ("mxd", "mxd-pk"):
        z = layer.encode(x).hidden
        assert z is not None
        return torch.stack([z @ (parameters.D * row) for row in table], 1)  # W_nᵀ z, W_n = D diag(c_n)
    if hasattr(layer, "expert"):
        z = layer.encode(x).hidden
        assert z is not None
        return torch.stack([z @ parameters.expert(n) for n in range(layer.n_units)], 1)
    return table.expand(len(x), -1, -1)


def busy(layer: SparseLayer, x: Tensor) -> int:
    return int((dense_code(layer, x) > 0).sum(0).argmax())


@pytest.mark.parametrize("kind", WITH_UNITS)
def test_ablation_removes_what_the_unit_writes_and_nothing_else(kind: str) -> None:
    layer, x = layer_of(kind), inputs()
    unit = busy(layer, x)
    gone = Edited(layer, scale={unit: 0.0})(x)
    expected = layer(x).y - dense_code(layer, x)[:, unit, None] * written(layer, x)[:, unit]
    torch.testing.assert_close(gone.y, expected, rtol=0, atol=1e-13)
    fires = dense_code(layer, x)[:, unit] > 0
    assert 0 < int(fires.sum()) < len(x)
    assert torch.equal(gone.y[~fires], layer(x).y[~fires]), "tokens without the unit keep their very bits"
    assert (gone.y[fires] - layer(x).y[fires]).abs().max() > 1e-3
    assert torch.equal(gone.code.indices, layer(x).code.indices), "no other unit moves up"


@pytest.mark.parametrize("kind", WITH_UNITS)
def test_scale_and_addition_are_linear_in_what_the_unit_writes(kind: str) -> None:
    layer, x = layer_of(kind), inputs()
    unit, other = busy(layer, x), (busy(layer, x) + 1) % UNITS
    made = Edited(layer, scale={unit: 2.5}, add={unit: -0.5, other: 3.0})(x)
    activation, rows = dense_code(layer, x), written(layer, x)
    expected = layer(x).y + (1.5 * activation[:, unit, None] - 0.5) * rows[:, unit] + 3.0 * rows[:, other]
    torch.testing.assert_close(made.y, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layer_type", [MxD, Transcoder])
def test_adding_writes_lambda_times_the_unit_as_the_layer_itself_states_it(layer_type: type[SparseLayer]) -> None:
    layer, x = layer_of(layer_type.kind), inputs()
    rise = Edited(layer, add={7: 100.0})(x).y - layer(x).y
    if isinstance(layer, MxD):
        z = layer.encode(x).hidden
        assert z is not None
        expected = 100.0 * z @ layer.expert(7)
    else:
        assert isinstance(layer, Transcoder)
        expected = (100.0 * layer.latent(7)).expand(len(x), -1)
    torch.testing.assert_close(rise, expected, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", LAYERS)
def test_no_change_is_bitwise_the_layer(kind: str, dtype: torch.dtype) -> None:
    layer, x = layer_of(kind, dtype=dtype), inputs(dtype=dtype)
    units = {} if kind == "dense" else {3: 1.0, 8: 1.0}
    edited = Edited(layer, scale=units, add=dict.fromkeys(units, 0.0))
    ours, theirs = edited(x), layer(x)
    assert torch.equal(ours.y, theirs.y)
    assert torch.equal(ours.code.values, theirs.code.values) and torch.equal(ours.code.indices, theirs.code.indices)
    assert torch.equal(edited.decode(edited.encode(x), x).y, theirs.y)
    assert (edited.kind, edited.reads, edited.is_control, edited.unit) == (layer.kind, layer.reads, layer.is_control, layer.unit)
    assert (edited.n_units, edited.k, edited.d_in, edited.d_out) == (layer.n_units, layer.k, layer.d_in, layer.d_out)
    assert edited.budget() == layer.budget()


@pytest.mark.parametrize("kind", WITH_UNITS)
def test_held_at_a_value(kind: str) -> None:
    """Scaled to 0 and added to: the activation is the value at every token, whether the unit was among the K or not."""
    layer, x = layer_of(kind), inputs()
    unit = busy(layer, x)
    held = Edited(layer, scale={unit: 0.0}, add={unit: 2.0})
    assert torch.equal(dense_code(held, x)[:, unit], torch.full((len(x),), 2.0, dtype=x.dtype))
    active = held.encode(x)
    fired = ((active.indices == unit) & (active.values > 0)).sum(1)
    assert fired.tolist() == [1] * len(x), "once at every token: firing counts would count twice"


def test_a_unit_that_is_active_and_added_to_is_in_the_code_once() -> None:
    layer, x = layer_of("transcoder"), inputs()
    unit = busy(layer, x)
    code = Edited(layer, add={unit: 1.0}).encode(x)
    assert ((code.indices == unit) & (code.values != 0)).sum(1).max() == 1
    assert code.values.shape == (len(x), layer.k + 1)


@pytest.mark.parametrize("kind", WITH_UNITS)
def test_k_equal_to_the_number_of_units(kind: str) -> None:
    layer, x = layer_of(kind, k=UNITS), inputs()
    edited = Edited(layer, scale={2: 0.0}, add={3: 1.0})
    expected = layer(x).y + written(layer, x)[:, 3] - dense_code(layer, x)[:, 2, None] * written(layer, x)[:, 2]
    torch.testing.assert_close(edited(x).y, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", WITH_UNITS)
def test_edits_of_edits_add_up(kind: str) -> None:
    layer, x = layer_of(kind), inputs()
    unit = busy(layer, x)
    twice = Edited(Edited(layer, scale={unit: 0.5}, add={4: 1.0}), scale={unit: 4.0}, add={5: 2.0})
    once = Edited(layer, scale={unit: 2.0}, add={4: 1.0, 5: 2.0})
    torch.testing.assert_close(twice(x).y, once(x).y, rtol=0, atol=1e-12)
    # What was added first is scaled by what comes after: s (a + λ).
    torch.testing.assert_close(
        Edited(Edited(layer, add={unit: 1.0}), scale={unit: 0.0})(x).y, Edited(layer, scale={unit: 0.0})(x).y, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", WITH_UNITS)
def test_gradients_pass_and_are_those_of_the_formula(kind: str, recompute: bool) -> None:
    layer = layer_of(kind).requires_grad_(True)
    x, ahead = inputs(8), torch.randn(8, 6, generator=torch.Generator().manual_seed(2)).double()
    unit = busy(layer, x)
    edited = Edited(layer, scale={unit: 0.25}, add={5: 2.0})
    leaf = x.clone().requires_grad_(True)
    names = [name for name, _ in layer.named_parameters()]
    with ops.using(recompute=recompute):
        found = torch.autograd.grad((edited(leaf).y * ahead).sum(), [leaf, *layer.parameters()], allow_unused=True)
    # The same by autograd through a code that is edited by hand.
    other = x.clone().requires_grad_(True)
    code = layer.encode(other)
    values = torch.where(code.indices == unit, 0.25 * code.values, code.values)
    values = torch.cat([values, values.new_full((8, 1), 2.0)], 1)
    indices = torch.cat([code.indices, torch.full((8, 1), 5)], 1)
    by_hand = layer.decode(code._replace(values=values, indices=indices), other).y
    wanted = torch.autograd.grad((by_hand * ahead).sum(), [other, *layer.parameters()], allow_unused=True)
    for name, ours, theirs in zip(["x", *names], found, wanted, strict=True):
        assert ours is not None and theirs is not None, name
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("kind", LAYERS)
def test_what_cannot_be_edited(kind: str) -> None:
    layer = layer_of(kind)
    expected = "a kind that has units" if kind == "dense" else f"a number from 0 to {UNITS - 1}"
    for changes in ({"scale": {UNITS: 0.0}}, {"add": {-1: 1.0}}):
        with pytest.raises(LayerError, match=expected):
            Edited(layer, **changes)
    if kind != "dense":
        for value in (float("nan"), float("inf")):
            with pytest.raises(LayerError, match=r"cannot edit (expert|latent) 1 \| expected a finite number"):
                Edited(layer, add={1: value})


@pytest.mark.parametrize("kind", WITH_UNITS)
def test_in_the_place_of_an_mlp(tiny_host: Any, kind: str) -> None:
    host = tiny_host("llama", tie_word_embeddings=False)
    generator = torch.Generator().manual_seed(3)
    layer = build(kind, Sizes(32, 32, UNITS, 4, 48, "silu", True), generator=generator)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    ids = torch.randint(0, 256, (2, 12), generator=generator)
    own = host.logits(ids)
    with host.replace({1: layer}):
        plain = host.logits(ids)
    with host.replace({1: Edited(layer, add={5: 4.0}, scale={6: 0.0})}):
        changed = host.logits(ids)
        texts = [host.generate("law and", new_tokens=5, static=static).new_ids for static in (False, True)]
    with host.replace({1: Edited(layer, scale={5: 1.0})}):
        assert torch.equal(host.logits(ids), plain)
    assert (changed - plain).abs().max() > 1e-3
    assert texts[0] == texts[1]
    assert torch.equal(host.logits(ids), own), "the host is as it was"


def test_follows_its_layer_to_another_number_format() -> None:
    edited = Edited(layer_of("mxd"), scale={3: 0.5}, add={4: 1.0}).to(torch.float32)
    y = edited(inputs(dtype=torch.float32)).y
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), Edited(layer_of("mxd"), scale={3: 0.5}, add={4: 1.0})(inputs()).y, rtol=1e-4, atol=1e-5)
