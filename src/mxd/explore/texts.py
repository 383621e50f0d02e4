"""The held-out text that is read, fixed on disk before the host reads it: every student sees the same tokens, also those added later."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from ..errors import RunError
from ..host import Host
from ..sealed import check_sum, read_json, write_atomic, write_sealed
from ..text import Corpus, Split, hash63, pack
from . import schema
from .spans import spans
from .store import making

TITLE = 60
"""Characters of its text that a document without a name is called by."""


class Texts(NamedTuple):
    """Sequences of tokens and the documents they begin in."""

    ids: NDArray[np.int64]
    """[sequence, position]."""
    documents: NDArray[np.int64]
    """[sequence] the one of `names` that each begins in."""
    names: list[str]
    """By document, in the order of the text."""
    sha256: str
    """Of the ids."""


def draw(corpus: Corpus, host: Host, split: str, *, tokens: int, tokens_per_sequence: int) -> Texts:
    """The first sequences of a split, at most `tokens` tokens, in the corpus's own (shuffled) order."""
    seen: dict[int, str] = {}

    def named() -> Iterator[Any]:
        for document in corpus.documents(cast("Split", split)):
            title = " ".join(document.text[: 4 * TITLE].split())[:TITLE]
            seen[hash63(document.id)] = title if document.id.startswith("md5:") else document.id
            yield document

    wanted = max(1, tokens // tokens_per_sequence)
    ids: list[NDArray[np.int64]] = []
    owners: list[int] = []
    for block in pack(host.tokenizer, named(), tokens_per_sequence):
        ids.append(block.ids.numpy())
        owners += block.documents.tolist()
        if len(owners) >= wanted:
            break
    if not owners:
        raise RunError(
            f"there is too little {split} text to collect from", expected=f"{tokens_per_sequence} tokens", next="mxd collect --help"
        )
    kept = np.concatenate(ids)[:wanted]
    place = {owner: number for number, owner in enumerate(seen)}
    documents = np.array([place[owner] for owner in owners[:wanted]], dtype=np.int64)
    return Texts(kept, documents, list(seen.values()), hashlib.sha256(kept.astype("<i8").tobytes()).hexdigest())


def save(folder: Path, texts: Texts, settings: dict[str, Any]) -> None:
    """Write the text as ``ids.npy`` and ``text.json``."""
    file = io.BytesIO()
    np.save(file, np.column_stack([texts.documents, texts.ids]), allow_pickle=False)
    write_atomic(folder / "ids.npy", file.getvalue())
    digest = hashlib.sha256(file.getvalue()).hexdigest()
    write_sealed(folder / "text.json", {"settings": settings, "names": texts.names, "ids_sha256": texts.sha256, "file_sha256": digest})


def kept(folder: Path, settings: dict[str, Any]) -> Texts | None:
    """What `save` wrote under the same settings; None if there is nothing.

    Raises:
        RunError: it was written under other settings, or is damaged.
    """
    if not (folder / "text.json").is_file():
        return None
    about = read_json(folder / "text.json")
    if about.get("settings") != settings:
        raise other_options(folder.parent, about.get("settings", {}), settings)
    data = check_sum(folder / "ids.npy", about["file_sha256"], mend="mxd collect RUN --overwrite")
    table = np.load(io.BytesIO(data), allow_pickle=False)
    return Texts(table[:, 1:], table[:, 0], list(about["names"]), about["ids_sha256"])


def other_options(folder: Path, was: Mapping[str, Any], asked: Mapping[str, Any]) -> RunError:
    """What is said of a folder that was collected with other options than those asked for."""
    other = [name for name, value in asked.items() if was.get(name) != value]
    return RunError(
        f"{folder} was collected with other options",
        expected=", ".join(f"{name} {str(was.get(name))[:40]}" for name in other),
        got=", ".join(f"{name} {str(asked[name])[:40]}" for name in other),
        next="add --overwrite to collect anew (labels and notes stay)",
    )


def write_database(path: Path, texts: Texts, losses: NDArray[np.float32], host: Host, split: str, meta: dict[str, str]) -> None:
    """Write ``text.sqlite``.

    Args:
        losses: the host's, [sequence, position], NaN where not measured.
    """
    with making(path, schema.TEXT, meta) as database:
        rows = [(number, name.partition("/")[0] if "/" in name else "", name, split) for number, name in enumerate(texts.names)]
        database.executemany("INSERT INTO doc VALUES (?, ?, ?, ?)", rows)
        database.executemany("INSERT INTO token VALUES (?, ?, ?)", vocabulary(host))
        for seq, ids in enumerate(texts.ids.tolist()):
            text, cuts = spans(ids, host.decode)
            blobs = (np.array(ids, "<u4").tobytes(), text, np.array(cuts, "<u4").tobytes(), losses[seq].astype("<f4").tobytes())
            database.execute("INSERT INTO seq VALUES (?, ?, ?, ?, ?, ?)", (seq, int(texts.documents[seq]), *blobs))


def vocabulary(host: Host) -> Iterator[tuple[int, str, int]]:
    """(id, text, whether it is special) of every token: one that is no whole character, or special, by the tokenizer's own name for it."""
    special = set(host.tokenizer.all_special_ids)
    for token, name in enumerate(host.tokenizer.convert_ids_to_tokens(list(range(len(host.tokenizer))))):
        text = host.decode([token]) if token not in special else ""
        yield token, text if text and "\ufffd" not in text else str(name or ""), int(token in special)
