"""Tiny random hosts made in code, a byte-level tokenizer, and a guard: no test reaches the network or the user's cache."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FAMILIES = ("gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi", "phi3")
"""Families of hosts whose MLPs must be found; ``mixtral`` and ``opt`` can be built too, and hold none."""
BOS, EOS, PAD = 256, 257, 258
VOCAB = 259
MAX_TOKENS = 64


def pytest_configure(config: pytest.Config) -> None:
    # Before anything is imported: huggingface_hub and datasets read these once.
    home = tempfile.mkdtemp(prefix="mxd-tests-")
    os.environ.update(HF_HOME=home, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    config.add_cleanup(lambda: shutil.rmtree(home, ignore_errors=True))
    import torch

    if not torch.cuda.is_available():
        # The kernels run on the CPU then. Triton's own functions read this when triton is imported, which torch.compile may do too.
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Sockets reach this machine only, pip has no index, and mxd's cache is an empty folder."""
    connect, connect_ex, getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def guard(address: Any) -> None:
        host = address[0] if isinstance(address, tuple) else address
        if isinstance(address, tuple) and str(host) not in ("127.0.0.1", "::1", "localhost", "0.0.0.0", ""):
            raise ConnectionError(f"the tests have no network, asked for {host}")

    def guarded_connect(self: socket.socket, address: Any) -> None:
        guard(address)
        return connect(self, address)

    def guarded_connect_ex(self: socket.socket, address: Any) -> int:
        guard(address)
        return connect_ex(self, address)

    def guarded_getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        guard((host.decode() if isinstance(host, bytes) else host or "",))
        return getaddrinfo(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", guarded_connect)
    monkeypatch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
    monkeypatch.setattr(socket, "getaddrinfo", guarded_getaddrinfo)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("MXD_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("MXD_ASSETS", raising=False)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tiny tensors, where a second thread only waits for the first."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build_tokenizer() -> Any:
    """One token per byte (ids 0 to 255 in the order of the byte-level alphabet), then BOS, EOS and PAD."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<bos>", "<eos>", "<pad>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


def build_model(family: str, *, layers: int = 3, d_model: int = 32, d_hidden: int = 48, seed: int = 0, **overrides: Any) -> Any:
    """A random causal LM of a family, float32. Weights are large enough for every part to matter; biases and norms are random too."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": d_model,
        "intermediate_size": d_hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": d_model // 4,
        "max_position_embeddings": MAX_TOKENS,
    }
    special: dict[str, dict[str, Any]] = {
        "gpt2": {"n_embd": d_model, "n_inner": d_hidden, "n_layer": layers, "n_head": 4, "n_positions": MAX_TOKENS},
        "gemma2": {**sizes, "query_pre_attn_scalar": 8, "sliding_window": 16},
        "gemma3": {**sizes, "query_pre_attn_scalar": 8, "sliding_window": 16},
        "mixtral": {**sizes, "num_local_experts": 4},
        "opt": {**sizes, "ffn_dim": d_hidden, "word_embed_proj_dim": d_model},
    }
    for name in ("gpt_neox", "phi", "phi3", "opt"):
        special.setdefault(name, dict(sizes)).pop("head_dim", None)
    settings = {
        "vocab_size": VOCAB,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "initializer_range": 0.2,
        **special.get(family, sizes),
        **overrides,
    }
    config = AutoConfig.for_model("gemma3_text" if family == "gemma3" else family, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.fixture
def tiny_tokenizer() -> Any:
    """See `build_tokenizer`."""
    return build_tokenizer()


@pytest.fixture
def tiny_model() -> Any:
    """`build_model`: a factory of random models by family."""
    return build_model


@pytest.fixture
def tiny_host() -> Any:
    """Factory: ``tiny_host("llama", layers=3, d_model=32, d_hidden=48, seed=0, **config)`` is a `Host` of a random model."""
    from mxd.host import Host

    def make(family: str = "llama", **options: Any) -> Host:
        return Host.from_model(build_model(family, **options), build_tokenizer(), name=f"tiny-{family}")

    return make


@pytest.fixture
def saved_host(tmp_path: Path) -> Path:
    """A folder with a tiny Llama and its tokenizer, as `Host.load` takes it."""
    folder = tmp_path / "tiny-llama"
    build_model("llama").save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder
