"""The header of a .gguf file, checked before any library reads it.

Libraries take the numbers in it at their word: a length, a count or a shape that is not there makes them allocate or loop for it.
Here nothing is allocated by a number out of the file, and every length must fit into what is left of it.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

from .errors import HostError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
KEY_BYTES = 2**16
"""Longest name of a key or a tensor."""
ELEMENTS = 2**23
"""Elements of all arrays together; a tokenizer of 262,144 tokens has about 1.3 million."""
NESTED = 4
"""Arrays within arrays, at most."""
DIMENSIONS = 4
"""Dimensions of a tensor, at most, as in ggml."""
MODULES = 100_000
"""Blocks times experts, at most: a module may be built for each. Kimi K2 has 23,424."""

SCALARS: dict[int, str] = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
"""Number of a value type -> its code in `struct`; type 7 is a truth value."""
STRING, ARRAY, UINT32 = 8, 9, 4
BLOCKS: dict[int, tuple[int, int]] = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 40),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292),
    16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136),
    24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17),
}  # fmt: skip
"""Number of a tensor type -> (elements, bytes) of a block. Of a type that is not here, only the offset is checked."""


class Tensor(NamedTuple):
    """What the header says of one tensor; `bytes` is 0 for an unknown type."""

    name: str
    offset: int
    bytes: int


def check(path: Path) -> None:
    """Read the header of the .gguf file at `path` and compare it with the size of the file.

    Raises:
        HostError: not a GGUF file of version 2 or 3, cut short, or with a count, length, type, shape or offset that cannot be.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        _Header(path, file).check()


