"""Evaluate the students of a run in their host on held-out text, and write the report into the run folder."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import edits
from ..checkpoint import Run, StudentRecord
from ..config import EvalConfig
from ..errors import ConfigError
from ..harvest import Batch, collect
from ..layers import MixtureOfDecoders, SparseLayer
from ..recipes import counterpart
from ..text import TokenBlock
from . import fidelity, report, routing, suite
from .bootstrap import ratio_interval
from .fidelity import Constant, HeldOut, Losses, Swap
from .parts import finite
from .probing import probes
from .steering import judge
from .suite import Kept

if TYPE_CHECKING:
    from ..host import Host
    from ..text import Corpus

VALIDATION_TOKENS = 16_384
"""Validation tokens, at most, on which the ridge penalty is chosen and gains and biases are fitted."""
SEQUENCES_PER_READ = 8
WEIGHT_BYTES = 2**31
"""Students held in memory at once, by the size of their weights; more are measured in several passes."""

FAITHFULNESS_SHARE = 0.15
"""Of the time of a larger suite, about; for the progress bar."""
VERSION = 4
"""Raised whenever the same options come to mean other figures of faithfulness or routing."""
_OPTIONS = ("sequences", "fit_tokens", "permutations")

Progress = Callable[[float, str], None]
Load = Callable[[StudentRecord], SparseLayer]


def evaluate(run: Run, host: Host, corpus: Corpus, config: EvalConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Measure every student and write ``report.json``, ``.md``, ``.html`` and ``frontier.svg`` into the run folder.

    Every finished measurement is kept under ``evals/`` in the run: after a stop, the same call goes on where it was.

    With an edit the files are called ``report-edit-NAME.*`` and ``frontier-edit-NAME.svg``, NAME being that of the edit's file.

    With ``split="validation"`` the files are called ``report-validation.*`` and ``frontier-validation.svg``, so that choosing
    a recipe never touches the figures on test text; what would be fitted on validation tokens is then fitted on training
    tokens that are not in the fit sample.

    Args:
        run: the run folder, opened.
        host: the host it was trained on.
        corpus: the texts it was trained on.
        config: what to measure and on how much text.
        progress: called with the fraction done and a word on what is being done.

    Returns:
        The report: run-level keys at the top, one dict per student under ``students``; figures that are undefined are None.

    Raises:
        ConfigError: a size or split that makes no sense.
        TextError: the split holds too little text.
        RunError: unknown student, or a damaged run folder.
    """
    _check(config)
    records, load = _students(run, host, config)
    kept = Kept(run, config, host.fingerprint)
    say = progress or (lambda _done, _note: None)
    measurements = len(records) * len(suite.wanted(config))
    result = _faithfulness(
        kept, host, corpus, records, load, lambda done, note: say(done * (1 if not measurements else FAITHFULNESS_SHARE), note)
    )
    found = suite.measure(
        kept, records, load, host, corpus, lambda done, note: say(FAITHFULNESS_SHARE + (1 - FAITHFULNESS_SHARE) * done / measurements, note)
    )
    for student, record in zip(result["students"], records, strict=True):
        student.update(suite.already(kept, record, host) | found[record.name])
    clean = finite(result)
    report.write(run, clean)
    return clean


def _students(run: Run, host: Host, config: EvalConfig) -> tuple[list[StudentRecord], Load]:
    """The students asked for, and how their layers are had: an edit narrows them to the one it belongs to, and is applied."""
    edit = edits.read(config.edit) if config.edit else None
    if edit:
        edits.check(edit, run)
    names = config.students or ((edit.student,) if edit else ())
    records = [run.student(name) for name in names] if names else run.students
    if edit and [r.name for r in records] != [edit.student]:
        raise ConfigError("this --edit belongs to another student", expected=edit.student, got=", ".join(r.name for r in records))

    def load(record: StudentRecord) -> SparseLayer:
        layer = run.load(record.name, host.device)
        return edit.apply(layer) if edit else layer

    return list(records), load


