"""Which units of a layer are active: the K largest of its scores, or, where K is all of them, every unit whose score is positive."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..ops import current, linear, topk_gate
from ..ops.rows.crowded import is_crowded
from ..ops.transpose import Plan


def active(
    x: Float[Tensor, "token d_in"], weight: Float[Tensor, "n_units d_in"], bias: Float[Tensor, " n_units"], k: int, plan: Plan
) -> tuple[Float[Tensor, "token k"], Int[Tensor, "token k"]]:
    """Values and indices of the active units of a = TopK_K(ReLU(weight x + bias)).

    With K = n_units that is a = ReLU(weight x + bias), no unit kept out (a gate made sparse by a loss, not by a count). Its code then
    has as many columns as units are active on the token where most are, at most n_units.
    """
    if k < len(weight) or torch.compiler.is_compiling():
        return topk_gate(x, weight, bias, k, plan)
    return relu_gate(x, weight, bias)


def relu_gate(
    x: Float[Tensor, "token d_in"], weight: Float[Tensor, "n_units d_in"], bias: Float[Tensor, " n_units"]
) -> tuple[Float[Tensor, "token active"], Int[Tensor, "token active"]]:
    """Values and indices of all units with a positive score; tokens with fewer than the most have values 0 behind.

    The indices of a token are all different. With gradients the scores [token, n_units] are held whole, and how many units are
    active is read from the device. Without, they exist a slice of tokens at a time (`Settings.scores_mib`), and twice over where
    one slice is not enough: once to count.
    """
    n_units = len(weight)
    parts = [x] if torch.is_grad_enabled() else list(x.split(current().tokens_at_once(n_units, x.device)))
    scores = [linear(part, weight, bias).relu() for part in parts[:1]]
    most = max([_most(scores[0]), *(_most(linear(part, weight, bias)) for part in parts[1:])]) if len(x) else 1
    if is_crowded(most, n_units):  # every unit in its own column: nothing to sort, and products of that many are dense anyway
        columns = torch.arange(n_units, device=x.device)
        found = [(a, columns.expand(len(a), -1)) for a in _all(scores, parts, weight, bias)]
    else:
        found = [a.topk(most, dim=1, sorted=False) for a in _all(scores, parts, weight, bias)]
    if len(found) == 1:
        return found[0][0], found[0][1]
    values, indices = (torch.cat([pair[i] for pair in found]) for i in (0, 1))
    return values, indices


def _most(scores: Tensor) -> int:
    """The most units that are active on one token, at least 1."""
    return max(int((scores > 0).sum(1).max()), 1) if len(scores) else 1


def _all(scores: list[Tensor], parts: list[Tensor], weight: Tensor, bias: Tensor) -> Iterator[Tensor]:
    yield from scores
    for part in parts[1:]:
        yield linear(part, weight, bias).relu()
