"""Generation agreement: for how many tokens a host whose MLP is replaced writes what the host itself writes.

Protocol (arXiv 2505.21364, figure 4): 512 held-out prompts of four words, 16 new tokens, share of samples identical up to n tokens.
The paper does not state how tokens are chosen; here greedily unless a temperature is asked for.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from ...errors import ConfigError
from ...text import Split
from ..bootstrap import Array, ratio_interval
from ..parts import Found, Part, Subject
from .show import show

if TYPE_CHECKING:
    from ...host import Generated, Host

NAME = "generation_agreement"
WORDS = 4
"""Words in a prompt, as published."""
PROMPT_TOKENS = 64
"""A prompt of more tokens (four "words" of a table or of a text without spaces) is passed over."""
STREAMED_DOCUMENTS = 8
"""Of streamed text, this many documents for each prompt are considered."""
ROWS = 64
"""Prompts continued in one batch."""
SAMPLES = 32
"""Continuations kept as text."""
END = -1
"""Stands at every position behind an end-of-text token: two continuations that end at the same place agree from there on."""


class Prompts(NamedTuple):
    """What the host is asked to continue."""

    texts: list[str]
    """Four words each, joined by single spaces."""
    documents: list[int]
    """Number of the document that each comes from, counted from 0 in order of first use."""


class Reference(NamedTuple):
    """What all students of a hookpoint are compared with."""

    prompts: Prompts
    """The prompts, in the order drawn."""
    batches: list[list[int]]
    """Prompts by batch. Host and students are given the same batches, so that rounding meets them alike."""
    host: list[Generated]
    """The host's own continuations, by prompt."""


def draw_prompts(
    documents: Iterable[tuple[str, str]], *, prompts: int, seed: int, fits: Callable[[str], bool] = lambda text: True
) -> Prompts:
    """Prompts of `WORDS` consecutive words (maximal runs without white space), each at a uniformly random word of its document.

    The documents take turns in a seeded random order, one prompt each; only when all have had theirs does the next round begin, in
    which no position comes a second time. So prompts are from as many documents as can be.

    Args:
        documents: id and text of what to draw from; their order does not matter.
        prompts: how many.
        seed: of the order of the documents and of the positions.
        fits: whether a prompt can be used; one that cannot is passed over.

    Raises:
        ConfigError: the documents do not hold as many prompts.
    """
    rng = random.Random(f"prompts {seed}")
    order = sorted(documents)
    rng.shuffle(order)
    split = ((name, text.split()) for name, text in order)
    waiting = ((name, words, _places(len(words) - WORDS + 1, rng)) for name, words in split)
    texts: list[str] = []
    owners: list[int] = []
    numbers: dict[str, int] = {}
    while len(texts) < prompts:
        left: list[tuple[str, list[str], Iterator[int]]] = []
        for name, words, places in waiting:
            found = next(filter(fits, (" ".join(words[start : start + WORDS]) for start in places)), None)
            if found is not None:
                texts.append(found)
                owners.append(numbers.setdefault(name, len(numbers)))
                left.append((name, words, places))
            if len(texts) == prompts:
                break
        if not left:
            break
        waiting = iter(left)
    if len(texts) < prompts:
        what = f"{prompts} prompts of {WORDS} words"
        raise ConfigError(
            "too little held-out text to draw prompts from", expected=what, got=str(len(texts)), next="lower --agreement-prompts"
        )
    return Prompts(texts, owners)


def _places(count: int, rng: random.Random) -> Iterator[int]:
    """0 .. count − 1 in a random order, each drawn when it is asked for."""
    own, seen = random.Random(rng.random()), set[int]()
    while len(seen) < count:
        place = own.randrange(count)
        if place not in seen:
            seen.add(place)
            yield place


def in_batches(lengths: Sequence[int]) -> list[list[int]]:
    """Numbers of the prompts by batch, those of like length together: little padding."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return [order[start : start + ROWS] for start in range(0, len(order), ROWS)]


def continued(
    host: Host,
    texts: Sequence[str],
    batches: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    temperature: float,
    seed: int,
    progress: Callable[[float], None] = lambda done: None,
) -> list[Generated]:
    """The host's continuation of every text, as it is at the moment; every prompt has noise of its own.

    Args:
        host: with or without a stand-in.
        texts: prompts.
        batches: the numbers of all of them, by batch.
        new_tokens, temperature: as in `Host.generate_batch`.
        seed: of the noise; the same seed gives every host the same noise for the same prompt.
        progress: called with the share of the batches done.
    """
    made: dict[int, Generated] = {}
    for number, batch in enumerate(batches):
        seeds = [1_000_003 * seed + i for i in batch]
        own = host.generate_batch([texts[i] for i in batch], new_tokens=new_tokens, temperature=temperature, seed=seeds)
        made |= zip(batch, own, strict=True)
        progress((number + 1) / len(batches))
    return [made[i] for i in range(len(texts))]


def identical_tokens(own: Sequence[int], host: Sequence[int], new_tokens: int) -> int:
    """How many tokens are the same before the first difference; `new_tokens` for two that are the same throughout.

    A continuation that stops at an end-of-text token agrees beyond it with one that stops there too, and with no other.
    """
    return _alike(_padded(own, new_tokens), _padded(host, new_tokens))


def _alike(one: Sequence[object], other: Sequence[object]) -> int:
    """Length of the common beginning."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _padded(ids: Sequence[int], length: int) -> list[int]:
    return [*ids, *[END] * (length - len(ids))]


