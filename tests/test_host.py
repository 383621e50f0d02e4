from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mxd import host as host_module
from mxd.errors import ConfigError, HostError
from mxd.host import Activations, Host
from mxd.ops import gemm
from mxd.sites import ACTIVATIONS, MLPSite, MLPWeights

from .conftest import BOS, EOS, FAMILIES, VOCAB, build_model, build_tokenizer
from .small import save_host

EXPECTED = {
    "gpt2": ("h.{}.mlp", "transformer.h.{}.mlp", "gelu_tanh", False),
    "gpt_neox": ("layers.{}.mlp", "gpt_neox.layers.{}.mlp", "gelu", False),
    "llama": ("layers.{}.mlp", "model.layers.{}.mlp", "silu", True),
    "mistral": ("layers.{}.mlp", "model.layers.{}.mlp", "silu", True),
    "qwen2": ("layers.{}.mlp", "model.layers.{}.mlp", "silu", True),
    "qwen3": ("layers.{}.mlp", "model.layers.{}.mlp", "silu", True),
    "gemma2": ("layers.{}.mlp", "model.layers.{}.mlp", "gelu_tanh", True),
    "gemma3": ("layers.{}.mlp", "model.layers.{}.mlp", "gelu_tanh", True),
    "phi": ("layers.{}.mlp", "model.layers.{}.mlp", "gelu_tanh", False),
    "phi3": ("layers.{}.mlp", "model.layers.{}.mlp", "silu", True),
}


pytestmark = pytest.mark.usefixtures("one_thread")


def tokens(sequences: int = 2, positions: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (sequences, positions), generator=torch.Generator().manual_seed(seed))


def formula(weights: MLPWeights, activation: str, x: Tensor) -> Tensor:
    phi = ACTIVATIONS[activation]
    up = x @ weights.E + (0 if weights.b_E is None else weights.b_E)
    gate = None if weights.E_gate is None else x @ weights.E_gate + (0 if weights.b_gate is None else weights.b_gate)
    z = phi(up) if gate is None else phi(gate) * up
    return z @ weights.D + (0 if weights.b_D is None else weights.b_D)


class Zero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class WithCode(NamedTuple):
    code: Tensor
    y: Tensor


class Named(nn.Module):
    """Returns a named tuple, as our layers do, and remembers what it was fed."""

    def __init__(self, reads: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.reads = reads
        self.scale = nn.Parameter(torch.ones((), dtype=dtype))
        self.fed: Tensor | None = None

    def forward(self, x: Tensor) -> WithCode:
        self.fed = x
        return WithCode(x * 100, x * self.scale)


# finding


def test_expected_covers_every_family() -> None:
    assert set(EXPECTED) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_are_found_by_structure(tiny_host: Callable[..., Host], family: str) -> None:
    host = tiny_host(family, layers=3, d_model=32, d_hidden=48)
    hookpoint, module, activation, glu = EXPECTED[family]
    assert host.sites == [MLPSite(hookpoint.format(i), i, 32, 32, 48, activation, glu, module.format(i)) for i in range(3)]
    assert (host.d_model, host.vocab_size, host.max_tokens) == (32, VOCAB, 64)


@pytest.mark.parametrize("family", FAMILIES)
def test_read_returns_exactly_what_the_mlp_received_and_returned(tiny_host: Callable[..., Host], family: str) -> None:
    host, ids = tiny_host(family), tokens()
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        host.mlp(site.layer).register_forward_hook(lambda _m, args, out, name=site.hookpoint: seen.update({name: (args[0], out)}))
        for site in host.sites
    ]
    with torch.no_grad():
        host.model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    read = host.read(ids, [2, 0])
    assert list(read) == [host.site(2).hookpoint, host.site(0).hookpoint]
    for name, activations in read.items():
        assert isinstance(activations, Activations)
        assert activations.x.shape == activations.y.shape == (2, 12, 32)
        assert torch.equal(activations.x, seen[name][0])
        assert torch.equal(activations.y, seen[name][1])
        assert not activations.x.requires_grad and not activations.x.is_inference()


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_reproduce_the_mlp(tiny_host: Callable[..., Host], family: str) -> None:
    host = tiny_host(family)
    for layer, site in enumerate(host.sites):
        x, y = host.read(tokens(), [layer])[site.hookpoint]
        weights = host.weights(layer)
        assert weights.E.shape == (32, 48) and weights.D.shape == (48, 32)
        assert (weights.E_gate is not None) == site.glu
        assert (formula(weights, site.activation, x) - y).norm() < 1e-5 * y.norm()


