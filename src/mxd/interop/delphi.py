"""delphi's cache of latents: ``RAW/HOOKPOINT/{start}_{end}.safetensors`` and ``config.json`` (EleutherAI/delphi 0.1.3).

Its ``LatentDataset(RAW, …)`` opens them and explains and scores what is in there, without the model or the layer at hand. As its own cache:

- a file holds the latents from start to end, the last one included; the files follow upon each other and cover all latents
- ``locations`` (n, 3): sequence, position, latent − start, in uint16 if they fit, else uint32. Ordered by token: its windows are cut from
  neighbouring rows
- ``activations`` (n): float16 (float32 where one does not fit)
- ``tokens`` (sequences, positions): int64, in every file, for a selection of latents may open any one alone

What it calls a latent is a unit of ours. Its windows of 32 tokens are cut from the sequences, whose length should be a multiple of that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

FILES = 5
"""Files that it writes itself unless told otherwise."""
FIRINGS_PER_FILE = 16_000_000
"""It reads a file at once; rather than more in one, there may be more files."""
LEAST = 1e-5
"""Activations up to this are none to it."""


class Firings(NamedTuple):
    """Where latents fired."""

    sequence: NDArray[np.int64]
    """Row of `tokens`, one for each firing."""
    position: NDArray[np.int64]
    """Column of `tokens`."""
    latent: NDArray[np.int64]
    """Which latent."""
    activation: NDArray[np.float32]
    """How strongly."""


def file_name(start: int, end: int) -> str:
    """Of the file with the latents from start to end, inclusive."""
    return f"{start}_{end}.safetensors"


def encode(firings: Firings, start: int, tokens: NDArray[np.integer[Any]]) -> bytes:
    """One file.

    Args:
        firings: of the latents of this file, in any order.
        start: its first latent.
        tokens: ids of all sequences [sequences, positions].
    """
    kept = firings.activation > LEAST
    sequence, position, latent = (numbers[kept].astype(np.int64) for numbers in firings[:3])
    activation = firings.activation[kept]
    latent -= start
    order = np.lexsort((latent, position, sequence))
    largest = max((int(numbers.max(initial=0)) for numbers in (sequence, position, latent)), default=0)
    locations = np.stack((sequence, position, latent), axis=1)[order].astype(np.uint16 if largest < 2**16 else np.uint32)
    fits = float(activation.max(initial=0)) <= float(np.finfo(np.float16).max)
    return save(
        {
            "locations": np.ascontiguousarray(locations),
            "activations": activation[order].astype(np.float16 if fits else np.float32),
            "tokens": np.ascontiguousarray(tokens, dtype=np.int64),
        }
    )


def config(
    *, model: str, dataset: str, split: str, tokens_per_sequence: int, tokens: int, n_files: int, about: Mapping[str, Any]
) -> dict[str, Any]:
    """``config.json`` beside the files.

    Args:
        model: name or folder by which transformers opens the tokenizer.
        dataset: what was read; for the reader, nothing is loaded from it.
        split: of the text.
        tokens_per_sequence: BOS included.
        tokens: of all sequences.
        n_files: how many.
        about: what else is to stand there, under "mxd".
    """
    return {
        "dataset_repo": dataset,
        "dataset_split": split,
        "dataset_name": "",
        "dataset_column": "text",
        "batch_size": 1,
        "cache_ctx_len": tokens_per_sequence,
        "ctx_len": tokens_per_sequence,  # the name that its loader asks for
        "n_tokens": tokens,
        "n_splits": n_files,
        "model_name": model,
        "mxd": dict(about),
    }
