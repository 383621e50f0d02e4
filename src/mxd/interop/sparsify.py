"""sparsify's coder folders: ``HOOKPOINT/cfg.json`` + ``HOOKPOINT/sae.safetensors`` (EleutherAI/sparsify 1.3).

Our transcoders and SAEs are the same functions as sparsify's, so they are saved under its names and open in it as they are:
``SparseCoder.load_from_disk(folder)``. It applies ReLU before TopK, the skip as x @ W_skipᵀ, and subtracts b_dec from the
input of SAEs only: so do we. It knows one width for input and output.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..layers import SparseLayer

WEIGHTS_FILE = "sae.safetensors"
KINDS = ("transcoder", "skip-transcoder", "topk-sae")
"""The kinds that sparsify has too."""

_NAMES = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "W_dec", "W_skip": "W_skip", "b_dec": "b_dec"}
_OURS = {theirs: ours for ours, theirs in _NAMES.items()}


def to_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of ours under sparsify's tensor names."""
    return {_NAMES[name]: tensor for name, tensor in state.items()}


def from_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """sparsify's tensors under our names; names it does not have are kept, for the caller to refuse."""
    return {_OURS.get(name, name): tensor for name, tensor in tensors.items()}


def config(layer: SparseLayer) -> dict[str, Any]:
    """The keys of sparsify's ``cfg.json`` for a layer of one of `KINDS`."""
    return {
        "activation": "topk",
        "expansion_factor": max(1, round(layer.n_units / layer.d_in)),
        "normalize_decoder": False,
        "num_latents": layer.n_units,
        "k": layer.k,
        "multi_topk": False,
        "skip_connection": layer.kind == "skip-transcoder",
        "transcode": layer.reads == "input",
        "d_in": layer.d_in,
    }
