"""A corpus: splits that never overlap, packing by hand, samples from the whole split."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from mxd import assets, sources, text
from mxd.errors import TextError
from mxd.text import Corpus, Document, Split, hash63, pack, split_of

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
BOS, EOS = 100, 101


class Letters:
    """A tokenizer of one token per letter: a is 1, b is 2, …; counts what it has read."""

    def __init__(self, bos: int | None = BOS, eos: int | None = EOS) -> None:
        self.bos_token_id, self.eos_token_id = bos, eos
        self.letters = 0

    def __call__(self, batch: Sequence[str], **options: bool) -> dict[str, list[list[int]]]:
        assert options["add_special_tokens"] is False
        self.letters += sum(map(len, batch))
        return {"input_ids": [[ord(letter) - 96 for letter in document if "a" <= letter <= "z"] for document in batch]}


def jsonl(path: Path, rows: Sequence[str]) -> str:
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def words(number: int, seed: int = 0, length: int = 200) -> list[str]:
    """Different documents of random letters: what follows the last x is the number, in letters, that tells them apart."""
    rng = random.Random(seed)
    digits = str.maketrans("0123456789", "abcdefghij")
    return ["".join(rng.choices("abcdefghij", k=rng.randrange(1, length))) + f"x{seed}x{i}".translate(digits) for i in range(number)]


def rows_of(blocks) -> list[list[int]]:
    return [row for block in blocks for row in block.ids.tolist()]


class TestSplit:
    def test_known_answers(self):
        for name in ("sotu/1790-Washington-1", "wiki-en/Été", "md5:00", ""):
            remainder = int(hashlib.md5(name.encode()).hexdigest(), 16) % 20
            assert split_of(name) == {0: "test", 1: "validation"}.get(remainder, "train")
            assert hash63(name) == int(hashlib.md5(name.encode()).hexdigest()[:16], 16) // 2

    def test_proportions(self):
        found = [split_of(f"document {number}") for number in range(20_000)]
        # Binomial with p = 1/20: standard deviation 31; four of them either way.
        assert abs(found.count("test") - 1_000) < 125 and abs(found.count("validation") - 1_000) < 125
        assert found.count("train") == 20_000 - found.count("test") - found.count("validation")

    def test_hash63_is_an_int64_and_tells_documents_apart(self):
        hashes = {hash63(f"document {number}") for number in range(10_000)}
        assert len(hashes) == 10_000 and min(hashes) >= 0 and max(hashes) < 2**63
        assert torch.tensor(sorted(hashes), dtype=torch.int64).tolist() == sorted(hashes)

    @pytest.mark.parametrize("streamed", [False, True], ids=["in memory", "streamed"])
    def test_never_overlaps_also_with_duplicates_in_other_files(self, tmp_path, monkeypatch, streamed):
        """Every text in one split and once, wherever its copies lie and whichever split is read."""
        if streamed:
            monkeypatch.setattr(sources, "MEMORY_BYTES", 0)
        all_texts = words(1_500, length=30)
        rng = random.Random(1)
        files = [rng.sample(all_texts, 900) + rng.sample(all_texts, 100) for _ in range(3)]
        names = [jsonl(tmp_path / f"{number}.jsonl", file) for number, file in enumerate(files)]
        (tmp_path / "folder").mkdir()
        for number, row in enumerate(all_texts[:60]):
            (tmp_path / "folder" / f"{number}.txt").write_text(row)
        corpus = Corpus([*names, tmp_path / "folder"])
        found = {split: [document.text for document in corpus.documents(split)] for split in SPLITS}
        together = [row for rows in found.values() for row in rows]
        assert len(together) == len(set(together))
        assert set(together) == set(all_texts[:60]).union(*files)
        assert min(map(len, found.values())) > 20

    def test_built_in_duplicates_under_ids_of_different_splits(self, monkeypatch, tmp_path):
        """The same text under ids that fall into different splits stays in the split of its first id, also against files."""
        ids = [f"sotu/{number}" for number in range(200)]
        monkeypatch.setattr(sources, "read_built_in", lambda _: ((name, f"text {number % 50}") for number, name in enumerate(ids)))
        corpus = Corpus(["sotu", jsonl(tmp_path / "a.jsonl", [f"text {number}" for number in range(60)])])
        found = {document.text: (document.id, split) for split in SPLITS for document in corpus.documents(split)}
        assert len(found) == sum(1 for split in SPLITS for _ in corpus.documents(split)) == 60
        for number in range(50):
            assert found[f"text {number}"] == (ids[number], split_of(ids[number]))
        first, second = corpus.describe()["sources"]
        assert (first["duplicates_dropped"], second["duplicates_dropped"]) == (150, 50)
        assert sum(second["documents"].values()) == 10

    def test_a_document_keeps_its_split_in_other_company(self, tmp_path):
        rows = words(300)
        alone = Corpus(jsonl(tmp_path / "a.jsonl", rows))
        beside = Corpus([jsonl(tmp_path / "b.jsonl", words(50, seed=9)), jsonl(tmp_path / "c.jsonl", rows[::-1])])
        for split in SPLITS:
            assert {document.id for document in alone.documents(split)} <= {document.id for document in beside.documents(split)}

    def test_packed_splits_share_no_document(self, tmp_path):
        rows = words(600)
        corpus = Corpus(jsonl(tmp_path / "a.jsonl", rows + rows[:200]))
        owners = {
            split: {
                name
                for block in corpus.blocks(Letters(), split, tokens_per_sequence=16, sequences_per_block=4)
                for name in block.documents.tolist()
            }
            for split in SPLITS
        }
        for one, other in itertools.combinations(SPLITS, 2):
            assert not owners[one] & owners[other]
        for split in SPLITS:
            assert owners[split] <= {hash63(document.id) for document in corpus.documents(split)} and len(owners[split]) > 10


class TestPacking:
    documents = (Document("one", "abc"), Document("two", "de"), Document("three", "fghij"))

    def test_by_hand_with_bos(self):
        # a b c EOS d e EOS f g h i j: three at a time, BOS before each three
        (block,) = pack(Letters(), self.documents, 4)
        assert block.ids.dtype == torch.int64 and block.documents.dtype == torch.int64
        assert block.ids.tolist() == [[BOS, 1, 2, 3], [BOS, EOS, 4, 5], [BOS, EOS, 6, 7], [BOS, 8, 9, 10]]
        assert block.documents.tolist() == [hash63(name) for name in ("one", "one", "two", "three")]

    def test_by_hand_without_bos(self):
        # the last incomplete sequence is dropped: i j
        (block,) = pack(Letters(bos=None), self.documents, 5)
        assert block.ids.tolist() == [[1, 2, 3, EOS, 4], [5, EOS, 6, 7, 8]]
        assert block.documents.tolist() == [hash63("one"), hash63("two")]

    def test_by_hand_without_eos(self):
        (block,) = pack(Letters(bos=None, eos=None), self.documents, 5)
        assert block.ids.tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]

    def test_a_document_without_tokens_leaves_no_trace(self):
        (block,) = pack(Letters(), [self.documents[0], Document("none", "123"), *self.documents[1:]], 4)
        assert block.ids.tolist() == [[BOS, 1, 2, 3], [BOS, EOS, 4, 5], [BOS, EOS, 6, 7], [BOS, 8, 9, 10]]

    @pytest.mark.parametrize("batch", [1, 50, 10**9])
    def test_content_is_the_documents_joined_with_eos(self, tmp_path, monkeypatch, batch):
        """However the tokenizer is fed, and however the sequences are grouped into blocks."""
        monkeypatch.setattr(text, "CHARACTERS_PER_BATCH", batch)
        corpus = Corpus(jsonl(tmp_path / "a.jsonl", words(80)), seed=3)
        stream: list[int] = []
        for document in corpus.documents("train"):
            stream += ([EOS] if stream else []) + Letters()([document.text], add_special_tokens=False)["input_ids"][0]
        blocks = list(corpus.blocks(Letters(), "train", tokens_per_sequence=17, sequences_per_block=7))
        rows = rows_of(blocks)
        assert all(row[0] == BOS for row in rows)
        assert [token for row in rows for token in row[1:]] == stream[: len(stream) // 16 * 16]
        assert [len(block.ids) for block in blocks[:-1]] == [7] * (len(blocks) - 1) and 1 <= len(blocks[-1].ids) <= 7
        assert all(len(block.documents) == len(block.ids) for block in blocks)

    def test_tokenises_only_what_is_read(self, tmp_path):
        corpus = Corpus(jsonl(tmp_path / "a.jsonl", words(2_000, length=2_000)))
        tokenizer = Letters()
        total = sum(len(document.text) for document in corpus.documents("train"))
        next(corpus.blocks(tokenizer, "train", tokens_per_sequence=128, sequences_per_block=8))
        assert 1_000 < tokenizer.letters < text.CHARACTERS_PER_BATCH + 4_100 < total / 10

    def test_a_real_fast_tokenizer(self, tmp_path):
        """Its options are accepted, and a document beyond the model's length is no warning."""
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 3, "<unk>": 4}, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=4
        )
        (block,) = pack(tokenizer, [Document("1", "a b a b a"), Document("2", "b z")], 5)
        assert block.ids.tolist() == [[0, 2, 3, 2, 3], [0, 2, 1, 3, 4]]

    @pytest.mark.parametrize("length", [1, 0])
    def test_no_room_beside_bos(self, tmp_path, length):
        corpus = Corpus(jsonl(tmp_path / "a.jsonl", words(40)))
        with pytest.raises(TextError, match="tokens_per_sequence"):
            next(corpus.blocks(Letters(), "train", tokens_per_sequence=length, sequences_per_block=1))

    def test_a_split_that_fills_no_sequence(self, tmp_path):
        corpus = Corpus(jsonl(tmp_path / "a.jsonl", ["abc"]))
        for split in SPLITS:
            with pytest.raises(TextError, match=f"too little {split} text .* at least 1 sequences of 128 tokens .* got 0"):
                list(corpus.blocks(Letters(), split, tokens_per_sequence=128, sequences_per_block=8))


