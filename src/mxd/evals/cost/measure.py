"""What a student costs: parameters and FLOPs counted on the object, latency and memory measured, beside the host's own MLP.

And the table of arXiv 2505.21364 (batch 512, I = H* = O = 1024): an MxD of N = 8192 experts against a sparse MLP of 9216 latents,
18,874,368 parameters each without biases. The paper counts a fused multiply-add as one FLOP and leaves biases out (here: MACs);
PyTorch's own counter takes two FLOPs for it (here: FLOPs).
"""

from __future__ import annotations

import statistics
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ...layers import Sizes, SparseLayer, build
from ...ops import using
from ...text import Split
from ...timing import rounds
from ..parts import Found, Part, Subject
from .show import show

NAME = "cost"
BATCH = 512
"""Tokens in one forward pass, as published."""
RUNS = 9
"""Forward passes behind a median."""
WARM_UP = 2
PAPER_WIDTH, PAPER_EXPERTS, PAPER_LATENTS, PAPER_K = 1024, 8192, 9216, 32
"""Of the paper's table; its K is not stated, 32 is what the paper trains with."""
MIB = 2**20


class Work(NamedTuple):
    """What a forward pass multiplies, per token; multiply-adds of products with weights, neither biases nor elementwise products."""

    macs: float
    """As it runs: of the units' rows only the active ones."""
    macs_all_units: float
    """As if every unit's row were multiplied by its activation, 0 or not: what the paper's formulas count."""


def work(module: nn.Module, x: Float[Tensor, "token d_in"]) -> Work:
    """Multiply-adds per token of one forward pass on `x`, by PyTorch's counter.

    It knows the usual products; two operators of ours are added to it: oneDNN's linear map (m·n·k multiply-adds) and the gather-and-sum
    of table rows (d for each active unit). Triton's kernels it cannot see, so PyTorch's operators run in their place.
    """
    skipped = 0

    def linear(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
        return 2 * _product(x) * weight[0]

    def bag(table: Sequence[int], indices: Sequence[int], offsets: Sequence[int], *_: Any, **__: Any) -> int:
        nonlocal skipped
        skipped += table[1] * (offsets[0] * table[0] - _product(indices))
        return 2 * _product(indices) * table[1]

    aten = torch.ops.aten
    extra: dict[Any, Any] = {aten._embedding_bag: bag, aten._embedding_bag_forward_only: bag}
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        extra[torch.ops.mkldnn._linear_pointwise] = linear
    counter = FlopCounterMode(display=False, custom_mapping=extra)
    with torch.no_grad(), using(backend="eager"), counter:
        module(x)
    macs = counter.get_total_flops() / 2
    return Work(macs / len(x), (macs + skipped) / len(x))


def _product(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())


class _Alive(TorchDispatchMode):
    """Bytes of the tensors that operators make, as long as they live: the highest sum."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.now = self.highest = 0
        self._seen = {_memory(tensor.untyped_storage()) for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (key := _memory(storage := tensor.untyped_storage())) not in self._seen:
                self._seen.add(key)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, key, storage.nbytes())
        self.highest = max(self.highest, self.now)
        return out

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def _memory(storage: torch.UntypedStorage) -> int:
    """What tells a piece of memory from others, as long as it lives: views of one tensor share it."""
    return storage._cdata  # pyright: ignore[reportPrivateUsage]


def working_bytes(module: nn.Module, x: Float[Tensor, "token d_in"]) -> int:
    """Bytes of what a forward pass without gradients holds at its highest besides parameters and `x`, its result included.

    On CUDA what PyTorch's allocator gave out; elsewhere the tensors alive, operator by operator (scratch memory inside one operator
    is not seen).
    """
    with torch.no_grad():
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
            torch.cuda.reset_peak_memory_stats(x.device)
            before = torch.cuda.memory_allocated(x.device)
            module(x)
            torch.cuda.synchronize(x.device)
            return torch.cuda.max_memory_allocated(x.device) - before
        with _Alive([x, *module.parameters(), *module.buffers()]) as alive:
            module(x)
    return alive.highest


def counted(module: nn.Module, x: Float[Tensor, "token d_in"]) -> dict[str, Any]:
    """Parameters, work and memory of `module` on `x`.

    Returns:
        ``params``; ``weights`` (parameters without biases: those of two dimensions or more); ``macs_per_token``, ``flops_per_token``
        (twice that), ``macs_per_token_all_units`` (see `Work`); ``working_mib`` (see `working_bytes`), ``peak_mib`` (with parameters and
        input).
    """
    parameters = list(module.parameters())
    done = work(module, x)
    working = working_bytes(module, x)
    held = sum(t.numel() * t.element_size() for t in [*parameters, *module.buffers(), x])
    return {
        "params": sum(p.numel() for p in parameters),
        "weights": sum(p.numel() for p in parameters if p.dim() > 1),
        "macs_per_token": done.macs,
        "flops_per_token": 2 * done.macs,
        "macs_per_token_all_units": done.macs_all_units,
        "working_mib": working / MIB,
        "peak_mib": (working + held) / MIB,
    }


def compared(rivals: Mapping[str, tuple[nn.Module, Tensor]]) -> dict[str, dict[str, Any]]:
    """`counted` of each rival on its own input, and its latency, the rivals taking turns.

    Returns:
        by name `counted` with ``milliseconds`` (median of `RUNS` forward passes without gradients), ``milliseconds_quartiles`` and
        ``microseconds_per_token``.
    """

    def run(module: nn.Module, x: Tensor) -> Callable[[], object]:
        def forward() -> object:
            with torch.no_grad():
                return module(x)

        return forward

    device = next(x for _, x in rivals.values()).device
    times = rounds({name: run(*rival) for name, rival in rivals.items()}, runs=RUNS, device=device, warm_up=WARM_UP)
    found: dict[str, dict[str, Any]] = {}
    for name, (module, x) in rivals.items():
        low, middle, high = statistics.quantiles(times[name], n=4, method="inclusive")
        taken = {"milliseconds": middle, "milliseconds_quartiles": [low, high], "microseconds_per_token": 1e3 * middle / len(x)}
        found[name] = {**counted(module, x), **taken}
    return found


def paper_rivals(device: torch.device | str) -> dict[str, SparseLayer]:
    """The two layers of the paper's table, with random weights throughout: nothing is skipped for being 0."""
    sizes = Sizes(PAPER_WIDTH, PAPER_WIDTH, PAPER_EXPERTS, PAPER_K, PAPER_WIDTH)
    made = {
        "mxd": build("mxd", sizes, device=device),
        "transcoder": build("transcoder", sizes._replace(n_units=PAPER_LATENTS), device=device),
    }
    generator = torch.Generator(device).manual_seed(0) if torch.device(device).type != "meta" else None
    for layer in made.values():
        layer.eval().requires_grad_(False)
        for parameter in layer.parameters():
            parameter.uniform_(-(PAPER_WIDTH**-0.5), PAPER_WIDTH**-0.5, generator=generator)
    return made


