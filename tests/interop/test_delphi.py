"""delphi's cache of latents, read back by its own rules: which file, which order, which numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load

from mxd.interop import delphi

SEQUENCES, LENGTH, LATENTS = 12, 8, 70_000


def firings(latents: NDArray[np.int64], seed: int = 0) -> delphi.Firings:
    """Every latent at a third of the tokens, in no order."""
    dice = np.random.default_rng(seed)
    pairs = [(token, latent) for latent in latents for token in dice.permutation(SEQUENCES * LENGTH)[: SEQUENCES * LENGTH // 3]]
    token, latent = dice.permutation(np.array(pairs, np.int64)).T
    return delphi.Firings(token // LENGTH, token % LENGTH, latent, dice.random(len(token), np.float32) * 9 + 0.01)


def read(data: bytes, name: str) -> tuple[dict[int, NDArray[Any]], NDArray[Any]]:
    """Latent -> rows (sequence, position, activation) as they stand, and the tokens: as delphi opens a file."""
    tensors = load(data)
    first = int(name.split("_")[0])
    locations = tensors["locations"].astype(np.int64)
    latents = locations[:, 2] + first
    rows = np.column_stack((locations[:, :2], tensors["activations"].astype(np.float64)))
    return {int(latent): rows[latents == latent] for latent in np.unique(latents)}, tensors["tokens"].astype(np.int64)


def test_every_firing_comes_back_in_the_order_of_the_text() -> None:
    tokens = np.arange(SEQUENCES * LENGTH, dtype=np.uint32).reshape(SEQUENCES, LENGTH)
    found = firings(np.array([40_000, 40_007, 65_000]))
    latents, ids = read(delphi.encode(found, 40_000, tokens), delphi.file_name(40_000, 69_999))
    assert (ids == tokens).all() and sorted(latents) == [40_000, 40_007, 65_000]
    for latent, rows in latents.items():
        of = found.latent == latent
        order = np.lexsort((found.position[of], found.sequence[of]))
        assert (rows[:, 0] == found.sequence[of][order]).all() and (rows[:, 1] == found.position[of][order]).all()
        assert rows[:, 2] == pytest.approx(found.activation[of][order], rel=1e-3)


@pytest.mark.parametrize(("start", "kind"), [(0, "uint32"), (5_000, "uint16")], ids=["far from its first latent", "near"])
def test_locations_are_of_the_smallest_type_that_holds_them(start: int, kind: str) -> None:
    tensors = load(delphi.encode(firings(np.array([69_999])), start, np.zeros((SEQUENCES, LENGTH), np.uint32)))
    assert tensors["locations"].dtype == kind and set(tensors["locations"][:, 2]) == {69_999 - start}
    assert tensors["activations"].dtype == "float16" and tensors["tokens"].dtype == "int64"


def test_an_activation_beyond_float16_is_no_infinity() -> None:
    one = np.zeros(1, np.int64)
    tensors = load(delphi.encode(delphi.Firings(one, one, one, np.array([70_000.0], np.float32)), 0, np.zeros((1, 4), np.uint32)))
    assert tensors["activations"].dtype == "float32" and tensors["activations"][0] == 70_000


def test_what_delphi_takes_for_none_is_left_out() -> None:
    two = np.arange(2)
    tensors = load(delphi.encode(delphi.Firings(two, two, two, np.array([1e-6, 1e-4], np.float32)), 0, np.zeros((2, 4), np.uint32)))
    assert tensors["locations"].tolist() == [[1, 1, 1]]


def test_a_file_of_dead_latents_holds_the_tokens_alone() -> None:
    none = np.zeros(0, np.int64)
    tensors = load(delphi.encode(delphi.Firings(none, none, none, np.zeros(0, np.float32)), 3, np.ones((2, 4), np.uint32)))
    assert tensors["locations"].shape == (0, 3) and tensors["activations"].shape == (0,) and tensors["tokens"].tolist() == [[1] * 4] * 2


def test_the_configuration_has_what_its_loader_asks_for(tmp_path: Path) -> None:
    config = delphi.config(
        model="smollm2", dataset="sotu", split="test", tokens_per_sequence=128, tokens=4096, n_files=5, about={"student": "mxd-k32"}
    )
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    asked = {"model_name": "smollm2", "ctx_len": 128, "cache_ctx_len": 128, "dataset_repo": "sotu", "dataset_split": "test"}
    asked |= {"dataset_name": "", "dataset_column": "text", "n_tokens": 4096, "n_splits": 5, "mxd": {"student": "mxd-k32"}}
    assert {name: config[name] for name in asked} == asked
