"""Where documents come from, and how they become packed sequences of tokens.

Documents of several sources go into one `Corpus`, which drops exact duplicates, splits by document (see `split_of`) and packs:

    tokens of document 1, EOS, tokens of document 2, EOS, …   cut into sequences, each with BOS first where the tokenizer has one

The identity of a document decides its split. Built-in corpora name their documents; a document out of a file or a Hugging Face dataset is
named by the MD5 of its text, so that it stays in its split wherever the file lies, whatever stands before it in the file, and with whatever
else it is read.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from jaxtyping import Int64
from torch import Tensor

from .errors import TextError, TooLittleText, nearest
from .sources import Document, Source, digest_of, open_source

Split = Literal["train", "validation", "test"]
SPLIT_RULE = "md5(document id) mod 20: 0 is test, 1 is validation, the rest is train; ids outside built-in corpora are 'md5:' + md5(text)"

CHARACTERS_PER_BATCH = 65_536
"""Text given to the tokenizer at a time, in characters: small enough to start at once, large enough to keep its threads busy."""
SHUFFLE_DOCUMENTS = 256
"""Size of the shuffle buffer of streamed sources, in documents."""
SAMPLE_TOKENS = 1_000_000
"""`Corpus.sample` considers a whole split up to this many tokens (about 4 MB of text)."""
SAMPLE_SPREAD = 8
"""… and beyond that, and of streamed sources, this many times the tokens asked for."""

log = logging.getLogger("mxd")


class TokenBlock(NamedTuple):
    """Packed sequences, and where each comes from."""

    ids: Int64[Tensor, "sequence position"]
    """Token ids; BOS at position 0 where the tokenizer has one."""
    documents: Int64[Tensor, " sequence"]
    """The document in which each sequence starts, as `hash63` of its id: the unit to resample in a bootstrap."""


def split_of(document_id: str) -> Split:
    """The split a document belongs to: MD5 of its id, as a number, modulo 20; 0 is test, 1 is validation, the rest train."""
    remainder = int.from_bytes(digest_of(document_id), "big") % 20
    return "test" if remainder == 0 else "validation" if remainder == 1 else "train"


def hash63(document_id: str) -> int:
    """A non-negative int64 that stands for a document id: the upper 63 bits of its MD5."""
    return int.from_bytes(digest_of(document_id)[:8], "big") >> 1


class Corpus:
    """The documents of several sources, without duplicates, split into train, validation and test.

    Sources held in memory (the built-in corpora, and files up to `sources.MEMORY_BYTES`) are read once, at the first use, and come in a
    seeded random order. Streamed sources (larger files, Hugging Face datasets) are read from their beginning at every call, in their own
    order, stirred by a shuffle buffer. Where there are several such streams, the one that has given the fewest characters is read next.

    Exact duplicates are dropped across all sources: the first one stays. A duplicate never straddles two splits.

    Args:
        sources: names of built-in corpora, paths of .txt, .jsonl or .parquet files or of folders of them, or Hugging Face datasets as
            ``owner/name`` or ``owner/name:configuration``.
        column: the field that holds the text in .jsonl, .parquet and Hugging Face datasets.
        seed: of the order of the documents.
        limit_documents: read at most this many usable documents of each source.

    Raises:
        TextError: a source is unknown or does not exist.
    """

    def __init__(
        self,
        sources: str | PathLike[str] | Sequence[str | PathLike[str]],
        *,
        column: str = "text",
        seed: int = 0,
        limit_documents: int | None = None,
    ) -> None:
        names = [sources] if isinstance(sources, str | PathLike) else list(sources)
        if not names:
            raise TextError("no text given", expected="at least one source", next="pass --text sotu wiki-en, or a file or folder")
        self.column, self.seed, self.limit_documents = column, seed, limit_documents
        self._sources = [open_source(str(name), column) for name in names]
        self._loaded: _Loaded | None = None

    def documents(self, split: Split) -> Iterator[Document]:
        """The documents of one split, each once.

        Raises:
            TextError: a source holds nothing usable, or there is no such split.
            AssetError: a built-in corpus cannot be fetched.
        """
        return self._ordered(split, self.seed)

    def blocks(self, tokenizer: Any, split: Split, *, tokens_per_sequence: int, sequences_per_block: int) -> Iterator[TokenBlock]:
        """The split once, packed. Tokenises as it goes; the last incomplete sequence is dropped, and the last block may be smaller.

        Args:
            tokenizer: a transformers tokenizer.
            tokens_per_sequence: length of every sequence, BOS included.
            sequences_per_block: sequences in every block but the last.

        Raises:
            TextError: as `documents`; also when the split does not fill one sequence.
        """
        _check_positive(sequences_per_block=sequences_per_block)
        waiting: list[TokenBlock] = []
        found = 0
        for packed in pack(tokenizer, self.documents(split), tokens_per_sequence):
            found += len(packed.ids)
            waiting.append(packed)
            if sum(len(block.ids) for block in waiting) < sequences_per_block:
                continue
            block = _join(waiting)
            whole = len(block.ids) // sequences_per_block * sequences_per_block
            for start in range(0, whole, sequences_per_block):
                yield _rows(block, slice(start, start + sequences_per_block))
            waiting = [_rows(block, slice(whole, None))]
        if not found:
            raise _too_little(split, 1, tokens_per_sequence, 0)
        last = _join(waiting)
        if len(last.ids):
            yield last

    def sample(self, tokenizer: Any, split: Split, *, sequences: int, tokens_per_sequence: int, seed: int) -> TokenBlock:
        """Packed sequences drawn at random, without replacement, from the whole split.

        Of a split of more than `SAMPLE_TOKENS` tokens, a random selection of documents is considered; of streamed sources, the first
        documents (`SAMPLE_SPREAD` times the tokens asked for).

        Args:
            tokenizer: a transformers tokenizer.
            sequences: how many to draw.
            tokens_per_sequence: length of every sequence, BOS included.
            seed: of the draw.

        Returns:
            One block of exactly `sequences` sequences, in random order.

        Raises:
            TextError: as `documents`; also when the split holds fewer sequences.
        """
        _check_positive(sequences=sequences)
        enough = SAMPLE_SPREAD * sequences * tokens_per_sequence
        if not self.streamed:
            enough = max(enough, SAMPLE_TOKENS)
        blocks: list[TokenBlock] = []
        tokens = 0
        for packed in pack(tokenizer, self._ordered(split, seed), tokens_per_sequence):
            blocks.append(packed)
            tokens += packed.ids.numel()
            if tokens >= enough:
                break
        found = sum(len(block.ids) for block in blocks)
        if found < sequences:
            raise _too_little(split, sequences, tokens_per_sequence, found)
        chosen = torch.randperm(found, generator=torch.Generator().manual_seed(seed))[:sequences]
        return _rows(_join(blocks), chosen)

    def describe(self) -> dict[str, Any]:
        """What this corpus is made of, ready for JSON: per source its kind, name, documents per split, characters, duplicates dropped,
        checksum or revision, and what was skipped and why (counts are None for streamed sources, of which the whole is never read)."""
        loaded = self._load()
        sources: list[dict[str, Any]] = []
        for source in self._sources:
            known = source.describe()
            sources.append({**known, **(loaded.counts[source] if source in loaded.counts else _uncounted()), **source.skipped.describe()})
        return {
            "sources": sources,
            "split_rule": SPLIT_RULE,
            "column": self.column,
            "seed": self.seed,
            "limit_documents": self.limit_documents,
        }

    def pin(self, described: Mapping[str, Any]) -> None:
        """Read every source as it was when `describe` said this, where it can still be had so."""
        for source, was in zip(self._sources, described.get("sources", ()), strict=False):
            source.pin(was)

    @property
    def streamed(self) -> bool:
        """Whether any source is read as it comes, so that how much it holds is known only at its end."""
        return any(source.streamed for source in self._sources)

    def _ordered(self, split: Split, seed: int) -> Iterator[Document]:
        if split not in get_args(Split):
            raise TextError(f"unknown split {split!r}", expected=nearest(str(split), get_args(Split)), got=str(split))
        return self._iterate(split, seed)

    def _iterate(self, split: Split, seed: int) -> Iterator[Document]:
        loaded = self._load()
        held = list(loaded.documents[split])
        random.Random(seed).shuffle(held)
        streamed_already: set[bytes] = set()
        streams = [self._stream(source, split, loaded.digests, streamed_already, seed) for source in self._sources if source.streamed]
        return _balanced([iter(held), *streams])

    def _stream(self, source: Source, split: Split, held: set[bytes], already: set[bytes], seed: int) -> Iterator[Document]:
        """One streamed source. Its ids come from the text, so that duplicates share a split and only that split need be remembered."""

        def kept() -> Iterator[Document]:
            for document in self._read(source):
                if split_of(document.id) != split or (digest := digest_of(document.text)) in held or digest in already:
                    continue
                already.add(digest)
                yield document

        return _stirred(kept(), random.Random(seed))

    def _read(self, source: Source) -> Iterator[Document]:
        """The usable documents of one source; says once what was skipped."""
        source.skipped.clear()
        usable = 0
        for document in itertools.islice(source.read(), self.limit_documents):
            usable += 1
            yield document
        if source.skipped.count and not source.warned:
            source.warned = True
            log.warning("%s: skipped %s", source.name, source.skipped.summary())
        if not usable and self.limit_documents != 0:
            raise TextError(
                f"no usable text in {source.name}",
                expected="text in UTF-8: .txt (one document a file), .jsonl or .parquet (one a row)",
                got=source.skipped.summary() or "no such file",
                next=f"check the files, and --text-column (now {self.column})",
            )

    def _load(self) -> _Loaded:
        """Read the sources that are held in memory, once."""
        if self._loaded is None:
            loaded = _Loaded({"train": [], "validation": [], "test": []}, set(), {})
            for source in self._sources:
                if not source.streamed:
                    loaded.counts[source] = self._load_one(source, loaded)
            self._loaded = loaded
        return self._loaded

    def _load_one(self, source: Source, loaded: _Loaded) -> dict[str, Any]:
        documents = dict.fromkeys(get_args(Split), 0)
        characters = duplicates = 0
        for document in self._read(source):
            if (digest := digest_of(document.text)) in loaded.digests:
                duplicates += 1
                continue
            loaded.digests.add(digest)
            split = split_of(document.id)
            loaded.documents[split].append(document)
            documents[split] += 1
            characters += len(document.text)
        return {"documents": documents, "characters": characters, "duplicates_dropped": duplicates}


class _Loaded(NamedTuple):
    documents: dict[Split, list[Document]]
    digests: set[bytes]
    counts: dict[Source, dict[str, Any]]


def pack(tokenizer: Any, documents: Iterable[Document], tokens_per_sequence: int) -> Iterator[TokenBlock]:
    """Tokenise documents and cut them into sequences, a batch of documents at a time.

    Raises:
        TextError: `tokens_per_sequence` leaves no room beside BOS.
    """
    bos, eos = cast("int | None", tokenizer.bos_token_id), cast("int | None", tokenizer.eos_token_id)
    body = tokens_per_sequence - (bos is not None)
    _check_positive(**{"tokens_per_sequence (without BOS)": body})
    stream = owners = torch.empty(0, dtype=torch.int64)
    before: int | None = None
    for batch in _batches(documents):
        # verbose=False: a document longer than the model's context is no reason to warn, it is cut below.
        encoded = tokenizer([document.text for document in batch], add_special_tokens=False, return_attention_mask=False, verbose=False)
        tokens: list[int] = []
        names: list[int] = []
        lengths: list[int] = []
        for document, ids in zip(batch, encoded["input_ids"], strict=True):
            if not ids:
                continue
            if before is not None and eos is not None:  # EOS belongs to the document that it ends
                tokens.append(eos)
                names.append(before)
                lengths.append(1)
            before = hash63(document.id)
            tokens.extend(ids)
            names.append(before)
            lengths.append(len(ids))
        stream = torch.cat([stream, torch.tensor(tokens, dtype=torch.int64)])
        owners = torch.cat([owners, torch.tensor(names, dtype=torch.int64).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))])
        if whole := len(stream) // body:
            rows = stream[: whole * body].view(whole, body)
            if bos is not None:
                rows = torch.cat([rows.new_full((whole, 1), bos), rows], dim=1)
            yield TokenBlock(rows, owners[: whole * body : body].clone())
            stream, owners = stream[whole * body :], owners[whole * body :]


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= CHARACTERS_PER_BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _balanced(streams: list[Iterator[Document]]) -> Iterator[Document]:
    """One stream out of several: always from the one that has given the fewest characters, until all are at their end."""
    queue = [(0, number) for number in range(len(streams))]
    while queue:
        given, number = heapq.heappop(queue)
        if (document := next(streams[number], None)) is not None:
            yield document
            heapq.heappush(queue, (given + len(document.text), number))


def _stirred(documents: Iterator[Document], rng: random.Random) -> Iterator[Document]:
    """A shuffle buffer: each document that comes in pushes a random one out."""
    buffer = list(itertools.islice(documents, SHUFFLE_DOCUMENTS))
    for document in documents:
        place = rng.randrange(len(buffer))
        buffer[place], document = document, buffer[place]
        yield document
    rng.shuffle(buffer)
    yield from buffer


def _join(blocks: list[TokenBlock]) -> TokenBlock:
    if len(blocks) == 1:
        return blocks[0]
    return TokenBlock(torch.cat([block.ids for block in blocks]), torch.cat([block.documents for block in blocks]))


def _rows(block: TokenBlock, rows: slice | Tensor) -> TokenBlock:
    return TokenBlock(block.ids[rows], block.documents[rows])


def _uncounted() -> dict[str, Any]:
    return {"documents": None, "characters": None, "duplicates_dropped": None}


def _check_positive(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise TextError(f"{name} is too small", expected="at least 1", got=str(count))


def _too_little(split: str, sequences: int, tokens_per_sequence: int, found: int) -> TooLittleText:
    return TooLittleText(
        f"too little {split} text",
        expected=f"at least {sequences} sequences of {tokens_per_sequence} tokens",
        got=f"{found} (text is split by document: of 20 documents about 18 are train, 1 validation, 1 test; a .txt file is one document)",
        next="give more documents with --text, or ask for fewer sequences or tokens",
    )
