"""Continuing token sequences with a causal language model: many in one batch, a KV cache, fixed shapes, a compiled step.

Knows no host, no tokenizer and no layer: token ids in, token ids out. Three ways to take a step, one token a row each:

    dynamic   the cache grows by a token a step; what needs no padding gets none
    static    a cache of a fixed size and prompts padded to a multiple of `BUCKET`, so that every step has the same shapes
    compiled  static, and the step goes through torch.compile (fullgraph: a graph break is an error, never a silent slow path)
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from .errors import ConfigError, HostError

BUCKET = 32
"""Static prompts and caches are padded to a multiple of this many tokens: few shapes, hence few compilations."""
BACKEND = "inductor"
"""What torch.compile makes of the step."""
NUCLEUS = 512
"""Most probable tokens that are looked through first for the nucleus of top-p sampling."""
COMPILATIONS = 64
"""Different models, sets of stand-ins and shapes whose compiled steps are kept; PyTorch's own limit is 8."""


class Generated(NamedTuple):
    """One continuation."""

    prompt_ids: list[int]
    """The prompt as the host read it, BOS first where the tokenizer has one."""
    new_ids: list[int]
    """The tokens added; shorter than asked for when the last is an end-of-text token."""
    text: str
    """The added tokens as text, without the prompt and without special tokens."""


class Layout(NamedTuple):
    """Prompts side by side: padded on the left, so that the newest token of every row stands in the same column."""

    ids: Int64[Tensor, "row prompt"]
    """Prompts; 0 where padded."""
    mask: Bool[Tensor, "row total"] | None
    """False where padded, True at prompts and at all tokens to come; None where nothing is padded."""
    positions: Int64[Tensor, "row total"]
    """Position of each token in its own row, counted from 0; 0 where padded."""


class Decoder:
    """Continues batches of token sequences with one model.

    A row's result is that of the row alone, up to the rounding of products of another size: the padding is masked, and the
    noise of a step is the same in every row.
    """

    def __init__(self, model: Any, static_cache: Callable[[int], Any]) -> None:
        """`model` is a transformers causal LM in evaluation mode; `static_cache` makes a KV cache of a fixed number of tokens."""
        self.model, self._static_cache = model, static_cache
        known = inspect.signature(model.forward).parameters
        self._takes_positions, self._keeps_logits = "position_ids" in known, "logits_to_keep" in known
        self._kept: tuple[tuple[int, int], Any] | None = None

    def extend(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        new_tokens: int,
        ends: set[int],
        temperature: float = 0.0,
        seed: int | Sequence[int] = 0,
        top_p: float = 1.0,
        frequency_penalty: float = 0.0,
        static: bool = False,
        compiled: bool = False,
    ) -> list[list[int]]:
        """The tokens added to each prompt, up to and with the first of `ends`, at most `new_tokens`. `compiled` implies `static`.

        How tokens are chosen: see `Picker`.

        Raises:
            ConfigError: compiled, and this machine has nothing to compile with.
            HostError: compiled, and the step cannot be compiled.
        """
        device = self.model.device
        static = static or compiled
        if compiled:
            check_compiler(device)
        laid = lay_out(prompts, new_tokens, bucket=BUCKET if static else 1, device=device)
        width = laid.ids.shape[1]
        cache = self._cache(len(prompts), laid.positions.shape[1], keep=compiled) if static else None
        take_step = _compiled_step if compiled else _step
        pick = Picker(temperature, seed, top_p, frequency_penalty)
        added: list[list[int]] = [[] for _ in prompts]
        going = set(range(len(prompts)))
        with torch.no_grad(), _compilations(compiled):
            inputs = self._inputs(laid, laid.ids, 0, width, static)
            scores, cache = _read(self.model, cache, {**inputs, **({"logits_to_keep": 1} if self._keeps_logits else {})})
            for at in range(width, width + new_tokens):
                chosen = pick(scores)
                for row, token in enumerate(chosen.tolist()):
                    if row in going:
                        added[row].append(token)
                        if token in ends:
                            going.discard(row)
                if not going or at + 1 == width + new_tokens:
                    break
                scores = take_step(self.model, cache, self._inputs(laid, chosen[:, None], at, at + 1, static))
        return added

    def _inputs(self, laid: Layout, ids: Tensor, start: int, end: int, static: bool) -> dict[str, Tensor]:
        """What the model is given for columns `start` to `end`: nothing that it would not work out itself alike."""
        inputs = {"input_ids": ids}
        if laid.mask is not None:
            inputs["attention_mask"] = laid.mask if static else laid.mask[:, :end]
            if self._takes_positions:
                inputs["position_ids"] = laid.positions[:, start:end].clone()
        return inputs

    def _cache(self, rows: int, tokens: int, *, keep: bool) -> Any:
        """An empty static cache. The compiled step is bound to its cache's memory: the last one is kept for further calls."""
        if self._kept is not None and self._kept[0] == (rows, tokens) and keep:
            self._kept[1].reset()
            return self._kept[1]
        cache = self._static_cache(tokens)
        if keep:
            self._kept = ((rows, tokens), cache)
        return cache


