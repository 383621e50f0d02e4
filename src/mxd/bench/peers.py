"""One training step of sparsify and of SAELens, as their own trainers make it, against the same step of ours.

The same on both sides: weights, batch, loss, K, the mask of dead units, AuxK with k_aux = d/2 and its scale, fused Adam (both peers use the
slower plain one by default, so this is in their favour), and counting which units fired. Different, and why:

- sparsify gives the auxiliary loss no gradient to its encoder (`FusedEncoder.backward` drops it); ours does that work.
- SAELens has no TopK transcoder to train: its TopK SAE stands against ours, decoder norms not folded into the selection
  (``rescale_acts_by_decoder_norm=False``). Its trainer clips gradients, ours does not: left out. Through the auxiliary loss it also trains
  b_dec, which ours holds constant.

Before anything is timed the two are checked to give the same loss and the same gradients, of all that both compute.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import MxdError
from ..layers import Code, Sizes, SparseLayer, build
from ..layers.aux import aux_output
from ..ops.settings import using
from ..tracking import FiringCounts
from . import dense
from .rows import Row, row
from .timing import in_turns, relative_error, verify

ALPHA = 1 / 32
"""Weight of the auxiliary loss (Gao et al. 2024)."""
DEAD_SHARE = 0.1
"""Units called dead."""


class Side(NamedTuple):
    """One rival's layer and its loss."""

    module: torch.nn.Module
    """What the optimiser trains."""
    loss: Callable[[], Tensor]
    """The loss of one batch; counts which units fired on the way."""
    weights: tuple[Tensor, Tensor]
    """Encoder and decoder [n_units, d] to compare gradients of."""


class Pair(NamedTuple):
    """A peer and ours, from the same weights."""

    rival: str
    """The peer, with its version and setting."""
    kind: str
    """Our kind of layer."""
    ours: Side
    """Our side."""
    theirs: Side
    """Theirs."""
    encoder_compared: bool
    """Whether the encoder's gradient is the same on both sides; with AuxK, sparsify's lacks a part."""


def rows(*, device: torch.device, threads: int, runs: int, quick: bool) -> Iterator[Row]:
    """A row per peer, with the auxiliary loss and without.

    Raises:
        MxdError: neither peer is installed.
    """
    shape = {"d": 16, "n": 512, "k": 4, "tokens": 32} if quick else {"d": 768, "n": 12_288, "k": 32, "tokens": 1024}
    makers = [maker for package, maker in (("sparsify", _sparsify), ("sae_lens", _saelens)) if importlib.util.find_spec(package)]
    if not makers:
        raise MxdError("neither sparsify nor SAELens is installed beside mxd", next="make bench-peers")
    for maker in makers:
        for aux in (True, False):
            for pair in maker(device, shape, aux):
                yield _row(pair, shape, aux, device, threads, runs)


def _row(pair: Pair, shape: dict[str, int], aux: bool, device: torch.device, threads: int, runs: int) -> Row:
    check = _check(pair, device)
    times = in_turns({"ours": _step(pair.ours, ours=True), "rival": _step(pair.theirs, ours=False)}, runs=runs, device=device, warm_up=2)
    said: dict[str, Any] = {**shape, "dead": int(DEAD_SHARE * shape["n"]) if aux else 0}
    return row(
        f"{pair.kind} step, {'AuxK on' if aux else 'without AuxK'}",
        pair.rival,
        device=device.type,
        shape={**said, "threads": threads} if device.type == "cpu" else said,
        dtype="float32" if device.type == "cpu" else "each side's default on CUDA: bfloat16 products",
        ours_ms=times["ours"],
        rival_ms=times["rival"],
        check=check,
        runs=runs,
    )


def _check(pair: Pair, device: torch.device) -> str:
    """The loss, and where both compute in float32 the gradients."""
    with using(precision="fp32"):
        losses = [side.loss() for side in (pair.ours, pair.theirs)]
    for side, loss in zip((pair.ours, pair.theirs), losses, strict=True):
        side.module.zero_grad(set_to_none=True)
        loss.backward()
    error = relative_error(losses[0].detach(), losses[1].detach())
    if device.type != "cpu":  # sparsify rounds to bfloat16 there: other units win at the edge, and single gradients differ
        return verify("losses", error, 1e-2)
    gradients = [[_gradient(weight) for weight in side.weights] for side in (pair.ours, pair.theirs)]
    errors = [relative_error(mine, other) for mine, other in zip(*gradients, strict=True)]
    compared = errors if pair.encoder_compared else errors[1:]
    return f"{verify('losses', error, 1e-5)}; {verify(f'gradients ({len(compared)} of 2 matrices)', max(compared), 1e-5)}"


def _gradient(weight: Tensor) -> Tensor:
    """Of a parameter, or of the parameter that `weight` is the transpose of."""
    if weight.is_leaf:
        assert weight.grad is not None
        return weight.grad
    base = weight._base
    assert base is not None and base.grad is not None
    return base.grad.t()


def _step(side: Side, *, ours: bool) -> Callable[[], None]:
    take = dense.optimised(side.module, ours=ours)
    return lambda: take(side.loss())


