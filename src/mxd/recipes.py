"""Named recipes: how each kind of student starts and is optimised, the demo, and the paper's 108 layers.

`paper` is the published one. `ours` starts from scratch too, with what was found to help on validation text (docs/log.md
keeps every arm). `host-encoder` gives MxD and its controls the host MLP's own encoder and keeps it: faithful within minutes, as a
decomposition of the host's decoder into experts over the host's own neurons, and to be read as that.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

from .config import CONTROLS, KINDS, TrainConfig
from .errors import ConfigError, nearest


@dataclass(frozen=True)
class Recipe:
    """How one kind of student starts and is optimised."""

    name: str
    """Name that the report shows."""
    learning_rate: float
    """Peak learning rate."""
    warmup_steps: int
    """Steps over which the learning rate rises linearly from 0."""
    schedule: str
    """After warm-up: constant, or linear (to zero at the last step)."""
    optimiser: str = "adam"
    """adam, or muon: Muon for the dense matrices (E, D, W_skip), Adam for everything else."""
    encoder: str = "fresh"
    """Dense encoder of MxD and the controls: fresh, host (starts from the host MLP's), host-frozen (stays there)."""
    centre: bool = False
    """Start the gate's bias at minus its mean score, so that no unit loses every comparison from the first step."""
    positive_c: bool = False
    """Start C as (1 + e)/S1, e ~ N(0, 1), S1 the mean sum of a: the modulation Cᵀa starts near 1 instead of near 0."""
    warm_start_steps: int = 0
    """Steps of conjugate gradients that fit the output matrices on the first buffer before training."""
    aux_weight: float = 0.0
    """Weight of the auxiliary loss of dead units (AuxK)."""
    balance: bool = False
    """Nudge the gate's bias of units that fire on far too many or far too few tokens (frozen for the last fifth)."""


PAPER = Recipe("paper", learning_rate=1e-4, warmup_steps=5000, schedule="constant")
OURS = Recipe("ours", learning_rate=4e-3, warmup_steps=20, schedule="linear", centre=True, balance=True)
FITTED = replace(OURS, warm_start_steps=20)
HOST_ENCODER = replace(OURS, name="host-encoder", encoder="host-frozen")

RECIPES: dict[str, dict[str, Recipe]] = {
    "paper": dict.fromkeys(KINDS, PAPER),
    "ours": {**dict.fromkeys(KINDS, OURS), "skip-transcoder": FITTED},
    "host-encoder": {
        **dict.fromkeys(KINDS, OURS),
        "skip-transcoder": FITTED,
        "mxd": HOST_ENCODER,
        "mxd-pk": HOST_ENCODER,
        "dense": HOST_ENCODER,
        "additive": HOST_ENCODER,
    },
}
"""Recipe by name and kind. A kind without a dense encoder has nothing to take from the host and gets `ours`."""

SCHEDULES = ("constant", "linear")


def chosen(config: TrainConfig, kind: str) -> list[Recipe]:
    """The recipes that `config` asks for, for one kind, with its own --lr, --warmup-steps and --schedule put in.

    Two names that come to the same for this kind (``host-encoder`` is ``ours`` for a transcoder) give one recipe.

    Raises:
        ConfigError: unknown recipe or schedule, or a learning rate or warm-up that makes no sense.
    """
    if config.schedule is not None and config.schedule not in SCHEDULES:
        raise ConfigError("unknown --schedule", expected=nearest(config.schedule, SCHEDULES), got=config.schedule)
    if config.lr is not None and not config.lr > 0:
        raise ConfigError("--lr must be above 0", got=str(config.lr))
    if config.warmup_steps is not None and config.warmup_steps < 0:
        raise ConfigError("--warmup-steps must be at least 0", got=str(config.warmup_steps))
    own = {"learning_rate": config.lr, "warmup_steps": config.warmup_steps, "schedule": config.schedule}
    given = {name: value for name, value in own.items() if value is not None}
    found: dict[Recipe, None] = {}
    for name in config.recipe:
        if name not in RECIPES:
            raise ConfigError("unknown --recipe", expected=nearest(name, RECIPES), got=name)
        found[replace(RECIPES[name][kind], **given)] = None
    return list(found)


def demo() -> TrainConfig:
    """The run behind ``make demo``: four kinds and two controls on layer 8 of the built-in host, K = 32, equal budgets."""
    return TrainConfig(
        out=TrainConfig.out.parent / "demo",
        kinds=("mxd", "transcoder", "skip-transcoder", "topk-sae", *CONTROLS),
        k=(32,),
        budget="16x",
        recipe=("host-encoder",),
        tokens=307_200,
        tokens_per_step=512,
        buffer_tokens=131_072,
    )


def published() -> dict[str, Any]:
    """The paper's numbers (arXiv 2505.21364): cross-entropies, generation agreement, sizes."""
    return json.loads(resources.files("mxd").joinpath("published.json").read_text(encoding="utf-8"))


def published_host(name: str) -> str | None:
    """The key of `published` for a host name such as ``EleutherAI/pythia-410m``; None for a host the paper did not use."""
    key = name.rstrip("/").split("/")[-1].lower()
    return key if key in published()["sizes"] else None


PAPER_HOSTS: dict[str, tuple[str, int, int]] = {
    "gpt2": ("gpt2", 8, 10),
    "pythia-410m": ("EleutherAI/pythia-410m", 15, 12),
    "pythia-1.4b": ("EleutherAI/pythia-1.4b", 12, 10),
    "llama-3.2-3b": ("meta-llama/Llama-3.2-3B", 12, 10),
}
"""The paper's hosts: Hugging Face id, main layer, extra layer (both 0-based)."""


def paper_layers() -> list[TrainConfig]:
    """The paper's 108 layers as eight runs: four hosts x (main layer at five K, extra layer at four K) x three kinds."""
    runs: list[TrainConfig] = []
    for key, (host, main, extra) in PAPER_HOSTS.items():
        for layer, ks in ((main, (16, 32, 64, 128, 256)), (extra, (32, 64, 128, 256))):
            runs.append(
                TrainConfig(
                    out=TrainConfig.out.parent / f"paper-{key}-{layer}",
                    host=host,
                    text=("Skylion007/openwebtext",),
                    layers=(str(layer),),
                    kinds=("mxd", "transcoder", "skip-transcoder"),
                    k=ks,
                    budget="32x",
                    sizes="published",
                    recipe=("paper",),
                    tokens=480_000_000,
                    tokens_per_step=4096,
                )
            )
    return runs
