"""SAEDashboard's output for Neuronpedia: ``batch-0.json`` … of features, and ``skipped_indexes.json`` (sae-dashboard 0.8.0).

Neuronpedia's converter reads the folder as it reads SAEDashboard's own: ``--saedashboard-output-dir``. What it makes of it:

- an activation is a list of tokens with a value each; of its *bin* it keeps the limits and the share of all tokens in it. The strongest
  are marked by the limits −1 and the maximum, and the share −1
- bars of a histogram are given by their middles, as many as there are heights
- features in ``skipped_indexes.json`` are shown as dead

Fields for which mxd has no number (neuron alignment, correlations, the histogram of logits, attention heads) are empty lists, which is
what it expects there. A *vector* would be a latent's direction to steer along; an expert of MxD has none, so it is empty for all.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

FEATURES_PER_FILE = 128
"""As many as SAEDashboard puts into one."""
_EMPTY = (
    *("neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1"),
    *("correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson"),
    *("correlated_features_indices", "correlated_features_l1", "correlated_features_pearson"),
    *("logits_hist_data_bar_heights", "logits_hist_data_bar_values", "decoder_weights_dist", "vector"),
)


@dataclass(frozen=True)
class Bin:
    """A range of activations."""

    low: float
    """Its lower limit; −1 for the bin of the strongest."""
    high: float
    """Its upper limit."""
    share: float
    """Of all tokens, those whose activation lies in it; −1 for the bin of the strongest."""


def strongest(maximum: float) -> Bin:
    """The bin of the strongest activations."""
    return Bin(-1.0, maximum, -1.0)


@dataclass(frozen=True)
class Activation:
    """A stretch of text."""

    tokens: Sequence[str]
    """Its tokens; at least one."""
    values: Sequence[float]
    """The activation at each."""
    at: int
    """The token it was chosen for."""
    bin: Bin
    """The bin it was chosen for."""


@dataclass(frozen=True)
class Feature:
    """One unit."""

    index: int
    """Its number."""
    frequency: float
    """Share of tokens on which it fires."""
    promoted: Sequence[tuple[str, float]]
    """Tokens whose logits it raises most, the most first."""
    suppressed: Sequence[tuple[str, float]]
    """Tokens whose logits it lowers most, the most first."""
    bars: Sequence[tuple[float, int]]
    """Histogram of its activations where it fires: middle and height of each bar."""
    activations: Sequence[Activation]
    """Text on which it fires."""


def batches(
    features: Iterable[Feature], *, model: str, layer: int, name: str, dataset: str, sequences: int, tokens_per_sequence: int
) -> Iterable[tuple[str, str]]:
    """Name and content of each file.

    Args:
        features: in order.
        model: as Neuronpedia calls it.
        layer: number of the block.
        name: of the dictionary; Neuronpedia's source set.
        dataset: what was read.
        sequences: how many.
        tokens_per_sequence: BOS included.
    """
    waiting: list[dict[str, Any]] = []
    number = 0
    read = {"n_prompts_total": sequences, "n_tokens_in_prompt": tokens_per_sequence, "dataset": dataset}

    def file() -> tuple[str, str]:
        content = {"model_id": model, "layer": layer, "sae_set": name, "sae_id_suffix": None, "features": waiting}
        return f"batch-{number}.json", json.dumps(content, allow_nan=False)

    for feature in features:
        waiting.append({**_feature(feature), **read})
        if len(waiting) == FEATURES_PER_FILE:
            yield file()
            waiting, number = [], number + 1
    if waiting or not number:
        yield file()


def skipped(indexes: Sequence[int], *, model: str, layer: int, name: str) -> tuple[str, str]:
    """Name and content of the file that names the dead units."""
    content = {"model_id": model, "layer": str(layer), "sae_set": name, "log_sparsity": None, "skipped_indexes": list(indexes)}
    return "skipped_indexes.json", json.dumps(content)


def _feature(feature: Feature) -> dict[str, Any]:
    return {
        "feature_index": feature.index,
        **{field: [] for field in _EMPTY},
        "neg_str": [token for token, _ in feature.suppressed],
        "neg_values": [_short(value) for _, value in feature.suppressed],
        "pos_str": [token for token, _ in feature.promoted],
        "pos_values": [_short(value) for _, value in feature.promoted],
        "frac_nonzero": feature.frequency,
        "freq_hist_data_bar_values": [_short(middle) for middle, _ in feature.bars],
        "freq_hist_data_bar_heights": [height for _, height in feature.bars],
        "activations": [_activation(activation) for activation in feature.activations],
    }


def _activation(activation: Activation) -> dict[str, Any]:
    return {
        "bin_min": _short(activation.bin.low),
        "bin_max": _short(activation.bin.high),
        "bin_contains": _short(activation.bin.share),
        "tokens": list(activation.tokens),
        "values": [_short(value) for value in activation.values],
        "qualifying_token_index": activation.at,
    }


def _short(value: float) -> float:
    """Five digits, and nothing behind the point of a zero, which most values are: files would be three times as large."""
    return float(f"{value:.5g}") if value else 0