def agreement(identical: Sequence[int], documents: Sequence[int], *, new_tokens: int, resamples: int, seed: int) -> dict[str, Any]:
    """Shares and means with 95 % bootstrap intervals.

    Args:
        identical: `identical_tokens` of every sample, 0 to `new_tokens`.
        documents: the number of the document that each sample's prompt comes from; documents are resampled whole.
        new_tokens: T.
        resamples, seed: of the bootstrap.

    Returns:
        ``n_tokens`` 0 .. T; ``shares`` [T + 1], the share of samples whose first n tokens are all the host's (at n = 0: 1);
        ``shares_ci95``; ``mean_identical_tokens`` (tokens before the first difference, T where there is none) and ``_ci95``;
        ``complete_share``, the share at T, and ``_ci95``.
    """
    found = np.asarray(identical)
    owners = np.unique(np.asarray(documents), return_inverse=True)[1]

    def by_document(values: Any) -> Array:
        return np.bincount(owners, weights=np.asarray(values, dtype=np.float64)).astype(np.float64)

    sizes = by_document(np.ones(len(found)))
    lengths = list(range(new_tokens + 1))
    shares = [ratio_interval(by_document(found >= n), sizes, resamples=resamples, seed=seed) for n in lengths]
    mean = ratio_interval(by_document(found), sizes, resamples=resamples, seed=seed)
    return {
        "n_tokens": lengths,
        "shares": [share.value for share in shares],
        "shares_ci95": [[share.low, share.high] for share in shares],
        "mean_identical_tokens": mean.value,
        "mean_identical_tokens_ci95": [mean.low, mean.high],
        "complete_share": shares[-1].value,
        "complete_share_ci95": [shares[-1].low, shares[-1].high],
    }


def measure(subject: Subject) -> Found:
    """Generation agreement of one student. See `agreement` for the shares; besides them

    - ``prompts``, ``prompt_words``, ``prompt_documents`` (how many documents they come from), ``new_tokens``, ``temperature``,
      ``host``, ``split``: how it was measured,
    - ``identical_tokens``: one number per prompt, in a string, with spaces between; ``documents``: alike, the number of the
      document that each prompt comes from, which the bootstrap resamples; from these two students can be compared prompt by prompt,
    - ``samples``: the first `SAMPLES` prompts with the ``host``'s continuation and the student's, which is cut where its first token
      differs into ``same`` and ``rest``; ``identical_tokens`` of each.

    Raises:
        ConfigError: a size or temperature that makes no sense, or too little held-out text.
    """
    config, host = subject.config, subject.host
    count, new_tokens, temperature = config.agreement_prompts, config.agreement_tokens, config.agreement_temperature
    _check(count, new_tokens, temperature)
    how: dict[str, Any] = {"new_tokens": new_tokens, "temperature": temperature, "seed": config.seed}

    def reference() -> Reference:
        subject.say(0.0, "the host's own continuations")
        prompts = _prompts(subject, count, new_tokens)
        batches = in_batches([len(host.encode(text)) for text in prompts.texts])
        said = lambda done: subject.say(0.5 * done, "the host's own continuations")  # noqa: E731
        return Reference(prompts, batches, continued(host, prompts.texts, batches, **how, progress=said))

    prompts, batches, theirs = subject.shared.get("reference", reference)
    with host.replace({subject.hookpoint: subject.layer}):
        own = continued(host, prompts.texts, batches, **how, progress=lambda done: subject.say(0.5 + 0.5 * done, "continuations"))
    identical = [identical_tokens(a.new_ids, b.new_ids, new_tokens) for a, b in zip(own, theirs, strict=True)]
    return {
        "prompts": count,
        "prompt_words": WORDS,
        "prompt_documents": len(set(prompts.documents)),
        "new_tokens": new_tokens,
        "temperature": temperature,
        "host": host.name,
        "hookpoint": subject.hookpoint,
        "split": config.split,
        **agreement(identical, prompts.documents, new_tokens=new_tokens, resamples=config.bootstrap, seed=config.seed),
        "identical_tokens": " ".join(map(str, identical)),
        "documents": " ".join(map(str, prompts.documents)),
        "samples": [_sample(host, prompts.texts[i], own[i], theirs[i], identical[i]) for i in range(min(SAMPLES, count))],
    }


def _check(prompts: int, new_tokens: int, temperature: float) -> None:
    for name, value in (("--agreement-prompts", prompts), ("--agreement-tokens", new_tokens)):
        if value < 1:
            raise ConfigError(f"{name} is too small", expected="at least 1", got=str(value))
    if not 0 <= temperature < float("inf"):
        raise ConfigError("impossible --agreement-temperature", expected="0 (greedy) or a number above it", got=f"{temperature:g}")


def _prompts(subject: Subject, count: int, new_tokens: int) -> Prompts:
    host, corpus = subject.host, subject.corpus
    room = PROMPT_TOKENS if host.max_tokens is None else min(PROMPT_TOKENS, host.max_tokens - new_tokens - 1)
    documents = corpus.documents(cast(Split, subject.config.split))
    if corpus.streamed:
        documents = itertools.islice(documents, STREAMED_DOCUMENTS * count)
    return draw_prompts(documents, prompts=count, seed=subject.config.seed, fits=lambda text: len(host.encode(text)) <= room)


def _sample(host: Host, prompt: str, own: Generated, theirs: Generated, identical: int) -> dict[str, Any]:
    """One continuation as text. A character that is spread over several tokens belongs to the part in which it ends."""
    before = len(host.decode(own.prompt_ids))
    agreed = host.decode(own.prompt_ids + own.new_ids[:identical])[before:]
    cut = len(own.text) if identical >= len(own.new_ids) else _alike(agreed, own.text)
    return {"prompt": prompt, "host": theirs.text, "same": own.text[:cut], "rest": own.text[cut:], "identical_tokens": identical}


PART = Part(NAME, 1, ("agreement_prompts", "agreement_tokens", "agreement_temperature"), measure, show)
"""Generation agreement."""
