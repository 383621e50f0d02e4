"""The footer of a .parquet file, checked before its values are read: what of a column is text, and how much of it may be held at once.

A column of a few kilobytes can stand for any number of rows and bytes: compressed, or as one long value that every row refers to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

STRINGS = 100 * 10**6
"""Longest string in a footer, bytes; pyarrow's own limit. No longer than the file in any case."""
CONTAINERS = 10**6
"""Longest list in a footer; pyarrow's own limit. No longer than the file has bytes in any case."""
GROUP_BYTES = 4 * 2**30
"""Largest text column of a row group, uncompressed; row groups of published data sets have up to about 1 GB."""
GROUP_ROWS = 64 * 2**20
"""Most rows of a row group; pyarrow writes no more."""
BATCH_ROWS = 1024
"""Rows read at once, where no value can be long."""
BATCH_BYTES = 2 * 2**30
"""What those rows may come to when each is the longest value that more than one row can refer to."""
PLAIN = {0, 2, 3, 4, 8}
"""Encodings (plain, dictionary, runs, packed bits) in which rows share values through a dictionary only."""
FOOTER_BYTES = 64 * 2**20
"""Largest footer; one of a thousand row groups and ten columns has about 2 MB."""
NESTED = 32
"""Structures within structures in a footer, at most."""


class Chunk(NamedTuple):
    """A column in one row group, in the footer's words. `start` is where its first page begins, in bytes from the file's beginning."""

    group: int
    rows: int
    bytes: int
    encodings: set[int]
    start: int


def limits(path: Path) -> dict[str, Any]:
    """Options of `pyarrow.parquet.ParquetFile` that bound what it allocates for the footer of the file at `path`."""
    size = max(path.stat().st_size, 1)
    return {"thrift_string_size_limit": min(size, STRINGS), "thrift_container_size_limit": min(size, CONTAINERS)}


def chunks(path: Path, column: str) -> list[Chunk]:
    """A column in each row group of the file at `path`.

    Read here and not through pyarrow, which ends the process (`std::terminate`) where some numbers of a column do not agree.

    Raises:
        ValueError: the footer is damaged or too long.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        size = path.stat().st_size
        file.seek(max(size - 8, 0))
        end = file.read(8)
        length = int.from_bytes(end[:4], "little")
        if len(end) < 8 or end[4:] != b"PAR1" or length > min(size - 8, FOOTER_BYTES):
            raise ValueError(f"no readable footer of at most {FOOTER_BYTES} bytes")
        file.seek(size - 8 - length)
        footer = Compact(file.read(length)).struct()
    try:
        return [found for number, group in enumerate(footer.get(4, [])) for found in _of_group(number, group, column.encode())]
    except (TypeError, AttributeError, LookupError) as error:
        raise ValueError("the footer is damaged") from error


def _of_group(number: int, group: dict[int, Any], column: bytes) -> Iterator[Chunk]:
    # Numbers of the fields as in parquet.thrift: RowGroup, ColumnChunk and ColumnMetaData.
    for about in (chunk[3] for chunk in group[1]):
        if about[3] == [column]:
            start = about[11] if 0 < about.get(11, 0) < about[9] else about[9]
            yield Chunk(number, int(group[3]), int(about[6]), set(about[2]), int(start))


def refusal(table: Any, column: str, found: Sequence[Chunk]) -> str:
    """Why a column is not read, empty where it is.

    Args:
        table: a `pyarrow.parquet.ParquetFile`.
        column: one of its fields.
        found: its chunks.
    """
    from pyarrow import types

    kind = table.schema_arrow.types[table.schema_arrow.names.index(column)]
    if types.is_nested(kind):
        return f"field {column!r} is {str(kind)[:100]}, not text"
    for chunk in found:
        if not 0 <= chunk.rows <= GROUP_ROWS:
            return f"row group {chunk.group} claims {chunk.rows} rows, more than {GROUP_ROWS}"
        if not 0 <= chunk.bytes <= GROUP_BYTES:
            return f"row group {chunk.group} claims {chunk.bytes} bytes of {column!r}, more than {GROUP_BYTES}"
    return ""


def batch_rows(path: Path, found: Sequence[Chunk]) -> int:
    """How many rows may be read at once, so that they fit into `BATCH_BYTES` even if all of them share one long value."""
    longest = 1
    with path.open("rb") as file:
        for chunk in found:
            file.seek(min(max(chunk.start, 0), 2**62))
            known = _dictionary_bytes(file.read(32)) if chunk.encodings <= PLAIN else None
            longest = max(longest, chunk.bytes if known is None else known)
    return min(max(BATCH_BYTES // longest, 1), BATCH_ROWS)


def texts(column: Any) -> Iterator[object]:
    """The values of a column as Python's; None for what is no text or not UTF-8."""
    from pyarrow import types

    kind = column.type.value_type if types.is_dictionary(column.type) else column.type
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        # Not converted: a date out of range or an unknown time zone raises.
        yield from (None for _ in range(len(column)))
        return
    for value in column:  # one at a time: rows that share a long value would each get a copy of it
        try:
            yield value.as_py()
        except UnicodeDecodeError:
            yield None


def _dictionary_bytes(header: bytes) -> int | None:
    """Uncompressed size of the dictionary that a page header opens, 0 if it opens another page, None if it cannot be told.

    A page header begins with two 32-bit integers: the type (2 is a dictionary) and that size.
    """
    reader, numbers = Compact(header), list[int]()
    try:
        for _ in range(2):
            if reader.take(1) != b"\x15":
                return None
            numbers.append(reader.integer())
    except ValueError:
        return None
    return max(numbers[1], 0) if numbers[0] == 2 else 0


class Compact:
    """A reader of Thrift's compact protocol, in which footers are written: structures become dicts by the number of the field.

    Raises ValueError, from every method, where the bytes end early, a list is longer than they are, or a type is unknown.
    """

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise ValueError("the footer ends early")
        self.at += count
        return self.data[self.at - count : self.at]

    def unsigned(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise ValueError("a number in the footer is too long")

    def integer(self) -> int:
        value = self.unsigned()
        return value >> 1 ^ -(value & 1)

    def struct(self, depth: int = 0) -> dict[int, Any]:
        fields: dict[int, Any] = {}
        number = 0
        while head := self.take(1)[0]:
            number = number + (head >> 4) if head >> 4 else self.integer()
            kind = head & 15
            fields[number] = kind == 1 if kind in (1, 2) else self.value(kind, depth + 1)
        return fields

    def value(self, kind: int, depth: int) -> Any:
        if depth > NESTED:
            raise ValueError("the footer is nested too deep")
        if kind in (4, 5, 6):
            return self.integer()
        if kind in (1, 2, 3):
            return self.take(1)[0]
        if kind == 7:
            return self.take(8)
        if kind == 8:
            return self.take(self.unsigned())
        if kind in (9, 10):
            return self.items(depth)
        if kind == 12:
            return self.struct(depth)
        raise ValueError("an unknown type in the footer")  # also maps, of which parquet has none

    def items(self, depth: int) -> list[Any]:
        head = self.take(1)[0]
        count = self.unsigned() if head >> 4 == 15 else head >> 4
        if count > len(self.data) - self.at:
            raise ValueError("a list in the footer is longer than it")
        return [self.value(head & 15, depth + 1) for _ in range(count)]
