"""What one unit does when it is pushed, and what is lost exactly when it is taken away."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..layers import Code, Edited, SparseLayer
from . import asks
from .controls import control_units
from .gradients import losses
from .lanes import Routed
from .live import Job
from .model import Model
from .replies import Refusal, short

STEPS = range(-4, 5)
"""Multiples of the unit's largest activation."""
MOVING = 5
"""Tokens that are told of: those whose probability moves most."""
ABLATION_SECONDS = 30.0
"""An ablation ends after this time with the firings that it has measured."""
ROWS_AT_ONCE = 8


def dose(model: Model, ask: asks.Dose, job: Job) -> dict[str, Any]:
    """P(next token) as a multiple of `ask.max` is added to a unit's activation, and to a control's.

    Added at every token of the prompt (``all``), or at its last only, from where the next token is predicted (``generated``).

    Raises:
        Refusal: too long, or too little memory.
    """
    ids = model.ids(ask.prompt, special=ask.special)
    layer, record = model.layer(ask.student), model.student(ask.student)
    other = control_units(model, record, layer, [ask.unit]).get(ask.unit)
    added = [ask.max * step for step in STEPS]
    model.check_room(ROWS_AT_ONCE * (4 * model.host.vocab_size + len(ids) * 40 * model.host.d_model))
    units = [ask.unit] if other is None else [ask.unit, other]
    paths = [_pushed(layer, unit, value, ask.at) for unit in units for value in added]
    probabilities = _next(model, record.hookpoint, ids, paths, job).view(len(units), len(added), -1)
    moved = (probabilities[0].amax(0) - probabilities[0].amin(0)).topk(min(MOVING, probabilities.shape[-1])).indices.tolist()

    def curves(of: Tensor) -> list[dict[str, Any]]:
        return [{"id": token, "token": model.token(token), "p": [short(p, 4) for p in of[:, token].tolist()]} for token in moved]

    return {
        "strengths": list(STEPS),
        "raw": [short(value) for value in added],
        "tokens": curves(probabilities[0]),
        "control": [] if other is None else curves(probabilities[1]),
        "control_unit": other,
    }


def _pushed(layer: SparseLayer, unit: int, value: float, at: str) -> nn.Module:
    edited = Edited(layer, add={unit: value}).eval()
    return edited if at == "all" else LastOnly(layer, edited)


class LastOnly(nn.Module):
    """One layer at the last position of a sequence, another before."""

    def __init__(self, before: SparseLayer, last: SparseLayer) -> None:
        super().__init__()
        self.before, self.last, self.reads = before, last, before.reads

    def forward(self, x: Tensor) -> Tensor:
        last = self.last(x[:, -1:]).y
        return torch.cat([self.before(x[:, :-1]).y, last], 1) if x.shape[1] > 1 else last


@torch.no_grad()
def _next(model: Model, hookpoint: str, ids: Sequence[int], paths: Sequence[nn.Module], job: Job) -> Tensor:
    """Probabilities of the next token [path, vocab], in float32 on the CPU."""
    host, found = model.host, list[Tensor]()
    kept = {"logits_to_keep": 1} if model.keeps_logits else {}
    for start in range(0, len(paths), ROWS_AT_ONCE):
        job.check()
        some = paths[start : start + ROWS_AT_ONCE]
        batch = torch.tensor([list(ids)], device=host.device).expand(len(some), -1)
        with host.replace({hookpoint: Routed(host.mlp(hookpoint), some)}):
            found.append(host.model(input_ids=batch, use_cache=False, **kept).logits[:, -1].float().softmax(-1).cpu())
    return torch.cat(found)


class Firing(NamedTuple):
    """A token of a collected sequence at which a unit fires."""

    ids: list[int]
    position: int
    band: int
    """Which band it was drawn from."""


