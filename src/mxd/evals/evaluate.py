"""Evaluate the students of a run in their host on held-out text, and write the report into the run folder."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checkpoint import Run, StudentRecord
from ..config import EvalConfig
from ..errors import ConfigError
from ..harvest import Batch, collect
from ..layers import MixtureOfDecoders, SparseLayer
from ..text import TokenBlock
from . import fidelity, report, routing
from .bootstrap import mean_interval
from .fidelity import Constant, HeldOut, Losses, Swap

if TYPE_CHECKING:
    from ..host import Host
    from ..text import Corpus

VALIDATION_TOKENS = 16_384
"""Validation tokens, at most, on which the ridge penalty is chosen and gains and biases are fitted."""
SEQUENCES_PER_READ = 8
WEIGHT_BYTES = 2**31
"""Students held in memory at once, by the size of their weights; more are measured in several passes."""

Progress = Callable[[int, str], None]


def evaluate(run: Run, host: Host, corpus: Corpus, config: EvalConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Measure every student and write ``report.json``, ``.md``, ``.html`` and ``frontier.svg`` into the run folder.

    With ``split="validation"`` the files are called ``report-validation.*`` and ``frontier-validation.svg``, so that choosing
    a recipe never touches the figures on test text; what would be fitted on validation tokens is then fitted on training
    tokens that are not in the fit sample.

    Args:
        run: the run folder, opened.
        host: the host it was trained on.
        corpus: the texts it was trained on.
        config: what to measure and on how much text.
        progress: called with the number of sequences done (of ``config.sequences``) and a word on what is being done.

    Returns:
        The report: run-level keys at the top, one dict per student under ``students``; figures that are undefined are None.

    Raises:
        ConfigError: a size or split that makes no sense.
        TextError: the split holds too little text.
        RunError: unknown student, or a damaged run folder.
    """
    _check(config)
    records = [run.student(name) for name in config.students] if config.students else run.students
    say = progress or (lambda _done, _note: None)
    hookpoints = list(dict.fromkeys(record.hookpoint for record in records))
    say(0, "reading activations")
    blocks = _sample(corpus, host, config, run.info["config"]["tokens_per_sequence"])
    fit, validation, held_out = (_read(host, block, hookpoints) for block in blocks)
    documents = torch.unique(blocks[2].documents, return_inverse=True)[1].repeat_interleave(blocks[2].ids.shape[1])
    seen = {h: HeldOut(*held_out[h], documents.to(held_out[h].x.device)) for h in hookpoints}
    say(0, "errors and routing")
    figures = {r.name: _activation_figures(run, r, fit[r.hookpoint], validation[r.hookpoint], seen[r.hookpoint], config) for r in records}
    means = {h: fit[h].y.mean(0) for h in hookpoints}
    del fit, validation, held_out, seen
    base, losses = _losses(run, host, records, means, blocks[2].ids, say)
    result = _run_figures(run, host, config, blocks, hookpoints, base, losses)
    result["students"] = [{**_student(r), **_loss_figures(r, base, losses, config), **figures[r.name]} for r in records]
    clean = report.finite(result)
    report.write(run, clean)
    return clean


def _check(config: EvalConfig) -> None:
    if config.split not in ("test", "validation"):
        raise ConfigError("unknown --split", expected="test or validation", got=config.split)
    for name in ("sequences", "fit_tokens", "bootstrap", "permutations"):
        if getattr(config, name) < (2 if name == "sequences" else 1):
            raise ConfigError(f"--{name.replace('_', '-')} is too small", expected="at least 2" if name == "sequences" else "at least 1")


