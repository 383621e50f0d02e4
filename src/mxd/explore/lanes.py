"""A prompt continued in several lanes at once: by the host, by the host with a student in place, and with that student's units changed.

The lanes are rows of one batch. Only at the student's MLP do they part: there every row takes its own path. One noise draw a step
serves all rows, so that texts agree until the models differ. Beside every lane but the host's runs a judge: a row that reads the same
text by the host's own path, so that each token's price is told in the host's nats.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..decoding import Picker
from ..devices import layer_device
from ..layers import Edited, SparseLayer
from . import asks
from .controls import control_units
from .live import Job
from .model import Model
from .replies import short

TOP = 5
PROGRESS_SECONDS = 0.5
LONGEST_CHARACTER = 8
"""Tokens, at most, that are held back because a character may not be whole yet."""

Tell = Callable[[str, dict[str, Any]], None]


class Routed(nn.Module):
    """In the place of an MLP: every row of a batch takes its own path, the MLP itself or a layer."""

    def __init__(self, mlp: nn.Module, paths: Sequence[nn.Module | None]) -> None:
        """`paths`: of each row, a layer or what stands in for an MLP like one; None is the MLP itself."""
        super().__init__()
        device = layer_device(mlp)
        groups: dict[int, list[int]] = {}
        for row, path in enumerate(paths):
            groups.setdefault(id(path), []).append(row)
        # Not as submodules: the MLP must not be registered at two places, and the stand-in would cast to what it finds in us.
        self._mlp = [mlp]
        self._groups = [(paths[rows[0]], torch.tensor(rows, device=device)) for rows in groups.values()]
        self._order = torch.cat([rows for _, rows in self._groups]).argsort()

    def forward(self, x: Tensor) -> Tensor:
        if len(self._groups) == 1:
            return self._through(self._groups[0][0], x)
        return torch.cat([self._through(path, x[rows]) for path, rows in self._groups])[self._order]

    def _through(self, path: nn.Module | None, x: Tensor) -> Tensor:
        if path is None:
            return self._mlp[0](x)
        source = self._mlp[0](x) if getattr(path, "reads", "input") == "output" else x
        made: Any = path(source.to(next(path.parameters())))
        return (made if isinstance(made, Tensor) else made.y).to(x)


class Growing:
    """Text that grows by a token at a time, given out in whole characters."""

    def __init__(self, decode: Callable[[Sequence[int]], str], before: Sequence[int]) -> None:
        """`before`: the last tokens before the first; what decoders make of a token depends on its neighbour."""
        self._decode, self._ids = decode, list(before[-4:])
        self._shown, self._known = 0, len(self._ids)

    def add(self, token: int) -> str:
        """What can be shown now: "" where a character is not whole yet, to be joined to a later token's."""
        self._ids.append(token)
        begin = self._decode(self._ids[self._shown : self._known])
        text = self._decode(self._ids[self._shown :])
        if text.endswith("\ufffd") and len(self._ids) - self._known < LONGEST_CHARACTER:
            return ""
        self._shown, self._known = self._known, len(self._ids)
        return text[len(begin) :]


@dataclass(eq=False)
class Lane:
    """One continuation."""

    name: str
    layer: SparseLayer | None
    """What stands in for the MLP where tokens are generated; None in the host's lane."""
    at_prompt: SparseLayer | None
    """… and in the prompt."""
    note: str
    ids: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    """Nats of each token by the host."""
    stopped: str | None = None
    """Why it ended before its length."""


def lanes_of(model: Model, ask: asks.Generation) -> list[Lane]:
    """The lanes of a generation, in the order asked for.

    Raises:
        LayerError: no such unit.
    """
    record = model.student(ask.student)
    layer = model.layer(ask.student) if {*ask.lanes} != {"host"} else None
    made: list[Lane] = []
    for name in ask.lanes:
        if layer is None or name == "host":
            made.append(Lane(name, None, None, f"{model.host.name}, nothing replaced"))
        elif name == "replaced":
            made.append(Lane(name, layer, layer, f"{record.name} at {record.hookpoint}"))
        elif name == "steered":
            made.append(Lane(name, *_edited(layer, ask.edits), f"{len(ask.edits)} edited"))
        else:
            others = control_units(model, record, layer, [edit.unit for edit in ask.edits])
            edits = [asks.Change(others[e.unit], e.op, e.value, e.at) for e in ask.edits if e.unit in others]
            names = ", ".join(f"{layer.unit} {other}" for other in others.values()) or "no other unit"
            made.append(Lane(name, *_edited(layer, edits), f"{names}, same frequency and norm, same strength"))
    return made