def _paper(device: torch.device) -> dict[str, Any]:
    """The paper's table on this machine, from normal random inputs."""
    x = torch.randn(BATCH, PAPER_WIDTH, generator=torch.Generator(device).manual_seed(1), device=device)
    return compared({name: (layer, x) for name, layer in paper_rivals(device).items()})


def measure(subject: Subject) -> Found:
    """The cost of one student, of the host's MLP, and of the paper's two layers on this machine.

    Returns:
        ``student`` and ``host_mlp``, each as `compared` gives it, on the same `BATCH` held-out tokens; ``reads_output`` (the student
        needs the host's MLP as well); ``paper``, by kind; ``batch_tokens``, ``device``, ``threads``, ``dtype`` and ``host_dtype``.

    Raises:
        TextError: there is no held-out text.
    """
    host, layer = subject.host, subject.layer
    subject.say(0.0, "reading activations")
    x, y = subject.shared.get(subject.hookpoint, lambda: _activations(subject))
    subject.say(0.1, "counting and timing")
    own = next((p for p in layer.parameters()), x)
    given = (y if layer.reads == "output" else x).to(own)
    found = compared({"student": (layer, given), "host_mlp": (host.mlp(subject.hookpoint), x.to(host.device, host.dtype))})
    subject.say(0.6, "the paper's sizes")
    return {
        **found,
        "reads_output": layer.reads == "output",
        "paper": subject.shared.get("paper", lambda: _paper(own.device)),
        "batch_tokens": len(x),
        "device": _device_name(own.device),
        "threads": torch.get_num_threads(),
        "dtype": str(own.dtype).removeprefix("torch."),
        "host_dtype": str(host.dtype).removeprefix("torch."),
    }


def _activations(subject: Subject) -> tuple[Tensor, Tensor]:
    """x and y [token, d] of the first `BATCH` held-out tokens of the corpus, or as many as there are."""
    length = int(subject.run.info["config"]["tokens_per_sequence"])
    block = next(
        subject.corpus.blocks(
            subject.host.tokenizer,
            cast(Split, subject.config.split),
            tokens_per_sequence=length,
            sequences_per_block=-(-BATCH // length),
        )
    )
    read = subject.host.read(block.ids, [subject.hookpoint])[subject.hookpoint]
    return read.x.flatten(0, 1)[:BATCH].clone(), read.y.flatten(0, 1)[:BATCH].clone()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


PART = Part(NAME, 2, (), measure, show, on_machine=True)
"""Cost."""
