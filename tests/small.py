"""A language model and texts small enough to run the whole pipeline in seconds, saved as folders that any host or text option takes."""

from __future__ import annotations

import random
from pathlib import Path

WORDS = [
    "law",
    "people",
    "congress",
    "house",
    "of",
    "the",
    "and",
    "public",
    "great",
    "nation",
    "union",
    "state",
    "peace",
    "trade",
    "war",
    "treaty",
    "duty",
    "tax",
    "bill",
    "land",
    "year",
    "by",
    "for",
    "with",
]


def tiny_tokenizer():
    """One token per byte, with BOS and EOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    made.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def save_host(folder: Path, *, layers: int = 9) -> Path:
    """A random Llama of width 16 with gated MLPs of width 24; as many layers as the examples address."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def documents(name: str, *, number: int = 400, words: int = 450) -> list[tuple[str, str]]:
    """(id, text) of made-up documents, about 2,000 characters each; of 400, about 20 fall into validation and 20 into test."""
    dice = random.Random(name)
    return [(f"{name}/{i}", " ".join(dice.choices(WORDS, k=words))) for i in range(number)]


def save_texts(folder: Path, **options: int) -> Path:
    """`documents` as one .txt file each."""
    folder.mkdir(parents=True)
    for number, (_, text) in enumerate(documents("texts", **options)):
        (folder / f"{number:03}.txt").write_text(text, encoding="utf-8")
    return folder
