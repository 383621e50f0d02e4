"""Training at GPT-2's size with everything in it: the host's pass, the shuffle buffer and the student, from token ids to weights.

The host has GPT-2's exact shape and random weights, the tokens are random: of no use but for speed. Loading and text are not in it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from typing import Any

import torch

from ..ahead import ahead
from ..errors import MxdError
from ..harvest import Batch, read_blocks
from ..host import Host
from ..layers import Sizes
from ..ops.settings import using
from ..recipes import PAPER
from ..shuffle import shuffled
from ..text import TokenBlock
from ..train import SAMPLE_TOKENS, Student, StudentSpec
from .rows import Row, row
from .timing import wait

LAYER = 8
"""The layer that the paper replaces, counted from 0: the host's blocks up to it run."""
CONTEXT = 128
"""Tokens in a sequence."""
VOCABULARY = 50_257
"""GPT-2's."""


def shape(device: torch.device, quick: bool) -> dict[str, int]:
    """The paper's GPT-2 run, shortened; the speed does not depend on how long it goes on."""
    if quick:
        return {"d": 32, "h": 48, "n": 256, "k": 4, "layers": 9, "tokens_per_step": 256, "tokens": 2048, "buffer_tokens": 512}
    made = {"d": 768, "h": 3072, "n": 21_490, "k": 32, "layers": 12, "tokens_per_step": 4096}
    if device.type == "cuda":
        return {**made, "tokens": 1 << 22, "buffer_tokens": 1 << 19}
    return {**made, "tokens": 1 << 14, "buffer_tokens": 1 << 13}


def rows(*, device: torch.device, threads: int, quick: bool) -> Iterator[Row]:
    """One row; one run, since it is long."""
    size = shape(device, quick)
    host = random_host(device, size)
    seconds, student, first_loss = _train(host, size)
    if not student.last_loss < first_loss:
        raise MxdError(
            "the student did not learn, so nothing is timed", expected=f"a loss below {first_loss:.3g}", got=f"{student.last_loss:.3g}"
        )
    yield row(
        "whole training at GPT-2's size, one MxD",
        None,
        device=device.type,
        shape={**size, "threads": threads} if device.type == "cpu" else size,
        dtype="host and products bfloat16" if device.type == "cuda" else "float32",
        ours_ms=1e3 * seconds / student.steps,
        rival_ms=None,
        check=f"the loss fell from {first_loss:.4g} to {student.last_loss:.4g}",
        runs=1,
        ours_tokens_per_second=round(student.tokens / seconds),
    )


def random_host(device: torch.device, size: Mapping[str, int]) -> Host:
    """GPT-2 with random weights; in bfloat16 on CUDA."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=size["d"],
        n_inner=size["h"],
        n_layer=size["layers"],
        n_head=max(1, size["d"] // 64),
        n_positions=CONTEXT,
        vocab_size=VOCABULARY,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = GPT2LMHeadModel(config)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return Host.from_model(model.to(device, dtype), None, name="random-gpt2")


def _blocks(size: Mapping[str, int]) -> Iterator[TokenBlock]:
    """Random token ids, a step's worth at a time."""
    generator = torch.Generator().manual_seed(0)
    sequences = max(1, size["tokens_per_step"] // CONTEXT)
    for _ in range(-(-size["tokens"] // (sequences * CONTEXT))):
        ids = torch.randint(VOCABULARY, (sequences, CONTEXT), generator=generator)
        yield TokenBlock(ids, torch.zeros(sequences, dtype=torch.int64))


def _train(host: Host, size: Mapping[str, int]) -> tuple[float, Student, float]:
    """Seconds from the first token to the last step, the student, and its loss at the first step."""
    site = host.site(LAYER)
    sizes = Sizes(site.d_in, site.d_out, size["n"], size["k"], size["h"], site.activation, site.glu)
    steps = size["tokens"] // size["tokens_per_step"]
    recipe = dataclasses.replace(PAPER, learning_rate=1e-3, warmup_steps=1)
    student = Student(StudentSpec("mxd", site.hookpoint, "mxd", sizes, recipe), total_steps=steps, device=host.device)
    first_loss = None
    wait(host.device)
    began = time.perf_counter()
    with closing(_batches(host, size, site.hookpoint)) as batches, using(precision="auto"):
        for batch in batches:
            if first_loss is None:
                student.start(batch.at(slice(0, SAMPLE_TOKENS)), None)
            student.step(batch)
            first_loss = student.last_loss if first_loss is None else first_loss
    wait(host.device)
    assert first_loss is not None
    return time.perf_counter() - began, student, first_loss


def _batches(host: Host, size: Mapping[str, int], hookpoint: str) -> Generator[Batch]:
    read = read_blocks(host, _blocks(size), [hookpoint])
    with closing(ahead(read, 4) if host.device.type == "cuda" else (batches for batches in read)) as source:
        generator = torch.Generator().manual_seed(0)
        steps = {"tokens_per_step": size["tokens_per_step"], "buffer_tokens": size["buffer_tokens"], "passes": 1}
        for batches in shuffled(source, generator=generator, **steps):
            yield batches[hookpoint]
