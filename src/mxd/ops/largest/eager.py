"""The K largest of every row, reading most of it once.

Cut a row into groups. A score among the K largest lies in one of the K groups with the largest maxima: otherwise K other groups would
each hold a larger one. So: maxima of all groups (one pass, vectorised), the K best groups (the same question on a row G times as
short), then an ordinary TopK over the K·G scores in them. Exact, whatever the scores are.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

GROUP = 8
"""Scores in a group: the pass over the maxima costs 1/8 of a whole one, and K·8 candidates are left."""


WORTH = 1 << 16
"""Scores below which an ordinary TopK is over before the groups are made."""


def largest(scores: Float[Tensor, "token n"], k: int) -> tuple[Float[Tensor, "token k"], Int[Tensor, "token k"]]:
    """Values and indices of the k largest of each row, in no particular order; which of several equal ones is not defined."""
    tokens, n = scores.shape
    groups = n // GROUP
    if groups < 4 * k or scores.numel() < WORTH:
        return scores.topk(k, dim=1, sorted=False)
    # A group is {j, j + groups, j + 2 groups, ..}: the maximum then runs along whole rows, which vectorises for every dtype.
    body = scores[:, : groups * GROUP].unflatten(1, (GROUP, groups))
    _, best = largest(body.amax(1), k)
    steps = torch.arange(GROUP, device=scores.device) * groups
    candidates = (best[:, None, :] + steps[:, None]).flatten(1)
    if groups * GROUP < n:
        rest = torch.arange(groups * GROUP, n, device=scores.device)
        candidates = torch.cat([candidates, rest.expand(tokens, -1)], 1)
    values, where = scores.gather(1, candidates).topk(k, dim=1, sorted=False)
    return values, candidates.gather(1, where)
