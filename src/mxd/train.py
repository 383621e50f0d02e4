"""The training loop: many students on one stream of activations.

Each student has its own optimiser, schedule and random generator and sees every batch of its hookpoint, so its result does
not depend on who trains beside it (on the CPU: bit for bit).
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .clock import DeviceTimer
from .layers import Code, Output, Sizes, SparseLayer, aux_output, build
from .layers.warm_start import (
    MODULATED,
    centre_gate,
    copy_host_encoder,
    dense_matrices,
    fit_output,
    positive_modulation,
    start_output_bias,
    unit_tables,
)
from .objectives import objective
from .optim import AdamInBackward
from .recipes import Recipe
from .slices import ActivationBatch, joined, slices
from .tracking import FiringCounts

log = logging.getLogger("mxd")

SAMPLE_TOKENS = 16_384
"""Tokens of the first buffer that a warm start looks at."""


LOOK_EVERY_STEPS = 16
"""Steps between two looks at what a GPU has computed: for losses that are not finite, and for units that have died."""


class EncoderWeights(Protocol):
    """The host MLP's encoder, for recipes that start from it."""

    @property
    def E(self) -> Tensor: ...
    @property
    def b_E(self) -> Tensor | None: ...
    @property
    def E_gate(self) -> Tensor | None: ...
    @property
    def b_gate(self) -> Tensor | None: ...


@dataclass(frozen=True)
class StudentSpec:
    """One student: what it is and how it is trained."""

    name: str
    """Unique in the run: ``mxd-k32``, with ``@hookpoint`` behind it where several layers are trained."""
    hookpoint: str
    """The MLP it stands in for."""
    kind: str
    """Kind of layer."""
    sizes: Sizes
    """Its widths."""
    recipe: Recipe
    """How it starts and is optimised."""
    loss: str = "norm-weighted"
    """Training loss, by name."""
    random_k: bool = False
    """Draw K from K/2 to 3K/2 at every step."""
    aux_weight: float = 0.0
    """Weight of the auxiliary loss of dead units."""
    aux_k: int = 1
    """Dead units that it uses per token."""
    dead_after_tokens: int = 10_000_000
    """Tokens without firing after which a unit is dead."""
    seed: int = 0
    """The run's seed; the student's own is made of it, the kind, K and hookpoint."""

    def own_seed(self) -> int:
        """A 63-bit seed that depends on this student alone, not on its company."""
        text = f"{self.seed}/{self.kind}/{self.sizes.k}/{self.hookpoint}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


