"""Widths by counting: budgets are met to within one unit, and the paper's sizes come out to the unit."""

from __future__ import annotations

from math import isqrt

import pytest

from mxd.errors import ConfigError, LayerError
from mxd.layers import LAYERS, Sizes, build
from mxd.layers.sizing import match_budget, parse_budget
from mxd.recipes import published

SIZES = Sizes(d_in=24, d_out=20, n_units=1, k=2, d_hidden=40, glu=True, rank=15)


@pytest.mark.parametrize("kind", [k for k in LAYERS if k != "dense"])
def test_the_budget_is_met_to_within_one_unit(kind: str) -> None:
    budget = 20_011
    sizes = match_budget(kind, SIZES, budget)
    here = build(kind, sizes).budget()
    next_larger = (isqrt(sizes.n_units) + 1) ** 2 if kind == "mxd-pk" else sizes.n_units + 1
    more = build(kind, sizes._replace(n_units=next_larger)).budget()
    assert here <= budget < more


def test_a_multiple_means_a_transcoder_of_that_many_latents() -> None:
    budget = parse_budget("32x", d_in=768, d_out=768)
    assert budget == published()["sizes"]["gpt2"]["transcoder_params"] == 37_774_080
    assert match_budget("transcoder", Sizes(768, 768, 1, 32, 3072), budget).n_units == 24_576
    assert parse_budget("1_000_000", d_in=1, d_out=1) == 1_000_000
    assert parse_budget("1.5x", d_in=4, d_out=4) == build("transcoder", Sizes(4, 4, 6, 1, 1)).budget()


@pytest.mark.parametrize("key", published()["sizes"])
def test_the_papers_parameter_totals(key: str) -> None:
    paper = published()["sizes"][key]
    d, glu = paper["d"], paper.get("mxd_encoder") == "glu"
    for kind, units, params in (
        ("transcoder", "transcoder_latents", "transcoder_params"),
        ("skip-transcoder", "transcoder_latents", "skip_transcoder_params"),
        ("mxd", "mxd_experts", "mxd_params"),
    ):
        sizes = Sizes(d, d, paper[units], 32, paper["mxd_hidden"], glu=glu)
        assert build(kind, sizes, device="meta").budget() == paper[params], kind


@pytest.mark.parametrize("wrong", ["", "x", "0x", "-3", "16 y", "0", "1e6"])
def test_a_budget_that_is_not_one_is_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match="--budget is not understood"):
        parse_budget(wrong, d_in=8, d_out=8)


def test_a_budget_too_small_for_one_expert_says_how_much_it_takes() -> None:
    with pytest.raises(LayerError, match=r"too small for one unit of a mxd \| expected at least 2,865 parameters \| got 100"):
        match_budget("mxd", SIZES, 100)


def test_a_budget_too_small_for_k_units_is_refused() -> None:
    with pytest.raises(LayerError, match=r"expected 1 <= k <= 10 \| got k = 32 \| next: lower --k or raise --budget"):
        match_budget("transcoder", SIZES._replace(k=32), 500)