def test_weights_are_copies(tiny_host: Callable[..., Host]) -> None:
    for family in ("gpt2", "llama", "phi3"):
        host, ids = tiny_host(family), tokens()
        before = host.logits(ids)
        for part in host.weights(1):
            if part is not None:
                part.fill_(float("nan"))
        assert torch.equal(host.logits(ids), before)


def test_a_gate_in_the_second_half_and_biases_in_a_fused_mlp() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both, self.out = nn.Linear(32, 80), nn.Linear(40, 32)

        def forward(self, x: Tensor) -> Tensor:
            up, gate = self.both(x).chunk(2, dim=-1)
            return self.out(F.gelu(gate) * up)  # no module holds the activation

    model = build_model("llama", layers=1)
    model.model.layers[0].mlp = Fused()
    host = Host.from_model(model, build_tokenizer())
    (site,) = host.sites
    assert (site.activation, site.glu, site.d_hidden) == ("gelu", True, 40)
    x, y = host.read(tokens(), [0])[site.hookpoint]
    assert (formula(host.weights(0), "gelu", x) - y).norm() < 1e-5 * y.norm()


def test_square_mlp_is_told_apart(tiny_host: Callable[..., Host]) -> None:
    host = tiny_host("gpt2", d_hidden=32)  # fc and proj have the same shape
    x, y = host.read(tokens(), [1])["h.1.mlp"]
    assert (formula(host.weights(1), "gelu_tanh", x) - y).norm() < 1e-5 * y.norm()


@pytest.mark.parametrize(("name", "ours"), [("relu", "relu"), ("quick_gelu", "quick_gelu"), ("relu2", "relu2"), ("gelu", "gelu")])
def test_other_activations(tiny_host: Callable[..., Host], name: str, ours: str) -> None:
    assert tiny_host("llama", layers=1, hidden_act=name).sites[0].activation == ours


@pytest.mark.parametrize(
    ("family", "options", "found"),
    [
        ("mixtral", {}, ["MixtralForCausalLM", "mlp (MixtralSparseMoeBlock of gate, experts)", "self_attn"]),
        ("opt", {}, ["OPTForCausalLM", "fc1 (linear 32 -> 48)", "fc2 (linear 48 -> 32)"]),
        ("llama", {"hidden_act": "mish"}, ["mlp (LlamaMLP", "its activation is none of gelu, gelu_tanh"]),
    ],
)
def test_host_without_separable_mlps_says_what_it_found(
    tiny_host: Callable[..., Host], family: str, options: Any, found: list[str]
) -> None:
    with pytest.raises(HostError, match="has no separable MLP") as caught:
        tiny_host(family, **options)
    assert all(part in str(caught.value) for part in found), str(caught.value)
    assert "\n" not in str(caught.value)


def test_mlp_whose_output_is_not_its_formula_is_refused() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(32, 48), nn.Linear(48, 32)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.fc2(F.relu(self.fc1(x)))

    model = build_model("llama", layers=1)
    model.model.layers[0].mlp = Residual()
    with pytest.raises(HostError, match="its output is not that of a plain or gated MLP"):
        Host.from_model(model, build_tokenizer())