class Student:
    """A layer in training, with its optimiser, generator, counts and clock."""

    def __init__(self, spec: StudentSpec, *, total_steps: int, device: torch.device | str = "cpu") -> None:
        self.spec = spec
        self.total_steps = total_steps
        self.generator = torch.Generator().manual_seed(spec.own_seed())
        # Drawn on the CPU whatever the device, so that a seed means the same start everywhere.
        self.layer: SparseLayer = build(spec.kind, spec.sizes, generator=self.generator).to(device)
        self.loss = objective(spec.loss)
        self.counts = FiringCounts(self.layer.n_units, torch.device(device))
        self.steps = 0
        self.tokens = 0
        self._timer = DeviceTimer(torch.device(device))
        self.in_step = False
        """True in the middle of a step, and after an error there: only some of the weights are updated."""
        self.stopped: str | None = None
        self._loss = torch.full((), math.nan, device=device)
        self._broken = torch.zeros((), device=device)
        self._dead = torch.zeros(0, dtype=torch.int64, device=device)
        self._score_scale = 1.0
        self.careful = torch.device(device).type != "cpu"
        """Whether running out of memory may be met by halving: then no weight moves before all gradients of an unproven step are there."""
        self.parts = 1
        """Slices of a step's tokens that are taken one after the other, their gradients added up."""
        self._proven: set[tuple[int, int]] = set()
        """K and dead units of steps that the memory has held: smaller ones need no care."""
        self._adam: AdamInBackward | None = None
        self._make_optimisers()

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def seconds(self) -> float:
        """Seconds that the device spent on this student. Reading it waits for the device."""
        return self._timer.seconds

    @property
    def last_loss(self) -> float:
        """Training loss of the last step, without the auxiliary one. Reading it waits for the device."""
        return float(self._loss)

    def inputs(self, batch: ActivationBatch) -> Tensor:
        """What this kind reads of a batch: x, or y for an SAE."""
        return batch.y if self.layer.reads == "output" else batch.x

    def start(self, sample: ActivationBatch, host: EncoderWeights | None) -> None:
        """Set up what depends on data, from a sample of the first buffer, as the recipe says."""
        with self._timer:
            self._start(sample, host)

    def _start(self, sample: ActivationBatch, host: EncoderWeights | None) -> None:
        recipe, layer = self.spec.recipe, self.layer
        if recipe.centre or recipe.warm_start_steps:
            # The first position has tens of times the norm of the others and would drown them in every mean.
            keep = ~sample.first
            inputs, y = self.inputs(sample)[keep], sample.y[keep]
        else:
            inputs, y = self.inputs(sample), sample.y
        start_output_bias(layer, y)
        if recipe.encoder != "fresh" and hasattr(layer, "encoder") and host is not None:
            copy_host_encoder(layer, host.E, host.b_E, host.E_gate, host.b_gate)
            self._freeze()
        if recipe.centre:
            centre_gate(layer, inputs)
        if recipe.positive_c and isinstance(layer, MODULATED):
            positive_modulation(layer, inputs, self.generator)
        if recipe.warm_start_steps:
            fit_output(layer, inputs, y, steps=recipe.warm_start_steps)
        if self._balanced() is not None:
            with torch.no_grad():
                self._score_scale = float((inputs[:256] @ layer.gates()[0][0].t()).std())
        self._make_optimisers()

    def step(self, batch: ActivationBatch) -> None:
        """One optimiser step. A loss that is not finite stops this student, its weights as they were before.

        Nothing here waits for a GPU: whether the loss is finite is read every `LOOK_EVERY_STEPS` steps there, and until then the
        optimisers leave the weights alone by themselves.
        """
        self.in_step = True
        with self._timer:
            self._step(batch)
        self.in_step = False

    def _step(self, batch: ActivationBatch) -> None:
        assert self._adam is not None
        k = self._draw_k()
        self._find_dead()
        size = (self.layer.k if k is None else k, len(self._dead))
        proven = any(size[0] <= units and size[1] <= dead for units, dead in self._proven)
        self._adam.holding = self.parts > 1 or (self.careful and not proven)
        self._adam.learning_rate, self._adam.moved = self.learning_rate(), False
        settled = self._adam.has_moments  # the first step has yet to make room for them
        fired = self._backward_or_halve(batch, k)
        if self.stopped is not None:
            return
        if settled and not proven:
            self._proven.add(size)
        self._adam.release()
        self._step_muon()
        self.counts.add(fired)
        self._balance()
        self.steps += 1
        self.tokens += len(batch.y)

    def _backward_or_halve(self, batch: ActivationBatch, k: int | None) -> Code:
        """All gradients of a step; where a GPU has no memory left for them, in halves from here on. Once: half as much must do."""
        assert self._adam is not None
        try:
            return self._backward(batch, k)
        except torch.OutOfMemoryError as error:
            if self.parts > 1 or self._adam.moved or not self.careful:
                raise
            said = str(error).split(". ")[0]
        # Outside of the except block: its traceback holds on to all that did not fit.
        self._forget()
        torch.cuda.empty_cache()
        self.parts = 2
        self._adam.holding = True
        tokens = f"{len(batch.y):,} tokens at a time, from here on {-(-len(batch.y) // 2):,}; gradients are added up: the same result"
        log.warning("%s: not enough memory for %s (%s)", self.name, tokens, said)
        return self._backward(batch, k)

    def _backward(self, batch: ActivationBatch, k: int | None) -> Code:
        """The loss and its gradients, part by part; the units that fired."""
        assert self._adam is not None
        codes: list[Code] = []
        self._loss = torch.zeros_like(self._loss)
        for part in slices(batch, self.parts):
            share = len(part.y) / len(batch.y)
            inputs = self.inputs(part)
            output = self.layer(inputs, k)
            loss = self.loss(output.y, part.y)
            total = loss + self._auxiliary(inputs, output, part.y) + self._penalty(output)
            self._loss = self._loss + share * loss.detach()
            self._broken = torch.maximum(self._broken, (~total.detach().isfinite()).float())
            codes.append(output.code._replace(hidden=None))
            del output  # what it holds need not outlive the backward pass
            if self._looks() and float(self._broken):
                self.stopped = f"the loss became {float(total.detach())} at step {self.steps + 1}"
                self._forget()
                break
            self._adam.found_inf = self._broken
            (total if self.parts == 1 else share * total).backward()
        return joined(codes)

    def _forget(self) -> None:
        """Drop all gradients."""
        for parameter in self.layer.parameters():
            parameter.grad = None

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that going on needs, bit for bit: tensors (on the student's device) and numbers. To be read between two steps."""
        assert self._adam is not None
        counted, counts = self.counts.state()
        tensors = {
            **{f"layer.{name}": tensor for name, tensor in self.layer.state_dict().items()},
            **{f"counts.{name}": tensor for name, tensor in counted.items()},
            **{f"own.{name}": getattr(self, f"_{name}") for name in ("loss", "broken", "dead")},
            "generator": self.generator.get_state(),
        }
        gathered = self._adam.state() | (dict(self._muon.state) if self._muon else {})
        for name, parameter in self.layer.named_parameters():
            tensors |= {f"optimiser.{name}.{key}": tensor for key, tensor in gathered.get(parameter, {}).items()}
        numbers = {name: getattr(self, name) for name in ("steps", "tokens", "stopped", "seconds")}
        return tensors, {**numbers, "score_scale": self._score_scale, "counts": counts}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Go on from what `state` gave; instead of `start`.

        Raises:
            KeyError, RuntimeError: it is not this student's.
        """
        of = _under(tensors)
        self.layer.load_state_dict(of["layer"])
        self._freeze()
        self._make_optimisers()
        assert self._adam is not None
        self.generator.set_state(tensors["generator"].cpu())
        self.counts.restore(of["counts"], numbers["counts"])
        self._loss, self._broken, self._dead = (of["own"][name].to(self._loss.device) for name in ("loss", "broken", "dead"))
        self.steps, self.tokens, self.stopped = numbers["steps"], numbers["tokens"], numbers["stopped"]
        self._timer.seconds, self._score_scale = numbers["seconds"], numbers["score_scale"]
        gathered = _under(of.get("optimiser", {}), last=True)
        for name, parameter in self.layer.named_parameters():
            optimiser = self._adam.adams.get(parameter, self._muon)
            if optimiser is not None and name in gathered:
                optimiser.state[parameter] = {key: tensor.to(parameter.device) for key, tensor in gathered[name].items()}

    def _looks(self) -> bool:
        """Whether this step may wait for the device."""
        return self._loss.device.type == "cpu" or self.steps % LOOK_EVERY_STEPS == 0

    def _find_dead(self) -> None:
        """Which units the auxiliary loss is to bring back."""
        if self.spec.aux_weight and self.layer.units() is not None and self._looks():
            self._dead = self.counts.dead(self.spec.dead_after_tokens)

    def _auxiliary(self, inputs: Tensor, output: Output, y: Tensor) -> Tensor | float:
        """The weighted auxiliary loss: how far the dead units are from what the layer still gets wrong."""
        spec = self.spec
        if not len(self._dead):
            return 0.0
        rest = aux_output(self.layer, inputs, output.code, self._dead, spec.aux_k)
        # The training loss of ŷ + ê with ŷ held constant: |(y − ŷ) − ê|², weighed as |y − ŷ|² is.
        return spec.aux_weight * self.loss(output.y.detach() + rest, y)

    def _penalty(self, output: Output) -> Tensor | float:
        """l1 times the sum of a, mean over tokens; rising over the first tenth of the steps, when little else holds a up."""
        weight = self.spec.recipe.l1 * min(1.0, 10 * (self.steps + 1) / self.total_steps)
        return weight * output.code.values.sum(-1).mean() if weight else 0.0

    def learning_rate(self) -> float:
        """The learning rate of the coming step."""
        recipe, step = self.spec.recipe, self.steps
        if step < recipe.warmup_steps:
            return recipe.learning_rate * (step + 1) / recipe.warmup_steps
        if recipe.schedule == "constant":
            return recipe.learning_rate
        left = (self.total_steps - step) / max(self.total_steps - recipe.warmup_steps, 1)
        return recipe.learning_rate * max(left, 0.0)

    def _draw_k(self) -> int | None:
        if not self.spec.random_k or self.layer.k == 0:
            return None
        k = self.layer.k
        return int(torch.randint(max(1, k // 2), k + k // 2 + 1, (), generator=self.generator))

    def _freeze(self) -> None:
        if self.spec.recipe.encoder == "host-frozen" and hasattr(self.layer, "encoder"):
            self.layer.get_submodule("encoder").requires_grad_(False)

    def _make_optimisers(self) -> None:
        """Adam for every parameter, or Muon for the dense matrices and Adam for the rest."""
        recipe = self.spec.recipe
        if self._adam is not None:
            self._adam.close()
        matrices = dense_matrices(self.layer) if recipe.optimiser == "muon" else []
        dense = [p for p in matrices if p.requires_grad]
        rest = [p for p in self.layer.parameters() if p.requires_grad and not any(p is matrix for matrix in dense)]
        self._adam = AdamInBackward(rest, learning_rate=recipe.learning_rate, factors=self._factors())
        self._muon = torch.optim.Muon(dense, weight_decay=0.0, adjust_lr_fn="match_rms_adamw") if dense else None

    def _factors(self) -> dict[Tensor, float]:
        """What the learning rate of single parameters is multiplied by."""
        recipe, layer = self.spec.recipe, self.layer
        gates = [tensor for gate in layer.gates() for tensor in gate]
        return {**dict.fromkeys(gates, recipe.gate_rate), **dict.fromkeys(unit_tables(layer), recipe.table_rate)}

    def _step_muon(self) -> None:
        if self._muon is None:
            return
        for group in self._muon.param_groups:
            group["lr"] = self.learning_rate()
        if not float(self._broken):  # it cannot look at that by itself
            self._muon.step()
        self._muon.zero_grad(set_to_none=True)

    def _balanced(self) -> Tensor | None:
        """The gate's bias, where every unit has one to itself."""
        gates = self.layer.gates()
        return gates[0][1] if len(gates) == 1 else None

    @torch.no_grad()
    def _balance(self) -> None:
        """One-sided frequency control of the gate's bias (after loss-free balancing, arXiv 2408.15664).

        Only units far off are touched: those on more than max(5 %, twice the even share) of tokens and those on less than a
        tenth of the even share. What fires between is left to the loss. It moves with the gate's learning rate: a frozen gate stays.
        """
        bias = self._balanced()
        if not self.spec.recipe.balance or bias is None or self.steps > 0.8 * self.total_steps:
            return
        frequency, even = self.counts.frequency, self.layer.k / self.layer.n_units
        unit = self._score_scale * self.spec.recipe.gate_rate
        sound = 1.0 - self._broken
        bias.sub_((frequency > max(0.05, 2 * even)) * sound, alpha=1e-2 * unit)
        bias.add_((frequency < 0.1 * even) * sound, alpha=3e-3 * unit)


def _under(tensors: Mapping[str, Tensor], *, last: bool = False) -> dict[str, dict[str, Tensor]]:
    """Tensors whose names have a dot, by what stands before the first (or the last)."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        head, dot, tail = name.rpartition(".") if last else name.partition(".")
        if dot:
            found.setdefault(head, {})[tail] = tensor
    return found