def _sample(corpus: Corpus, host: Host, config: EvalConfig, length: int) -> tuple[TokenBlock, TokenBlock, TokenBlock]:
    """Sequences to fit on, to choose on, and to measure on."""
    n_fit = -(-config.fit_tokens // length)
    n_choose = -(-min(config.fit_tokens, VALIDATION_TOKENS) // length)

    def draw(split: Any, sequences: int) -> TokenBlock:
        return corpus.sample(host.tokenizer, split, sequences=sequences, tokens_per_sequence=length, seed=config.seed)

    held_out = draw(config.split, config.sequences)
    if config.split == "validation":
        both = draw("train", n_fit + n_choose)
        return TokenBlock(*(t[:n_fit] for t in both)), TokenBlock(*(t[n_fit:] for t in both)), held_out
    return draw("train", n_fit), draw("validation", n_choose), held_out


def _read(host: Host, block: TokenBlock, hookpoints: list[str]) -> dict[str, Batch]:
    parts = (TokenBlock(*parts) for parts in zip(*(t.split(SEQUENCES_PER_READ) for t in block), strict=True))
    return collect(host, parts, hookpoints, block.ids.numel())


def _activation_figures(
    run: Run, record: StudentRecord, fit: Batch, validation: Batch, seen: HeldOut, config: EvalConfig
) -> dict[str, Any]:
    """Errors, firing, and for an MxD the routing."""
    device = seen.x.device
    layer = run.load(record.name, device)
    found = fidelity.activation_statistics(layer, seen, resamples=config.bootstrap, seed=config.seed)
    if isinstance(layer, MixtureOfDecoders):
        found["routing"] = routing.measure(
            layer,
            _pairs(fit),
            _pairs(validation),
            seen.without_first(),
            dense=_dense_control(run, record, device),
            permutations=config.permutations,
            resamples=config.bootstrap,
            seed=config.seed,
        )
    return found


def _pairs(batch: Batch) -> routing.Pairs:
    return routing.Pairs(batch.x[~batch.first], batch.y[~batch.first])


def _dense_control(run: Run, record: StudentRecord, device: torch.device) -> SparseLayer | None:
    """The dense control trained beside this student under the same recipe, whether or not it is among the students asked for."""
    own = (record.hookpoint, record.recipe)
    name = next((r.name for r in run.students if r.kind == "dense" and (r.hookpoint, r.recipe) == own), None)
    return run.load(name, device) if name else None


def _losses(
    run: Run, host: Host, records: Sequence[StudentRecord], means: dict[str, Tensor], ids: Tensor, say: Progress
) -> tuple[Losses, dict[str, Losses]]:
    """Cross-entropy and the rest with each student in place, and under both ablations of each hookpoint."""
    swaps: dict[str, Swap] = {}
    for hookpoint, mean in means.items():
        swaps[f"zero@{hookpoint}"] = Swap(hookpoint, Constant(torch.zeros_like(mean)))
        swaps[f"mean@{hookpoint}"] = Swap(hookpoint, Constant(mean))
    groups = list(_groups(records))
    base: Losses | None = None
    losses: dict[str, Losses] = {}
    for number, group in enumerate(groups):
        now = {f"student@{r.name}": Swap(r.hookpoint, run.load(r.name, host.device)) for r in group}
        now = {**swaps, **now} if number == 0 else now

        def done(sequences: int, number: int = number) -> None:
            say((number * len(ids) + sequences) // len(groups), "cross-entropy")

        base, found = fidelity.swapped_losses(host, ids, now, done)
        losses.update(found)
    assert base is not None
    return base, losses


def _groups(records: Sequence[StudentRecord]) -> Iterator[list[StudentRecord]]:
    group: list[StudentRecord] = []
    for record in records:
        if group and 4 * sum(r.params for r in [*group, record]) > WEIGHT_BYTES:
            yield group
            group = []
        group.append(record)
    yield group


def _student(record: StudentRecord) -> dict[str, Any]:
    fields = "name kind k d_in d_out n_units params tokens_trained train_seconds tokens_per_second seed recipe is_control hookpoint stopped"
    return {field: getattr(record, field) for field in fields.split()}


def _loss_figures(record: StudentRecord, base: Losses, losses: dict[str, Losses], config: EvalConfig) -> dict[str, Any]:
    own, zero = losses[f"student@{record.name}"], losses[f"zero@{record.hookpoint}"]
    excess = mean_interval((own.ce - base.ce).numpy(), resamples=config.bootstrap, seed=config.seed)
    ce = float(own.ce.mean())
    return {
        "ce": ce,
        "excess_ce": excess.value,
        "excess_ce_ci95": [excess.low, excess.high],
        "ce_recovered": fidelity.recovered(ce, float(base.ce.mean()), float(zero.ce.mean())),
        "kl": float(own.kl.mean()),
        "top1_agreement": float(own.top1.mean()),
    }


def _run_figures(
    run: Run,
    host: Host,
    config: EvalConfig,
    blocks: tuple[TokenBlock, TokenBlock, TokenBlock],
    hookpoints: list[str],
    base: Losses,
    losses: dict[str, Losses],
) -> dict[str, Any]:
    """What holds for the whole run. With several hookpoints, what differs between them is a dict by hookpoint."""

    def ablated(how: str) -> Any:
        by = {h: float(losses[f"{how}@{h}"].ce.mean()) for h in hookpoints}
        return by[hookpoints[0]] if len(by) == 1 else by

    layers = [host.site(h).layer for h in hookpoints]
    held_out = blocks[2]
    ce = float(base.ce.mean())
    return {
        "format_version": report.FORMAT_VERSION,
        "host": run.info["host"]["name"],
        "host_revision": run.info["host"].get("revision"),
        "host_fingerprint": run.info["host"].get("fingerprint"),
        "layer": layers[0] if len(layers) == 1 else layers,
        "hookpoint": hookpoints[0] if len(hookpoints) == 1 else hookpoints,
        "base_ce": ce if math.isfinite(ce) else None,
        "zero_ablation_ce": ablated("zero"),
        "mean_ablation_ce": ablated("mean"),
        "split": config.split,
        "eval_tokens": held_out.ids.numel(),
        "eval_sequences": len(held_out.ids),
        "eval_documents": len(held_out.documents.unique()),
        "fit_tokens": blocks[0].ids.numel(),
        "validation_tokens": blocks[1].ids.numel(),
        "train_tokens": run.info.get("train_tokens"),
        "budget": run.info["config"].get("budget"),
        "recipe": run.info["config"].get("recipe"),
        "loss": run.info["config"].get("loss"),
        "seed": run.info["config"].get("seed"),
        "eval_seed": config.seed,
        "bootstrap": config.bootstrap,
        "permutations": config.permutations,
        "text": run.info.get("text"),
        "versions": versions(),
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads(), "device": str(host.device)},
    }


def versions() -> dict[str, str]:
    """Versions of what the figures depend on, at the time of the evaluation."""
    from .. import __version__

    return {"python": platform.python_version(), "mxd": __version__, **{name: metadata.version(name) for name in ("torch", "transformers")}}
