"""From rises of the loss, text by text, to selectivity with its interval: bootstrap over texts, all classes resampled together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from ..bootstrap import Array, interval_of_sums, mean_interval

FLOOR = 1e-3
"""Nats per token. A mean rise on the other classes below it counts as so much: selectivity is never a division by nothing."""


def by_class(
    rise: Float[Tensor, " text"], labels: Int[Tensor, " text"], classes: Sequence[str], *, resamples: int, seed: int
) -> dict[str, list[float]]:
    """Mean over the texts of each class, as [value, low, high]."""
    return {
        name: list(mean_interval(rise[labels == number].numpy(), resamples=resamples, seed=seed)) for number, name in enumerate(classes)
    }


def selectivity(rise: Float[Tensor, " text"], labels: Int[Tensor, " text"], own: int, *, resamples: int, seed: int) -> dict[str, Any]:
    """How much an ablation hurts class `own` more than the others.

    Returns a dict with, each as [value, low, high],

    - ``own``: mean rise on the class; ``others``: mean over the other classes of their mean rises,
    - ``contrast`` = own − others, which is always defined,
    - ``ratio`` = own / max(others, `FLOOR`), the selectivity; null where the interval of ``others`` reaches below `FLOOR`: then the
      floor decides, and only a lower bound can be given,

    and ``at_least``: the lower end of the interval of own / max(others, `FLOOR`); null unless the interval of ``own`` is above 0.
    """
    sums = _sums(rise, labels)

    def interval(statistic: Callable[[Array, Array], Array]) -> list[float]:
        return list(interval_of_sums(sums, lambda s: statistic(*_own_and_others(s, own)), resamples=resamples, seed=seed))

    first, others = interval(lambda o, _: o), interval(lambda _, r: r)
    ratio = interval(lambda o, r: o / np.maximum(r, FLOOR))
    return {
        "own": first,
        "others": others,
        "contrast": interval(lambda o, r: o - r),
        "ratio": ratio if others[1] > FLOOR else None,
        "at_least": ratio[1] if first[1] > 0 else None,
    }


def contrast(rise: Float[Tensor, " text"], labels: Int[Tensor, " text"], own: int, *, resamples: int, seed: int) -> list[float]:
    """Mean on the class minus the mean over the other classes, as [value, low, high]."""
    sums = _sums(rise, labels)
    return list(interval_of_sums(sums, lambda s: np.subtract(*_own_and_others(s, own)), resamples=resamples, seed=seed))


def _sums(rise: Tensor, labels: Tensor) -> Array:
    """[text, 2 x class]: its rise in the column of its class, and a 1 in that of the class's count."""
    member = (labels[:, None] == labels.unique()).double()
    return np.concatenate([(rise[:, None] * member).numpy(), member.numpy()], axis=1)


def _own_and_others(sums: Array, own: int) -> tuple[Array, Array]:
    """Mean rise on the class, and the mean over the others of theirs; NaN for a resample that misses a class."""
    classes = sums.shape[-1] // 2
    means = sums[..., :classes] / sums[..., classes:]
    return means[..., own], np.delete(means, own, axis=-1).mean(-1)
