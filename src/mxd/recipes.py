"""Named recipes: how each kind of student starts and is optimised, the demo, and the paper's 108 layers.

`paper` is the published one. `ours` starts from scratch too, with what was found to help on validation text (docs/log.md
keeps every arm). `host-encoder` gives MxD and its controls the host MLP's own encoder and keeps it: faithful within minutes, as a
decomposition of the host's decoder into experts over the host's own neurons, and to be read as that.

A name may carry modifiers, so that many arms train in one pass: ``ours+muon``, ``ours+lr=2e-3+width=0.25``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any, NamedTuple

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
    random_k: bool = False
    """Draw K uniformly from K/2 to 3K/2 at every training step, as --random-k does for the whole run."""
    width: float = 1.0
    """Width H of the dense hidden vector, as a fraction of the host MLP's; the units get what the budget then leaves."""
    phi: str = "host"
    """φ of the dense encoder: host (the host MLP's), or a name out of `ACTIVATIONS`."""
    shape: str = "host"
    """Shape of the dense encoder: host (the host MLP's), mlp (φ(Eᵀx)), glu (φ(E_gateᵀx) * (Eᵀx))."""
    rank: float = 1.0
    """Rank R of a CP-μMoE, as a fraction of the MLP's output width."""
    l1: float = 0.0
    """Above 0, the gate has no TopK: a = ReLU(G x + b_G), and this times the sum of a (mean over tokens) is added to the loss. The
    weight rises linearly over the first tenth of the steps."""
    gate_rate: float = 1.0
    """Factor on the learning rate of the gate's matrices and biases (G, b_G; W_enc, b_enc)."""
    table_rate: float = 1.0
    """Factor on the learning rate of what the units write (C; W_dec)."""


PAPER = Recipe("paper", learning_rate=1e-4, warmup_steps=5000, schedule="constant")
OURS = Recipe("ours", learning_rate=8e-3, warmup_steps=20, schedule="linear", centre=True, balance=True)
FITTED = replace(OURS, warm_start_steps=20)
SLOWER = replace(OURS, learning_rate=2e-3)
HOST_ENCODER = replace(OURS, name="host-encoder", encoder="host-frozen")

RECIPES: dict[str, dict[str, Recipe]] = {
    "paper": dict.fromkeys(KINDS, PAPER),
    "ours": {**dict.fromkeys(KINDS, OURS), "skip-transcoder": FITTED, "topk-sae": SLOWER},
    "host-encoder": {
        **dict.fromkeys(KINDS, OURS),
        "skip-transcoder": FITTED,
        "topk-sae": SLOWER,
        "mxd": HOST_ENCODER,
        "mxd-pk": HOST_ENCODER,
        "cp-mumoe": HOST_ENCODER,
        "mov": HOST_ENCODER,
        "dense": HOST_ENCODER,
        "additive": HOST_ENCODER,
    },
}
"""Recipe by name and kind. A kind without a dense encoder has nothing to take from the host and gets `ours`."""

SIZING = ("width", "shape", "rank")
"""Fields that change a student's sizes."""
NAME_LETTERS = 120
"""Longest name of a recipe: it becomes part of a folder's."""
SCHEDULES = ("constant", "linear")
ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "relu", "quick_gelu", "relu2", "identity")
"""What φ can be."""

MODULATED = ("mxd", "mxd-pk", "cp-mumoe", "mov")
"""Kinds whose units multiply something dense: MxD and its relatives."""
ENCODED = (*MODULATED, *CONTROLS)
"""Kinds with a dense encoder."""
GATED = tuple(kind for kind in KINDS if kind != "dense")
"""Kinds with a gate."""
OWN_ROWS = tuple(kind for kind in GATED if kind != "mxd-pk")
"""Kinds whose units each have a row of the gate to themselves."""
WRITING = tuple(kind for kind in OWN_ROWS if kind not in ("cp-mumoe", "mov"))
"""Kinds whose units also write a row of a table each, which is what the auxiliary loss trains."""


def _number(text: str, low: float, high: float, *, open_low: bool = True, whole: bool = False) -> float | int | None:
    if not re.fullmatch(r"[0-9.eE-]+", text):  # Python's own numbers can be inf, 1_0 or hold spaces, and this becomes a folder's name
        return None
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        return None
    return value if (low < value or (value == low and not open_low)) and value <= high and math.isfinite(value) else None


