"""Where a language model keeps its MLPs: found by structure, proved by a dry forward.

A site is a direct child of a decoder block that is called with one tensor, returns one tensor, and whose output is reproduced by
one of two formulas on its own linear maps:

    plain   y = phi(x E + b_E) D + b_D
    gated   y = (phi(x E_gate + b_gate) * (x E + b_E)) D + b_D

Which linear is which, and in which half of a fused one the gate sits, is decided by trying, not by names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import permutations
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import HostError

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu2": lambda x: F.relu(x).square(),
}
"""The activations we know, by our names."""


class MLPSite(NamedTuple):
    """One MLP of a host."""

    hookpoint: str
    """Path of the MLP in the base model, such as ``layers.8.mlp`` or ``h.8.mlp``."""
    layer: int
    """Number of its block, from 0."""
    d_in: int
    """Width of its input."""
    d_out: int
    """Width of its output."""
    d_hidden: int
    """Its own width (of one half, if gated)."""
    activation: str
    """Name of phi, a key of `ACTIVATIONS`."""
    glu: bool
    """Whether it is gated."""
    module: str
    """Path of the MLP in the whole model, such as ``model.layers.8.mlp``."""


class MLPWeights(NamedTuple):
    """An MLP's weights, float32, oriented so that y = (phi(x E_gate + b_gate) * (x E + b_E)) D + b_D, or phi(x E + b_E) D + b_D.

    Biases that the MLP does not have are None, and so are E_gate and b_gate of an MLP without gate.
    """

    E: Float[Tensor, "d_in d_hidden"]
    b_E: Float[Tensor, " d_hidden"] | None
    E_gate: Float[Tensor, "d_in d_hidden"] | None
    b_gate: Float[Tensor, " d_hidden"] | None
    D: Float[Tensor, "d_hidden d_out"]
    b_D: Float[Tensor, " d_out"] | None


class Activations(NamedTuple):
    """What an MLP received and returned, float32."""

    x: Float[Tensor, "*batch d_in"]
    """The argument of the MLP module."""
    y: Float[Tensor, "*batch d_out"]
    """Its return value."""


class Layout(NamedTuple):
    """Which child of an MLP plays which part."""

    up: str
    gate: str | None
    """None: no gate. The same as `up`: one linear holds both, halved along its outputs."""
    down: str
    gate_first: bool = True
    """In a fused linear, whether the gate is the first half."""


class Found(NamedTuple):
    """What `find_sites` returns."""

    d_model: int
    sites: list[tuple[MLPSite, Layout]]


def find_sites(model: Any, name: str) -> Found:
    """The MLPs of a transformers causal LM.

    Raises:
        HostError: there are none; says what the first block holds instead.
    """
    config = model.config.get_text_config()
    base, d_model = model.base_model, int(config.hidden_size)
    prefix = next((path for path, module in model.named_modules() if module is base), "")
    path, blocks = _blocks(base, int(config.num_hidden_layers))
    seen = _dry_forward(model, blocks, int(config.vocab_size))
    sites: list[tuple[MLPSite, Layout]] = []
    reasons: dict[str, str] = {}
    for layer, block in enumerate(blocks):
        found = []
        for child, module in block.named_children():
            made = _analyse(module, seen.get(module), d_model)
            if isinstance(made, str):
                reasons.setdefault(child, f"{_describe(child, module)}{made and ': ' + made}")
                continue
            layout, activation = made
            d_in, d_hidden, d_out = d_model, _widths(module.get_submodule(layout.down))[0], d_model
            hookpoint = f"{path}.{layer}.{child}"
            whole = f"{prefix}.{hookpoint}" if prefix else hookpoint
            found.append((MLPSite(hookpoint, layer, d_in, d_out, d_hidden, activation, layout.gate is not None, whole), layout))
        if len(found) == 1:
            sites += found
    if not sites:
        what = f"its blocks ({type(blocks[0]).__name__}) hold {'; '.join(reasons.values())}" if blocks else "no decoder blocks"
        raise HostError(f"host {name} ({type(model).__name__}) has no separable MLP", expected="one MLP module in each block", got=what)
    return Found(d_model, sites)


def read_weights(module: nn.Module, layout: Layout) -> MLPWeights:
    """Float32 copies of the weights of an MLP, on its device."""
    E, b_E = _matrix(module.get_submodule(layout.up))
    D, b_D = _matrix(module.get_submodule(layout.down))
    if layout.gate is None:
        return MLPWeights(E, b_E, None, None, D, b_D)
    if layout.gate != layout.up:
        return MLPWeights(E, b_E, *_matrix(module.get_submodule(layout.gate)), D, b_D)
    matrices = [half.contiguous() for half in E.chunk(2, dim=1)]
    biases = [None, None] if b_E is None else [half.contiguous() for half in b_E.chunk(2)]
    gate, up = (0, 1) if layout.gate_first else (1, 0)
    return MLPWeights(matrices[up], biases[up], matrices[gate], biases[gate], D, b_D)


class StandIn(nn.Module):
    """Sits in a block in the MLP's place: casts, calls the replacement, takes its ``y``, checks its shape."""

    def __init__(self, module: nn.Module, original: nn.Module, site: MLPSite) -> None:
        super().__init__()
        self.module, self.original, self.site = module, original, site
        self.reads_output = getattr(module, "reads", "input") == "output"
        self.like = next((t for t in [*module.parameters(), *module.buffers()] if t.is_floating_point()), None)

    def forward(self, x: Tensor) -> Tensor:
        source = self.original(x) if self.reads_output else x
        out = self.module(source if self.like is None else source.to(self.like))
        y: Any = getattr(out, "y", out) if isinstance(out, tuple) else out
        expected = [*x.shape[:-1], self.site.d_out]
        if not isinstance(y, Tensor) or list(y.shape) != expected:
            got = str(list(y.shape)) if isinstance(y, Tensor) else type(y).__name__
            raise HostError(f"what replaces {self.site.hookpoint} returned the wrong shape", expected=str(expected), got=got)
        return y.to(x)


