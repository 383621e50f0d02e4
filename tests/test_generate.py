"""Generation: batches, fixed shapes, torch.compile, number formats, each with every kind of layer in an MLP's place."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mxd import decoding
from mxd.config import KINDS
from mxd.decoding import BUCKET, lay_out
from mxd.errors import ConfigError, HostError, MxdError
from mxd.host import Host
from mxd.layers import Sizes, SparseLayer, build

from . import small
from .conftest import EOS, FAMILIES, VOCAB, build_model, build_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ["the law of the people", "no", "war and peace"]
MODES: dict[str, dict[str, bool]] = {"dynamic": {}, "static": {"static": True}, "compiled": {"compiled": True}}


@pytest.fixture(autouse=True)
def traced_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tracing without graph breaks is what most tests are about; what is traced runs as it is, without a minute of C++."""
    monkeypatch.setattr(decoding, "BACKEND", "eager")
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def endless(family: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> Host:
    """A tiny host that never ends by itself. Untied, or the residual stream of some would name the same token for ever."""
    host = Host.from_model(build_model(family, tie_word_embeddings=False, **options).to(dtype), build_tokenizer())
    host.model.generation_config.eos_token_id = [VOCAB + 1]
    return host


def made_up(kind: str, *, dtype: torch.dtype = torch.float32, scale: float = 0.2) -> SparseLayer:
    """A random layer for a tiny host whose every parameter matters."""
    generator = torch.Generator().manual_seed(3)
    layer = build(kind, Sizes(32, 32, 100, 4, 48, "silu", True), generator=generator)  # 100: some kinds want a square
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)
    return layer.to(dtype)


def ids_of(made: list[Any]) -> list[list[int]]:
    return [one.new_ids for one in made]


# layout


def test_layout_by_hand() -> None:
    laid = lay_out([[5, 6, 7], [8]], 2, bucket=1, device=torch.device("cpu"))
    assert laid.ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert laid.mask is not None and laid.mask.int().tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]
    assert laid.positions.tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]]
    alike = lay_out([[5, 6], [7, 8]], 2, bucket=1, device=torch.device("cpu"))
    assert alike.mask is None and alike.ids.tolist() == [[5, 6], [7, 8]]


@pytest.mark.parametrize(("length", "new", "width", "total"), [(1, 1, 32, 64), (32, 32, 32, 64), (33, 31, 64, 96), (32, 33, 32, 96)])
def test_static_layouts_have_few_shapes(length: int, new: int, width: int, total: int) -> None:
    laid = lay_out([[1] * length], new, bucket=BUCKET, device=torch.device("cpu"))
    assert laid.ids.shape == (1, width) and laid.positions.shape == (1, total)
    assert laid.mask is not None and int(laid.mask.sum()) == total - (width - length)


# batches