class Grammar(NamedTuple):
    """One modifier of recipes, as in ``ours+lr=2e-3`` or ``ours+muon``."""

    field: str
    """The field of `Recipe` that it sets."""
    kinds: tuple[str, ...]
    """Kinds on which it has an effect; the others go without it, in name as well."""
    expected: str
    """What its value may be, in words; empty for a modifier without value."""
    value: Callable[[str], Any]
    """The field's value from what stands behind the =, None where that makes no sense."""


def _flag(field: str, kinds: tuple[str, ...], value: Any) -> Grammar:
    return Grammar(field, kinds, "", lambda text: value)


def _choice(field: str, kinds: tuple[str, ...], names: tuple[str, ...]) -> Grammar:
    return Grammar(field, kinds, ", ".join(names), lambda text: text if text in names else None)


FLAGS: dict[str, Grammar] = {
    "muon": _flag("optimiser", (*ENCODED, "skip-transcoder"), "muon"),
    "centre": _flag("centre", KINDS, True),
    "no-centre": _flag("centre", KINDS, False),
    "balance": _flag("balance", OWN_ROWS, True),
    "no-balance": _flag("balance", OWN_ROWS, False),
    "positive-c": _flag("positive_c", MODULATED, True),
    "random-k": _flag("random_k", GATED, True),
    "aux": _flag("aux_weight", WRITING, 1 / 32),
}
"""Modifiers that stand by themselves."""
VALUES: dict[str, Grammar] = {
    "lr": Grammar("learning_rate", KINDS, "a number above 0", lambda text: _number(text, 0, 1e3)),
    "warmup": Grammar("warmup_steps", KINDS, "a whole number of steps", lambda text: _number(text, 0, 1e9, open_low=False, whole=True)),
    "schedule": _choice("schedule", KINDS, SCHEDULES),
    "warm-start": Grammar(
        "warm_start_steps", KINDS, "a whole number of steps", lambda text: _number(text, 0, 1e4, open_low=False, whole=True)
    ),
    "aux": Grammar("aux_weight", WRITING, "a number of at least 0", lambda text: _number(text, 0, 1e3, open_low=False)),
    "width": Grammar("width", ENCODED, "a fraction of the host's width, above 0 and at most 8", lambda text: _number(text, 0, 8)),
    "phi": _choice("phi", ENCODED, ("host", *ACTIVATIONS)),
    "encoder": _choice("shape", ENCODED, ("host", "mlp", "glu")),
    "rank": Grammar("rank", ("cp-mumoe",), "a fraction of the output width, above 0 and at most 8", lambda text: _number(text, 0, 8)),
    "l1": Grammar("l1", OWN_ROWS, "a number above 0", lambda text: _number(text, 0, 1e6)),
    "lr-gate": Grammar("gate_rate", GATED, "a factor of at least 0", lambda text: _number(text, 0, 1e3, open_low=False)),
    "lr-c": Grammar("table_rate", GATED, "a factor of at least 0", lambda text: _number(text, 0, 1e3, open_low=False)),
}
"""Modifiers that take a value behind an =."""


class Modifier(NamedTuple):
    """One modifier of a recipe's name, read."""

    text: str
    """As typed, without its +."""
    field: str
    """The field of `Recipe` that it sets."""
    value: Any
    """To what."""
    kinds: tuple[str, ...]
    """Kinds on which it has an effect."""


def modifiers(name: str) -> list[Modifier]:
    """What stands behind the base recipe in `name`: ``ours+muon+lr=2e-3`` has two modifiers.

    Raises:
        ConfigError: the base or a modifier is unknown, a value makes no sense, or a field is set twice.
    """
    base, *texts = name.split("+")
    if base not in RECIPES:
        raise ConfigError("unknown --recipe", expected=nearest(base, RECIPES), got=name)
    if len(name) > NAME_LETTERS:
        raise ConfigError("a --recipe is too long for the name of a folder", expected=f"at most {NAME_LETTERS} letters", got=name)
    found: list[Modifier] = []
    for text in texts:
        key, _, given = text.partition("=")
        grammar = (VALUES if "=" in text else FLAGS).get(key)
        if grammar is None:
            known = [*FLAGS, *(f"{key}=" for key in VALUES)]
            raise ConfigError(
                f"unknown modifier in --recipe {name}", expected=f"{nearest(text, known)}; all: {' '.join(known)}", got=f"+{text}"
            )
        value = grammar.value(given)
        if value is None:
            raise ConfigError(f"--recipe {name}: what is +{text}?", expected=f"{key}= and {grammar.expected}", got=given or "nothing")
        if any(grammar.field == other.field for other in found):
            raise ConfigError(f"--recipe {name} sets {grammar.field.replace('_', ' ')} twice", expected="once", got=f"+{text}")
        found.append(Modifier(text, grammar.field, value, grammar.kinds))
    return found


