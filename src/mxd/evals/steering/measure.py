"""Steering: what the host writes when one unit of a student is held up, and how coherent and fluent that is, unit by unit.

Protocol: docs/evaluation.md. Nothing here needs a service outside; a language model as a judge is an option (`mxd.evals.judge`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from ...config import EvalConfig
from ...errors import ConfigError, TextError
from ...harvest import Batch, collect
from ...text import TokenBlock
from ..bootstrap import Interval, mean_interval
from ..parts import Found, Part, Subject, missing
from . import judge
from .coherence import Coherence, Words, coherence, count_words, tfidf
from .layer import Firing, choose, divergence, firing, push_sizes, random_directions
from .show import show
from .text import Ordinary, Reading, Sampling, changed, distinct, ordinary, read, steered

if TYPE_CHECKING:
    from ...host import Generated, Host

VALIDATION_TOKENS = 16_384
"""Validation tokens on which the units' frequencies and typical activations are measured."""
ORDINARY = 64
"""The host's own continuations, which say what is ordinary, and its baseline loss."""
UNSTEERED = 32
"""Continuations with the student in place and nothing steered: its baseline."""
DEPTH = 2 / 3
"""Where in the host the vectors are read, as a share of its depth."""
EXAMPLES = 6
"""Units whose first continuation is kept."""
_SEQUENCES_PER_READ = 8


class Protocol(NamedTuple):
    """One way of steering."""

    name: str
    """``ours`` or ``paper``."""
    units: int
    """How many."""
    how: Literal["stratified", "first"]
    """Which."""
    samples: int
    """Continuations of each."""
    push: float
    """λ itself, or what multiplies the typical activation."""
    scaled: bool
    """Whether `push` multiplies the typical activation."""
    sampling: Sampling
    """How the continuations are made."""


def protocol(config: EvalConfig) -> Protocol:
    """The protocol that a configuration asks for.

    Raises:
        ConfigError: too few units or samples, or a scale that is no finite number.
    """
    paper = config.suite == "paper"
    units = (100 if paper else 24) if config.steer_units is None else config.steer_units
    samples = (10 if paper else 4) if config.steer_samples is None else config.steer_samples
    for name, value in (("--steer-units", units), ("--steer-samples", samples)):
        if value < 2:
            raise ConfigError(f"{name} is too small", expected="at least 2", got=str(value))
    if not np.isfinite(config.steer_scale):
        raise ConfigError("--steer-scale is no number", expected="a finite one", got=str(config.steer_scale))
    if paper:
        return Protocol("paper", units, "first", samples, 100.0, False, Sampling("Let's talk about ", 32, 1.0, 0.1, 1.0))
    return Protocol("ours", units, "stratified", samples, config.steer_scale, True, Sampling("Let's talk about", 24, 1.0, 0.9, 0.0))


def measure(subject: Subject) -> Found:
    """Steer units of one student; see `Part.measure`."""
    asked = protocol(subject.config)
    if not subject.layer.n_units:
        return missing(f"the {subject.layer.kind} control has no units")
    host, layer, hookpoint, seed = subject.host, subject.layer, subject.hookpoint, subject.config.seed
    subject.say(0.0, "how units fire on validation text")
    around = _around(subject, asked)
    fires = firing(layer, around.batch)
    units = choose(fires, asked.units, asked.how, seed)
    added = [asked.push * (float(fires.typical[unit]) if asked.scaled else 1.0) for unit in units]
    seeds = [_seed(seed, sample) for sample in range(max(UNSTEERED, asked.samples))]
    subject.say(0.1, "continuing without steering")
    with host.replace({hookpoint: layer}):
        plain = asked.sampling.write(host, seeds)
    seeds = seeds[: asked.samples]
    directions = random_directions(len(units), layer.d_out, [_seed(seed, 10**6 + unit) for unit in units])
    found: dict[str, Side] = {}
    for at, (name, ways) in enumerate({"unit": None, "random": directions}.items()):
        note = "steering units" if ways is None else "control: pushing in random directions"
        texts = steered(
            host, hookpoint, layer, units, added, seeds, asked.sampling, ways,
            lambda share, at=at, note=note: subject.say(0.15 + 0.4 * at + 0.3 * share, note),
        )  # fmt: skip
        subject.say(0.45 + 0.4 * at, "reading what was written")
        found[name] = _side(subject, around, texts, plain[: asked.samples])
    subject.say(0.95, "sizes of the pushes")
    ids = torch.tensor(plain[0].prompt_ids + plain[0].new_ids, device=host.device)
    kl = divergence(host, hookpoint, layer, ids, len(plain[0].prompt_ids), units, added)
    push = push_sizes(layer, around.batch, units, added)
    per_unit = _per_unit(units, fires, added, found, push.tolist(), kl.tolist())
    result = _figures(subject, asked, around, found, per_unit, read(host, plain, around.reader).loss, plain)
    return result | _judged(subject, found["unit"].texts, asked)


class _Around(NamedTuple):
    """What is the same for all students at a hookpoint."""

    batch: Batch
    """Activations on validation text."""
    words: Words
    """Tokens of validation text."""
    usual: Ordinary
    """The host's own continuations."""
    reader: str
    """Where the host's vectors are read."""


def _around(subject: Subject, asked: Protocol) -> _Around:
    host, shared = subject.host, subject.shared
    reader = host.sites[round(DEPTH * (len(host.sites) - 1))].hookpoint
    length = subject.run.info["config"]["tokens_per_sequence"]
    sequences = -(-VALIDATION_TOKENS // length)
    seed = subject.config.seed
    block = shared.get("text", lambda: _sample(subject, sequences, length))
    usual = shared.get(
        ("usual", asked.sampling), lambda: ordinary(host, asked.sampling, [_seed(seed, 2 * 10**6 + i) for i in range(ORDINARY)], reader)
    )
    words = shared.get("words", lambda: count_words(block.ids.tolist()))
    batch = shared.get(("activations", subject.hookpoint), lambda: _collect(host, block, subject.hookpoint))
    return _Around(batch, words, usual, reader)


def _sample(subject: Subject, sequences: int, length: int) -> TokenBlock:
    """Validation sequences; fewer where the split is small."""
    tokenizer, seed = subject.host.tokenizer, subject.config.seed
    while True:
        try:
            return subject.corpus.sample(tokenizer, "validation", sequences=sequences, tokens_per_sequence=length, seed=seed)
        except TextError:
            if sequences == 1:
                raise
            sequences //= 2


def _collect(host: Host, block: TokenBlock, hookpoint: str) -> Batch:
    parts = (TokenBlock(*parts) for parts in zip(*(t.split(_SEQUENCES_PER_READ) for t in block), strict=True))
    return collect(host, parts, [hookpoint], block.ids.numel())[hookpoint]


def _seed(seed: int, number: int) -> int:
    """A seed for a stream of its own, the same for every student and kind."""
    return int(np.random.SeedSequence([abs(seed), number]).generate_state(1)[0])


class Side(NamedTuple):
    """What came of steering units, or of pushing in random directions."""

    texts: list[list[Generated]]
    """Continuations [unit][sample]."""
    loss: NDArray[np.float64]
    """The host's loss on each [unit, sample]."""
    alike: Coherence
    """By the host's vectors."""
    words: Coherence
    """By the words."""
    changed: list[tuple[bool, float]]
    """Of each unit: see `text.changed`."""


def _side(subject: Subject, around: _Around, texts: list[list[Generated]], plain: Sequence[Generated]) -> Side:
    config, shape = subject.config, (len(texts), len(plain), -1)
    flat = [text for own in texts for text in own]
    seen: Reading = read(subject.host, flat, around.reader)
    counts = tfidf([text.new_ids for text in flat], around.words)
    both = [
        coherence(vectors.reshape(shape), resamples=config.bootstrap, seed=config.seed)
        for vectors in (around.usual.normalise(seen.vectors), counts)
    ]
    return Side(texts, seen.loss.reshape(shape[:2]), both[0], both[1], [changed(own, plain) for own in texts])


def _per_unit(
    units: Sequence[int], fires: Firing, added: Sequence[float], found: Mapping[str, Side], push: Sequence[float], kl: Sequence[float]
) -> list[dict[str, Any]]:
    own, control = found["unit"], found["random"]
    return [
        {
            "unit": unit,
            "frequency": int(fires.times[unit]) / fires.tokens,
            "typical": float(fires.typical[unit]),
            "lambda": added[i],
            "push": push[i],
            "kl": kl[i],
            "coherence": float(own.alike.units[i]),
            "word_coherence": float(own.words.units[i]),
            "loss": float(own.loss[i].mean()),
            "changed": own.changed[i][0],
            "tokens_changed": own.changed[i][1],
            "random_coherence": float(control.alike.units[i]),
            "random_loss": float(control.loss[i].mean()),
        }
        for i, unit in enumerate(units)
    ]


def _figures(
    subject: Subject,
    asked: Protocol,
    around: _Around,
    found: Mapping[str, Side],
    per_unit: list[dict[str, Any]],
    plain_loss: NDArray[np.float64],
    plain: Sequence[Generated],
) -> dict[str, Any]:
    """What goes into the report, but for the judges."""

    def mean(values: Any) -> dict[str, Any]:
        return interval(mean_interval(np.asarray(values, dtype=np.float64), resamples=subject.config.bootstrap, seed=subject.config.seed))

    own, control = found["unit"], found["random"]
    return {
        "protocol": {**asked._asdict(), "sampling": asked.sampling._asdict()},
        "host": subject.host.name,
        "unit_word": subject.layer.unit,
        "reader": around.reader,
        "validation_tokens": int((~around.batch.first).sum()),
        "coherence": _alike(own.alike),
        "word_coherence": _alike(own.words),
        "loss": mean(own.loss.mean(1)),
        "distinct": mean([distinct(texts) for texts in own.texts]),
        "changed": share_interval([one for one, _ in own.changed]),
        "tokens_changed": mean([share for _, share in own.changed]),
        "kl": mean([row["kl"] for row in per_unit]),
        "push": mean([row["push"] for row in per_unit]),
        "random": {
            "coherence": _alike(control.alike),
            "word_coherence": _alike(control.words),
            "loss": mean(control.loss.mean(1)),
            "distinct": mean([distinct(texts) for texts in control.texts]),
            "changed": share_interval([one for one, _ in control.changed]),
            "tokens_changed": mean([share for _, share in control.changed]),
        },
        "over_random": {
            "coherence": mean(own.alike.units - control.alike.units),
            "word_coherence": mean(own.words.units - control.words.units),
            "loss": mean(own.loss.mean(1) - control.loss.mean(1)),
        },
        "host_loss": mean(around.usual.loss),
        "unsteered_loss": mean(plain_loss),
        "unsteered_distinct": distinct(plain),
        "units": per_unit,
        "examples": {
            "unsteered": plain[0].text,
            "units": [
                {"unit": per_unit[i]["unit"], "texts": [text.text for text in own.texts[i][:2]]}
                for i in np.argsort([-row["coherence"] for row in per_unit], kind="stable")[:EXAMPLES].tolist()
            ],
        },
    }


def share_interval(those: Sequence[bool]) -> dict[str, Any]:
    """A share with Wilson's score interval of 95 % (1927): that of a bootstrap has no width where all or none of a few do."""
    low, high = stats.binomtest(sum(those), len(those)).proportion_ci(0.95, method="wilson")
    return interval(Interval(sum(those) / len(those), float(low), float(high)))


def interval(found: Interval) -> dict[str, Any]:
    """An interval as the report holds it."""
    return {"value": found.value, "ci95": [found.low, found.high]}


def _alike(found: Coherence) -> dict[str, Any]:
    return {**interval(found.mean), "within": found.within, "between": found.between, "p": found.p}


def _judged(subject: Subject, texts: list[list[Generated]], asked: Protocol) -> dict[str, Any]:
    """What the judges say of the steered texts, by model; ``incomplete`` where a verdict is missing, so that the next run asks again."""
    asked_for = judge.judges(subject.config, subject.run.path / "evals" / "steering" / "judge-cache.jsonl")
    if not asked_for:
        return {}
    given = [[asked.sampling.prompt + text.text for text in own] for own in texts]
    found: list[dict[str, Any]] = []
    for one in asked_for:
        said = one.ask_all(given, lambda done, name=one.model: subject.say(0.97, f"judge {name}: {done} of {len(given)}"))
        have = [verdict for verdict in said.verdicts if verdict is not None]
        means: dict[str, Any] = {
            axis: interval(
                mean_interval(np.array([getattr(v, axis) for v in have]), resamples=subject.config.bootstrap, seed=subject.config.seed)
            )
            for axis in ("coherence", "fluency")
            if have
        }
        verdicts = [None if v is None else v._asdict() for v in said.verdicts]
        found.append({"model": one.model, **means, "missing": len(given) - len(have), "why": said.why, "verdicts": verdicts})
    return {"judges": found, "incomplete": any(one["missing"] for one in found)}


PART = Part("steering", 2, ("steer_units", "steer_samples", "steer_scale", "judge_model"), measure, show)