@pytest.mark.parametrize("mode", ["dynamic", "static"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_gives_what_each_prompt_gives_alone(family: str, mode: str) -> None:
    host = endless(family)
    alone = [host.generate(prompt, new_tokens=20) for prompt in PROMPTS]
    assert host.generate_batch(PROMPTS, new_tokens=20, **MODES[mode]) == alone
    assert [len(one.new_ids) for one in alone] == [20, 20, 20] and len({str(one.new_ids) for one in alone}) > 1


def test_rows_end_by_themselves() -> None:
    host = endless()
    whole = ids_of(host.generate_batch(PROMPTS, new_tokens=16))
    end = next(token for token in whole[0][1:] if token != whole[0][0] and token != EOS and sum(token in ids for ids in whole) < 3)
    host.model.generation_config.eos_token_id = [VOCAB + 1, end]
    made = ids_of(host.generate_batch(PROMPTS, new_tokens=16))
    for row, ids in enumerate(whole):
        assert made[row] == (ids[: ids.index(end) + 1] if end in ids else ids)
    assert len(made[0]) < 16 and max(map(len, made)) == 16, "one ends, another goes on"
    assert made == ids_of([host.generate(prompt, new_tokens=16) for prompt in PROMPTS])


def test_nothing_is_computed_once_all_have_ended() -> None:
    host = endless()
    prompt_ids, first, _ = host.generate("no", new_tokens=2)
    assert first[0] != first[1]
    host.model.generation_config.eos_token_id = first[1]
    calls: list[int] = []
    host.model.register_forward_pre_hook(lambda _m, _args, given: calls.append(given["input_ids"].shape[1]), with_kwargs=True)
    assert host.generate("no", new_tokens=30).new_ids == first
    assert calls == [len(prompt_ids), 1]


def test_the_noise_of_sampling_is_the_same_in_every_row() -> None:
    host = endless()
    options: dict[str, Any] = {"new_tokens": 12, "temperature": 1.5, "seed": 4}
    batch = host.generate_batch([*PROMPTS, PROMPTS[0]], **options)
    assert batch[:3] == [host.generate(prompt, **options) for prompt in PROMPTS]
    assert batch[3] == batch[0]
    options["seed"] = 5
    assert ids_of(batch) != ids_of(host.generate_batch([*PROMPTS, PROMPTS[0]], **options))


def test_no_prompts_and_wrong_prompts() -> None:
    host = endless()
    assert host.generate_batch([], new_tokens=3) == []
    with pytest.raises(HostError, match=r"too long for host model \| expected at most 64 tokens \| got 66"):
        host.generate_batch(["no", "x" * 60], new_tokens=5)
    with pytest.raises(ConfigError, match="impossible generation"):
        host.generate_batch([], new_tokens=0)
    host.tokenizer.bos_token = None
    with pytest.raises(ConfigError, match="the prompt is empty"):
        host.generate_batch(["no", ""], new_tokens=1)


def test_a_model_that_takes_neither_positions_nor_a_count_of_logits() -> None:
    host = endless()
    model = host.model

    class Plain(nn.Module):
        """Its attention mask is all that it is told; it works out positions by itself, as ALiBi models do."""

        device = model.device

        def forward(
            self, input_ids: Tensor, attention_mask: Tensor | None = None, past_key_values: Any = None, use_cache: bool = True
        ) -> Any:
            return model(input_ids, attention_mask=attention_mask, past_key_values=past_key_values, use_cache=use_cache)

    decoder = decoding.Decoder(Plain(), host._static_cache)
    prompt_ids, new_ids, _ = host.generate("no", new_tokens=8)
    assert decoder.extend([prompt_ids], new_tokens=8, ends=set()) == [new_ids]
    assert (decoder._takes_positions, decoder._keeps_logits) == (False, False)
    assert (host._decoder._takes_positions, host._decoder._keeps_logits) == (True, True)


# top-p, frequency penalty, a seed for each row


def test_nucleus_by_hand_and_beyond_the_first_look(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.97, 0.01, 0.01, 0.01]], dtype=torch.float64).log()
    assert decoding.nucleus(scores, 0.75).tolist() == [[False, True, False, True], [True, False, False, False]]
    assert decoding.nucleus(scores, 0.76).tolist() == [[False, True, True, True], [True, False, False, False]]
    assert decoding.nucleus(scores, 1e-300).sum(-1).tolist() == [1, 1]
    wide = torch.randn(3, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = decoding.nucleus(wide, 0.9)
    monkeypatch.setattr(decoding, "NUCLEUS", 2)
    assert decoding.nucleus(scores, 0.76).tolist() == [[False, True, True, True], [True, False, False, False]]
    assert torch.equal(decoding.nucleus(wide, 0.9), whole)
    kept = torch.where(whole, wide.softmax(-1), 0.0)
    assert (kept.sum(-1) >= 0.9).all() and (kept.sum(-1) - torch.where(whole, wide.softmax(-1), 2.0).amin(-1) < 0.9).all()


def test_top_p_samples_the_renormalised_nucleus_with_the_same_noise() -> None:
    scores = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(20_000, 4)
    drawn = decoding.Picker(1.0, list(range(20_000)), top_p=0.8)(scores)
    shares = torch.bincount(drawn, minlength=4) / 20_000
    assert shares.tolist() == pytest.approx([0.625, 0.375, 0, 0], abs=0.015)
    free = decoding.Picker(1.0, list(range(20_000)))(scores)
    assert torch.equal(free[free < 2], drawn[free < 2]), "noise that fell within the nucleus anyway decides as before"


def test_frequency_penalty_by_hand() -> None:
    scores = torch.tensor([[3.0, 2.5, 0.0], [0.0, 9.0, 0.0]])
    pick = decoding.Picker(0.0, 0, frequency_penalty=1.0)
    assert [pick(scores).tolist() for _ in range(4)] == [[0, 1], [1, 1], [0, 1], [1, 1]]
    host = endless()
    assert host.generate_batch(PROMPTS, new_tokens=20, frequency_penalty=0.0) == host.generate_batch(PROMPTS, new_tokens=20)
    for ids in ids_of(host.generate_batch(PROMPTS, new_tokens=40, frequency_penalty=1e6)):
        assert len(set(ids)) == 40, "no token twice, whatever stands in the prompt"


@pytest.mark.parametrize("mode", MODES)
def test_a_row_with_its_own_seed_is_the_row_alone(mode: str) -> None:
    host = endless()
    options: dict[str, Any] = {"new_tokens": 12, "temperature": 1.5, "top_p": 0.95, "frequency_penalty": 0.5}
    seeds = [4, 9, 4, 0]
    batch = host.generate_batch([*PROMPTS, PROMPTS[0]], seed=seeds, **options, **MODES[mode])
    alone = [host.generate_batch([prompt], seed=seed, **options)[0] for prompt, seed in zip([*PROMPTS, PROMPTS[0]], seeds, strict=True)]
    assert batch == alone
    assert batch[3] != batch[0], "another seed"
    options["top_p"] = 0.05
    other = host.generate_batch([*PROMPTS, PROMPTS[0]], seed=seeds, **options)
    assert other != batch, "top-p does something"


def test_impossible_sampling_gives_one_line() -> None:
    host = endless()
    expected = r"^impossible sampling \| expected 0 < top_p <= 1 and a finite frequency_penalty \| got "
    impossible: list[dict[str, Any]] = [{"top_p": 0.0}, {"top_p": 1.5}, {"top_p": float("nan")}, {"frequency_penalty": float("inf")}]
    for wrong in impossible:
        with pytest.raises(ConfigError, match=expected):
            host.generate_batch(["no"], new_tokens=1, **wrong)
    with pytest.raises(ConfigError, match=r"^wrong number of seeds \| expected one, or one for each of 1 prompts \| got 2$"):
        host.generate_batch(["no"], new_tokens=1, seed=[1, 2])


# fixed shapes


def test_static_keeps_to_fixed_shapes_and_dynamic_does_not() -> None:
    host = endless()
    shapes: dict[str, set[Any]] = {}
    for mode in ("dynamic", "static"):
        seen: list[Any] = []

        def look(_module: Any, _args: Any, given: dict[str, Any], seen: list[Any] = seen) -> None:
            mask, cache = given.get("attention_mask"), given["past_key_values"]
            keys = cache.layers[0].keys if cache is not None and cache.layers else None
            seen.append((tuple(given["input_ids"].shape), None if mask is None else tuple(mask.shape), keys is None or tuple(keys.shape)))

        handle = host.model.register_forward_pre_hook(look, with_kwargs=True)
        for prompt in ("no", "the law"):
            host.generate_batch([prompt, "war and peace"], new_tokens=8, **MODES[mode])
        handle.remove()
        shapes[mode] = {shape for shape in seen if shape[0][1] == 1}
    assert shapes["static"] == {((2, 1), (2, 64), (2, 2, 64, 8))}
    assert len(shapes["dynamic"]) > 5


def test_a_cache_that_is_used_again_remembers_nothing() -> None:
    host = endless(layers=1)
    alone = [ids_of([host.generate(prompt, new_tokens=9)]) for prompt in PROMPTS]
    assert [ids_of(host.generate_batch([prompt], new_tokens=9, compiled=True)) for prompt in PROMPTS] == alone
    kept = host._decoder._kept
    assert kept is not None and kept[0] == (1, 64)
    host.generate_batch(PROMPTS, new_tokens=9, static=True)
    assert host._decoder._kept is kept, "nothing is kept where nothing is compiled"
    assert host._decoder._cache(3, 64, keep=True) is not kept[1]
    assert host._decoder._kept is not None and host._decoder._kept[0] == (3, 64), "one cache is kept, not one for each shape"


# every kind of layer in the place of an MLP


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_replaced_host_generates_alike_in_every_way(kind: str, mode: str) -> None:
    host, layer = endless(layers=2), made_up(kind)
    own = ids_of(host.generate_batch(PROMPTS, new_tokens=10))
    with host.replace({1: layer}):
        alone = ids_of([host.generate(prompt, new_tokens=10) for prompt in PROMPTS])
        assert ids_of(host.generate_batch(PROMPTS, new_tokens=10, **MODES[mode])) == alone
        for prompt, ids in zip(PROMPTS, alone, strict=True):
            assert ids == without_cache(host, prompt, 10)
    assert alone != own
    assert ids_of(host.generate_batch(PROMPTS, new_tokens=10, static=mode != "dynamic")) == own, "afterwards it is the host again"


def without_cache(host: Host, prompt: str, new_tokens: int) -> list[int]:
    """Greedy tokens by a full forward of all that is there, once a token."""
    prompt_ids = host.generate(prompt, new_tokens=1).prompt_ids
    ids = list(prompt_ids)
    for _ in range(new_tokens):
        ids.append(int(host.logits(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt_ids) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_traced_whole_with_all_mlps_replaced(family: str) -> None:
    host = endless(family, layers=2)
    with host.replace({0: made_up("mxd"), 1: made_up("topk-sae")}):
        alone = [host.generate(prompt, new_tokens=6) for prompt in PROMPTS]
        assert host.generate_batch(PROMPTS, new_tokens=6, compiled=True) == alone


# number formats


FLOAT, BRAIN = torch.float32, torch.bfloat16
CLOSE = {(FLOAT, FLOAT): 5e-6, (FLOAT, BRAIN): 5e-3, (BRAIN, FLOAT): 5e-2, (BRAIN, BRAIN): 5e-2}
"""(host, layer) -> largest relative error (norm) of the scores of steps with the cache against those of a full forward."""


def steps(host: Host, ids: Tensor) -> Tensor:
    """Scores at every position, read one token at a time through a KV cache."""
    cache, found = None, []
    with torch.no_grad():
        for column in ids.split(1, dim=1):
            scores, cache = decoding._read(host.model, cache, {"input_ids": column})
            found.append(scores)
    return torch.stack(found, dim=1)


@pytest.mark.parametrize(("host_dtype", "layer_dtype"), CLOSE)
@pytest.mark.parametrize("kind", KINDS)
def test_scores_with_and_without_the_cache_agree(kind: str, host_dtype: torch.dtype, layer_dtype: torch.dtype) -> None:
    host, layer = endless(dtype=host_dtype), made_up(kind, dtype=layer_dtype, scale=0.05)
    ids = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(0))
    before = host.logits(ids)
    with host.replace({1: layer}):
        full, cached = host.logits(ids), steps(host, ids)
        assert layer(host.read(ids, [1])["layers.1.mlp"].x.to(layer_dtype)).y.dtype == layer_dtype
    limit = CLOSE[host_dtype, layer_dtype]
    assert (full - cached).norm() < limit * full.norm()
    assert (full - before).norm() > 10 * limit * before.norm(), "the layer matters more than the tolerance"


@pytest.mark.parametrize("kind", KINDS)
def test_a_bfloat16_layer_is_its_float32_self_rounded(kind: str) -> None:
    host, layer = endless(dtype=BRAIN), made_up(kind, scale=0.05)
    ids = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(0))
    with host.replace({1: layer}):
        wide = host.logits(ids)
    with host.replace({1: layer.to(BRAIN)}):
        narrow = host.logits(ids)
    assert 0 < (wide - narrow).norm() < 5e-2 * wide.norm()


# torch.compile


class Breaks(nn.Module):
    """Looks at a value in the middle, which no graph can hold."""

    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.sum()) > 0 else -x


