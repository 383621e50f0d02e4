"""A language model and texts small enough to run the whole pipeline in seconds, saved as folders that any host or text option takes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from mxd.config import TrainConfig
from tests.conftest import BOS, EOS, VOCAB, build_tokenizer

WORDS = "law people congress house of the and public great nation union state peace trade war treaty duty tax bill land year by"


def save_host(folder: Path, *, layers: int = 9) -> Path:
    """A random Llama of width 16 with gated MLPs of width 24; as many layers as the examples address."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def documents(name: str, *, number: int = 280, words: int = 450) -> list[tuple[str, str]]:
    """(id, text) of made-up documents, about 2,000 characters each; about one in twenty falls into validation, and one into test."""
    dice, words_known = random.Random(name), WORDS.split()
    return [(f"{name}/{i}", " ".join(dice.choices(words_known, k=words))) for i in range(number)]


def save_texts(folder: Path, **options: int) -> Path:
    """`documents` as one .txt file each."""
    folder.mkdir(parents=True)
    for number, (_, text) in enumerate(documents("texts", **options)):
        (folder / f"{number:03}.txt").write_text(text, encoding="utf-8")
    return folder


def small_run(folder: Path, *, layers_of_host: int = 2, number: int = 160, **options: Any) -> TrainConfig:
    """Options of a run in ``folder/run`` that takes a second: 16 steps, a shuffle buffer that is filled anew eight times.

    Args:
        folder: host and texts are saved in it.
        layers_of_host: of which layer 1 is replaced.
        number: texts.
        options: other than these.
    """
    usual: dict[str, Any] = {
        "layers": ("1",),
        "k": (2,),
        "tokens": 4096,
        "tokens_per_step": 256,
        "buffer_tokens": 1024,
        "tokens_per_sequence": 32,
    }
    host, texts = save_host(folder / "host", layers=layers_of_host), save_texts(folder / "texts", number=number)
    return TrainConfig(out=folder / "run", host=str(host), text=(str(texts),), device="cpu", **(usual | options))