def _edited(layer: SparseLayer, edits: Sequence[asks.Change]) -> tuple[SparseLayer, SparseLayer]:
    """The layer where tokens are generated, and in the prompt."""
    scale, add = asks.factors(edits)
    everywhere = [edit for edit in edits if edit.at == "all"]
    before = asks.factors(everywhere)
    return Edited(layer, scale=scale, add=add).eval(), Edited(layer, scale=before[0], add=before[1]).eval() if everywhere else layer


class Batch:
    """The lanes and their judges as rows, with a KV cache.

    Attributes:
        scores: of the next token of each row, float32 [row, vocab].
    """

    def __init__(self, model: Model, hookpoint: str, lanes: Sequence[Lane], prompt: Sequence[int]) -> None:
        """Read the prompt, by every different path once."""
        self._model, self._site = model, model.host.site(hookpoint).hookpoint
        self._rows = [(lane, False) for lane in lanes] + [(lane, True) for lane in lanes if lane.layer is not None]
        wanted = [None if judge else lane.at_prompt for lane, judge in self._rows]
        paths = list({id(path): path for path in wanted}.values())
        which = torch.tensor([next(i for i, path in enumerate(paths) if path is one) for one in wanted], device=model.host.device)
        ids = torch.tensor([list(prompt)], device=model.host.device).expand(len(paths), -1)
        self._cache: Any = None
        self._read(ids, paths)
        self._cache.batch_select_indices(which)
        self.scores = self.scores[which]

    def own(self, lanes: Sequence[Lane]) -> Tensor:
        """What decides the next token of these lanes [lane, vocab]."""
        return self.scores[[self._rows.index((lane, False)) for lane in lanes]]

    def judged(self, lanes: Sequence[Lane]) -> Tensor:
        """What the host thinks comes next in these lanes [lane, vocab]."""
        return self.scores[[self._rows.index((lane, lane.layer is not None)) for lane in lanes]]

    def step(self, lanes: Sequence[Lane]) -> None:
        """Read the last token of these lanes; the others are left behind."""
        kept = [row for row, (lane, _) in enumerate(self._rows) if lane in lanes]
        if len(kept) < len(self._rows):
            self._cache.batch_select_indices(torch.tensor(kept, device=self._model.host.device))
            self._rows = [self._rows[row] for row in kept]
        ids = torch.tensor([[lane.ids[-1]] for lane, _ in self._rows], device=self._model.host.device)
        self._read(ids, [None if judge else lane.layer for lane, judge in self._rows])

    def _read(self, ids: Tensor, paths: Sequence[SparseLayer | None]) -> None:
        host = self._model.host
        kept = {"logits_to_keep": 1} if self._model.keeps_logits else {}
        # Only for this step: between two steps others read with the host as it is.
        with torch.no_grad(), host.replace({self._site: Routed(host.mlp(self._site), paths)}):
            out = host.model(input_ids=ids, past_key_values=self._cache, use_cache=True, **kept)
        self._cache, self.scores = out.past_key_values, out.logits[:, -1].float()