def test_a_step_is_compiled_once_and_used_again() -> None:
    from torch._dynamo.utils import counters

    host, layers = endless(layers=2), {kind: made_up(kind) for kind in ("mxd", "dense")}

    def compilations(kind: str) -> int:
        counters.clear()
        with host.replace({1: layers[kind]}):
            host.generate_batch(["no"], new_tokens=6, compiled=True)
        return counters["stats"]["unique_graphs"]

    assert [compilations(kind) for kind in ("mxd", "mxd", "dense", "mxd", "dense")] == [1, 0, 1, 0, 0]


def test_too_many_steps_are_forgotten_and_compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "COMPILATIONS", 1)
    host = endless(layers=1)
    alone = host.generate("no", new_tokens=4)
    assert host.generate("no", new_tokens=4, compiled=True) == alone
    with host.replace({0: made_up("dense")}):
        other = host.generate("no", new_tokens=4)
        assert other != alone and host.generate("no", new_tokens=4, compiled=True) == other
    assert host.generate("no", new_tokens=4, compiled=True) == alone


def test_a_step_that_cannot_be_compiled_gives_one_line() -> None:
    host = endless(layers=1)
    with host.replace({0: Breaks()}):
        assert len(host.generate("no", new_tokens=4, static=True).new_ids) == 4
        with pytest.raises(HostError, match=r"^one step of this host cannot be compiled \| got .+ \| next: leave out --compile") as caught:
            host.generate("no", new_tokens=4, compiled=True)
    assert "\n" not in str(caught.value)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A machine without a C++ compiler."""
    from torch._inductor import config, cpp_builder

    monkeypatch.setattr(decoding, "BACKEND", "inductor")
    monkeypatch.setenv("PATH", str(tmp_path))
    cpp_builder.cpp_compiler_search.cache_clear()
    with config.patch({"cpp.cxx": (None, "g++")}):
        yield
    cpp_builder.cpp_compiler_search.cache_clear()


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_one_line_at_once() -> None:
    host = endless(layers=1)
    host.model.forward = None  # nothing runs before
    with pytest.raises(
        ConfigError, match=r"^--compile needs a C\+\+ compiler \| expected g\+\+ or clang\+\+ .* \| got none \| next: install one"
    ):
        host.generate("no", new_tokens=4, compiled=True)


def test_without_triton_one_line_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "BACKEND", "inductor")
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    with pytest.raises(ConfigError, match=r"^--compile needs Triton on CUDA devices \| next: pip install triton, or leave out --compile$"):
        decoding.check_compiler(torch.device("cuda"))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, while it imports its compiler
def test_compiled_for_true(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(decoding, "BACKEND", "inductor")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    host = endless(layers=2)
    for kind in KINDS:
        with host.replace({1: made_up(kind)}):
            alone = [host.generate(prompt, new_tokens=10) for prompt in PROMPTS]
            assert host.generate_batch(PROMPTS, new_tokens=10, compiled=True) == alone
    assert list(tmp_path.rglob("*.cpp")), "kernels were made"


# the benchmark


def test_benchmark_verifies_and_measures(tmp_path: Path) -> None:
    from mxd.bench.generation import rows

    folder = small.save_host(tmp_path / "host")
    options: dict[str, Any] = {"device": torch.device("cpu"), "threads": 1, "runs": 2, "quick": True, "host_name": str(folder)}
    found = list(rows(**options, kinds=("mxd", "transcoder"), modes=("dynamic", "static")))
    assert [(r["shape"]["kind"], r["shape"]["sequences"], r.get("setting")) for r in found] == [
        (kind, size, mode) for kind in ("mxd", "transcoder") for size in (1, 3) for mode in (None, "static")
    ]
    for r in found:
        made = r["shape"]["sequences"] * r["shape"]["new_tokens"]
        assert r["verified"] is True and r["time_ratio"] > 0
        assert r["ours_tokens_per_second"] == pytest.approx(1e3 * made / r["ours_ms"], rel=1e-2)
        assert r["rival_tokens_per_second"] == pytest.approx(1e3 * made / r["rival_ms"], rel=1e-2)
        assert r["throughput_ratio"] == pytest.approx(1 / r["time_ratio"], rel=1e-3)


def test_benchmark_refuses_wrong_tokens_and_idle_layers() -> None:
    from mxd.bench.generation import _verify, fresh

    host = endless()
    layer = fresh("mxd", host.site(1), budget="4x", k=4)
    assert all(parameter.any() for parameter in layer.parameters())
    with host.replace({1: layer}):
        made = host.generate("no", new_tokens=5)
    assert "agree to 0.0e+00" in _verify(host, layer, host.site(1), [made])
    with pytest.raises(MxdError, match="do not agree, so nothing is timed"):
        _verify(host, layer, host.site(1), [made._replace(new_ids=[*made.new_ids[:-1], made.new_ids[-1] ^ 1])])
    with pytest.raises(MxdError, match="the replaced host computes what the host does"):
        _verify(host, host.mlp(1), host.site(1), [made])  # pyright: ignore[reportArgumentType]
