"""GGUF headers that are whole, cut short, or lie."""

from __future__ import annotations

import random
import struct
import time
from pathlib import Path

import pytest

from mxd import gguf_header
from mxd.errors import HostError
from mxd.host import Host
from tests.reliability.figures import note
from tests.reliability.foreign import changed, refused

pytestmark = pytest.mark.usefixtures("one_thread")

Key = tuple[bytes, int, bytes]
Info = tuple[bytes, tuple[int, ...], int, int]


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def array(kind: int, count: int, content: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + content


UINT32 = struct.pack("<I", 1)
KEYS: tuple[Key, ...] = (
    (b"general.architecture", 8, string(b"llama")),
    (b"llama.block_count", 4, UINT32),
    (b"general.alignment", 4, struct.pack("<I", 32)),
    (b"every.uint8", 0, b"\1"),
    (b"every.int8", 1, b"\xff"),
    (b"every.uint16", 2, b"\1\0"),
    (b"every.int16", 3, b"\1\0"),
    (b"every.int32", 5, UINT32),
    (b"every.float32", 6, struct.pack("<f", 1.5)),
    (b"every.bool", 7, b"\1"),
    (b"every.uint64", 10, struct.pack("<Q", 2**63)),
    (b"every.int64", 11, struct.pack("<q", -1)),
    (b"every.float64", 12, struct.pack("<d", float("nan"))),
    (b"tokenizer.ggml.tokens", 9, array(8, 2, string(b"a") + string("\u00fc".encode()))),
    (b"tokenizer.ggml.scores", 9, array(6, 2, struct.pack("<2f", 0, 1))),
    (b"nested", 9, array(9, 2, array(4, 1, UINT32) + array(8, 0, b""))),
)
INFOS: tuple[Info, ...] = ((b"token_embd.weight", (8, 2), 0, 0), (b"blk.0.weight", (64, 2), 3, 64), (b"blk.0.new", (3,), 1000, 160))
DATA = bytes(160 + 32)


def gguf(
    keys: tuple[Key, ...] = KEYS, infos: tuple[Info, ...] = INFOS, data: bytes = DATA, *, version: int = 3, counts: tuple[int, int] = (0, 0)
) -> bytes:
    """A GGUF file; `counts` are added to the true numbers of tensors and keys."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(infos) + counts[0], len(keys) + counts[1])
    head += b"".join(string(name) + struct.pack("<I", kind) + value for name, kind, value in keys)
    for name, shape, kind, offset in infos:
        head += string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return head + bytes(-len(head) % 32) + data


def with_key(name: bytes, kind: int, value: bytes) -> bytes:
    return gguf((*(key for key in KEYS if key[0] != name), (name, kind, value)))


def with_tensor(shape: tuple[int, ...], kind: int = 0, offset: int = 0, name: bytes = b"x") -> bytes:
    return gguf(infos=((name, shape, kind, offset), (b"y", (1,), 0, 160)))


def nested(depth: int) -> bytes:
    return array(4, 1, UINT32) if depth == 0 else array(9, 1, nested(depth - 1))


BAD_GGUF: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cut short or damaged | expected the magic number, up to byte 4 | got 0 bytes"),
    "other magic": (b"PK\3\4" + gguf()[4:], r"it is not a GGUF file | expected b'GGUF' | got b'PK\x03\x04'"),
    "version 1": (gguf(version=1), "expected GGUF of version 2 or 3, little endian | got version 1"),
    "big endian": (gguf(version=3 << 24), "got version 3, big endian"),
    "many tensors": (gguf(counts=(2**63, 0)), "expected 9223372036854775811 tensors, up to byte"),
    "many keys": (gguf(counts=(0, 2**60)), "keys, up to byte"),
    "long name": (
        gguf(((struct.pack("<Q", 1), 4, UINT32),)).replace(string(struct.pack("<Q", 1)), struct.pack("<Q", 2**62)),
        "absurd length",
    ),
    "name not UTF-8": (with_key(b"\xff", 4, UINT32), "a key is not UTF-8"),
    "same key twice": (gguf((*KEYS, KEYS[0])), "each key once | got general.architecture"),
    "unknown value type": (with_key(b"k", 13, b"\1"), "wrong type of k"),
    "unknown type in an array": (with_key(b"k", 9, array(99, 1, UINT32 * 2)), "wrong type of k | expected type 0 to 12"),
    "long string": (with_key(b"k", 8, struct.pack("<Q", 2**63)), "expected k, up to byte"),
    "long array": (with_key(b"k", 9, array(12, 2**61, b"")), "expected 2305843009213693952 elements of k, up to byte"),
    "long array of strings": (with_key(b"k", 9, array(8, 2**61, b"")), "elements of k, up to byte"),
    "deep arrays": (with_key(b"k", 9, nested(10)), "nested 4 times at most"),
    "alignment of another type": (with_key(b"general.alignment", 10, struct.pack("<Q", 32)), "type 4 (uint32) | got type 10"),
    "alignment 0": (with_key(b"general.alignment", 4, struct.pack("<I", 0)), "expected a power of two | got 0"),
    "alignment 3": (with_key(b"general.alignment", 4, struct.pack("<I", 3)), "expected a power of two | got 3"),
    "many blocks": (with_key(b"llama.block_count", 4, struct.pack("<I", 10**9)), "one block for each of 3 tensors | got 1000000000"),
    "many experts": (with_key(b"llama.expert_count", 4, struct.pack("<I", 10**6)), "absurd expert_count"),
    "five dimensions": (with_tensor((1,) * 5), "expected 1 to 4 dimensions | got 5"),
    "2**31 dimensions": (
        gguf().replace(struct.pack("<I2Q", 2, 8, 2), struct.pack("<I2Q", 2**31, 8, 2)),
        "1 to 4 dimensions | got 2147483648",
    ),
    "absurd shape": (with_tensor((2**62, 2**62)), "cut short or damaged | expected x of"),
    "no elements": (with_tensor((0, 4)), "absurd shape of x"),
    "half a block": (with_tensor((33, 1), kind=3), "expected rows of a multiple of 32 | got [33, 1]"),
    "offset behind the end": (with_tensor((1,), offset=2**40), "expected x of 4 bytes, up to byte"),
    "offset of an unknown type behind the end": (with_tensor((1,), kind=999, offset=2**40), "expected x of 0 bytes, up to byte"),
    "odd offset": (with_tensor((1,), offset=7), "expected an offset that 32 divides | got 7"),
    "over another": (
        with_tensor((48,), offset=0).replace(struct.pack("<IQ", 0, 160), struct.pack("<IQ", 0, 32)),
        "overlaps another tensor",
    ),
    "same tensor twice": (with_tensor((1,), name=b"y"), "each tensor once | got y"),
}


@pytest.mark.parametrize("version", gguf_header.VERSIONS)
def test_a_whole_gguf_file_passes(tmp_path: Path, version: int) -> None:
    path = tmp_path / "whole.gguf"
    path.write_bytes(gguf(version=version))
    gguf_header.check(path)


@pytest.mark.parametrize("kind", sorted(BAD_GGUF))
def test_a_gguf_file_that_lies_is_refused(tmp_path: Path, kind: str) -> None:
    data, words = BAD_GGUF[kind]
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    said = refused(lambda: Host.load(str(path)))
    assert words in said and said.endswith("next: download or convert it again") and len(said) < 1000


def test_a_gguf_file_cut_short_anywhere_is_named_so(tmp_path: Path) -> None:
    path, whole = tmp_path / "x.gguf", gguf()
    end = len(whole) - 32  # the last tensor is of an unknown type, whose length cannot be known
    for length in range(end):
        path.write_bytes(whole[:length])
        assert "cut short or damaged" in refused(lambda: gguf_header.check(path)), length


def test_sizes_of_blocks_are_those_of_the_library() -> None:
    from gguf.constants import GGML_QUANT_SIZES

    known = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
    assert gguf_header.BLOCKS.items() <= known.items()


def fuzz_gguf(folder: Path, number: int, dice: random.Random) -> tuple[int, float]:
    """How many of so many changed files were refused, and the longest time that one took, in seconds."""
    path, whole = folder / "x.gguf", gguf()
    count, longest = 0, 0.0
    for _ in range(number):
        path.write_bytes(changed(whole, dice, len(whole) - len(DATA)))
        began = time.perf_counter()
        try:
            gguf_header.check(path)
        except HostError as error:
            assert len(str(error).splitlines()) == 1
            count += 1
        longest = max(longest, time.perf_counter() - began)
    return count, longest


def test_gguf_of_other_bytes(tmp_path: Path) -> None:
    count, longest = fuzz_gguf(tmp_path, 500, random.Random(0))
    assert 100 < count < 500 and longest < 2


@pytest.mark.slow
def test_gguf_of_other_bytes_many(tmp_path: Path) -> None:
    count, longest = fuzz_gguf(tmp_path, 30_000, random.Random(1))
    assert longest < 5
    note("GGUF headers of other bytes", inputs=30_000, refused=count, crashes=0)
