"""The studies behind docs/results.md: which students are trained, on what, and which question they answer.

Light on purpose: only configurations. `mxd.study` runs them; ``mxd study NAME`` is the command.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from .config import CONTROLS, PARTS, HarvestConfig, TrainConfig
from .errors import ConfigError, nearest

SPARSE = ("mxd", "transcoder", "skip-transcoder", "topk-sae")
SCREEN_TOKENS = 307_200
"""Training tokens of the smaller studies."""
COMPARISON_TOKENS = 1_048_576
"""Training tokens of the comparison."""
LEARNING_RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
"""The grid of peak learning rates on which every kind is tuned."""


PUBLISHED = "paper+lr=0.001+warmup=20"
"""The published start and constant rate, at a rate that gets somewhere in a few hundred steps."""
ROUTED = "ours+positive-c+lr-c=4"
"""The start from scratch under which MxD keeps up with its dense control and still routes (docs/log.md)."""


class Study(NamedTuple):
    """A question, and the runs that answer it."""

    name: str
    """As in ``mxd study NAME``."""
    question: str
    """What it asks, in a sentence."""
    runs: tuple[TrainConfig, ...]
    """What is trained; `out` holds the run's own name, activations come from one cache for all runs of the same layers and tokens."""
    split: str = "test"
    """Held-out text it is measured on: validation where something is chosen by it."""
    parts: tuple[str, ...] = ()
    """Parts of the evaluation suite that are measured, besides faithfulness and routing."""

    also_cached: tuple[str, ...] = ()
    """Layers harvested besides those trained on, so that another study's activations serve."""

    def harvest(self, folder: Path) -> HarvestConfig:
        """What all its runs are trained on, to be kept in `folder`: one harvest for all studies of the same layers and tokens."""
        layers = tuple(sorted({*self.also_cached, *(layer for run in self.runs for layer in run.layers)}, key=int))
        tokens = max(run.tokens for run in self.runs)
        # Half the disk where there is much of it; the smaller ones keep the host's own bits.
        store = "float32" if tokens <= SCREEN_TOKENS else "float16"
        text = self.runs[0].text
        name = "-".join(["activations", *layers, str(tokens), *(Path(t).name for t in text if text != TrainConfig.text)])
        return HarvestConfig(out=folder / name, host=self.runs[0].host, text=text, layers=layers, tokens=tokens, store=store)


_SMALL = TrainConfig(tokens=SCREEN_TOKENS, layers=("8",))


THREE_LANGUAGES = TrainConfig(tokens=2 * SCREEN_TOKENS, layers=("8",), text=("sotu", "wiki-en", "wiki-fr", "wiki-es"))
"""Where a language is a question, every language was trained on."""


def _run(name: str, base: TrainConfig = _SMALL, **changes: object) -> TrainConfig:
    return replace(base, out=Path(name), **changes)  # pyright: ignore[reportArgumentType]


def _comparison() -> tuple[TrainConfig, ...]:
    """Layer 8 at three K and three seeds, a second layer at K = 32; the controls that make no claim to sparsity at K = 32 only."""
    base = TrainConfig(tokens=COMPARISON_TOKENS, layers=("8",))
    sparse, routed = (*SPARSE, "dense"), ("mxd", "dense")
    ks = (8, 32, 128)
    # With the first seed the rivals get the faster table (lr-c=4) of the routed MxD as well: it helps or it does not.
    runs = [_run("layer8-seed0", base, kinds=sparse, k=ks, recipe=("ours", ROUTED))]
    for seed in (1, 2):
        runs.append(_run(f"layer8-seed{seed}", base, kinds=sparse, k=ks, recipe=("ours",), seed=seed))
        runs.append(_run(f"layer8-routed-seed{seed}", base, kinds=routed, k=ks, recipe=(ROUTED,), seed=seed))
    for seed in (0, 1, 2):
        runs.append(_run(f"layer8-host-seed{seed}", base, kinds=("mxd", *CONTROLS), recipe=("host-encoder",), seed=seed))
        runs.append(_run(f"layer8-additive-seed{seed}", base, kinds=("additive",), seed=seed))
    runs.append(_run("layer16-seed0", base, layers=("16",), kinds=(*SPARSE, *CONTROLS), recipe=("ours",)))
    runs.append(_run("layer16-routed-seed0", base, layers=("16",), kinds=routed, recipe=(ROUTED,)))
    runs.append(_run("layer16-host-seed0", base, layers=("16",), kinds=("mxd", *CONTROLS), recipe=("host-encoder",)))
    return tuple(runs)