def _faithfulness(kept: Kept, host: Host, corpus: Corpus, records: Sequence[StudentRecord], load: Load, say: Progress) -> dict[str, Any]:
    """The report without the parts of the suite. Students measured before under the same settings are not measured again."""
    config = kept.config
    settings = {r.name: kept.settings("faithfulness", VERSION, _OPTIONS, r) | _control(kept.run, r) for r in records}
    found = {r.name: kept.read("faithfulness", r.name, settings[r.name]) for r in records}
    todo = [r for r in records if found[r.name] is None]
    if todo:
        around, fresh = _measure(kept.run, host, corpus, todo, load, config, say)
        for record in todo:
            figures = {"run": around, "student": fresh[record.name]}
            found[record.name] = kept.write("faithfulness", record.name, settings[record.name], figures)
    say(1.0, "faithfulness")
    each = [f["run"] for f in found.values() if f is not None]
    # Measured at different times, each with the hookpoints that it was about.
    ablations = {key: {h: ce for one in each for h, ce in one[key].items()} for key in ("zero_ablation_ce", "mean_ablation_ce")}
    result = _run_figures(kept.run, host, config, records, each[0] | ablations)
    result["students"] = [{**_student(r), **(found[r.name] or {})["student"]} for r in records]
    return result


def _control(run: Run, record: StudentRecord) -> dict[str, Any]:
    """What a student's figures depend on besides itself: its dense control, and the other dense students."""
    name = _dense_name(run, record)
    rivals = sorted(run.weights_sha256(r.name) for r in _dense_students(run, record))
    return {"dense": run.weights_sha256(name) if name else None, "rivals": rivals}


