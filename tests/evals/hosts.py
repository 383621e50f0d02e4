"""A tiny random host with a word tokenizer, a text of its own, and a run folder with every kind of student: no network."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mxd.checkpoint import Run, StudentRecord
from mxd.host import Host
from mxd.layers import LAYERS, Sizes, SparseLayer, build
from mxd.run_writer import RunWriter

LENGTH = 16
WORDS = [f"w{i}" for i in range(60)]
SIZES = Sizes(d_in=16, d_out=16, n_units=25, k=4, d_hidden=24, activation="silu", glu=True, rank=12)


def tiny_llama() -> Host:
    """Two blocks, d = 16, GLU MLPs of width 24; weights large enough that the MLPs matter to the logits."""
    torch.manual_seed(0)
    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", *WORDS])}
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.5,
    )
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return Host.from_model(LlamaForCausalLM(config), tokenizer, name="tiny")


def write_text(folder: Path, documents: int = 260, words: int = 60) -> Path:
    """A folder of .txt files of random words."""
    rng = random.Random(0)
    folder.mkdir()
    for i in range(documents):
        (folder / f"{i}.txt").write_text(" ".join(rng.choices(WORDS, k=words)), encoding="utf-8")
    return folder


def write_run(path: Path, text: Path, kinds: tuple[str, ...] = tuple(LAYERS), hookpoints: tuple[str, ...] = ("layers.1.mlp",)) -> Run:
    """A finished run with random layers of `kinds` at every hookpoint, as training would write it."""
    writer = RunWriter(path, overwrite=False)
    layers: list[SparseLayer] = []
    records: list[StudentRecord] = []
    for hookpoint, kind in itertools.product(hookpoints, kinds):
        layer = random_layer(kind)
        name = (kind if kind == "dense" else f"{kind}-k4") + ("" if len(hookpoints) == 1 else f"@{hookpoint}")
        record = StudentRecord(
            name=name, hookpoint=hookpoint, kind=kind, k=layer.k, d_in=16, d_out=16, n_units=layer.n_units, params=layer.budget(),
            recipe="ours", seed=0, tokens_trained=640, steps=10, train_seconds=1.5, tokens_per_second=426.7, is_control=layer.is_control,
        )  # fmt: skip
        layers.append(layer)
        records.append(record)
    config = {
        "host": "tiny",
        "tokens_per_sequence": LENGTH,
        "text": [str(text)],
        "text_column": "text",
        "seed": 0,
        "budget": "16x",
        "recipe": ["ours"],
    }
    about = {
        "config": {**config, "loss": "norm-weighted"},
        "host": {"name": "tiny", "revision": None, "fingerprint": "0" * 64},
        "text": {"sources": [{"name": text.name}], "seed": 0},
        "train_tokens": 640,
    }
    writer.save(layers, records, about, finished=True)
    writer.finish()
    return Run.open(path)


def random_layer(kind: str, seed: int = 0) -> SparseLayer:
    """A layer whose every parameter is random and of a size that matters."""
    generator = torch.Generator().manual_seed(seed)
    layer = build(kind, SIZES, generator=generator)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return layer.eval().requires_grad_(False)
