"""Selectivity: does ablating the units that are tied to a class hurt the host on that class, and only there?

For each class (language) of a labelled task the units most tied to it are chosen on texts of other splits than the measured ones,
ablated in place, and the host's next-token loss is measured on texts of every class. With r(c) the mean rise of the loss on class c
against the same student without the ablation,

    selectivity of an ablation for class c = r(c) / max(mean of r over the other classes, FLOOR)

Two controls get the same treatment: as many random live units, as many of the most active ones; and so do as many neurons of the
host's own MLP, chosen by the same rule. Each text is cut to its first tokens; the resampled unit is the text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import ConfigError
from ...layers import Edited, SparseLayer
from ...layers.encoder import ACTIVATIONS
from ..bootstrap import mean_interval
from ..fidelity import LOGIT_BYTES
from ..parts import Found, Part, Subject, missing
from ..trained_on import trained_on
from . import show
from .rises import FLOOR, by_class, contrast, selectivity
from .texts import AT_LEAST, Texts, read_texts

if TYPE_CHECKING:
    from ...host import Host

DOSES = (0.25, 1.0, 4.0)
"""Numbers of units ablated, as multiples of ``--selectivity-units``."""
DRAWS = 3
"""Draws of random live units; their rises are averaged text by text."""
TEXTS_AT_ONCE = 16
"""Texts that a layer encodes at once."""


def measure(subject: Subject) -> Found:
    """Figures of one student; see `_figures`."""
    config, layer = subject.config, subject.layer
    if config.selectivity_units < 1 or config.selectivity_documents < AT_LEAST:
        raise ConfigError(
            "too small for selectivity",
            expected=f"--selectivity-units of at least 1 and --selectivity-documents of at least {AT_LEAST}",
            got=f"{config.selectivity_units} and {config.selectivity_documents}",
        )
    if not layer.n_units:
        return missing("the dense control has no units")
    texts = subject.shared.get("texts", lambda: read_texts(subject.host, config))
    subject.say(0.02, "choosing units")
    x, y = subject.shared.get(("activations", subject.hookpoint), lambda: _activations(subject, texts))
    neurons = subject.shared.get(("neurons", subject.hookpoint), lambda: _neurons(subject, texts, x))
    means = mean_activations(layer, y if layer.reads == "output" else x)
    live = (means > 0).any(0).nonzero().flatten()
    units = config.selectivity_units
    conditions: dict[str, list[int]] = {"none": []}
    for number, name in enumerate(texts.classes):
        ranked = rank(means, texts.choose.labels, number)
        conditions |= {f"{name}/{dose}": ranked[:dose] for dose in doses(units)}
    conditions["active"] = most_active(means, texts.choose.labels, units)
    generator = torch.Generator().manual_seed(config.seed)
    for draw in range(DRAWS):
        conditions[f"random/{draw}"] = live[torch.randperm(len(live), generator=generator)[:units].to(live.device)].tolist()
    edited = {name: Edited(layer, scale=dict.fromkeys(chosen, 0.0)) for name, chosen in conditions.items()}
    losses = text_losses(
        subject.host,
        subject.hookpoint,
        texts.measure.ids,
        edited,
        lambda done: subject.say(0.2 + 0.78 * done, f"{len(edited)} ablations, text by text"),
    )
    return _figures(subject, texts, conditions, losses, neurons) | {"live_units": len(live), "n_units": layer.n_units}


def doses(units: int) -> list[int]:
    """Numbers of units to ablate around `units`, ascending."""
    return sorted({max(1, round(units * dose)) for dose in DOSES})


@torch.no_grad()
def mean_activations(layer: SparseLayer, read: Float[Tensor, "text position d_in"]) -> Float[Tensor, "text n_units"]:
    """Mean activation of each unit (its sparse code) over a text's tokens, float64 on the CPU; the first position is left out."""
    rows: list[Tensor] = []
    for part in read[:, 1:].split(TEXTS_AT_ONCE):
        code = layer.encode(part)
        sums = code.values.new_zeros(len(part), layer.n_units)
        rows.append(sums.scatter_add_(1, code.indices.flatten(1), code.values.flatten(1)).double().cpu() / part.shape[1])
    return torch.cat(rows)