def generate(model: Model, ask: asks.Generation, job: Job, tell: Tell) -> None:
    """Continue the prompt in every lane, telling of each token as it comes.

    Events: ``start`` {job, seed, lanes, prompt_tokens}, ``token`` {i, lane, id, text, p, host_loss, top}, ``progress``
    {tokens_per_second, seconds_left}, ``done`` {lanes}.

    Raises:
        Refusal: too long, or too little memory.
    """
    prompt = model.ids(ask.prompt, special=ask.special)
    model.check_length(len(prompt) + ask.tokens)
    rows = 2 * len(ask.lanes)
    model.check_room(model.cache_numbers(rows, len(prompt) + ask.tokens) + 8 * rows * model.host.vocab_size)
    lanes = lanes_of(model, ask)
    said = [{"lane": lane.name, "note": lane.note} for lane in lanes]
    tell("start", {"job": job.id, "seed": ask.seed, "lanes": said, "prompt_tokens": len(prompt)})
    texts = {lane.name: Growing(model.host.decode, prompt) for lane in lanes}
    pick, ends, going = Picker(ask.temperature, ask.seed, ask.top_p), model.host.end_ids(), list(lanes)
    batch, begun, spoken = Batch(model, model.student(ask.student).hookpoint, lanes, prompt), time.monotonic(), 0.0
    for i in range(ask.tokens):
        going = _finite(batch, going)
        if not going:
            break
        _choose(model, batch, going, pick, lambda lane, event, i=i: tell("token", {"i": i, "lane": lane, **event}), texts)
        for lane in going:
            lane.stopped = "end of text" if lane.ids[-1] in ends else None
        going = [lane for lane in going if lane.stopped is None]
        why = "cancelled" if job.cancelled else "time is up" if job.late else None
        for lane in going if why else ():
            lane.stopped = why
        if why or not going or i + 1 == ask.tokens:
            break
        if time.monotonic() - spoken > PROGRESS_SECONDS:
            spoken = time.monotonic()
            speed = (i + 1) / max(spoken - begun, 1e-6)
            tell("progress", {"tokens_per_second": short(speed, 3), "seconds_left": short((ask.tokens - i - 1) / speed, 3)})
        job.between()
        batch.step(going)
    tell("done", {"lanes": {lane.name: _stats(model, lane, lanes, prompt) for lane in lanes}})


def _finite(batch: Batch, lanes: Sequence[Lane]) -> list[Lane]:
    """The lanes whose scores are numbers; the others end."""
    fine: list[bool] = batch.own(lanes).isfinite().all(-1).tolist()
    for lane, kept in zip(lanes, fine, strict=True):
        if not kept:
            lane.stopped = "its scores are no numbers any more: a smaller strength"
    return [lane for lane, kept in zip(lanes, fine, strict=True) if kept]


def _choose(
    model: Model,
    batch: Batch,
    lanes: Sequence[Lane],
    pick: Picker,
    tell: Callable[[str, dict[str, Any]], None],
    texts: dict[str, Growing],
) -> None:
    """Choose the next token of every lane and tell of it."""
    scores = batch.own(lanes)
    chosen = pick(scores)
    own, judged = scores.log_softmax(-1), batch.judged(lanes).log_softmax(-1)
    best, tokens = own.topk(min(TOP, own.shape[-1]), -1)
    price = -judged.gather(-1, chosen[:, None])[:, 0]
    p = own.gather(-1, chosen[:, None])[:, 0].exp()
    columns = (lanes, chosen.tolist(), p.tolist(), price.tolist(), tokens.tolist(), best.exp().tolist())
    for lane, token, own_p, nats, top, top_p in zip(*columns, strict=True):
        lane.ids.append(token)
        lane.losses.append(nats)
        event: dict[str, Any] = {"id": token, "text": texts[lane.name].add(token), "p": short(own_p, 4), "host_loss": short(nats, 5)}
        event["top"] = [[model.token(one), short(its, 4)] for one, its in zip(top, top_p, strict=True)]
        tell(lane.name, {**event, **({"special": model.token(token)} if model.is_special(token) else {})})


def _stats(model: Model, lane: Lane, lanes: Sequence[Lane], prompt: Sequence[int]) -> dict[str, Any]:
    """What a lane came to."""
    host = next((other for other in lanes if other.layer is None), None)
    splits = None
    if host is not None and host is not lane:
        longer = max(len(lane.ids), len(host.ids))
        splits = next((i for i in range(longer) if lane.ids[i : i + 1] != host.ids[i : i + 1]), None)
    triples = list(zip(lane.ids, lane.ids[1:], lane.ids[2:], strict=False))
    decode = model.host.decode
    return {
        "nats_per_token": short(sum(lane.losses) / len(lane.losses), 5) if lane.losses else None,
        "repeats": short(1 - len(set(triples)) / len(triples), 4) if triples else None,
        "splits_at": splits,
        "tokens": len(lane.ids),
        "stopped": lane.stopped,
        "text": decode([*prompt, *lane.ids])[len(decode(prompt)) :],
    }