def _routing() -> tuple[TrainConfig, ...]:
    """The finalist of the search on validation text (docs/log.md) and its controls: 5 M token-steps each, in five passes.

    Controls: tuned dense and additive, the gate frozen, the dense path narrow or linear. The rate is the comparison's, lowered as the
    square root of the number of steps, alike for all kinds.
    """
    base = TrainConfig(tokens=COMPARISON_TOKENS, passes=5, layers=("8",))
    linear = "encoder=mlp+phi=identity+width=0.375"
    arms = ("", "+positive-c+lr-c=4", "+positive-c+lr-c=4+lr-gate=0", "+width=0.25", f"+{linear}")
    return (
        _run("mxd", base, kinds=("mxd", "dense"), recipe=tuple(f"ours{arm}+lr=4e-3" for arm in arms)),
        _run("rivals", base, kinds=("transcoder", "skip-transcoder", "additive"), recipe=("ours+lr=4e-3",)),
        _run("sae", base, kinds=("topk-sae",), recipe=("ours+lr=1e-3",)),
    )


STUDIES: dict[str, Study] = {
    study.name: study
    for study in (
        Study(
            "tuning",
            "Which learning rate is best for each kind? The same grid for all, chosen on validation text.",
            tuple(_run(f"lr-{rate:g}", kinds=(*SPARSE, *CONTROLS), recipe=("ours", "host-encoder"), lr=rate) for rate in LEARNING_RATES),
            split="validation",
        ),
        Study(
            "comparison",
            "How faithful is each kind at equal budget, tokens and tuning, and do MxD's experts matter?",
            _comparison(),
        ),
        Study(
            "routing",
            "Can an MxD from scratch be as faithful as the best skip transcoder while its experts matter (N_r, G_r and ID above zero)?",
            _routing(),
            also_cached=("16",),
        ),
        Study(
            "meaning",
            "Do single units mean something? Every part of the suite, every kind, on students that were trained on three languages.",
            (
                _run("every-kind", THREE_LANGUAGES, kinds=(*SPARSE, "dense"), recipe=("ours",)),
                _run("every-mxd", THREE_LANGUAGES, kinds=("mxd", "dense"), recipe=(ROUTED, "host-encoder")),
            ),
            parts=PARTS,
        ),
        Study(
            "topk-or-l1",
            "TopK against ReLU with an L1 penalty, at the same number of active units.",
            (
                _run("topk", kinds=("mxd", "transcoder"), k=(8, 32, 128)),
                _run(
                    "l1",
                    kinds=("mxd", "transcoder"),
                    recipe=("ours+l1=0.01", "ours+l1=0.03", "ours+l1=0.1"),
                ),
            ),
        ),
        Study(
            "encoder",
            "Which dense encoder: the host's own form (a gated SiLU) or an MLP with GELU or ReLU, at one budget?",
            (
                _run(
                    "encoders",
                    kinds=("mxd", "dense"),
                    recipe=("ours", "ours+encoder=mlp+phi=gelu", "ours+encoder=mlp+phi=relu"),
                ),
            ),
        ),
        Study(
            "rank",
            "How much does an expert's rank matter? CP-μMoE with R/O from .5 to 1, beside MxD.",
            (
                _run("mxd", kinds=("mxd",)),
                _run("ranks", kinds=("cp-mumoe",), recipe=tuple(f"ours+rank={rank:g}" for rank in (0.5, 0.625, 0.75, 0.875, 1.0))),
            ),
        ),
        Study(
            "random-k",
            "Does drawing K at random in training remove the shared expert, and at what cost in error?",
            (
                _run(
                    "random-k",
                    kinds=("mxd", "dense"),
                    recipe=("ours", "ours+random-k", "ours+no-balance", "ours+no-balance+random-k", PUBLISHED, f"{PUBLISHED}+random-k"),
                ),
            ),
            parts=("anatomy",),
        ),
        Study(
            "n-or-k",
            "More experts, or more of them active? A narrower dense path buys experts at the same budget.",
            (
                _run(
                    "grid",
                    kinds=("mxd", "dense"),
                    k=(8, 32, 128),
                    recipe=("ours+width=0.25", "ours", "ours+width=2"),
                ),
            ),
        ),
        Study(
            "mode-2",
            "MxD's factor on the output (as published) or on the hidden vector (mode 2, about half of the experts)?",
            (_run("both", kinds=("mxd", "mov"), k=(8, 32, 128)),),
        ),
    )
}
"""Every study, by name."""


def study(name: str) -> Study:
    """The study of that name.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    if name not in STUDIES:
        raise ConfigError("unknown study", expected=f"{nearest(name, STUDIES)}; all: {', '.join(STUDIES)}", got=name)
    return STUDIES[name]
