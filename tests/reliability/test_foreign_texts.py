"""Texts from anywhere: lines without end, parquet files that lie, archives."""

from __future__ import annotations

import ast
import faulthandler
import os
import random
import re
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mxd import assets, parquet_footer, sources
from mxd.sources import open_source
from tests.reliability.figures import note
from tests.reliability.foreign import changed

pytestmark = pytest.mark.usefixtures("one_thread")

SOURCE = Path(assets.__file__).parent


def read(path: Path) -> tuple[list[str], str]:
    """The texts of a file, and what was said of the rest."""
    source = open_source(str(path), "text")
    found = [document.text for document in source.read()]
    return found, source.skipped.summary()


def test_long_lines_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LONGEST_BYTES", 20)
    path = tmp_path / "a.jsonl"
    longest = b'{"text": "12345678"}'
    assert len(longest) == 20
    path.write_bytes(longest + b"\n" + longest[:-1] + b"\n" + longest + b" " * 100 + b"\n" + b'{"text": "end"}\n' + b"x" * 41)
    found, said = read(path)
    assert found == ["end"]
    assert said == ("4: a.jsonl (line 1: longer than 20 bytes; line 2: not JSON; line 3: longer than 20 bytes; … 4 in all)")


def test_long_texts_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LONGEST_BYTES", 20)
    (tmp_path / "a.txt").write_text("x" * 20)
    (tmp_path / "b.txt").write_text("x" * 21)
    assert read(tmp_path) == (["x" * 20], "1: b.txt (longer than 20 bytes)")


def parquet(path: Path, values: Any, **options: Any) -> Path:
    import pyarrow
    from pyarrow import parquet as pq

    pq.write_table(pyarrow.table({"text": values, "n": list(range(len(values)))}), path, **options)
    return path


@pytest.fixture
def small(tmp_path: Path) -> bytes:
    """A parquet file of two row groups, about a kilobyte."""
    return parquet(tmp_path / "small.parquet", ["one", "two", "three", "two"], row_group_size=2).read_bytes()


def test_columns_that_are_no_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    for values, kind in (([["a"]], "list<element: string>"), ([{"a": "b"}], "struct<a: string>")):
        assert read(parquet(path, values)) == ([], f"1: a.parquet (field 'text' is {kind}, not text)")
    assert read(parquet(path, [b"bytes"])) == ([], "1: a.parquet (row 1: not text)")


def test_rows_that_are_not_utf8_are_named(tmp_path: Path, small: bytes) -> None:
    path = parquet(tmp_path / "a.parquet", ["one", "two"], compression="none", use_dictionary=False, write_statistics=False)
    data = path.read_bytes()
    assert data.count(b"two") == 1
    path.write_bytes(data.replace(b"two", b"t\xffo"))
    assert read(path) == (["one"], "1: a.parquet (row 2: not text)")


def test_a_wrong_codec_is_one_reason(tmp_path: Path) -> None:
    """Written with Snappy, but the footer says zstd: in Thrift's compact protocol, 0x02 and 0x0c behind the field's header."""
    path = parquet(tmp_path / "a.parquet", ["some text " * 9] * 9, compression="snappy")
    data = path.read_bytes()
    place = b"\x18\x04text\x15\x02"
    assert data.count(place) == 1
    path.write_bytes(data.replace(place, place[:-1] + b"\x0c"))
    found, said = read(path)
    assert found == [] and said.startswith("1: a.parquet (not parquet: ")


