"""A language model and texts small enough to run the whole pipeline in seconds, saved as folders that any host or text option takes."""

from __future__ import annotations

import random
from pathlib import Path

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
