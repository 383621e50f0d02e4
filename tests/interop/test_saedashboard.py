"""SAEDashboard's files, read as Neuronpedia's converter reads them: by these keys, with this arithmetic."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from mxd.interop.saedashboard import FEATURES_PER_FILE, Activation, Bin, Feature, batches, skipped, strongest

READ: dict[str, Any] = {"model": "smollm2", "layer": 8, "name": "mxd-k32", "dataset": "sotu", "sequences": 64, "tokens_per_sequence": 128}
CONVERTED = (
    *("feature_index", "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1", "correlated_neurons_indices"),
    *("correlated_neurons_pearson", "correlated_neurons_l1", "correlated_features_indices", "correlated_features_pearson"),
    *("correlated_features_l1", "neg_str", "neg_values", "pos_str", "pos_values", "frac_nonzero", "freq_hist_data_bar_heights"),
    *("freq_hist_data_bar_values", "logits_hist_data_bar_heights", "logits_hist_data_bar_values", "decoder_weights_dist"),
)
"""Keys without which it stops."""


def feature(index: int, **other: Any) -> Feature:
    usual: dict[str, Any] = {
        "frequency": 0.0123456789,
        "promoted": [(" treaty", 1.5), ("</script>", 0.25)],
        "suppressed": [("\u2028", -0.75)],
        "bars": [((i + 0.5) / 4, 10 - i) for i in range(4)],
        "activations": [
            Activation(["The", " law", " holds"], [0.0, 0.987654321, 0.5], 1, strongest(0.987654321)),
            Activation(["\ud83d", "\ude00"], [0.1, 0.0], 0, Bin(0.0, 0.2, 1e-6)),
        ],
    }
    return Feature(index, **(usual | other))


def read(files: Any) -> list[dict[str, Any]]:
    return [json.loads(content) for _, content in files]


def test_a_batch_converts_key_by_key() -> None:
    (batch,) = read(batches([feature(4711)], **READ))
    assert (batch["model_id"], batch["layer"], batch["sae_set"], batch["sae_id_suffix"]) == ("smollm2", 8, "mxd-k32", None)
    (found,) = batch["features"]
    assert set(CONVERTED) <= set(found) and found["feature_index"] == 4711
    assert (found["n_prompts_total"], found["n_tokens_in_prompt"], found["dataset"]) == (64, 128, "sotu")
    assert found["frac_nonzero"] == 0.0123456789
    assert (found["pos_str"], found["pos_values"]) == ([" treaty", "</script>"], [1.5, 0.25])
    assert (found["neg_str"], found["neg_values"]) == (["\u2028"], [-0.75])
    assert found["vector"] == [], "there is no direction to steer along"
    for activation in found["activations"]:
        values = activation["values"]
        assert len(values) == len(activation["tokens"]) and max(values) > 0 and values[activation["qualifying_token_index"]] == max(values)


def test_bars_are_middles_one_for_each_height() -> None:
    (batch,) = read(batches([feature(0)], **READ))
    middles, heights = (batch["features"][0][f"freq_hist_data_bar_{name}"] for name in ("values", "heights"))
    assert middles == [0.125, 0.375, 0.625, 0.875] and heights == [10, 9, 8, 7]


def test_bins_mark_the_strongest_and_give_the_limits_of_the_rest() -> None:
    (batch,) = read(batches([feature(0)], **READ))
    top, low = batch["features"][0]["activations"]
    assert (top["bin_min"], top["bin_max"], top["bin_contains"]) == (-1, 0.98765, -1)
    assert (low["bin_min"], low["bin_max"], low["bin_contains"]) == (0, 0.2, 1e-6)


def test_many_features_go_into_several_files() -> None:
    files = list(batches((feature(i) for i in range(FEATURES_PER_FILE + 2)), **READ))
    assert [name for name, _ in files] == ["batch-0.json", "batch-1.json"]
    indexes = [[found["feature_index"] for found in batch["features"]] for batch in read(files)]
    assert indexes == [list(range(FEATURES_PER_FILE)), [FEATURES_PER_FILE, FEATURES_PER_FILE + 1]]


def test_no_feature_gives_one_file_without_any() -> None:
    assert [(name, json.loads(text)["features"]) for name, text in batches([], **READ)] == [("batch-0.json", [])]


def test_a_number_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="Out of range"):
        read(batches([feature(0, promoted=[("a", math.nan)])], **READ))


def test_dead_units_are_named() -> None:
    name, content = skipped([3, 5], model="smollm2", layer=8, name="mxd-k32")
    assert name == "skipped_indexes.json"
    assert json.loads(content) | {"log_sparsity": None} == {
        **{"model_id": "smollm2", "layer": "8", "sae_set": "mxd-k32", "log_sparsity": None, "skipped_indexes": [3, 5]}
    }
