"""Tokens as spans of their text."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from mxd.explore.spans import spans, utf16
from tests.conftest import BOS, build_tokenizer

TOKENIZER = build_tokenizer()


def decode(ids: Sequence[int]) -> str:
    return str(TOKENIZER.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def pieces(text: str, cuts: list[int]) -> list[str]:
    data = text.encode("utf-16-le")
    return [data[2 * a : 2 * b].decode("utf-16-le") for a, b in itertools.pairwise(cuts)]


@pytest.mark.parametrize(
    "text", ["plain text", " leading", "tab\tnew\nline", "naïve", "日本語", "a 🙂 b", "שלום", "\u202eevil", "x" * 50, "� itself"]
)
def test_tokens_are_spans_of_the_text(text: str) -> None:
    ids = [BOS, *TOKENIZER.encode(text, add_special_tokens=False)]
    found, cuts = spans(ids, decode)
    assert found == text
    assert len(cuts) == len(ids) + 1 and cuts[0] == 0 and cuts[-1] == utf16(text)
    parts = pieces(found, cuts)
    assert parts[0] == "", "a special token has no width"
    assert "".join(parts) == text
    if text.isascii():
        assert parts[1:] == list(text), "a byte a token"
    if text == "日本語":
        assert parts[1:] == ["", "", "日", "", "", "本", "", "", "語"], "the character belongs to the token that completes it"


def test_a_text_cut_within_a_character() -> None:
    ids = TOKENIZER.encode("a🙂", add_special_tokens=False)[:3]
    found, cuts = spans(ids, decode)
    assert found.startswith("a") and cuts[1] == 1 and cuts[-1] == utf16(found)


def test_a_decoder_that_drops_the_first_blank() -> None:
    words = ["▁the", "▁cat", "s", "▁sat"]

    def sentencepiece(ids: Sequence[int]) -> str:
        return "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" ")

    found, cuts = spans([0, 1, 2, 3], sentencepiece)
    assert found == "the cats sat"
    assert pieces(found, cuts) == ["the", " cat", "s", " sat"]
