"""Numbers about units, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mxd.explore import schema, statistics
from mxd.explore.bands import ranks, text_of
from mxd.explore.codes import Firings
from mxd.explore.statistics import measure, states


def test_the_numbers_of_a_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "MEASURED", 2)
    ids = np.array([[0, 5, 5, 6, 7], [0, 5, 6, 6, 8]])
    starts = np.array([0, 4, 4, 5])
    tokens = np.array([1, 2, 3, 8, 9])
    values = np.array([1.0, 4.0, 2.0, 2.0, 0.5], np.float32)
    shares = np.array([0.1, 0.3, 0.1, 0.1, 1.0], np.float32)
    effects = np.array([0.2, 0.4, np.nan, 0.6, np.nan], np.float32)
    found = Firings(10, starts, tokens, values, shares, effects)
    made = measure(found, ranks(found), text_of(ids, np.array([0, 1]), 0), tokens=8, n=2)
    columns = {name: column.tolist() for name, column in made.columns.items()}
    assert columns["fires"] == [4, 0, 1]
    assert columns["state"] == [1, 0, 1]
    assert columns["max_a"][0] == 4 and math.isnan(columns["max_a"][1])
    assert columns["mean_a"][0] == pytest.approx(2.25)
    assert columns["p50"][0] == 2 and columns["p99"][0] == 4
    assert columns["share"][0] == pytest.approx(0.15)
    assert columns["effect"][0] == pytest.approx(0.4) and columns["effect_n"] == [3, 0, 0]
    assert columns["effect_se"][0] == pytest.approx(0.2 / math.sqrt(3))
    assert math.isnan(columns["effect"][2]), "no gradient was taken where it fired"
    assert columns["top_token"][0] == 5 and columns["top_token_share"][0] == 0.5
    assert columns["token_entropy"][0] == pytest.approx(1.0), "two tokens, equally often: one bit"
    assert columns["token_entropy"][2] == 0 and math.isnan(columns["token_entropy"][1])
    monkeypatch.setattr(statistics, "MEASURED", 4)
    made = measure(found, ranks(found), text_of(ids, np.array([0, 1]), 0), tokens=8, n=2)
    assert math.isnan(made.columns["effect"][0]) and made.columns["effect_n"][0] == 3, "too few to say"
    assert made.peak_tokens[0].tolist() == [(5, 2), (6, 2)] and len(made.peak_tokens[1]) == 0
    assert made.hist[0].nonzero()[0].tolist() == [15, 31, 63] and made.hist[0].sum() == 4
    assert made.edges[0].tolist() == [4, 2, 4, 2, 2, 1, 1]


def test_states() -> None:
    counts = np.array([0, 1, schema.RARE - 1, schema.RARE, 500, 501])
    assert [schema.STATES[s] for s in states(counts, 1000)] == ["dead", "rare", "rare", "live", "live", "shared"]