@pytest.mark.parametrize(("key", "layer"), [(1, 1), ("1", 1), ("h.2.mlp", 2), ("transformer.h.0.mlp", 0)])
def test_site_by_number_or_hookpoint(tiny_host: Callable[..., Host], key: int | str, layer: int) -> None:
    host = tiny_host("gpt2")
    assert host.site(key).layer == layer
    assert host.mlp(key) is host.model.transformer.h[layer].mlp


@pytest.mark.parametrize(
    ("key", "hint"),
    [(3, "a layer from 0 to 2"), ("-1", "a layer from 0 to 2"), ("layers.1.mpl", "layers.1.mlp"), ("h.1.mlp", "layers.1.mlp")],
)
def test_unknown_site_names_the_nearest(tiny_host: Callable[..., Host], key: int | str, hint: str) -> None:
    host = tiny_host("llama")
    for use in (host.site, host.mlp, host.weights, lambda k: host.read(tokens(), [k]), lambda k: host.replace({k: Zero()}).__enter__()):
        with pytest.raises(HostError, match="has no MLP at") as caught:
            use(key)
        assert hint in str(caught.value)


# reading


@pytest.mark.parametrize("family", FAMILIES)
def test_read_stops_after_the_deepest_mlp(tiny_host: Callable[..., Host], family: str) -> None:
    host = tiny_host(family, layers=4)
    ran: list[str] = []
    for path, module in host.model.named_modules():
        module.register_forward_pre_hook(lambda _m, _args, path=path: ran.append(path))
    blocks = [site.module.rpartition(".")[0] for site in host.sites]
    host.read(tokens(), [1, 0])
    assert blocks[0] in ran and blocks[1] in ran
    beyond = [path for path in ran if path.startswith((blocks[2], blocks[3])) or "head" in path or "embed_out" in path or "norm_f" in path]
    assert beyond == []
    # … the same hooks do see them when nothing stops the forward
    ran.clear()
    host.logits(tokens())
    assert blocks[3] in ran and any(path in ran for path in ("lm_head", "embed_out"))
    assert not any(module._forward_hooks for module in host.model.modules())


def test_read_of_nothing_runs_nothing(tiny_host: Callable[..., Host]) -> None:
    host = tiny_host()
    host.model.forward = host.model.base_model.forward = None
    assert host.read(tokens(), []) == {}


def test_read_leaves_no_hook_after_an_error(tiny_host: Callable[..., Host]) -> None:
    host = tiny_host()
    with pytest.raises(IndexError):
        host.read(torch.full((1, 4), VOCAB + 5), [0, 1])
    assert not any(module._forward_hooks for module in host.model.modules())


@pytest.mark.parametrize("ids", [torch.zeros(4, dtype=torch.int64), torch.zeros(2, 4), torch.zeros((0, 4), dtype=torch.int64)])
def test_wrong_ids(tiny_host: Callable[..., Host], ids: Tensor) -> None:
    with pytest.raises(HostError, match=r"wrong token ids \| expected int64 \[sequence, position\]"):
        tiny_host()._checked(ids)  # what `read` and `logits` call


def test_too_long(tiny_host: Callable[..., Host]) -> None:
    host = tiny_host("gpt2")
    with pytest.raises(HostError, match=r"expected at most 64 tokens \| got 65"):
        host.read(tokens(1, 65), [0])
    with pytest.raises(HostError, match=r"at most 64 tokens \| got 66"):
        host.generate("abc", new_tokens=62)
    assert len(host.generate("abc", new_tokens=1).new_ids) == 1


def test_logits_are_the_models_own(tiny_host: Callable[..., Host]) -> None:
    host, ids = tiny_host(), tokens()
    with torch.no_grad():
        assert torch.equal(host.logits(ids), host.model(ids).logits)
    assert host.logits(ids).shape == (2, 12, VOCAB)


