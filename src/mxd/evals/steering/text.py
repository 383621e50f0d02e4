"""What the steering measurement writes and reads: continuations of one prompt, the host's loss on them, and vectors of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from ...layers import SparseLayer
from ..bootstrap import Array
from ..fidelity import LOGIT_BYTES
from .layer import Steered

if TYPE_CHECKING:
    from ...host import Generated, Host

ROWS = 128
"""Continuations that are generated at once, about."""


class Sampling(NamedTuple):
    """How continuations are made."""

    prompt: str
    """Text that is continued."""
    new_tokens: int
    """Tokens of each continuation."""
    temperature: float
    """Of the sampling."""
    top_p: float
    """Probability of the nucleus that is sampled from."""
    frequency_penalty: float
    """Subtracted from a token's logit for each time it was added before."""

    def write(self, host: Host, seeds: Sequence[int]) -> list[Generated]:
        """One continuation for each seed, by the host as it stands."""
        return host.generate_batch(
            [self.prompt] * len(seeds),
            new_tokens=self.new_tokens,
            temperature=self.temperature,
            seed=seeds,
            top_p=self.top_p,
            frequency_penalty=self.frequency_penalty,
        )


def steered(
    host: Host,
    hookpoint: str,
    layer: SparseLayer,
    units: Sequence[int],
    added: Sequence[float],
    seeds: Sequence[int],
    how: Sampling,
    directions: Float[Tensor, "unit d_out"] | None = None,
    say: Callable[[float], None] = lambda _share: None,
) -> list[list[Generated]]:
    """The continuations of each unit [unit][sample]: sample i of every unit is made with seed i.

    Args:
        host, hookpoint, layer: where, and what stands there.
        units, added: which unit is steered, and by how much.
        seeds: of the samples, the same for every unit.
        how: prompt and sampling.
        directions: for the control with random directions, see `Steered`.
        say: called with the share that is done.
    """
    samples = len(seeds)
    at_once = max(1, ROWS // samples)
    made: list[list[Generated]] = []
    for at in range(0, len(units), at_once):
        rows = torch.arange(at, min(at + at_once, len(units))).repeat_interleave(samples)
        module = Steered(layer, torch.tensor(units)[rows], torch.tensor(added)[rows], None if directions is None else directions[rows])
        with host.replace({hookpoint: module}):
            found = how.write(host, list(seeds) * (len(rows) // samples))
        made += [found[i : i + samples] for i in range(0, len(found), samples)]
        say(len(made) / len(units))
    return made


class Reading(NamedTuple):
    """What the host, with its own MLPs, makes of continuations."""

    loss: Float[NDArray[np.float64], " text"]
    """Its mean cross-entropy on the added tokens of each, given the prompt and what stands before, nats per token."""
    vectors: Float[NDArray[np.float64], "text d_model"]
    """What one of its MLPs receives (the normalised residual stream), mean over the added tokens."""


def read(host: Host, texts: Sequence[Generated], hookpoint: str) -> Reading:
    """Loss and vectors of continuations of prompts of one length. `hookpoint` says where the vectors are read."""
    if not texts:
        return Reading(np.zeros(0), np.zeros((0, host.d_model)))
    start = len(texts[0].prompt_ids)
    longest = max(len(text.new_ids) for text in texts)
    chunk = max(1, LOGIT_BYTES // (4 * (start + longest) * host.vocab_size))
    losses: list[Tensor] = []
    vectors: list[Tensor] = []
    for at in range(0, len(texts), chunk):
        part = texts[at : at + chunk]
        # Padded on the right: a causal model's earlier positions cannot see it.
        rows = [text.prompt_ids + text.new_ids + [0] * (longest - len(text.new_ids)) for text in part]
        ids = torch.tensor(rows, device=host.device)
        own = torch.tensor([[i < len(text.new_ids) for i in range(longest)] for text in part], device=host.device)
        with _received(host, hookpoint) as streams:
            scores = host.logits(ids)[:, start - 1 : -1].log_softmax(-1)
        loss = -scores.gather(-1, ids[:, start:, None]).squeeze(-1).double()
        losses.append(((loss * own).sum(1) / own.sum(1)).cpu())
        stream = streams[0][:, start:].double()
        vectors.append(((stream * own[..., None]).sum(1) / own.sum(1, keepdim=True)).cpu())
    return Reading(torch.cat(losses).numpy(), torch.cat(vectors).numpy())


@contextmanager
def _received(host: Host, hookpoint: str) -> Iterator[list[Tensor]]:
    """What the host's own MLP receives while the host reads: one pass for the scores and for the vectors."""
    found: list[Tensor] = []
    handle = host.mlp(hookpoint).register_forward_pre_hook(lambda _module, args: found.append(args[0].float()))
    try:
        yield found
    finally:
        handle.remove()


class Ordinary(NamedTuple):
    """What the unsteered host's own continuations of the prompt look like."""

    loss: Array
    """Its loss on each of them."""
    middle: Array
    """Mean of their vectors [d_model]."""
    spread: Array
    """Standard deviation of each component; 1 where it does not vary."""

    def normalise(self, vectors: Float[NDArray[np.float64], "text d_model"]) -> Float[NDArray[np.float64], "text d_model"]:
        """Vectors as deviations from the ordinary: (v − middle) / spread, so that no large component drowns the others."""
        return (vectors - self.middle) / self.spread


def ordinary(host: Host, how: Sampling, seeds: Sequence[int], hookpoint: str) -> Ordinary:
    """`Ordinary` of the host's continuations with these seeds."""
    made = [text for at in range(0, len(seeds), ROWS) for text in how.write(host, list(seeds[at : at + ROWS]))]
    found = read(host, made, hookpoint)
    spread = found.vectors.std(0)
    return Ordinary(found.loss, found.vectors.mean(0), np.where(spread > 1e-9, spread, 1.0))


def changed(steered: Sequence[Generated], plain: Sequence[Generated]) -> tuple[bool, float]:
    """Whether any sample differs from the unsteered one with the same random numbers, and the share of tokens that differ.

    A token that only one of the two has counts as different.
    """
    different = total = 0
    for one, other in zip(steered, plain, strict=True):
        longest = max(len(one.new_ids), len(other.new_ids))
        alike = sum(a == b for a, b in zip(one.new_ids, other.new_ids, strict=False))
        different, total = different + longest - alike, total + longest
    return different > 0, different / total


def distinct(texts: Sequence[Generated]) -> float:
    """Share of different tokens among the added tokens of each text, mean over texts: 1 if none comes twice (distinct-1)."""
    return sum(len(set(text.new_ids)) / len(text.new_ids) for text in texts) / len(texts)