class TestOrder:
    @pytest.mark.parametrize("limit", [2**30, 0], ids=["in memory", "streamed"])
    def test_depends_on_the_seed_and_only_on_it(self, tmp_path, monkeypatch, limit):
        monkeypatch.setattr(sources, "MEMORY_BYTES", limit)
        name = jsonl(tmp_path / "a.jsonl", words(800))

        def order(seed: int) -> list[str]:
            return [document.id for document in Corpus(name, seed=seed).documents("train")]

        corpus = Corpus(name, seed=1)
        assert corpus.streamed == (limit == 0)
        first = [document.id for document in corpus.documents("train")]
        assert first == [document.id for document in corpus.documents("train")] == order(1)
        assert first != order(2) and sorted(first) == sorted(order(2))

    def test_a_streamed_source_is_stirred_within_a_buffer(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sources, "MEMORY_BYTES", 0)
        rows = words(3_000, length=20)
        corpus = Corpus(jsonl(tmp_path / "a.jsonl", rows))
        place = {row: number for number, row in enumerate(row for row in rows if split_of(sources.from_text(row).id) == "train")}
        came = [place[document.text] for document in corpus.documents("train")]
        assert sorted(came) == list(range(len(place))) and came != sorted(came)
        assert all(number < time + text.SHUFFLE_DOCUMENTS + 1 for time, number in enumerate(came))

    def test_a_streamed_source_is_read_only_as_far_as_needed(self, monkeypatch):
        read: list[int] = []

        def hub(*_: object):
            for number in itertools.count():
                read.append(number)
                yield {"text": f"document {number}"}

        monkeypatch.setattr(assets, "open_dataset", lambda *_: (hub(), None))
        next(Corpus("owner/name").documents("train"))
        assert text.SHUFFLE_DOCUMENTS < len(read) < 2 * text.SHUFFLE_DOCUMENTS

    def test_streams_take_turns_by_characters(self, tmp_path, monkeypatch):
        """A short in-memory source and an endless one: neither waits for the other, and both give equally much."""
        monkeypatch.setattr(assets, "open_dataset", lambda *_: (({"text": f"{number} " + "h" * 998} for number in itertools.count()), None))
        corpus = Corpus(["owner/name", jsonl(tmp_path / "a.jsonl", [f"m{number:05d}" + "m" * 94 for number in range(1_000)])])
        given = {"m": 0, "h": 0}
        for document in itertools.islice(corpus.documents("train"), 550):
            given[document.text[-1]] += len(document.text)
        assert min(given.values()) > 40_000 and abs(given["m"] - given["h"]) <= 1_010

    def test_limit(self, tmp_path):
        corpus = Corpus(jsonl(tmp_path / "a.jsonl", words(100)), limit_documents=30)
        assert sum(1 for split in SPLITS for _ in corpus.documents(split)) == 30
        assert corpus.describe()["limit_documents"] == 30