def test_lost_ends_are_one_reason(tmp_path: Path, small: bytes) -> None:
    path = tmp_path / "a.parquet"
    for data in (small[: len(small) // 2], small[:-4], b"PAR1", b"", small[:-8] + struct.pack("<I", 2**31 - 1) + b"PAR1"):
        path.write_bytes(data)
        found, said = read(path)
        assert found == [] and said.startswith("1: a.parquet (not parquet: ")


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ("GROUP_BYTES", r"1: a.parquet (row group 0 claims \d+ bytes of 'text', more than 1)"),
        ("GROUP_ROWS", "1: a.parquet (row group 0 claims 2 rows, more than 1)"),
    ],
)
def test_claims_over_the_limits_are_refused(tmp_path: Path, small: bytes, limit: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(small)
    monkeypatch.setattr(parquet_footer, limit, 1)
    found, said = read(tmp_path / "a.parquet")
    assert found == [] and re.fullmatch(words.replace("(", r"\(").replace(")", r"\)"), said)


def test_a_long_value_that_many_rows_share_is_not_held_for_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One kilobyte of file, 5 MB of text, 200 MB for all rows at once."""
    import pyarrow
    from pyarrow import parquet as pq

    path = tmp_path / "a.parquet"
    once = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 40), pyarrow.array(["x" * 5_000_000]))
    pq.write_table(pyarrow.table({"text": once}), path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 2000
    monkeypatch.setattr(parquet_footer, "BATCH_BYTES", 16_000_000)
    assert parquet_footer.batch_rows(path, parquet_footer.chunks(path, "text")) == 3
    pool, peak, number = pyarrow.default_memory_pool(), 0, 0
    for document in open_source(str(path), "text").read():
        number += 1
        peak = max(peak, pool.bytes_allocated())
        assert len(document.text) == 5_000_000
    assert number == 40 and peak < 60_000_000


@pytest.mark.parametrize("options", [{}, {"use_dictionary": False}, {"compression": "none"}, {"data_page_version": "2.0"}], ids=str)
def test_ordinary_files_are_read_in_large_batches(tmp_path: Path, options: dict[str, Any]) -> None:
    """And the footer says here what it says to pyarrow."""
    from pyarrow import parquet as pq

    path = parquet(tmp_path / "a.parquet", [f"{number} " * 50 for number in range(3000)], row_group_size=1000, **options)
    chunks = parquet_footer.chunks(path, "text")
    assert parquet_footer.batch_rows(path, chunks) == parquet_footer.BATCH_ROWS
    assert len(read(path)[0]) == 3000
    with pq.ParquetFile(path) as table:
        theirs = [table.metadata.row_group(number).column(0) for number in range(3)]
    assert [chunk.bytes for chunk in chunks] == [chunk.total_uncompressed_size for chunk in theirs]
    assert [chunk.start for chunk in chunks] == [chunk.dictionary_page_offset or chunk.data_page_offset for chunk in theirs]
    assert [chunk.rows for chunk in chunks] == [1000] * 3 and [chunk.group for chunk in chunks] == [0, 1, 2]


@pytest.mark.parametrize(
    ("footer", "words"),
    [
        (b"\x19\xfc\xff\xff\xff\xff\x0f", "longer than it"),
        (b"\x18\xff\xff\xff\xff\x7f", "ends early"),
        (b"\x1c" * 100, "nested too deep"),
        (b"\x19\x19" + b"\x19" * 100, "nested too deep"),
        (b"\x15" + b"\xff" * 20, "too long"),
        (b"\x1d\x00", "unknown type"),
        (b"\x15\x02", "ends early"),
        (b"\x45\x02\x00", "the footer is damaged"),
        (b"\x49\x1c\x00\x00", "the footer is damaged"),
    ],
    ids=range(9),
)
def test_footers_that_lie(tmp_path: Path, footer: bytes, words: str) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1" + footer + struct.pack("<I", len(footer)) + b"PAR1")
    with pytest.raises(ValueError, match=words):
        parquet_footer.chunks(path, "text")


def watched(work: Callable[[int], object], numbers: range, at: Path) -> Iterator[tuple[int, int]]:
    """Does `work` for each number in a process of its own, a new one behind each that ends early: (number, what ended it)."""
    start = numbers.start
    while start < numbers.stop:
        process = os.fork()
        if process == 0:
            try:
                with open(os.devnull, "w") as nowhere:
                    os.dup2(nowhere.fileno(), 2)
                faulthandler.disable()
                signal.signal(signal.SIGALRM, signal.SIG_DFL)  # pytest's own would wait for the library to return
                for number in range(start, numbers.stop):
                    at.write_text(str(number))
                    signal.alarm(30)
                    work(number)
                os._exit(0)
            except BaseException as error:
                at.with_suffix(".error").write_text(repr(error))
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if code == 0:
            return
        start = int(at.read_text())
        yield start, code
        start += 1


def fuzz_parquet(folder: Path, whole: bytes, numbers: range) -> list[tuple[int, int]]:
    """The inputs that ended the process that read them, and how; a stray exception is 1, a hang -SIGALRM, a crash -SIGSEGV or such."""
    path = folder / "x.parquet"

    def work(number: int) -> None:
        path.write_bytes(changed(whole, random.Random(number), len(whole)))
        read(path)

    return list(watched(work, numbers, folder / "at"))


def test_the_watch_sees_crashes_hangs_and_strays(tmp_path: Path) -> None:
    ends = {1: lambda: os.kill(os.getpid(), signal.SIGSEGV), 3: lambda: 1 / 0, 4: lambda: os.kill(os.getpid(), signal.SIGALRM)}
    found = list(watched(lambda number: ends.get(number, int)(), range(6), tmp_path / "at"))
    assert found == [(1, -signal.SIGSEGV), (3, 1), (4, -signal.SIGALRM)]


def test_parquet_of_other_bytes(tmp_path: Path, small: bytes) -> None:
    # Pyarrow's own view of a column ends the process at input 1070, see `parquet_footer.chunks`.
    assert fuzz_parquet(tmp_path, small, range(800, 1100)) == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_parquet_of_other_bytes_many(tmp_path: Path, small: bytes) -> None:
    ended = fuzz_parquet(tmp_path, small, range(1000, 31_000))
    assert ended == []
    note("parquet files of other bytes", inputs=30_000, crashes=0)


# Archives.


def unpackers(source: str) -> list[int]:
    """Lines that unpack an archive by the names in it."""
    names = {"extract", "extractall", "unpack_archive"}
    return [node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute) and node.attr in names]


def test_no_archive_is_unpacked_by_the_names_in_it() -> None:
    assert unpackers("import tarfile\ntarfile.open('x').extractall('y')\nz.extract('a')\nshutil.unpack_archive('b')") == [2, 3, 4]
    found = [f"{path.name}:{line}" for path in SOURCE.rglob("*.py") for line in unpackers(path.read_text(encoding="utf-8"))]
    assert not found