def recipe(name: str, kind: str) -> Recipe:
    """The recipe of that name for `kind`: a base and its modifiers, those left out, in name as well, that have no effect on the kind.

    Raises:
        ConfigError: as `modifiers`; or another dense encoder is asked for where the host's own is kept.
    """
    base = RECIPES[name.split("+")[0]][kind] if name.split("+")[0] in RECIPES else PAPER
    own = [modifier for modifier in modifiers(name) if kind in modifier.kinds]
    made = replace(base, name="+".join([base.name, *(m.text for m in own)]), **{modifier.field: modifier.value for modifier in own})
    if made.encoder != "fresh" and (made.width, made.phi, made.shape) != (1.0, "host", "host"):
        raise ConfigError(f"--recipe {name} takes the host's encoder as it is", expected="no width, phi or encoder behind it", got=name)
    if made.l1:
        idle = next((m.text for m in own if (m.field, m.value) in (("random_k", True), ("balance", True))), None)
        if idle is not None:
            raise ConfigError(f"--recipe {name}: a gate with l1 has no K", expected=f"one of +l1 and +{idle}", got="both")
        made = replace(made, balance=False)
    return made


def counterpart(name: str, kind: str) -> str:
    """Under which name `kind` is trained by the recipe of that name: ``ours`` for a dense control under ``ours+positive-c``."""
    try:
        return recipe(name, kind).name
    except ConfigError:  # a name from elsewhere
        return name


def without_effect(config: TrainConfig) -> tuple[str, str] | None:
    """The first (recipe, modifier) of `config` that has no effect on any of its kinds."""
    for name in config.recipe:
        for modifier in modifiers(name):
            if not set(config.kinds) & set(modifier.kinds):
                return name, modifier.text
    return None


def chosen(config: TrainConfig, kind: str) -> list[Recipe]:
    """The recipes that `config` asks for, for one kind, with its own --lr, --warmup-steps and --schedule put in.

    Two names that come to the same for this kind (``host-encoder`` is ``ours`` for a transcoder, and so is ``ours+width=0.25``)
    give one recipe; so do two that differ in name only (``ours`` and ``ours+balance``).

    Raises:
        ConfigError: unknown recipe, modifier or schedule, or a value that makes no sense.
    """
    if config.schedule is not None and config.schedule not in SCHEDULES:
        raise ConfigError("unknown --schedule", expected=nearest(config.schedule, SCHEDULES), got=config.schedule)
    if config.lr is not None and not config.lr > 0:
        raise ConfigError("--lr must be above 0", got=str(config.lr))
    if config.warmup_steps is not None and config.warmup_steps < 0:
        raise ConfigError("--warmup-steps must be at least 0", got=str(config.warmup_steps))
    own = {"learning_rate": config.lr, "warmup_steps": config.warmup_steps, "schedule": config.schedule}
    given = {name: value for name, value in own.items() if value is not None}
    found: dict[Recipe, Recipe] = {}
    for name in config.recipe:
        twice = next((m for m in modifiers(name) if m.field in given or (m.field == "aux_weight" and config.aux_weight is not None)), None)
        if twice is not None:
            option = {"learning_rate": "--lr", "aux_weight": "--aux-weight"}.get(twice.field, "--" + twice.field.replace("_", "-"))
            raise ConfigError(f"{option} contradicts --recipe {name}", expected=f"one of {option} and +{twice.text}", got="both")
        made = replace(recipe(name, kind), **given)
        found.setdefault(replace(made, name=""), made)
    return list(found.values())


def demo() -> TrainConfig:
    """The run behind ``make demo``: four kinds and two controls on layer 8 of the built-in host, K = 32, equal budgets."""
    return TrainConfig(
        out=TrainConfig.out.parent / "demo",
        kinds=("mxd", "transcoder", "skip-transcoder", "topk-sae", *CONTROLS),
        k=(32,),
        budget="16x",
        recipe=("host-encoder",),
        lr=4e-3,  # what the README's table was measured with, for every kind
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
