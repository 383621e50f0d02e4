"""A text read by the host and by the host with students in place: what replacing costs at each token, and which units are at work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..layers import SparseLayer
from . import asks, gradients
from .live import Job
from .model import Model
from .replies import short

TOP = 5
MOST_UNITS = 64
"""Units of a token that are told of, the strongest."""
MOST_FOUND = 100
"""Units found by a text."""


@dataclass(frozen=True)
class Tokens:
    """What is read: the tokens of a collected sequence, or of a text."""

    ids: list[int] | None
    text: str
    special: bool = False


def ids_of(model: Model, tokens: Tokens) -> list[int]:
    """
    Raises:
        Refusal: too long, or empty.
    """
    if tokens.ids is None:
        return model.ids(tokens.text, special=tokens.special)
    model.check_length(len(tokens.ids))
    return tokens.ids[: asks.MOST_TOKENS]


def sentence(model: Model, tokens: Tokens, students: Sequence[str], job: Job) -> dict[str, Any]:
    """The losses of host and students token by token, and the active units with their first-order effects.

    ``loss[t]`` is that of predicting token t from those before it, None for the first; ``kl[t]`` and ``top[t]`` are of the prediction
    of token t + 1. The effect of a unit at a token is what all following tokens of this text would lose without it, to first order.

    Raises:
        Refusal: too long, or too little memory.
    """
    found = ids_of(model, tokens)
    model.check_room(6 * len(found) * model.host.vocab_size + 40 * len(found) * model.host.d_model * len(model.host.sites))
    ids = torch.tensor([found], device=model.host.device)
    hookpoints = {name: model.student(name).hookpoint for name in students}
    with model.host.remember(set(hookpoints.values())) as memory:
        own = model.host.logits(ids)[0].log_softmax(-1)
    answers: list[dict[str, Any]] = []
    for name in students:
        job.check()
        layer = model.layer(name)
        with model.host.resume(memory, hookpoints[name]):
            answers.append({"name": name, **_student(model, layer, hookpoints[name], ids, own)})
    losses = gradients.losses(own[None], ids)[0]
    host = {"loss": _numbers(losses), "p": _numbers((-losses).exp()), "top": _top(model, own)}
    return {"tokens": model.read_again(found), "host": host, "students": answers, "mean_from": 1}


def _student(model: Model, layer: SparseLayer, hookpoint: str, ids: Tensor, own: Tensor) -> dict[str, Any]:
    """What one student makes of the tokens; `own` are the host's log-probabilities [token, vocab]."""
    tap = gradients.Tapped(layer)
    with model.host.replace({hookpoint: tap}), torch.enable_grad():
        logits = model.host.model(ids, use_cache=False).logits.float()
        losses = gradients.losses(logits, ids)
        gradient = torch.autograd.grad(losses[:, 1:].sum(), tap.added)[0][0] if ids.shape[1] > 1 else torch.zeros_like(tap.y[0])
    with torch.no_grad():
        theirs = logits.detach()[0].log_softmax(-1)
        losses = losses.detach()[0]
        # Σ p (log p − log q) term by term: exactly 0 where they are equal.
        kl = ((own - theirs) * own.exp()).sum(-1).clamp_min(0)
    return {
        "loss": _numbers(losses),
        "p": _numbers((-losses).exp()),
        "kl": _numbers(kl),
        "top": _top(model, theirs),
        "hookpoint": hookpoint,
        "word": layer.unit,
        "k": layer.k,
        "units": _units(model, layer, tap, gradient),
    }


@torch.no_grad()
def _units(model: Model, layer: SparseLayer, tap: gradients.Tapped, gradient: Tensor) -> dict[str, Any]:
    """The active units of each token, the strongest first, as flat lists; those of token t lie between ``from[t]`` and ``from[t + 1]``."""
    columns: dict[str, list[Any]] = {"from": [0], "unit": [], "a": [], "share": [], "effect": []}
    x, y = tap.x[0], tap.y[0]
    if not layer.n_units:
        return {**columns, "from": [0] * (len(x) + 1)}
    written = model.written(layer, x)
    # What is written is asked of the layer that reads x, whatever it reads: its input, or for a SAE the MLP's output.
    for chunk in written.chunks(x, x if layer.reads == "output" else y):
        added = written.units(chunk)
        whole = (chunk.rest + added.sum(1)).norm(dim=1).clamp(min=1e-30)
        shares = added.norm(dim=2) / whole[:, None]
        effects = -torch.einsum("tko,to->tk", added, gradient[chunk.rows].to(added))
        values, order = chunk.code.values.sort(dim=1, descending=True, stable=True)
        parts = [part.gather(1, order) for part in (chunk.code.indices, shares, effects)]
        for count, unit, a, share, effect in zip(
            (values > 0).sum(1).clamp(max=MOST_UNITS).tolist(),
            parts[0].tolist(),
            values.tolist(),
            *(p.tolist() for p in parts[1:]),
            strict=True,
        ):
            columns["from"].append(columns["from"][-1] + count)
            columns["unit"] += unit[:count]
            columns["a"] += [short(value, 5) for value in a[:count]]
            columns["share"] += [short(value, 3) for value in share[:count]]
            columns["effect"] += [short(value, 3) for value in effect[:count]]
    return columns


def _top(model: Model, scores: Tensor) -> list[list[list[Any]]]:
    """The likeliest next tokens after each token, with their probabilities."""
    best, tokens = scores.topk(min(TOP, scores.shape[-1]), -1)
    rows = zip(tokens.tolist(), best.exp().tolist(), strict=True)
    return [[[model.token(token), short(p, 4)] for token, p in zip(*row, strict=True)] for row in rows]


def _numbers(values: Tensor) -> list[float | None]:
    return [short(value, 5) for value in values.tolist()]


def heat(model: Model, tokens: Tokens, student: str, unit: int) -> dict[str, Any]:
    """The activation of one unit at each token of a text.

    Raises:
        Refusal: too long, or empty.
    """
    ids = ids_of(model, tokens)
    values, indices = _codes(model, ids, student)
    a = (values * (indices == unit)).sum(1)
    return {"tokens": model.read_again(ids), "a": _numbers(a)}


def firing_on(model: Model, tokens: Tokens, student: str) -> list[int]:
    """The units that fire most on a text: by the sum of their activations, the first token left out.

    Raises:
        Refusal: too long, or empty.
    """
    ids = ids_of(model, tokens)
    values, indices = _codes(model, ids, student)
    first = 1 if len(ids) > 1 else 0
    sums = torch.zeros(model.layer(student).n_units, device=values.device)
    sums.index_add_(0, indices[first:].flatten(), values[first:].flatten())
    found = sums.topk(min(MOST_FOUND, len(sums)))
    return [unit for unit, total in zip(found.indices.tolist(), found.values.tolist(), strict=True) if total > 0]


@torch.no_grad()
def _codes(model: Model, ids: Sequence[int], student: str) -> tuple[Tensor, Tensor]:
    """Activations and units [token, k] of a student on one sequence."""
    layer = model.layer(student)
    source = model.source(layer, model.student(student).hookpoint, torch.tensor([list(ids)]))
    code = layer.encode(source.to(next(layer.parameters())))
    return code.values, code.indices
