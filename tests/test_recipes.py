"""Recipes: the paper's 108 layers by number, every name resolves, overrides are used."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mxd import recipes
from mxd.config import CONTROLS, KINDS, TrainConfig
from mxd.errors import ConfigError


def test_the_papers_layers_are_108() -> None:
    runs = recipes.paper_layers()
    assert len(runs) == 8 and len({run.out for run in runs}) == 8
    assert sum(len(run.kinds) * len(run.k) for run in runs) == 108
    for run in runs:
        assert (run.recipe, run.sizes, run.tokens, run.tokens_per_step, run.tokens_per_sequence) == (
            ("paper",),
            "published",
            480_000_000,
            4096,
            128,
        )
        key = recipes.published_host(run.host)
        assert key is not None
        assert int(run.layers[0]) == recipes.published()["cross_entropy_nats"]["hosts"][key]["layer"] or len(run.k) == 4


def test_the_published_recipe_is_as_published() -> None:
    for kind in KINDS:
        assert recipes.RECIPES["paper"][kind] == recipes.Recipe("paper", learning_rate=1e-4, warmup_steps=5000, schedule="constant")


def test_only_mxd_and_its_controls_take_the_hosts_encoder() -> None:
    for kind, chosen in recipes.RECIPES["host-encoder"].items():
        dense = kind in ("mxd", "mxd-pk", *CONTROLS)
        assert (chosen.encoder == "host-frozen") is dense
        assert chosen.name == ("host-encoder" if dense else "ours")


def test_options_override_the_recipe() -> None:
    config = TrainConfig(lr=0.5, warmup_steps=7, schedule="linear", recipe=("paper",))
    (chosen,) = recipes.chosen(config, "mxd")
    assert (chosen.learning_rate, chosen.warmup_steps, chosen.schedule) == (0.5, 7, "linear")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lr": 0.0}, "--lr must be above 0"),
        ({"warmup_steps": -1}, "--warmup-steps"),
        ({"recipe": ("papr",)}, "expected paper"),
        ({"schedule": "cosine"}, "unknown --schedule"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(change: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        recipes.chosen(replace(TrainConfig(), **change), "mxd")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("name", "key"),
    [("EleutherAI/pythia-410m", "pythia-410m"), ("gpt2", "gpt2"), ("meta-llama/Llama-3.2-3B", "llama-3.2-3b"), ("smollm2", None)],
)
def test_published_hosts_are_known_by_name(name: str, key: str | None) -> None:
    assert recipes.published_host(name) == key


def test_the_demo_trains_four_kinds_and_the_controls_at_one_budget() -> None:
    config = recipes.demo()
    assert (
        config.kinds == tuple(kind for kind in KINDS if kind != "mxd-pk")
        and config.k == (32,)
        and config.tokens >= 300_000
        and config.out.name == "demo"
    )


def test_two_names_for_one_recipe_give_one_student() -> None:
    config = TrainConfig(recipe=("paper", "ours", "host-encoder"))
    assert [r.name for r in recipes.chosen(config, "mxd")] == ["paper", "ours", "host-encoder"]
    assert [r.name for r in recipes.chosen(config, "transcoder")] == ["paper", "ours"]
