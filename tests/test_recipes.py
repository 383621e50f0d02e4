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
        dense = kind in ("mxd", "mxd-pk", "cp-mumoe", "mov", *CONTROLS)
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
        config.kinds == tuple(kind for kind in KINDS if kind not in ("mxd-pk", "cp-mumoe", "mov"))
        and config.k == (32,)
        and config.tokens >= 300_000
        and config.out.name == "demo"
    )


def test_two_names_for_one_recipe_give_one_student() -> None:
    config = TrainConfig(recipe=("paper", "ours", "host-encoder"))
    assert [r.name for r in recipes.chosen(config, "mxd")] == ["paper", "ours", "host-encoder"]
    assert [r.name for r in recipes.chosen(config, "transcoder")] == ["paper", "ours"]


def only(name: str, kind: str = "mxd") -> recipes.Recipe:
    (found,) = recipes.chosen(TrainConfig(recipe=(name,)), kind)
    return found


@pytest.mark.parametrize(
    ("modifier", "kind", "field", "value"),
    [
        ("muon", "skip-transcoder", "optimiser", "muon"),
        ("centre", "mxd", "centre", True),
        ("no-centre", "topk-sae", "centre", False),
        ("balance", "mov", "balance", True),
        ("no-balance", "cp-mumoe", "balance", False),
        ("positive-c", "mov", "positive_c", True),
        ("random-k", "transcoder", "random_k", True),
        ("aux", "transcoder", "aux_weight", 1 / 32),
        ("aux=0.5", "mxd", "aux_weight", 0.5),
        ("lr=2e-3", "dense", "learning_rate", 2e-3),
        ("warmup=7", "mxd", "warmup_steps", 7),
        ("schedule=constant", "mxd", "schedule", "constant"),
        ("warm-start=3", "mxd", "warm_start_steps", 3),
        ("width=0.25", "dense", "width", 0.25),
        ("phi=relu", "additive", "phi", "relu"),
        ("encoder=glu", "mxd-pk", "shape", "glu"),
        ("rank=0.5", "cp-mumoe", "rank", 0.5),
        ("l1=0.01", "topk-sae", "l1", 0.01),
        ("lr-gate=0.5", "transcoder", "gate_rate", 0.5),
        ("lr-c=3", "mxd", "table_rate", 3.0),
    ],
)
@pytest.mark.parametrize("base", ["paper", "ours"])
def test_a_modifier_sets_its_field_and_nothing_else(base: str, modifier: str, kind: str, field: str, value: object) -> None:
    found = only(f"{base}+{modifier}", kind)
    assert getattr(found, field) == value
    also = {"balance": False} if field == "l1" else {}  # a gate without TopK is not balanced
    assert replace(only(base, kind), name=f"{base}+{modifier}", **{**also, field: value}) == found


def test_every_modifier_is_tested_above() -> None:
    (marks,) = (m for m in test_a_modifier_sets_its_field_and_nothing_else.pytestmark if m.args[0] != "base")  # pyright: ignore
    tested = {case[0].partition("=") for case in marks.args[1]}
    assert {key for key, sign, _ in tested if not sign} == set(recipes.FLAGS)
    assert {key for key, sign, _ in tested if sign} == set(recipes.VALUES)


def test_modifiers_add_up_and_keep_the_name_as_typed() -> None:
    found = only("host-encoder+muon+lr=1e-3+positive-c")
    assert (found.name, found.optimiser, found.learning_rate) == ("host-encoder+muon+lr=1e-3+positive-c", "muon", 1e-3)
    assert found.encoder == "host-frozen" and found.positive_c


def test_a_kind_goes_without_the_modifiers_that_do_nothing_to_it_in_name_as_well() -> None:
    config = TrainConfig(recipe=("ours", "ours+width=0.25", "ours+lr=1e-3+width=0.25", "host-encoder+positive-c"))
    assert [r.name for r in recipes.chosen(config, "transcoder")] == ["ours", "ours+lr=1e-3"]
    assert [r.name for r in recipes.chosen(config, "dense")] == ["ours", "ours+width=0.25", "ours+lr=1e-3+width=0.25", "host-encoder"]
    assert [r.name for r in recipes.chosen(config, "mxd")] == list(config.recipe)