def rank(means: Float[Tensor, "text n_units"], labels: Int[Tensor, " text"], own: int) -> list[int]:
    """Units from the most to the least tied to class `own`: by the smallest, over the other classes, of the standardised differences

        (mean over its texts − mean over the other class) / sqrt((variance over its texts + variance over the other class) / 2),

    and only those that are more active in the class than in every other. A unit that two classes share is tied to neither. Of equals,
    the lower number comes first.

    Args:
        means: mean activation of each unit in each text.
        labels: the class of each text.
        own: the class.
    """
    inside = means[labels == own]
    worst = torch.full_like(means[0], torch.inf)
    # A unit that never varies divides by nothing: the floor is far below any spread that activations have.
    floor = 1e-9 * means.max().clamp_min(1e-30)
    for other in labels.unique().tolist():
        if other != own:
            outside = means[labels == other]
            spread = ((inside.var(0) + outside.var(0)) / 2).sqrt()
            worst = torch.minimum(worst, (inside.mean(0) - outside.mean(0)) / spread.clamp_min(floor))
    order = torch.argsort(worst, descending=True, stable=True)
    return order[worst[order] > 0].tolist()


def most_active(means: Float[Tensor, "text n_units"], labels: Int[Tensor, " text"], units: int) -> list[int]:
    """The units of the largest mean activation, each class weighing the same."""
    overall = torch.stack([means[labels == label].mean(0) for label in labels.unique()]).mean(0)
    order = torch.argsort(overall, descending=True, stable=True)[:units]
    return order[overall[order] > 0].tolist()