def test_bfloat16_host_gives_float32(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    host = Host.from_model(tiny_model("phi3").to(torch.bfloat16), tiny_tokenizer)
    assert host.dtype == torch.bfloat16 and len(host.sites) == 3 and host.sites[0].activation == "silu"
    x, y = host.read(tokens(), [1])["layers.1.mlp"]
    assert x.dtype == y.dtype == host.logits(tokens()).dtype == host.weights(1).D.dtype == torch.float32
    assert torch.equal(x, x.bfloat16().float())
    layer = Named("input")  # float32
    with host.replace({1: layer}):
        host.logits(tokens())
    assert layer.fed is not None and layer.fed.dtype == torch.float32 and torch.equal(layer.fed, x)


def test_linears_of_a_float32_cpu_host_go_through_the_gemm(tiny_host: Callable[..., Host], monkeypatch: pytest.MonkeyPatch) -> None:
    host, ids = tiny_host("llama"), tokens()
    calls: list[tuple[int, ...]] = []
    real = gemm.linear
    monkeypatch.setattr(gemm, "linear", lambda x, w, b=None: (calls.append(tuple(w.shape)), real(x, w, b))[1])
    routed = host.logits(ids)
    assert len(calls) == 3 * 7 + 1
    monkeypatch.setattr(gemm, "linear", F.linear)
    assert (host.logits(ids) - routed).norm() < 1e-5 * routed.norm()
    assert all(isinstance(m, nn.Linear) for m in (host.model.lm_head, host.mlp(0).get_submodule("up_proj")))


def test_gpt2s_linear_maps_go_through_the_gemm_too(tiny_host: Callable[..., Host], monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.pytorch_utils import Conv1D

    host, ids = tiny_host("gpt2"), tokens()
    maps = [module for module in host.model.modules() if isinstance(module, Conv1D)]
    assert len(maps) == 3 * 4 and all(type(m) is not Conv1D and type(m).__name__ == "Conv1D" for m in maps)
    calls: list[tuple[int, ...]] = []
    real = gemm.linear
    monkeypatch.setattr(gemm, "linear", lambda x, w, b=None: (calls.append(tuple(w.shape)), real(x, w, b))[1])
    routed = host.logits(ids)
    assert sorted(calls) == sorted([tuple(m.weight.shape[::-1]) for m in maps] + [(VOCAB, 32)])
    for m, rows in ((m, rows) for m in maps for rows in (1, 2, 7)):
        x = torch.randn(rows, m.nx, generator=torch.Generator().manual_seed(rows))  # one row takes another path than several
        own = Conv1D.forward(m, x)
        assert m(x).shape == own.shape and (m(x) - own).norm() < 1e-6 * own.norm()
        assert m(x[None]).shape == (1, *own.shape)
    for m in maps:
        m.__class__ = Conv1D
    assert (host.logits(ids) - routed).norm() < 1e-6 * routed.norm()


# replacing


@pytest.mark.parametrize("family", FAMILIES)
def test_replacing_an_mlp_by_itself_changes_no_bit(tiny_host: Callable[..., Host], family: str) -> None:
    host, ids = tiny_host(family), tokens()
    before = host.logits(ids)
    with host.replace({site.layer: host.mlp(site.layer) for site in host.sites}) as replaced:
        assert replaced is host
        assert torch.equal(host.logits(ids), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_replacing_changes_logits_and_leaving_restores_every_bit(tiny_host: Callable[..., Host], family: str) -> None:
    host, ids = tiny_host(family), tokens()
    before, modules = host.logits(ids), dict(host.model.named_modules())
    zero, keys = Zero(), list(host.model.state_dict())
    with host.replace({1: zero}):
        one = host.logits(ids)
        with host.replace({"0": zero, host.site(2).hookpoint: zero}):
            three = host.logits(ids)
        assert torch.equal(host.logits(ids), one)
    assert torch.equal(host.logits(ids), before)
    with pytest.raises(ZeroDivisionError), host.replace({0: zero, 2: zero}):
        host.logits(ids)
        raise ZeroDivisionError
    assert torch.equal(host.logits(ids), before)
    assert (one - before).norm() > 1e-3 * before.norm()
    assert (three - one).norm() > 1e-3 * before.norm()
    after = dict(host.model.named_modules())
    assert list(after) == list(modules) and all(after[path] is modules[path] for path in modules)
    assert list(host.model.state_dict()) == keys


def test_inner_replacement_of_the_same_mlp_holds_until_it_ends(tiny_host: Callable[..., Host]) -> None:
    host, ids = tiny_host(), tokens()
    before, double = host.logits(ids), nn.Linear(32, 32)
    with host.replace({1: Zero()}):
        zero = host.logits(ids)
        with host.replace({1: double}):
            inner = host.logits(ids)
            assert host.mlp(1) is not double
        assert torch.equal(host.logits(ids), zero)
        with host.replace({1: host.mlp(1)}):
            assert torch.equal(host.logits(ids), before)
    assert not torch.equal(inner, zero)


def test_zero_equals_adding_nothing(tiny_host: Callable[..., Host]) -> None:
    host, ids = tiny_host("llama", layers=1), tokens()
    handle = host.mlp(0).register_forward_hook(lambda _m, args, _out: torch.zeros_like(args[0]))
    expected = host.logits(ids)
    handle.remove()
    with host.replace({0: Zero()}):
        assert torch.equal(host.logits(ids), expected)


def test_named_tuple_gives_y_and_reads_output_is_fed_the_mlps_output(tiny_host: Callable[..., Host]) -> None:
    host, ids = tiny_host(), tokens()
    x, y = host.read(ids, [1])["layers.1.mlp"]
    before = host.logits(ids)
    sae, transcoder = Named("output"), Named("input")
    with host.replace({1: sae}):
        assert torch.equal(host.logits(ids), before)  # the identity on the MLP's output
    with host.replace({1: transcoder}):
        through = host.logits(ids)
    assert sae.fed is not None and transcoder.fed is not None
    assert torch.equal(sae.fed, y) and torch.equal(transcoder.fed, x)
    handle = host.mlp(1).register_forward_hook(lambda _m, args, _out: args[0])
    assert torch.equal(through, host.logits(ids))
    handle.remove()
    with host.replace({1: Zero()}), host.replace({1: sae}):
        assert torch.equal(host.logits(ids), before)  # fed by the host's own MLP, not by the outer stand-in


def test_replacement_of_another_dtype_is_cast_to_and_back(tiny_host: Callable[..., Host]) -> None:
    host, ids = tiny_host(), tokens()
    double = Named("output", torch.float64)
    before = host.logits(ids)
    with host.replace({1: double}):
        assert torch.equal(host.logits(ids), before)
    assert double.fed is not None and double.fed.dtype == torch.float64


def test_replaced_layer_shows_in_read_and_generate(tiny_host: Callable[..., Host]) -> None:
    host, ids = tiny_host(), tokens()
    x, _ = host.read(ids, [0])["layers.0.mlp"]
    plain = host.read(ids, [2])["layers.2.mlp"]
    text = host.generate("abc", new_tokens=8)
    with host.replace({0: Zero()}):
        read = host.read(ids, [0, 2])
        assert torch.equal(read["layers.0.mlp"].x, x) and not read["layers.0.mlp"].y.any()
        assert not torch.equal(read["layers.2.mlp"].x, plain.x)
        assert host.generate("abc", new_tokens=8) != text
    assert host.generate("abc", new_tokens=8) == text


def test_bad_replacements(tiny_host: Callable[..., Host]) -> None:
    host, ids = tiny_host(), tokens()
    before = host.logits(ids)
    with pytest.raises(HostError, match=r"must be a module \| expected torch.nn.Module \| got function"):
        host._stand_ins({0: F.relu})
    with pytest.raises(HostError, match=r"two modules for layers.1.mlp"), host.replace({1: Zero(), "layers.1.mlp": Zero()}):
        pass
    wrong = r"what replaces layers.1.mlp returned the wrong shape \| expected \[2, 12, 32\] \| got \[2, 12, 31\]"
    with pytest.raises(HostError, match=wrong), host.replace({1: nn.Linear(32, 31)}):
        host.logits(ids)
    assert torch.equal(host.logits(ids), before)


# generating


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers_generate(tiny_host: Callable[..., Host], family: str) -> None:
    # untied, or the residual stream of some would name the same token for ever
    host = tiny_host(family, tie_word_embeddings=False)
    host.model.generation_config.eos_token_id = [VOCAB + 1]  # do not end
    made = host.generate("hello", new_tokens=24)
    prompt = torch.tensor([made.prompt_ids])
    theirs = host.model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=24)
    assert made.prompt_ids == [BOS, *host.encode("hello")]
    assert made.new_ids == theirs[0, len(made.prompt_ids) :].tolist()
    assert len(made.new_ids) == 24 and len(set(made.new_ids)) > 2
    assert made.text == host.decode(made.new_ids)


def test_generation_ends_at_the_end_token(tiny_host: Callable[..., Host]) -> None:
    host = tiny_host("qwen2")
    host.model.generation_config.eos_token_id = VOCAB + 1
    whole = host.generate("hello", new_tokens=12).new_ids
    end = next(token for token in whole if token != whole[0])
    host.model.generation_config.eos_token_id = [EOS, end]
    made = host.generate("hello", new_tokens=12)
    assert len(whole) == 12 and made.new_ids == whole[: whole.index(end) + 1]
    host.model.generation_config.eos_token_id = None  # then the tokenizer's counts
    host.tokenizer.eos_token = host.tokenizer.convert_ids_to_tokens(end)
    assert host.generate("hello", new_tokens=12) == made


def test_sampling_depends_on_the_seed_and_only_on_it(tiny_host: Callable[..., Host]) -> None:
    host = tiny_host()
    lanes = [host.generate("hello", new_tokens=24, temperature=1.0, seed=seed) for seed in (5, 5, 6)]
    assert lanes[0] == lanes[1]
    assert lanes[0].new_ids != lanes[2].new_ids
    assert lanes[0].new_ids != host.generate("hello", new_tokens=24).new_ids
    torch.manual_seed(0)
    state = torch.get_rng_state()
    host.generate("hello", new_tokens=4, temperature=1.0)
    assert torch.equal(torch.get_rng_state(), state)


def test_samples_follow_the_softmax(tiny_host: Callable[..., Host]) -> None:
    host, temperature, draws = tiny_host(layers=1), 3.0, 600
    prompt = [BOS, *host.encode("a")]
    probabilities = (host.logits(torch.tensor([prompt]))[0, -1] / temperature).softmax(-1)
    top = set(probabilities.topk(40).indices.tolist())
    expected = float(probabilities[list(top)].sum())
    assert 0.15 < expected < 0.85
    hits = sum(host.generate("a", new_tokens=1, temperature=temperature, seed=s).new_ids[0] in top for s in range(draws))
    assert abs(hits / draws - expected) < 4 * (expected * (1 - expected) / draws) ** 0.5


def test_impossible_generation(tiny_host: Callable[..., Host]) -> None:
    host = tiny_host()
    for new_tokens, temperature in ((0, 0.0), (1, -1.0), (1, float("nan"))):
        with pytest.raises(ConfigError, match="impossible generation"):
            host.generate("x", new_tokens=new_tokens, temperature=temperature)
    host.tokenizer.bos_token = None
    with pytest.raises(ConfigError, match="the prompt is empty"):
        host.generate("", new_tokens=1)
    assert host.generate("x", new_tokens=1).prompt_ids == host.encode("x")


def test_encode_and_decode_round_trip(tiny_host: Callable[..., Host]) -> None:
    host, text = tiny_host(), "Añb , 世界\n  don 't"
    assert len(host.encode(text)) == len(text.encode())
    assert host.decode(host.encode(text)) == text
    assert host.decode([BOS, *host.encode("a"), EOS]) == "a"


# loading


def test_local_folder_round_trip(saved_host: Path) -> None:
    host = Host.load(str(saved_host), device="cpu")
    memory = Host.from_model(build_model("llama"), build_tokenizer())
    assert torch.equal(host.logits(tokens()), memory.logits(tokens()))
    assert host.encode("abc") == memory.encode("abc") and host.tokenizer.bos_token_id == BOS
    assert (host.name, host.revision, host.device.type, host.dtype) == (str(saved_host), None, "cpu", torch.float32)
    assert repr(host) == f"Host({str(saved_host)!r}, 3 MLPs, d_model=32, cpu, torch.float32)"
    assert not any(p.requires_grad for p in host.model.parameters()) and not host.model.training


def test_fingerprints_tell_weights_apart(saved_host: Path) -> None:
    import hashlib

    digest = hashlib.sha256((saved_host / "model.safetensors").read_bytes()).hexdigest()
    assert Host.load(str(saved_host)).fingerprint == digest
    prints = [Host.from_model(build_model("llama", seed=seed), build_tokenizer()).fingerprint for seed in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]


def test_dtype_option(saved_host: Path) -> None:
    assert Host.load(str(saved_host), dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(ConfigError, match=r"unknown dtype \| expected bfloat16, float32 or float16 \| got bfloat"):
        Host.load(str(saved_host), dtype="bfloat")


def test_device_option(saved_host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert Host.load(str(saved_host), device="auto").device.type == "cpu"
    with pytest.raises(ConfigError, match=r"this machine has no device cuda:1"):
        Host.load(str(saved_host), device="cuda:1")
    with pytest.raises(ConfigError, match=r"unknown device \| expected auto, cpu, cuda, cuda:N or mps \| got gpu"):
        Host.load(str(saved_host), device="gpu")


def test_built_in_host_comes_from_the_assets(saved_host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mxd import assets

    monkeypatch.setattr(assets, "builtin_host", lambda progress=None: saved_host)
    host = Host.load("smollm2")
    assert host.name == "smollm2" and len(host.sites) == 3


def test_missing_weights_are_refused(saved_host: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(saved_host / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, saved_host / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HostError, match=r"is incomplete \| expected all of its weights \| got none for model.layers.1.mlp.up_proj.weight$"):
        Host.load(str(saved_host))


def test_truncated_weights_give_one_line(saved_host: Path) -> None:
    file = saved_host / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(HostError, match="could not be loaded: ") as caught:
        Host.load(str(saved_host))
    assert "\n" not in str(caught.value)


def test_unknown_model_type_gives_one_line(saved_host: Path) -> None:
    config = json.loads((saved_host / "config.json").read_text())
    (saved_host / "config.json").write_text(json.dumps({**config, "model_type": "nonesuch"}))
    with pytest.raises(HostError, match="could not be loaded: ") as caught:
        Host.load(str(saved_host))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smolm2", r"host smolm2 is not built in, .* cannot be reached \| next: did you mean smollm2\?"),
        ("EleutherAI/pythia-41m", r"cannot be reached \| next: did you mean .*EleutherAI/pythia-410m"),
        ("missing.gguf", r"no file missing.gguf"),
        ("./nowhere", r"no host ./nowhere \| expected smollm2, a folder, a .gguf file, or a Hugging Face id"),
        ("two words", r"no host two words"),
    ],
)
def test_unknown_name(name: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HostError, match=message) as caught:
        Host.load(name)
    assert "\n" not in str(caught.value)


def test_folder_or_file_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="holds no model"):
        Host.load(str(tmp_path))
    (tmp_path / "note.txt").write_text("hello")
    with pytest.raises(HostError, match="a file of another kind"):
        Host.load(str(tmp_path / "note.txt"))


def test_revision_of_a_local_host_is_refused(saved_host: Path) -> None:
    with pytest.raises(ConfigError, match="a revision is only for hosts from the Hugging Face hub"):
        Host.load(str(saved_host), revision="main")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("GatedRepoError", "asks for permission"),
        ("RevisionNotFoundError", "has no revision v9"),
        ("RepositoryNotFoundError", "no host owner/name on the Hugging Face hub"),
    ],
)
def test_answers_of_the_hub(kind: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    def refuse(*_args: Any, **_options: Any) -> None:
        try:
            raise type(kind, (Exception,), {})("what the hub says\nat length")
        except Exception as error:
            raise OSError("transformers' own words\nat length") from error

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(HostError, match=message) as caught:
        Host.load("owner/name", revision="v9")
    assert "\n" not in str(caught.value)


def test_host_from_the_hub_is_identified_by_its_commit(saved_host: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    saved_host.rename(repository / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    options = {"cache_dir": str(tmp_path / "hub")}
    for name in ("AutoModelForCausalLM", "AutoTokenizer"):
        cls = getattr(__import__("transformers"), name)
        real = cls.from_pretrained
        monkeypatch.setattr(cls, "from_pretrained", lambda source, real=real, **given: real(source, **options, **given))
    real_cached_file = __import__("transformers").utils.cached_file
    monkeypatch.setattr("transformers.utils.cached_file", lambda *a, **given: real_cached_file(*a, **options, **given))
    host = Host.load("owner/name")
    assert host.fingerprint == commit and len(host.sites) == 3


def test_gguf_file(tmp_path: Path) -> None:
    model, file = build_model("llama", layers=2), tmp_path / "tiny.gguf"
    write_gguf(model, file)
    host = Host.load(str(file))
    assert [site.hookpoint for site in host.sites] == ["layers.0.mlp", "layers.1.mlp"]
    theirs = Host.from_model(model, build_tokenizer()).weights(1)
    for ours, expected in zip(host.weights(1), theirs, strict=True):
        assert (ours is None) == (expected is None)
        assert ours is None or expected is None or torch.equal(ours, expected)
    assert host.decode(host.encode("hello")) == "hello"
    assert len(host.fingerprint) == 64
    with pytest.raises(HostError, match="could not be loaded"):
        file.write_bytes(b"GGUF but not really")
        Host.load(str(file))


def write_gguf(model: Any, file: Path) -> None:
    """A Llama as llama.cpp would write it (but for the order of the rows of Q and K, which no test here looks at)."""
    import gguf

    config, vocabulary = model.config, build_tokenizer().get_vocab()
    names = [*sorted(vocabulary, key=vocabulary.__getitem__)[:-1], "he"]  # the format wants at least one merge
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(names)
    writer.add_token_types([3 if name in ("<bos>", "<eos>") else 1 for name in names])
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    tensors = {"token_embd": model.model.embed_tokens.weight, "output_norm": model.model.norm.weight, "output": model.lm_head.weight}
    for i, block in enumerate(model.model.layers):
        tensors |= {f"blk.{i}.{theirs}": block.get_submodule(ours).weight for ours, theirs in parts.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_tests_have_no_network() -> None:
    with pytest.raises(ConnectionError, match="the tests have no network"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    with pytest.raises(ConnectionError, match="the tests have no network"):
        socket.create_connection(("huggingface.co", 443), timeout=1)
    server = socket.create_server(("127.0.0.1", 0))
    with socket.create_connection(server.getsockname(), timeout=5), server:
        pass


def test_names_of_the_module() -> None:
    assert host_module.KNOWN[0] == host_module.BUILT_IN == "smollm2"


def test_the_tokenizer_of_a_folder_is_read_once_until_its_files_change(tmp_path: Path) -> None:
    """tokenizers frees nothing of one that is dropped; see `mxd.kept_tokenizer`."""
    folder = save_host(tmp_path / "host", layers=1)
    first, second = (Host.load(str(folder), device="cpu").tokenizer for _ in range(2))
    assert first is second
    config = folder / "tokenizer_config.json"
    config.write_text(config.read_text() + " \n")
    assert Host.load(str(folder), device="cpu").tokenizer is not first