def check_numbers(
    prompts: int, new_tokens: int, temperature: float, seed: int | Sequence[int], top_p: float = 1.0, frequency_penalty: float = 0.0
) -> None:
    """Refuse numbers that `Decoder.extend` cannot work with.

    Raises:
        ConfigError: new_tokens < 1, temperature < 0, top_p outside (0, 1], a penalty that is not finite, a wrong number of seeds.
    """
    if new_tokens < 1 or not temperature >= 0:
        got = f"{new_tokens} and {temperature:g}"
        raise ConfigError("impossible generation", expected="new_tokens >= 1 and temperature >= 0", got=got)
    if not (0 < top_p <= 1 and math.isfinite(frequency_penalty)):
        got = f"{top_p:g} and {frequency_penalty:g}"
        raise ConfigError("impossible sampling", expected="0 < top_p <= 1 and a finite frequency_penalty", got=got)
    if not isinstance(seed, int) and len(seed) != prompts:
        raise ConfigError("wrong number of seeds", expected=f"one, or one for each of {prompts} prompts", got=str(len(seed)))


def lay_out(prompts: Sequence[Sequence[int]], new_tokens: int, *, bucket: int, device: torch.device) -> Layout:
    """Prompts padded on the left to a multiple of `bucket`, with room for `new_tokens`, again to a multiple of it.

    With a bucket of 1 prompts of one length are not padded; with a larger one there is always a mask, so that shapes repeat.
    """
    longest = max(len(prompt) for prompt in prompts)
    width = -(-longest // bucket) * bucket
    total = -(-(width + new_tokens) // bucket) * bucket
    pads = torch.tensor([width - len(prompt) for prompt in prompts], device=device)[:, None]
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    columns = torch.arange(total, device=device)[None]
    padded = bucket > 1 or any(len(prompt) < width for prompt in prompts)
    return Layout(ids, columns >= pads if padded else None, (columns - pads).clamp(min=0))


class Picker:
    """The next token of each row: the likeliest, or a sample of softmax(scores / temperature), with Gumbel noise that depends on the
    row's seed and the step only.

    With `frequency_penalty` α, α times the number of times that a token was added to the row so far (not in its prompt) is subtracted from
    its score, at any temperature. With `top_p`, only the nucleus is sampled from (see `nucleus`); it has no effect at temperature 0.
    """

    def __init__(self, temperature: float, seed: int | Sequence[int], top_p: float = 1.0, frequency_penalty: float = 0.0) -> None:
        """`seed` is one for all rows, or one for each."""
        seeds = [seed] if isinstance(seed, int) else list(seed)
        self.temperature, self.top_p, self.penalty = temperature, top_p, frequency_penalty
        self._noise = {one: torch.Generator().manual_seed(one) for one in dict.fromkeys(seeds)}
        self._rows = None if isinstance(seed, int) else torch.tensor([list(self._noise).index(one) for one in seeds])
        self._counts: Tensor | None = None

    def __call__(self, scores: Float[Tensor, "row vocab"]) -> Int64[Tensor, " row"]:
        if self.penalty:
            self._counts = torch.zeros_like(scores) if self._counts is None else self._counts
            scores = scores - self.penalty * self._counts
        chosen = self._sample(scores) if self.temperature > 0 else scores.argmax(-1)
        if self._counts is not None:
            self._counts.scatter_add_(1, chosen[:, None], torch.ones_like(self._counts[:, :1]))
        return chosen

    def _sample(self, scores: Float[Tensor, "row vocab"]) -> Int64[Tensor, " row"]:
        # minus the logarithm of an exponential variable is Gumbel noise
        drawn = [torch.empty(scores.shape[-1], dtype=torch.float64).exponential_(generator=noise) for noise in self._noise.values()]
        gumbel = -torch.stack(drawn).log()
        wanted = scores.cpu().double() / self.temperature
        if self.top_p < 1:
            wanted = wanted.masked_fill(~nucleus(wanted, self.top_p), -torch.inf)
        return (wanted + (gumbel if self._rows is None else gumbel[self._rows])).argmax(-1).to(scores.device)


def nucleus(scores: Float[Tensor, "row vocab"], top_p: float) -> Bool[Tensor, "row vocab"]:
    """The fewest most probable tokens of softmax(scores) that have probability `top_p` together (Holtzman et al. 2020, arXiv 1904.09751).

    At least one token a row; of equally probable ones at the edge, any.
    """
    probabilities = scores.softmax(-1)
    kept = torch.zeros_like(scores, dtype=torch.bool)
    rows = torch.arange(len(scores), device=scores.device)
    # A whole row is sorted only where a few hundred tokens do not hold enough: sorting a vocabulary costs more than a step of a small host.
    for size in (min(NUCLEUS, scores.shape[-1]), scores.shape[-1]):
        top, tokens = probabilities[rows].topk(size)
        before = top.cumsum(-1) - top
        kept[rows[:, None], tokens] = before < top_p
        kept[rows, tokens[:, 0]] = True
        rows = rows[top.sum(-1) < top_p]
        if not len(rows):
            break
    return kept


def _read(model: Any, cache: Any, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
    """Scores of the token after the last column, float32 [row, vocab], and the cache."""
    out = model(**inputs, past_key_values=cache, use_cache=True)
    return out.logits[:, -1].float(), out.past_key_values


def _step(model: Any, cache: Any, inputs: dict[str, Tensor]) -> Tensor:
    return _read(model, cache, inputs)[0]


def _compiled_step(model: Any, cache: Any, inputs: dict[str, Tensor]) -> Tensor:
    """`_step` through torch.compile: compiled once for each model, set of stand-ins and shape, and kept for the process."""
    from torch._dynamo import exc

    step = _compile(BACKEND)
    try:
        try:
            return step(model, cache, inputs)
        except exc.FailOnRecompileLimitHit:
            torch.compiler.reset()  # too many different models and shapes in one process: forget them all, go on with this one
            return step(model, cache, inputs)
    except exc.TorchDynamoException as error:
        cause = getattr(error, "inner_exception", error)
        said = next((line.strip() for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        raise HostError("one step of this host cannot be compiled", got=said, next="leave out --compile (compiled=True)") from error


@contextmanager
def _compilations(compiled: bool) -> Iterator[None]:
    """Let `COMPILATIONS` steps be kept."""
    if not compiled:
        yield
        return
    import torch._dynamo.config as config

    with config.patch(recompile_limit=COMPILATIONS):
        yield


@functools.cache
def _compile(backend: str) -> Callable[[Any, Any, dict[str, Tensor]], Tensor]:
    return torch.compile(_step, fullgraph=True, backend=backend)


def check_compiler(device: torch.device) -> None:
    """Find out before a minute has gone by.

    Raises:
        ConfigError: torch.compile has no C++ compiler (CPU) or no Triton (CUDA) to make kernels with.
    """
    if BACKEND != "inductor":
        return
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise ConfigError("--compile needs Triton on CUDA devices", next="pip install triton, or leave out --compile")
        return
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, RuntimeError, OSError):
        what = "g++ or clang++ on the PATH, or its path in CXX"
        raise ConfigError("--compile needs a C++ compiler", expected=what, got="none", next="install one, or leave out --compile") from None