def ablate(model: Model, student: str, unit: int, firings: Sequence[Firing], sizes: Mapping[int, int], job: Job) -> dict[str, Any]:
    """What the rest of a sequence loses, in nats, when the unit is removed at one token; the mean over its firings.

    Args:
        firings: a sample from each band, the bands taking turns: a slow machine measures the first of them only.
        sizes: firings of each band, which its sample stands for.

    Returns:
        ``exact`` nats per firing, ``exact_se`` its standard error (None for one firing), ``exact_n`` firings measured.

    Raises:
        Refusal: the unit fires at none of them, or too little memory.
    """
    hookpoint, layer = model.student(student).hookpoint, model.layer(student)
    longest = max((len(firing.ids) for firing in firings), default=0)
    model.check_room(ROWS_AT_ONCE * longest * (4 * model.host.vocab_size + 40 * model.host.d_model))
    found: dict[int, list[float]] = {}
    end = time.monotonic() + ABLATION_SECONDS
    for some in _batches(firings):
        job.check()
        for firing, lost in zip(some, _lost(model, layer, hookpoint, unit, some), strict=True):
            if lost is not None:
                found.setdefault(firing.band, []).append(lost)
        if found and time.monotonic() > end:
            break
    if not found:
        next = f"mxd collect {model.shelf.path}"
        raise Refusal(422, "the unit fires at none of its stored places", expected="the weights it was collected with", next=next)
    mean, error = stratified(found, sizes)
    return {"exact": short(mean), "exact_se": short(error), "exact_n": sum(map(len, found.values()))}


def _batches(firings: Sequence[Firing]) -> Iterator[list[Firing]]:
    """A few at a time, all of one length."""
    for _, same in groupby(firings, lambda firing: len(firing.ids)):
        alike = list(same)
        for start in range(0, len(alike), ROWS_AT_ONCE):
            yield alike[start : start + ROWS_AT_ONCE]


def stratified(samples: Mapping[int, Sequence[float]], sizes: Mapping[int, int]) -> tuple[float, float | None]:
    """The mean over all firings from samples of its strata, and its standard error; None where no stratum has two samples.

    A stratum with one sample is taken to be as spread as the others.
    """
    total = sum(sizes[stratum] for stratum in samples)
    means = {stratum: sum(values) / len(values) for stratum, values in samples.items()}
    mean = sum(sizes[stratum] * means[stratum] for stratum in samples) / total
    squares = {stratum: sum((value - means[stratum]) ** 2 for value in values) for stratum, values in samples.items()}
    free = sum(len(values) - 1 for values in samples.values())
    if not free:
        return mean, None
    spread = {
        name: squares[name] / (len(values) - 1) if len(values) > 1 else sum(squares.values()) / free for name, values in samples.items()
    }
    return mean, sum((sizes[name] / total) ** 2 * spread[name] / len(values) for name, values in samples.items()) ** 0.5


class Without(nn.Module):
    """A layer, and the same layer with one unit removed at one position of each row.

    Attributes:
        removing: whether it is removed now.
        active: whether the unit was active there [row].
    """

    def __init__(self, layer: SparseLayer, unit: int, positions: Tensor) -> None:
        super().__init__()
        self.layer, self.reads, self._unit, self._positions = layer, layer.reads, unit, positions
        self.removing, self.active = False, torch.zeros(len(positions), dtype=torch.bool)

    def forward(self, x: Tensor) -> Tensor:
        code = self.layer.encode(x)
        rows = torch.arange(len(x), device=x.device)
        there = (code.indices[rows, self._positions] == self._unit) & (code.values[rows, self._positions] > 0)
        self.active = there.any(1)
        values = code.values.clone()
        if self.removing:
            values[rows, self._positions] = torch.where(there, 0.0, values[rows, self._positions])
        return self.layer.decode(Code(values, code.indices, code.hidden), x).y


@torch.no_grad()
def _lost(model: Model, layer: SparseLayer, hookpoint: str, unit: int, firings: Sequence[Firing]) -> list[float | None]:
    """Nats lost over the following tokens; None where the unit is not active. All sequences are of one length."""
    host = model.host
    ids = torch.tensor([firing.ids for firing in firings], device=host.device)
    module = Without(layer, unit, torch.tensor([firing.position for firing in firings], device=host.device))
    with host.replace({hookpoint: module}):
        with host.remember([hookpoint]) as memory:
            whole = losses(host.logits(ids), ids).nan_to_num(0.0)
        module.removing = True
        with host.resume(memory, hookpoint):
            without = losses(host.logits(ids), ids).nan_to_num(0.0)
    lost = (without - whole).double().sum(1).tolist()
    return [value if active else None for value, active in zip(lost, module.active.tolist(), strict=True)]
