"""Anatomy of a student: what its units are made of, when they fire, and what each of them does. Protocol: docs/evaluation.md.

Chosen and fitted on validation text: mean activations, replacements, gains and biases, the order of units by benefit. Everything that is
reported is of the split that is evaluated. First positions count in firing frequencies and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...errors import ConfigError, TextError
from ...recipes import recipe
from ...text import Split, TokenBlock
from ...written import Written, mean_activations
from ..parts import Found, Part, Subject
from . import causality, firing, jacobian, shares, weights
from .shares import Tokens
from .show import show

VALIDATION_TOKENS = 16_384
"""Validation tokens, at most, on which the fits are made."""
UNTABLED_TOKENS = 4096
"""Tokens behind benefits and causality of kinds whose contributions have to be decoded one by one."""
NATS_SEQUENCES = 40
"""Sequences, at most, behind the identity in nats: every one is three passes of the whole host."""
RANK_EXPERTS = 128
"""Experts whose rank is found: live ones, at random."""
PAPER_RANK_EXPERTS = 2000
"""The first of them, as published."""
SEQUENCES_PER_READ = 8


class Texts(NamedTuple):
    """The token sequences of this part, the same for all students."""

    window: TokenBlock
    """Those over which firing is counted; the first ``--sequences`` of them are measured on."""
    validation: TokenBlock
    """Those that are fitted on."""


class Seen(NamedTuple):
    """Activations of one hookpoint on these texts."""

    x: Float[Tensor, "token d_in"]
    """What the MLP received over the window."""
    first: Bool[Tensor, " token"]
    """First positions of the window's sequences."""
    held_out: Tokens
    """Of the first ``--sequences`` sequences, first positions left out."""
    validation: Tokens
    """Likewise."""


def measure(subject: Subject) -> Found:
    """All of it for one student; the dense control, which has no units, has a Jacobian and nothing else.

    Raises:
        ConfigError: a window shorter than one sequence, or no tokens for the Jacobian.
        TextError: no held-out text.
    """
    config, layer, say = subject.config, subject.layer, subject.say
    texts = subject.shared.get("texts", lambda: _texts(subject))
    say(0.01, "reading activations")
    seen = subject.shared.get(("seen", subject.hookpoint), lambda: _seen(subject, texts))
    found: Found = {
        "window_tokens": len(seen.x),
        "tokens": len(seen.held_out.x),
        "documents": int(seen.held_out.documents.max()) + 1,
        "validation_tokens": len(seen.validation.x),
        "random_k": _random_k(subject),
        "paper": subject.paper,
    }
    routing: Found = {}
    if layer.n_units:
        found |= _units(subject, texts, seen, _between(say, 0.3, 0.5))
        routing = _routing(subject, texts, seen, _between(say, 0.5, 0.75))
    x, documents = _spread_out(texts.window, seen, config.jacobian_tokens, config.seed)
    say(0.75, "Jacobians")
    made = jacobian.products(layer, subject.host, subject.hookpoint, x, lambda done: say(0.75 + 0.25 * done, "Jacobians"))
    routing["jacobian"] = jacobian.summary(made, documents, resamples=config.bootstrap, seed=config.seed)
    return {**found, "routing": routing}


def _random_k(subject: Subject) -> bool:
    """Whether this student was trained with random K: by --random-k, or by its own recipe (`+random-k`)."""
    asked = bool(subject.run.info["config"].get("random_k"))
    try:
        own = recipe(subject.record.recipe, subject.record.kind)
    except ConfigError:  # a name from elsewhere
        return asked
    return (asked and not own.l1) or own.random_k


def _between(say: Callable[[float, str], None], low: float, high: float) -> Callable[[float, str], None]:
    return lambda done, note: say(low + (high - low) * done, note)