class TestSample:
    @pytest.fixture
    def corpus(self, tmp_path) -> Corpus:
        return Corpus(jsonl(tmp_path / "a.jsonl", words(800)), seed=0)

    def test_without_replacement_and_by_seed(self, corpus):
        def draw(seed: int) -> text.TokenBlock:
            return corpus.sample(Letters(), "train", sequences=100, tokens_per_sequence=16, seed=seed)

        first, again, other = draw(5), draw(5), draw(6)
        assert first.ids.shape == (100, 16) and first.documents.shape == (100,)
        assert torch.equal(first.ids, again.ids) and torch.equal(first.documents, again.documents)
        assert not torch.equal(first.ids, other.ids)
        assert bool((first.ids[:, 0] == BOS).all())
        assert len({tuple(row) for row in first.ids.tolist()}) == 100  # random letters: no two sequences are alike

    def test_all_of_a_split_is_a_permutation_of_its_sequences(self, corpus):
        everything = rows_of(corpus.blocks(Letters(), "test", tokens_per_sequence=16, sequences_per_block=8))
        drawn = corpus.sample(Letters(), "test", sequences=len(everything), tokens_per_sequence=16, seed=corpus.seed)
        assert sorted(drawn.ids.tolist()) == sorted(everything) and drawn.ids.tolist() != everything

    def test_the_whole_split_is_reached(self, corpus):
        """One draw of a tenth touches about as many documents as chance has it; a few draws of a third, every document of some length."""
        documents = {hash63(document.id): len(document.text) for document in corpus.documents("train")}
        whole = sum(documents.values()) // 15
        block = corpus.sample(Letters(), "train", sequences=whole // 10, tokens_per_sequence=16, seed=1)
        assert len(set(block.documents.tolist())) > 0.35 * len(documents)
        reached: set[int] = set()
        for seed in range(10):
            drawn = corpus.sample(Letters(), "train", sequences=whole // 3, tokens_per_sequence=16, seed=seed)
            reached |= set(drawn.documents.tolist())
        assert {name for name, length in documents.items() if length > 60} <= reached

    def test_of_more_than_is_considered_every_seed_takes_other_documents(self, corpus, monkeypatch):
        monkeypatch.setattr(text, "SAMPLE_TOKENS", 0)
        monkeypatch.setattr(text, "CHARACTERS_PER_BATCH", 100)
        tokenizer = Letters()
        reached: set[int] = set()
        for seed in range(20):
            drawn = corpus.sample(tokenizer, "train", sequences=50, tokens_per_sequence=16, seed=seed)
            reached |= set(drawn.documents.tolist())
        assert tokenizer.letters < 20 * (text.SAMPLE_SPREAD * 50 * 16 * 1.2)
        assert len(reached) > 5 * 65  # one seed considers 6,400 tokens, which are about 65 documents

    def test_a_streamed_split_is_read_only_as_far_as_needed(self, monkeypatch):
        read: list[int] = []

        def hub(*_: object):
            for number in itertools.count():
                read.append(number)
                yield {"text": f"document{number}" + "z" * 500}

        monkeypatch.setattr(assets, "open_dataset", lambda *_: (hub(), None))
        monkeypatch.setattr(text, "CHARACTERS_PER_BATCH", 1_000)
        block = Corpus("owner/name").sample(Letters(), "train", sequences=100, tokens_per_sequence=128, seed=0)
        assert block.ids.shape == (100, 128)
        assert 8 * 100 * 128 / 510 < len(read) < 1_000

    def test_too_little_text_says_how_much_there_is(self, corpus):
        there = len(rows_of(corpus.blocks(Letters(), "test", tokens_per_sequence=16, sequences_per_block=8)))
        with pytest.raises(TextError) as error:
            corpus.sample(Letters(), "test", sequences=100_000, tokens_per_sequence=16, seed=corpus.seed)
        message = str(error.value)
        assert message.startswith("too little test text | expected at least 100000 sequences of 16 tokens | got ")
        assert f"got {there} (text is split by document" in message and "--text" in message and "\n" not in message

    def test_no_sequences(self, corpus):
        with pytest.raises(TextError, match="sequences is too small"):
            corpus.sample(Letters(), "test", sequences=0, tokens_per_sequence=16, seed=0)


class TestBadText:
    def test_skipped_files_are_said_once_in_one_line_and_described(self, tmp_path, caplog):
        (tmp_path / "a.txt").write_text("good")
        (tmp_path / "b.txt").write_text("")
        (tmp_path / "c.txt").write_bytes(b"\0\0")
        (tmp_path / "d.txt").write_bytes(b"\xff\xfe")
        corpus = Corpus(tmp_path)
        with caplog.at_level(logging.WARNING, logger="mxd"):
            for split in SPLITS:
                list(corpus.documents(split))
        assert [record.getMessage() for record in caplog.records] == [
            f"{tmp_path}: skipped 3: b.txt (empty), c.txt (binary), d.txt (not UTF-8 at byte 0)"
        ]
        (described,) = corpus.describe()["sources"]
        assert described["skipped_count"] == 3
        assert described["skipped"][0] == {"name": "b.txt", "reason": "empty", "count": 1}

    @pytest.mark.parametrize("limit", [2**30, 0], ids=["in memory", "streamed"])
    def test_nothing_usable(self, tmp_path, monkeypatch, limit, caplog):
        monkeypatch.setattr(sources, "MEMORY_BYTES", limit - 1)
        (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
        (tmp_path / "b.txt").write_text("")
        with pytest.raises(TextError) as error:
            list(Corpus(tmp_path).documents("train"))
        message = str(error.value)
        assert message.startswith(f"no usable text in {tmp_path} | ")
        assert "a.jsonl (line 1: no field 'text' (fields: body))" in message and "b.txt (empty)" in message and "--text-column" in message

    def test_an_empty_folder(self, tmp_path):
        with pytest.raises(TextError, match=r"no usable text in .* got no such file"):
            list(Corpus(tmp_path).documents("train"))

    def test_unknown_corpus_at_once_with_the_nearest_name(self):
        with pytest.raises(TextError, match=r"unknown text 'wiki-em' .* wiki-en"):
            Corpus(["sotu", "wiki-em"])

    def test_no_source(self):
        with pytest.raises(TextError, match="no text given"):
            Corpus([])

    def test_unknown_split(self, tmp_path):
        with pytest.raises(TextError, match=r"unknown split 'valid' .* validation"):
            Corpus(jsonl(tmp_path / "a.jsonl", ["x"])).documents("valid")  # pyright: ignore[reportArgumentType]


def test_describe_is_json_and_counts(tmp_path):
    rows = words(200)
    corpus = Corpus([jsonl(tmp_path / "a.jsonl", [*rows, rows[0]])], seed=7)
    described = json.loads(json.dumps(corpus.describe()))
    (source,) = described["sources"]
    assert source["kind"] == "files" and source["name"] == str(tmp_path / "a.jsonl")
    assert source["documents"] == {split: sum(1 for _ in corpus.documents(split)) for split in SPLITS}
    assert sum(source["documents"].values()) == 200
    assert source["characters"] == sum(map(len, rows)) and source["duplicates_dropped"] == 1
    assert len(source["sha256"]) == 64 and source["skipped"] == []
    assert described["split_rule"] == text.SPLIT_RULE and described["seed"] == 7 and described["column"] == "text"


def test_describe_a_streamed_source(monkeypatch):
    monkeypatch.setattr(assets, "open_dataset", lambda *_: (({"text": f"{n}"} for n in range(5)), "c0ffee"))
    corpus = Corpus("owner/name")
    list(corpus.documents("train"))
    (source,) = corpus.describe()["sources"]
    assert source["revision"] == "c0ffee" and source["documents"] is None and source["characters"] is None