def text_losses(
    host: Host,
    hookpoint: str,
    ids: Int[Tensor, "text position"],
    modules: Mapping[str, nn.Module],
    progress: Callable[[float], None] = lambda _: None,
) -> dict[str, Float[Tensor, " text"]]:
    """Mean next-token cross-entropy of each text with each of `modules` in the MLP's place, nats per predicted token, float64 on the CPU.

    Every position but the last counts. What is below the hookpoint is computed once for all modules; the host's own loss is ``""``.
    """
    rows: dict[str, list[Tensor]] = {name: [] for name in ("", *modules)}

    def add(name: str, part: Tensor) -> None:
        logits = host.logits(part)[:, :-1]
        loss = F.cross_entropy(logits.transpose(1, 2), part[:, 1:].to(logits.device), reduction="none")
        rows[name].append(loss.double().mean(1).cpu())

    parts = ids.split(max(1, LOGIT_BYTES // (4 * ids.shape[1] * host.vocab_size)))
    for number, part in enumerate(parts):
        with host.remember([hookpoint]) as memory:
            add("", part)
        for done, (name, module) in enumerate(modules.items()):
            progress((number + done / len(modules)) / len(parts))
            with host.resume(memory, hookpoint), host.replace({hookpoint: module}):
                add(name, part)
    return {name: torch.cat(found) for name, found in rows.items()}


class WithoutNeurons(nn.Module):
    """The host's own MLP without some of its neurons: mlp(x) − Σ_j h_j D_j over those, h being what the MLP multiplies with D."""

    def __init__(self, host: Host, hookpoint: str, neurons: Sequence[int]) -> None:
        super().__init__()
        site, found = host.site(hookpoint), host.weights(hookpoint)
        self.mlp, self.phi, chosen = host.mlp(hookpoint), ACTIVATIONS[site.activation], list(neurons)
        self.weights = found._replace(
            E=found.E[:, chosen],
            b_E=None if found.b_E is None else found.b_E[chosen],
            E_gate=None if found.E_gate is None else found.E_gate[:, chosen],
            b_gate=None if found.b_gate is None else found.b_gate[chosen],
            D=found.D[chosen],
        )

    def hidden(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch neuron"]:
        """h of the chosen neurons, float32."""
        w, x = self.weights, x.float()
        up = x @ w.E if w.b_E is None else x @ w.E + w.b_E
        if w.E_gate is None:
            return self.phi(up)
        gate = x @ w.E_gate if w.b_gate is None else x @ w.E_gate + w.b_gate
        return self.phi(gate) * up

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        return self.mlp(x) - (self.hidden(x) @ self.weights.D).to(x)


def _activations(subject: Subject, texts: Texts) -> tuple[Tensor, Tensor]:
    """What the MLP receives and returns on the texts that units are chosen on, [text, position, d]."""
    found = [subject.host.read(part, [subject.hookpoint])[subject.hookpoint] for part in texts.choose.ids.split(TEXTS_AT_ONCE)]
    return torch.cat([one.x for one in found]), torch.cat([one.y for one in found])


def _neurons(subject: Subject, texts: Texts, x: Tensor) -> dict[str, Any]:
    """The same for the host's own neurons: losses by condition, and which neurons. Chosen by the mean of |h|, since h may be negative."""
    host, hookpoint = subject.host, subject.hookpoint
    width = host.site(hookpoint).d_hidden
    whole = WithoutNeurons(host, hookpoint, range(width))
    means = torch.cat([whole.hidden(part).abs().mean(1).double().cpu() for part in x[:, 1:].split(TEXTS_AT_ONCE)])
    chosen = {
        name: rank(means, texts.choose.labels, number)[: subject.config.selectivity_units] for number, name in enumerate(texts.classes)
    }
    without = {name: WithoutNeurons(host, hookpoint, neurons) for name, neurons in chosen.items()}
    losses = text_losses(
        host, hookpoint, texts.measure.ids, without, lambda done: subject.say(0.03 + 0.17 * done, "ablating the host's own neurons")
    )
    losses["none"] = losses.pop("")
    return {"losses": losses, "chosen": chosen, "width": width}


def _figures(
    subject: Subject, texts: Texts, conditions: dict[str, list[int]], losses: dict[str, Tensor], neurons: dict[str, Any]
) -> dict[str, Any]:
    """What goes into report.json: rises in nats per predicted token, every interval [value, low, high] by bootstrap over texts."""
    config, classes, labels = subject.config, texts.classes, texts.measure.labels
    how: dict[str, int] = {"resamples": config.bootstrap, "seed": config.seed}
    rises = {name: loss - losses["none"] for name, loss in losses.items()}
    random = torch.stack([rises[f"random/{draw}"] for draw in range(DRAWS)]).mean(0)
    found: dict[str, Any] = {}

    def ablation(units: list[int], rise: Tensor, number: int) -> dict[str, Any]:
        return {"units": units, "rises": by_class(rise, labels, classes, **how), **selectivity(rise, labels, number, **how)}

    for number, name in enumerate(classes):
        tied = {dose: ablation(conditions[f"{name}/{dose}"], rises[f"{name}/{dose}"], number) for dose in doses(config.selectivity_units)}
        own = rises[f"{name}/{config.selectivity_units}"]
        host_rise = neurons["losses"][name] - neurons["losses"]["none"]
        found[name] = {
            "tied": tied,
            "random": selectivity(random, labels, number, **how),
            "active": selectivity(rises["active"], labels, number, **how),
            "against": {
                control: {
                    "rise": list(mean_interval((own - other)[labels == number].numpy(), **how)),
                    "contrast": contrast(own - other, labels, number, **how),
                }
                for control, other in (("random", random), ("active", rises["active"]))
            },
            "neurons": ablation(neurons["chosen"][name], host_rise, number),
        }
    each = {name: [int((split.labels == i).sum()) for split in (texts.choose, texts.measure)] for i, name in enumerate(classes)}
    return {
        "task": texts.task,
        "classes": list(classes),
        "units": config.selectivity_units,
        "floor": FLOOR,
        "tokens": texts.measure.ids.shape[1],
        "documents": {name: {"choose": chosen, "measure": measured} for name, (chosen, measured) in each.items()},
        "skipped": texts.skipped,
        "trained_on": trained_on(subject.run.info),
        "host_neurons": neurons["width"],
        "ce": {
            "host": by_class(neurons["losses"]["none"], labels, classes, **how),
            "student": by_class(losses["none"], labels, classes, **how),
        },
        "by_class": found,
        "active": {"units": conditions["active"], "rises": by_class(rises["active"], labels, classes, **how)},
        "random": {
            "units": [conditions[f"random/{draw}"] for draw in range(DRAWS)],
            "rises": by_class(random, labels, classes, **how),
        },
    }


_show: Callable[..., Any] = show.show
PART = Part("selectivity", 2, ("selectivity_units", "selectivity_documents"), measure, _show)