def test_an_arm_finds_its_control_under_the_name_that_the_control_has() -> None:
    assert recipes.counterpart("ours+positive-c+lr=1e-3", "dense") == "ours+lr=1e-3"
    assert recipes.counterpart("host-encoder+random-k", "dense") == "host-encoder"
    assert recipes.counterpart("ours", "dense") == "ours"
    assert recipes.counterpart("a name from elsewhere", "dense") == "a name from elsewhere"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ours+moun", r"unknown modifier in --recipe ours\+moun \| expected muon; all: muon .*lr= .* \| got \+moun"),
        ("ours+", r"unknown modifier"),
        ("ours+muon=1", r"unknown modifier .* got \+muon=1"),
        ("ours+lr", r"expected lr= or"),
        ("ours+lr=", r"what is \+lr=\? \| expected lr= and a number above 0 \| got nothing"),
        ("ours+lr=fast", r"expected lr= and a number above 0 \| got fast"),
        ("ours+lr=nan", "a number above 0"),
        ("ours+lr=inf", "a number above 0"),
        ("ours+lr=0", "a number above 0"),
        ("ours+lr= 1", "a number above 0"),
        ("ours+lr=١", "a number above 0"),
        ("ours+lr=1_0", "a number above 0"),
        ("ours+warmup=1.5", "a whole number of steps"),
        ("ours+warmup=-1", "a whole number of steps"),
        ("ours+width=9", "at most 8"),
        ("ours+phi=tanh", r"expected phi= and host, gelu, .* \| got tanh"),
        ("ours+schedule=cosine", "expected schedule= and constant, linear"),
        ("ours+lr=1+lr=2", r"sets learning rate twice \| expected once \| got \+lr=2"),
        ("ours+centre+no-centre", "sets centre twice"),
        ("uors+muon", r"unknown --recipe \| expected ours"),
        ("ours+lr=" + "0" * 120 + "1", "too long for the name of a folder"),
        ("host-encoder+width=0.5", r"takes the host's encoder as it is \| expected no width, phi or encoder"),
        ("host-encoder+phi=relu", "takes the host's encoder as it is"),
        ("host-encoder+encoder=mlp", "takes the host's encoder as it is"),
        ("ours+l1=0.1+random-k", r"a gate with l1 has no K \| expected one of \+l1 and \+random-k"),
        ("ours+l1=0.1+balance", r"a gate with l1 has no K \| expected one of \+l1 and \+balance"),
    ],
)
def test_a_modifier_that_makes_no_sense_is_one_line(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        only(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "modifier", "option"),
    [
        ({"lr": 1e-3}, "lr=2e-3", "--lr"),
        ({"warmup_steps": 3}, "warmup=4", "--warmup-steps"),
        ({"schedule": "linear"}, "schedule=constant", "--schedule"),
        ({"aux_weight": 0.1}, "aux", "--aux-weight"),
    ],
)
def test_an_option_and_a_modifier_for_the_same_contradict_each_other(change: dict[str, object], modifier: str, option: str) -> None:
    config = replace(TrainConfig(recipe=(f"ours+{modifier}",)), **change)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match=rf"{option} contradicts --recipe ours\+{modifier}"):
        recipes.chosen(config, "mxd")


def test_the_first_modifier_without_effect_is_found() -> None:
    assert recipes.without_effect(TrainConfig(kinds=("transcoder",), recipe=("ours+lr=1", "ours+width=0.5"))) == (
        "ours+width=0.5",
        "width=0.5",
    )
    assert recipes.without_effect(TrainConfig(kinds=("transcoder", "dense"), recipe=("ours+width=0.5",))) is None


def test_the_names_of_phi_are_the_encoders() -> None:
    from mxd.layers.encoder import ACTIVATIONS

    assert tuple(ACTIVATIONS) == recipes.ACTIVATIONS


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_grammar_says_of_a_kind_is_so(kind: str) -> None:
    from mxd.layers import Sizes, build
    from mxd.layers.warm_start import MODULATED, dense_matrices, unit_tables

    layer = build(kind, Sizes(4, 4, 9, 2, 5))
    gates = layer.gates()
    assert (kind in recipes.ENCODED) == hasattr(layer, "encoder")
    assert (kind in recipes.GATED) == bool(gates) == bool(unit_tables(layer))
    assert (kind in recipes.OWN_ROWS) == (len(gates) == 1 and len(gates[0][1]) == layer.n_units)
    assert (kind in recipes.WRITING) == (layer.units() is not None)
    assert (kind in recipes.FLAGS["muon"].kinds) == bool(dense_matrices(layer))
    assert (kind in recipes.MODULATED) == isinstance(layer, MODULATED)
