"""Files that other programs made: GGUF, parquet, text, archives and the folders of hosts, honest, damaged and made to do harm."""

from __future__ import annotations

import ast
import faulthandler
import json
import os
import pickle
import random
import re
import resource
import signal
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mxd import assets, gguf_header, host_files, parquet_footer, sources
from mxd.errors import HostError
from mxd.host import Host
from mxd.sources import open_source
from tests.reliability.figures import note
from tests.small import save_host

pytestmark = pytest.mark.usefixtures("one_thread")

SOURCE = Path(assets.__file__).parent
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


def refused(work: Callable[[], object]) -> str:
    """The one line of the error that `work` ends in."""
    with pytest.raises(HostError) as caught:
        work()
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


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


def changed(whole: bytes, dice: random.Random, front: int) -> bytes:
    """Up to five bytes, or one number of eight, changed in the first `front` bytes; or cut; or both."""
    data = bytearray(whole)
    front = min(front, len(data) - 8)
    for _ in range(dice.randrange(1, 6)):
        data[dice.randrange(front)] = dice.choice((0, 1, 127, 128, 255, dice.randrange(256)))
    if dice.random() < 0.3:
        at = dice.randrange(front)
        data[at : at + 8] = struct.pack("<Q", dice.choice((0, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)))
    return bytes(data[: dice.randrange(len(data))]) if dice.random() < 0.15 else bytes(data)


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


# Folders of hosts.


class _Malicious:
    """Whoever unpickles this runs a command."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_host(tmp_path / "host", layers=2)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """A file that is there once somebody else's code has run."""
    return tmp_path / "ran"


def change(folder: Path, name: str = "config.json", **fields: object) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def as_bin(folder: Path, **more: object) -> Path:
    """The weights as a pickle, with something else among them."""
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({**weights, **more}, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def test_honest_bin_files_are_read(folder: Path) -> None:
    before = Host.load(str(folder), device="cpu").logits(torch.tensor([[1, 2]]))
    as_bin(folder)
    assert torch.equal(Host.load(str(folder), device="cpu").logits(torch.tensor([[1, 2]])), before)


@pytest.mark.parametrize("form", ["within", "bare", "sharded"])
def test_malicious_bin_files_do_not_run(folder: Path, mark: Path, form: str) -> None:
    path = as_bin(folder, evil=_Malicious(mark))
    if form == "bare":
        path.write_bytes(pickle.dumps(_Malicious(mark)))
    elif form == "sharded":
        index = {"metadata": {}, "weight_map": {"lm_head.weight": path.rename(folder / "part.bin").name}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert "could run code | expected safetensors" in refused(lambda: Host.load(str(folder)))
    assert not mark.exists()
    pickle.loads(pickle.dumps(_Malicious(mark)))
    assert mark.exists(), "it would have run"


@pytest.mark.parametrize(
    ("name", "fields"), [("config.json", {"model_type": "evil"}), ("tokenizer_config.json", {"tokenizer_class": "Evil"})]
)
def test_code_in_a_hosts_folder_does_not_run_whatever_is_answered(
    folder: Path, mark: Path, name: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoConfig, AutoTokenizer

    (folder / "evil.py").write_text(
        f"open({str(mark)!r}, 'w').close()\nfrom transformers import LlamaConfig\nclass Evil(LlamaConfig): pass\n"
    )
    change(folder, name, auto_map={"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}, **fields)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    assert "needs code of its own, which is never run" in refused(lambda: Host.load(str(folder)))
    assert not mark.exists()
    loader = AutoConfig if name == "config.json" else AutoTokenizer
    loader.from_pretrained(folder, trust_remote_code=True)
    assert mark.exists(), "it would have run"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_hidden_layers": 10**9}, "absurd number of layers in config.json | expected at most 1000 | got 1000000000"),
        ({"text_config": {"n_layer": 10**9}}, "absurd number of layers"),
        ({"num_local_experts": 10**9}, "absurd number of experts in config.json | expected at most 100000"),
        ({"hidden_size": 10**9}, "describes more than it holds"),
        ({"vocab_size": 10**12}, "describes more than it holds"),
        ({"intermediate_size": 10**8}, "describes more than it holds"),
        ({"hidden_size": 10**30}, "could not be loaded"),
        ({"_attn_implementation": "evil/kernel"}, "wants code from elsewhere"),
    ],
    ids=str,
)
def test_absurd_numbers_in_a_config_are_refused_before_anything_is_built(folder: Path, fields: dict[str, Any], words: str) -> None:
    change(folder, **fields)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    assert words in refused(lambda: Host.load(str(folder)))
    assert time.perf_counter() - began < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19, "KiB"


@pytest.mark.parametrize("text", ["[]", "{", "[" * 10**5, "\xff", '{"a":' * 900 + "1" + "}" * 900])
def test_a_config_that_is_none(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text, encoding="latin-1")
    refused(lambda: Host.load(str(folder)))


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
@pytest.mark.parametrize("file", ["../outside.safetensors", "/etc/passwd", "..\\x", "deep/x", "\0"])
def test_an_index_that_leads_elsewhere_is_refused(folder: Path, name: str, file: str) -> None:
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": file}}))
    assert f"{name} leads elsewhere" in refused(lambda: Host.load(str(folder)))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": 1}'])
def test_an_index_that_is_none_is_refused(folder: Path, text: str) -> None:
    (folder / "model.safetensors.index.json").write_text(text)
    assert "unreadable model.safetensors.index.json" in refused(lambda: host_files.check_index("x", folder))


# Texts.


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
    began, number, ended = time.monotonic(), 1000, list[tuple[int, int]]()
    while time.monotonic() - began < 120:
        ended += fuzz_parquet(tmp_path, small, range(number, number + 1000))
        number += 1000
    note("parquet files of other bytes", inputs=number - 1000, crashes=len(ended))
    assert ended == []


# Archives.


def unpackers(source: str) -> list[int]:
    """Lines that unpack an archive by the names in it."""
    names = {"extract", "extractall", "unpack_archive"}
    return [node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute) and node.attr in names]


def test_no_archive_is_unpacked_by_the_names_in_it() -> None:
    assert unpackers("import tarfile\ntarfile.open('x').extractall('y')\nz.extract('a')\nshutil.unpack_archive('b')") == [2, 3, 4]
    found = [f"{path.name}:{line}" for path in SOURCE.rglob("*.py") for line in unpackers(path.read_text(encoding="utf-8"))]
    assert not found