def _blocks(base: nn.Module, n_layers: int) -> tuple[str, list[nn.Module]]:
    """Path in the base model, and contents, of the first list as long as the model has layers."""
    for path, module in base.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            return path, list(module)
    return "", []


def _dry_forward(model: Any, blocks: list[nn.Module], vocab_size: int) -> dict[nn.Module, tuple[Tensor, Tensor]]:
    """Input and output of the blocks' children that are called once, with one tensor, and return one, on a few arbitrary tokens."""
    calls: dict[nn.Module, list[tuple[Tensor, Tensor] | None]] = {}

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        fits = len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and isinstance(output, Tensor)
        calls.setdefault(module, []).append((args[0], output) if fits else None)

    handles = [child.register_forward_hook(hook, with_kwargs=True) for block in blocks for child in block.children()]
    try:
        with torch.no_grad():
            model.base_model((torch.arange(8, device=model.device) % vocab_size)[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {module: made[0] for module, made in calls.items() if len(made) == 1 and made[0] is not None}


def _analyse(module: nn.Module, call: tuple[Tensor, Tensor] | None, d_model: int) -> tuple[Layout, str] | str:
    """Layout and activation of an MLP; or why it is none, empty when it does not even look like one."""
    layouts = list(_layouts(module, d_model))
    if not layouts:
        return ""
    if call is None or call[0].shape[-1] != d_model or call[0].shape != call[1].shape:
        return "does not map one tensor to another of its shape"
    x, y = call
    activations = _activations_of(module)
    if not activations:
        return f"its activation is none of {', '.join(ACTIVATIONS)}"
    tries = [(_error(module, layout, ACTIVATIONS[name], x, y), layout, name) for layout in layouts for name in activations]
    error, layout, activation = min(tries, key=lambda made: made[0])
    # 16-bit hosts round at every step; a wrong layout is off by about 1
    if not error < (1e-3 if y.dtype == torch.float32 else 5e-2):
        return "its output is not that of a plain or gated MLP"
    return layout, activation


def _layouts(module: nn.Module, d_model: int) -> Iterator[Layout]:
    """Every way in which the linear children of `module` can form an MLP, by their widths."""
    maps = {name: _widths(child) for name, child in module.named_children() if _is_linear(child)}
    if len(maps) == 2:
        for up, down in permutations(maps):
            if maps[up][0] == maps[down][1] == d_model:
                if maps[up][1] == maps[down][0]:
                    yield Layout(up, None, down)
                if maps[up][1] == 2 * maps[down][0]:
                    yield Layout(up, up, down, True)
                    yield Layout(up, up, down, False)
    if len(maps) == 3:
        for up, gate, down in permutations(maps):
            if maps[up] == maps[gate] == maps[down][::-1] and maps[up][0] == d_model:
                yield Layout(up, gate, down)


def _activations_of(module: nn.Module) -> list[str]:
    """Our names for the activation among `module`'s children; all names if it has no such child."""
    children = [
        child
        for child in module.children()
        if not _is_linear(child) and not isinstance(child, nn.Dropout | nn.Identity) and not list(child.children())
    ]
    if not children:
        return list(ACTIVATIONS)
    probe = torch.linspace(-6, 6, 241)
    known: list[str] = []
    for child in children:
        if next(child.parameters(), None) is None:
            with torch.no_grad():
                out = child(probe)
            # gelu and its tanh form differ by up to 5e-4, two ways to compute one of them by 1e-6
            known += [name for name, phi in ACTIVATIONS.items() if torch.allclose(out, phi(probe), rtol=0, atol=1e-5)]
    return known


def _error(module: nn.Module, layout: Layout, phi: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> float:
    """Relative error of the formula against what the module returned."""
    with torch.no_grad():
        hidden: Tensor = module.get_submodule(layout.up)(x)
        if layout.gate is None:
            hidden = phi(hidden)
        elif layout.gate != layout.up:
            hidden = phi(module.get_submodule(layout.gate)(x)) * hidden
        else:
            first, second = hidden.chunk(2, dim=-1)
            hidden = phi(first) * second if layout.gate_first else phi(second) * first
        made: Tensor = module.get_submodule(layout.down)(hidden)
        return float((made.double() - y.double()).norm() / y.double().norm())


def _is_linear(module: nn.Module) -> bool:
    # GPT-2 keeps its weights in transformers' own Conv1D, the transpose of nn.Linear
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _widths(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear map."""
    rows, columns = module.get_parameter("weight").shape
    return (columns, rows) if isinstance(module, nn.Linear) else (rows, columns)


def _matrix(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight [inputs, outputs] and bias of a linear map, as float32 copies."""
    weight, bias = module.get_parameter("weight").detach(), getattr(module, "bias", None)
    weight = weight.t() if isinstance(module, nn.Linear) else weight
    return weight.float().clone(memory_format=torch.contiguous_format), None if bias is None else bias.detach().float().clone()


def _describe(name: str, module: nn.Module) -> str:
    if _is_linear(module):
        return f"{name} (linear {' -> '.join(map(str, _widths(module)))})"
    children = ", ".join(child for child, _ in module.named_children())
    return f"{name} ({type(module).__name__}{children and ' of ' + children})"