def _measure(
    run: Run, host: Host, corpus: Corpus, records: Sequence[StudentRecord], load: Load, config: EvalConfig, say: Progress
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What holds for the whole sample of text, and the figures of every student."""
    hookpoints = list(dict.fromkeys(record.hookpoint for record in records))
    say(0.0, "reading activations")
    blocks = _sample(corpus, host, config, run.info["config"]["tokens_per_sequence"])
    fit, validation, held_out = (_read(host, block, hookpoints) for block in blocks)
    documents = torch.unique(blocks[2].documents, return_inverse=True)[1].repeat_interleave(blocks[2].ids.shape[1])
    seen = {h: HeldOut(*held_out[h], documents.to(held_out[h].x.device)) for h in hookpoints}
    say(0.0, "errors and routing")
    figures = {
        r.name: _activation_figures(run, r, load(r), fit[r.hookpoint], validation[r.hookpoint], seen[r.hookpoint], config) for r in records
    }
    means = {h: fit[h].y.mean(0) for h in hookpoints}
    del fit, validation, held_out, seen
    base, losses = _losses(host, records, load, means, blocks[2].ids, say)
    return _text_figures(blocks, hookpoints, base, losses), {
        r.name: {**_loss_figures(r, base, losses, blocks[2].documents, config), **figures[r.name]} for r in records
    }


def _check(config: EvalConfig) -> None:
    judge.check(config)
    probes.check(config)
    suite.check(config)
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
    run: Run, record: StudentRecord, layer: SparseLayer, fit: Batch, validation: Batch, seen: HeldOut, config: EvalConfig
) -> dict[str, Any]:
    """Errors, firing, and for an MxD (not for an edited one) the routing."""
    device = seen.x.device
    found = fidelity.activation_statistics(layer, seen, resamples=config.bootstrap, seed=config.seed)
    if isinstance(layer, MixtureOfDecoders):
        found["routing"] = routing.measure(
            layer,
            _pairs(fit),
            _pairs(validation),
            seen.without_first(),
            dense=_dense_control(run, record, device),
            rivals={r.name: run.load(r.name, device) for r in _dense_students(run, record)},
            permutations=config.permutations,
            resamples=config.bootstrap,
            seed=config.seed,
        )
    return found


def _pairs(batch: Batch) -> routing.Pairs:
    return routing.Pairs(batch.x[~batch.first], batch.y[~batch.first])


def _dense_control(run: Run, record: StudentRecord, device: torch.device) -> SparseLayer | None:
    """The dense control trained beside this student under the same recipe, whether or not it is among the students asked for."""
    name = _dense_name(run, record)
    return run.load(name, device) if name else None


def _dense_students(run: Run, record: StudentRecord) -> list[StudentRecord]:
    """Every dense student of the run at this hookpoint from the same start: none with the host's encoder for an MxD from scratch."""
    dense = [r for r in run.students if r.kind == "dense" and r.hookpoint == record.hookpoint]
    return [r for r in dense if r.recipe.split("+")[0] == record.recipe.split("+")[0]]


def _dense_name(run: Run, record: StudentRecord) -> str | None:
    own = (record.hookpoint, counterpart(record.recipe, "dense"))
    return next((r.name for r in run.students if r.kind == "dense" and (r.hookpoint, r.recipe) == own), None)


def _losses(
    host: Host, records: Sequence[StudentRecord], load: Load, means: dict[str, Tensor], ids: Tensor, say: Progress
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
        now = {f"student@{r.name}": Swap(r.hookpoint, load(r)) for r in group}
        now = {**swaps, **now} if number == 0 else now

        def done(sequences: int, number: int = number) -> None:
            say((number + sequences / len(ids)) / len(groups), "cross-entropy")

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


def _loss_figures(record: StudentRecord, base: Losses, losses: dict[str, Losses], documents: Tensor, config: EvalConfig) -> dict[str, Any]:
    """Losses of one student. The interval resamples documents: sequences of one document are not independent."""
    own, zero = losses[f"student@{record.name}"], losses[f"zero@{record.hookpoint}"]
    rise = own.ce - base.ce
    sums = fidelity.sum_by(torch.unique(documents, return_inverse=True)[1], rise, torch.ones_like(rise)).numpy()
    excess = ratio_interval(sums[:, 0], sums[:, 1], resamples=config.bootstrap, seed=config.seed)
    ce = float(own.ce.mean())
    return {
        "ce": ce,
        "excess_ce": excess.value,
        "excess_ce_ci95": [excess.low, excess.high],
        # By document, in the order of `document_sequences`: what a paired difference between two students is made from.
        "excess_ce_sums": [round(float(rise), 7) for rise in sums[:, 0]],
        "ce_recovered": fidelity.recovered(ce, float(base.ce.mean()), float(zero.ce.mean())),
        "kl": float(own.kl.mean()),
        "top1_agreement": float(own.top1.mean()),
    }


def _text_figures(
    blocks: tuple[TokenBlock, TokenBlock, TokenBlock], hookpoints: list[str], base: Losses, losses: dict[str, Losses]
) -> dict[str, Any]:
    """What holds for the sample of text, whichever the student; ablations by hookpoint."""
    held_out = blocks[2]
    return {
        "base_ce": float(base.ce.mean()),
        "zero_ablation_ce": {h: float(losses[f"zero@{h}"].ce.mean()) for h in hookpoints},
        "mean_ablation_ce": {h: float(losses[f"mean@{h}"].ce.mean()) for h in hookpoints},
        "eval_tokens": held_out.ids.numel(),
        "eval_sequences": len(held_out.ids),
        "eval_documents": len(held_out.documents.unique()),
        "document_sequences": torch.unique(held_out.documents, return_counts=True)[1].tolist(),
        "fit_tokens": blocks[0].ids.numel(),
        "validation_tokens": blocks[1].ids.numel(),
    }


def _run_figures(run: Run, host: Host, config: EvalConfig, records: Sequence[StudentRecord], around: Mapping[str, Any]) -> dict[str, Any]:
    """What holds for the whole run. With several hookpoints, what differs between them is a dict by hookpoint."""
    hookpoints = list(dict.fromkeys(record.hookpoint for record in records))

    def ablated(key: str) -> Any:
        by = {h: around[key].get(h) for h in hookpoints}
        return by[hookpoints[0]] if len(by) == 1 else by

    layers = [host.site(h).layer for h in hookpoints]
    return {
        "format_version": report.FORMAT_VERSION,
        "host": run.info["host"]["name"],
        "host_revision": run.info["host"].get("revision"),
        "host_fingerprint": run.info["host"].get("fingerprint"),
        "layer": layers[0] if len(layers) == 1 else layers,
        "hookpoint": hookpoints[0] if len(hookpoints) == 1 else hookpoints,
        **around,
        "zero_ablation_ce": ablated("zero_ablation_ce"),
        "mean_ablation_ce": ablated("mean_ablation_ce"),
        "suite": config.suite,
        "edit": config.edit.stem if config.edit else None,
        "edit_summary": edits.read(config.edit).summary() if config.edit else None,
        "split": config.split,
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