def _texts(subject: Subject) -> Texts:
    config, corpus, tokenizer = subject.config, subject.corpus, subject.host.tokenizer
    length = int(subject.run.info["config"]["tokens_per_sequence"])
    if config.anatomy_tokens < length:
        raise ConfigError("--anatomy-tokens is too small", expected=f"at least one sequence, {length}", got=str(config.anatomy_tokens))
    if config.jacobian_tokens < 1:
        raise ConfigError("--jacobian-tokens is too small", expected="at least 1", got=str(config.jacobian_tokens))

    def draw(split: Split, sequences: int) -> TokenBlock:
        how: dict[str, Any] = {"tokens_per_sequence": length, "seed": config.seed}
        try:
            return corpus.sample(tokenizer, split, sequences=sequences, **how)
        except TextError:  # less than that: all there is
            blocks = list(corpus.blocks(tokenizer, split, tokens_per_sequence=length, sequences_per_block=SEQUENCES_PER_READ))
            return TokenBlock(*(torch.cat(column) for column in zip(*blocks, strict=True)))

    chosen: Split = "train" if config.split == "validation" else "validation"
    measured: Split = "validation" if config.split == "validation" else "test"
    return Texts(draw(measured, max(config.sequences, config.anatomy_tokens // length)), draw(chosen, -(-VALIDATION_TOKENS // length)))


def _seen(subject: Subject, texts: Texts) -> Seen:
    host, hookpoint, sequences = subject.host, subject.hookpoint, subject.config.sequences

    def read(block: TokenBlock, done: float, share: float) -> tuple[Tensor, Tensor]:
        parts: list[tuple[Tensor, Tensor]] = []
        for ids in block.ids.split(SEQUENCES_PER_READ):
            x, y = host.read(ids, [hookpoint])[hookpoint]
            parts.append((x.flatten(0, 1), y.flatten(0, 1)))
            subject.say(done + share * min(1.0, len(parts) * SEQUENCES_PER_READ / len(block.ids)), "reading activations")
        x, y = (torch.cat(column) for column in zip(*parts, strict=True))
        return x, y

    def tokens(block: TokenBlock, x: Tensor, y: Tensor) -> Tokens:
        keep = ~_first(block)
        documents = torch.unique(block.documents, return_inverse=True)[1].repeat_interleave(block.ids.shape[1])
        return Tokens(x[keep.to(x.device)], y[keep.to(y.device)], documents[keep])

    head = TokenBlock(*(part[:sequences] for part in texts.window))
    validation = tokens(texts.validation, *read(texts.validation, 0.01, 0.06))
    x, y = read(texts.window, 0.07, 0.22)
    n = head.ids.numel()
    return Seen(x, _first(texts.window), tokens(head, x[:n], y[:n]), validation)


def _first(block: TokenBlock) -> Bool[Tensor, " token"]:
    first = torch.zeros(block.ids.shape, dtype=torch.bool)
    first[:, 0] = True
    return first.flatten()


def _units(subject: Subject, texts: Texts, seen: Seen, say: Callable[[float, str], None]) -> Found:
    """Firing, co-activation, token types, ranks, and the shared expert."""
    layer, config = subject.layer, subject.config
    say(0.0, "firing")
    window = firing.look(layer, _read_by(subject, seen.x))
    say(0.4, "co-activation")
    keep, length = ~seen.first, texts.window.ids.shape[1]
    found = firing.firing(window)
    together = firing.coactivation(window, keep, length)
    say(0.6, "token types")
    types = firing.token_types(window, texts.window.ids.flatten(), keep, seed=config.seed)
    for example in types["examples"]:
        example["token"] = str(subject.host.tokenizer.decode([example["id"]]))
    say(0.7, "ranks")
    ranked = _ranked(window.counts, subject.paper, config.seed)
    return {
        "firing": found,
        "coactivation": together,
        "token_types": types,
        "rank": weights.expert_ranks(layer, ranked, lambda done: say(0.7 + 0.3 * done, "ranks")),
        "shared": _shared(subject, found, window),
    }


def _ranked(counts: Int[Tensor, " n_units"], paper: bool, seed: int) -> Sequence[int]:
    """The units whose rank is found."""
    if paper:
        return range(min(PAPER_RANK_EXPERTS, len(counts)))
    live = counts.nonzero().squeeze(1)
    order = torch.randperm(len(live), generator=torch.Generator().manual_seed(seed))[:RANK_EXPERTS]
    return sorted(live[order].tolist())


def _shared(subject: Subject, firing: Found, window: firing.Window) -> Found:
    """The busiest unit: whether it is shared by more than half of the tokens, and what it has in common with the host's decoder."""
    unit = int(window.counts.argmax())
    strength = float(window.strength[unit])
    decoder = subject.host.weights(subject.hookpoint).D
    return {
        "found": firing["n_above_half"] > 0,
        "unit": unit,
        "frequency": firing["max_frequency"],
        "strength": strength,
        "distances": weights.distances(subject.layer, decoder, unit, strength),
    }


def _read_by(subject: Subject, x: Float[Tensor, "token d_in"]) -> Float[Tensor, "token d"]:
    """What the layer reads where the MLP receives x."""
    if subject.layer.reads == "input":
        return x

    def outputs() -> Tensor:
        mlp = jacobian.mlp_of(subject.host, subject.hookpoint)
        with torch.no_grad():
            return torch.cat([mlp(part.to(subject.host.device)) for part in x.split(4096)])

    return subject.shared.get(("outputs", subject.hookpoint), outputs)


def _routing(subject: Subject, texts: Texts, seen: Seen, say: Callable[[float, str], None]) -> Found:
    """Benefit shares, amplitude share, causality and identity."""
    layer, config = subject.layer, subject.config
    how: dict[str, Any] = {"resamples": config.bootstrap, "seed": config.seed}
    validation, held_out = seen.validation, seen.held_out
    written = Written(layer, validation.y if layer.reads == "output" else validation.x)
    if written.table is None:
        validation, held_out = _some(validation), _some(held_out)
    say(0.0, "benefit shares")
    mean, frequency = mean_activations(written, validation.x, validation.y)
    known = shares.players(written, validation, mean)
    chosen = shares.benefits(written, validation, known)
    say(0.2, "benefit shares")
    benefit = shares.summary(chosen, shares.benefits(written, held_out, known), **how)
    say(0.4, "amplitude share")
    amplitude = shares.amplitude(written, held_out, mean, **how)
    say(0.5, "causality")
    each = causality.summary(causality.effects(written, held_out, frequency, seed=config.seed), **how)
    say(0.7, "identity")
    module = causality.exchanged(layer, seen.validation, seed=config.seed)
    ids, documents = (part[:NATS_SEQUENCES] for part in texts.window)
    return {
        "tokens": len(held_out.x),
        "benefit": benefit,
        "amplitude": amplitude,
        "causality": each,
        "identity": {
            "fvu": causality.identity_fvu(module, seen.held_out, **how),
            "nats": causality.identity_nats(subject.host, subject.hookpoint, module, ids, documents, **how),
        },
    }


def _some(tokens: Tokens) -> Tokens:
    return Tokens(*(part[:UNTABLED_TOKENS] for part in tokens))


def _spread_out(block: TokenBlock, seen: Seen, count: int, seed: int) -> tuple[Float[Tensor, "token d_in"], Int[Tensor, " token"]]:
    """`count` tokens at random positions (not the first) of as many sequences of the window as there are, and their documents."""
    n, length = block.ids.shape
    count = min(count, n * (length - 1))
    # Position p of every sequence comes after a shuffle of its own, so that no token is drawn twice.
    generator = torch.Generator().manual_seed(seed)
    orders = torch.stack([torch.randperm(length - 1, generator=generator) + 1 for _ in range(n)])
    sequence = torch.arange(count) % n
    at = sequence * length + orders[sequence, torch.arange(count) // n]
    return seen.x[at.to(seen.x.device)], block.documents[sequence]


PART = Part("anatomy", 2, ("sequences", "anatomy_tokens", "jacobian_tokens"), measure, show)
"""Anatomy and the measures of routing that take longer."""