def _sparsify(device: torch.device, shape: dict[str, int], aux: bool) -> Iterator[Pair]:
    """sparsify's SparseCoder as a transcoder; loss and bookkeeping as in `Trainer.fit`."""
    if device.type == "cpu":
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # read at import; its Triton decoder cannot run on a CPU
    with contextlib.redirect_stdout(io.StringIO()):
        sparsify: Any = importlib.import_module("sparsify")
    x, y = dense.batch(device, d=shape["d"], tokens=shape["tokens"])
    layer, dead = _ours("transcoder", device, shape, aux)
    settings = sparsify.SparseCoderConfig(num_latents=shape["n"], k=shape["k"], transcode=True, normalize_decoder=False)
    coder: Any = sparsify.SparseCoder(shape["d"], settings, device=device)
    with torch.no_grad():
        for mine, other in (
            (coder.encoder.weight, layer.get_parameter("W_enc")),
            (coder.encoder.bias, layer.get_parameter("b_enc")),
            (coder.W_dec, layer.get_parameter("W_dec")),
            (coder.b_dec, layer.get_parameter("b_dec")),
        ):
            mine.copy_(other)
    fired = torch.zeros(shape["n"], dtype=torch.bool, device=device)

    def theirs() -> Tensor:
        variance = (y - y.mean(0)).pow(2).sum()
        out = coder(x=x, y=y, dead_mask=dead, total_variance=variance)
        fired[out.latent_indices.flatten()] = True
        return out.fvu + ALPHA * out.auxk_loss

    def loss(residual: Tensor, auxiliary: Tensor | None) -> Tensor:
        variance = (y - y.mean(0)).pow(2).sum()
        main = residual.pow(2).sum() / variance
        return main if auxiliary is None else main + ALPHA * auxiliary.pow(2).sum() / variance

    ours = _our_side(layer, x, y, dead, loss)
    side = Side(coder, theirs, (coder.encoder.weight, coder.W_dec))
    yield Pair(f"sparsify {_version('eai-sparsify')}, fused Adam", "transcoder", ours, side, encoder_compared=not aux)


def _saelens(device: torch.device, shape: dict[str, int], aux: bool) -> Iterator[Pair]:
    """SAELens' TopKTrainingSAE, with dense activations (its default) and sparse ones; bookkeeping as in `SAETrainer`."""
    with contextlib.redirect_stdout(io.StringIO()):
        torch.sparse.check_sparse_tensor_invariants.disable()  # its default, said aloud: silences a warning at every sparse step
        saes: Any = importlib.import_module("sae_lens.saes.topk_sae")
        base: Any = importlib.import_module("sae_lens.saes.sae")
    x, _ = dense.batch(device, d=shape["d"], tokens=shape["tokens"])
    for sparse in (False, True):
        layer, dead = _ours("topk-sae", device, shape, aux)
        settings = saes.TopKTrainingSAEConfig(
            d_in=shape["d"],
            d_sae=shape["n"],
            k=shape["k"],
            device=str(device),
            aux_loss_coefficient=ALPHA,
            rescale_acts_by_decoder_norm=False,
            use_sparse_activations=sparse,
        )
        sae: Any = saes.TopKTrainingSAE(settings)
        with torch.no_grad():
            for name in ("b_enc", "W_dec", "b_dec"):
                getattr(sae, name).copy_(layer.get_parameter(name))
            sae.W_enc.copy_(layer.get_parameter("W_enc").t())
        since = torch.zeros(shape["n"], device=device)

        def theirs(sae: Any = sae, since: Tensor = since, dead: Tensor | None = dead) -> Tensor:
            out = sae.training_forward_pass(base.TrainStepInput(x, {}, dead, 0, False))
            with torch.no_grad():
                did_fire = out.feature_acts.bool().float().sum(-2).bool()
                since.add_(1)
                since[did_fire.to_dense() if did_fire.is_sparse else did_fire] = 0
            return out.loss

        def loss(residual: Tensor, auxiliary: Tensor | None) -> Tensor:
            main = residual.pow(2).sum(-1).mean()
            return main if auxiliary is None else main + ALPHA * auxiliary.pow(2).sum(-1).mean()

        said = "sparse activations" if sparse else "dense activations (its default)"
        side = Side(sae, theirs, (sae.W_enc.t(), sae.W_dec))
        ours = _our_side(layer, x, x, dead, loss)
        yield Pair(f"SAELens {_version('sae-lens')}, {said}, fused Adam", "topk-sae", ours, side, encoder_compared=True)


def _ours(kind: str, device: torch.device, shape: dict[str, int], aux: bool) -> tuple[SparseLayer, Tensor | None]:
    """Our layer, and the mask of the units called dead [n_units], the first tenth; None without AuxK."""
    sizes = Sizes(shape["d"], shape["d"], shape["n"], shape["k"], 1)
    layer = build(kind, sizes, generator=torch.Generator().manual_seed(0)).to(device)
    dead = torch.zeros(shape["n"], dtype=torch.bool, device=device)
    dead[: int(DEAD_SHARE * shape["n"])] = True
    return layer, dead if aux else None


def _our_side(layer: SparseLayer, x: Tensor, y: Tensor, dead: Tensor | None, loss: Callable[[Tensor, Tensor | None], Tensor]) -> Side:
    counts = FiringCounts(layer.n_units, x.device)
    k_aux = x.shape[-1] // 2

    def whole() -> Tensor:
        output = layer(x)
        code: Code = output.code
        residual = y - output.y
        auxiliary = None
        if dead is not None:
            numbers = dead.nonzero().flatten()
            # The published scale for few dead units, as both peers have it, on the squared error.
            scale = min(len(numbers) / k_aux, 1.0) ** 0.5
            auxiliary = scale * (residual.detach() - aux_output(layer, x, code, numbers, k_aux))
        counts.add(code)
        return loss(residual, auxiliary)

    return Side(layer, whole, (layer.get_parameter("W_enc"), layer.get_parameter("W_dec")))


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)