class _Header:
    """A reader that knows how much of the file is left."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.size = path.stat().st_size
        self.at = 0
        self.elements = 0

    def check(self) -> None:
        self.magic()
        tensors, keys = self.number("Q", "the number of tensors"), self.number("Q", "the number of keys")
        # A key takes at least 13 bytes (length, type, value), a tensor 32 (length, dimensions, one size, type, offset).
        self.fits(keys, 13, "keys")
        self.fits(tensors, 32, "tensors")
        values: dict[str, int | None] = {}
        for _ in range(keys):
            key = self.name("a key")
            if key in values:
                raise self.error("twice the same key", expected="each key once", got=key)
            values[key] = self.value(key)
        self.plausible(values, tensors)
        self.extents([self.tensor() for _ in range(tensors)], values["general.alignment"] or 32 if "general.alignment" in values else 32)

    def magic(self) -> None:
        if (magic := self.take(4, "the magic number")) != MAGIC:
            raise self.error("it is not a GGUF file", expected=repr(MAGIC), got=repr(magic))
        version = self.number("I", "the version")
        if version not in VERSIONS:
            swapped = version & 0xFFFF == 0 and version >> 24 in VERSIONS
            got = f"version {version >> 24}, big endian" if swapped else f"version {version}"
            raise self.error("it cannot be read", expected="GGUF of version 2 or 3, little endian", got=got)

    def value(self, key: str) -> int | None:
        """Passes over the value of a key; returns it if it is a whole number."""
        kind = self.number("I", f"the type of {key}")
        if key == "general.alignment" and kind != UINT32:
            raise self.error("wrong type of general.alignment", expected="type 4 (uint32)", got=f"type {kind}")
        if kind in SCALARS:
            found = self.scalar(SCALARS[kind], key)
            return int(found) if SCALARS[kind] not in "fd" else None
        self.skip(kind, key, 0)
        return None

    def skip(self, kind: int, key: str, depth: int) -> None:
        """Passes over a string or an array, without keeping it."""
        if kind == STRING:
            self.over(self.number("Q", f"the length of {key}"), key)
        elif kind != ARRAY or depth == NESTED:
            raise self.error(f"wrong type of {key}", expected=f"type 0 to 12, nested {NESTED} times at most", got=f"type {kind}")
        else:
            inner, count = self.number("I", f"the type in {key}"), self.number("Q", f"the length of {key}")
            width = struct.calcsize(f"<{SCALARS[inner]}") if inner in SCALARS else 0
            self.fits(count, width or 8, f"elements of {key}")  # a string or an array begins with a length of 8 bytes
            self.elements += count
            if self.elements > ELEMENTS:
                raise self.error("absurd arrays", expected=f"at most {ELEMENTS} elements in all", got=f"{self.elements} up to {key}")
            self.over(count * width, key)
            for _ in range(0 if width else count):
                self.skip(inner, key, depth + 1)

    def plausible(self, values: dict[str, int | None], tensors: int) -> None:
        """Refuses numbers of blocks and experts that no file has tensors for, and an alignment that is none."""
        blocks = max([value or 0 for key, value in values.items() if key.endswith(".block_count")], default=0)
        experts = max([value or 0 for key, value in values.items() if key.endswith(".expert_count")], default=0)
        if blocks > tensors:
            raise self.error("absurd block_count", expected=f"at most one block for each of {tensors} tensors", got=f"{blocks}")
        if blocks * experts > MODULES:
            raise self.error("absurd expert_count", expected=f"at most {MODULES} experts in all blocks", got=f"{blocks * experts}")
        alignment = values.get("general.alignment", 32) or 0
        if alignment < 1 or alignment & (alignment - 1):
            raise self.error("impossible general.alignment", expected="a power of two", got=f"{alignment}")

    def tensor(self) -> Tensor:
        name = self.name("the name of a tensor")
        dimensions = self.number("I", f"the dimensions of {name}")
        if not 1 <= dimensions <= DIMENSIONS:
            raise self.error(f"absurd shape of {name}", expected=f"1 to {DIMENSIONS} dimensions", got=f"{dimensions}")
        shape = [self.number("Q", f"the shape of {name}") for _ in range(dimensions)]
        kind, offset = self.number("I", f"the type of {name}"), self.number("Q", f"the offset of {name}")
        elements, length = BLOCKS.get(kind, (1, 0))
        if min(shape) < 1 or shape[0] % elements:
            raise self.error(f"absurd shape of {name}", expected=f"rows of a multiple of {elements}", got=f"{shape}")
        return Tensor(name, offset, math.prod(shape) // elements * length)

    def extents(self, tensors: list[Tensor], alignment: int) -> None:
        """Every tensor lies in the file, in a place of its own."""
        start = -(-self.at // alignment) * alignment
        names: set[str] = set()
        for tensor in tensors:
            if tensor.name in names:
                raise self.error("twice the same tensor", expected="each tensor once", got=tensor.name)
            names.add(tensor.name)
            if tensor.offset % alignment:
                raise self.error(f"misplaced {tensor.name}", expected=f"an offset that {alignment} divides", got=f"{tensor.offset}")
        end = start
        for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
            if start + tensor.offset < end and tensor.bytes:
                raise self.error(f"{tensor.name} overlaps another tensor", expected=f"byte {end} or behind", got=f"{start + tensor.offset}")
            end = start + tensor.offset + tensor.bytes
            if end > self.size:
                raise self.short(f"{tensor.name} of {tensor.bytes} bytes", end)

    def name(self, what: str) -> str:
        length = self.number("Q", f"the length of {what}")
        if length > KEY_BYTES:
            raise self.error(f"absurd length of {what}", expected=f"at most {KEY_BYTES} bytes", got=f"{length}")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError:
            raise self.error(f"{what} is not UTF-8", expected="UTF-8", got=f"other bytes before byte {self.at}") from None

    def number(self, code: str, what: str) -> int:
        """The next whole number, of a type by its code in `struct`."""
        return int(self.scalar(code, what))

    def scalar(self, code: str, what: str) -> float:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}"), what))[0]

    def take(self, count: int, what: str) -> bytes:
        """The next `count` bytes; callers ask for few, or have compared `count` with `KEY_BYTES`."""
        found = self.file.read(count) if self.at + count <= self.size else b""
        if len(found) < count:
            raise self.short(what, self.at + count)
        self.at += count
        return found

    def over(self, count: int, what: str) -> None:
        """Passes over `count` bytes."""
        if self.at + count > self.size:
            raise self.short(what, self.at + count)
        self.at += count
        self.file.seek(self.at)

    def fits(self, count: int, least: int, what: str) -> None:
        """Refuses `count` things of at least so many bytes each where there is no room for them."""
        if self.at + count * least > self.size:
            raise self.short(f"{count} {what}", self.at + count * least)

    def short(self, what: str, end: int) -> HostError:
        return self.error("it is cut short or damaged", expected=f"{what}, up to byte {end}", got=f"{self.size} bytes")

    def error(self, what: str, *, expected: str, got: str) -> HostError:
        # A name out of the file may hold anything and be long.
        what, expected, got = (_shown(part) for part in (what, expected, got))
        return HostError(f"{self.path} could not be loaded: {what}", expected=expected, got=got, next="download or convert it again")


def _shown(text: str) -> str:
    printable = "".join(letter if letter.isprintable() else "?" for letter in text)
    return printable if len(printable) <= 200 else f"{printable[:197]}..."
