"""One file of cached activations: x [token, d_in], y [token, d_out] and first [token] of a run of tokens, as safetensors.

A shard is written in place as the rows come, and read a few rows at a time, so that neither side ever holds one in memory. For that
reason the container is written by hand: 8 bytes of header length, a JSON header, the tensors one after the other. Any safetensors reader
opens it.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .errors import ConfigError, RunError
from .harvest import Batch

PIECE_BYTES = 1 << 22
"""What is copied or hashed at a time."""
HEADER_BYTES = 1 << 20
"""A header longer than this is not one of ours."""

MEND = "copy the folder again, whole, or harvest again with --overwrite"


class Format(NamedTuple):
    """A number format on disk."""

    name: str
    """Its name in safetensors."""
    torch: torch.dtype
    """What activations are rounded to."""
    numpy: np.dtype[Any]
    """How its bytes are read; numpy has no bfloat16, whose bits are the upper half of a float32's."""


FORMATS: dict[str, Format] = {
    "float32": Format("F32", torch.float32, np.dtype("<f4")),
    "bfloat16": Format("BF16", torch.bfloat16, np.dtype("<u2")),
    "float16": Format("F16", torch.float16, np.dtype("<f2")),
}
"""Number formats by the names that --store takes."""


class Widths(NamedTuple):
    """What the rows of a shard look like."""

    d_in: int
    """Width of x."""
    d_out: int
    """Width of y."""
    store: str
    """Number format of both, a key of `FORMATS`."""

    @property
    def row_bytes(self) -> int:
        """Bytes on disk for one token: x, y and first."""
        return (self.d_in + self.d_out) * FORMATS[self.store].numpy.itemsize + 1


class Shard(NamedTuple):
    """What the manifest knows of one shard."""

    file: str
    """Path inside the folder, with forward slashes."""
    tokens: int
    """Rows."""
    bytes: int
    """Size of the file."""
    sha256: str
    """Of the whole file, in hexadecimal."""


class Region(NamedTuple):
    """Where one tensor lies in a shard."""

    start: int
    """Offset of its first byte in the file."""
    row_bytes: int
    """Bytes of one row."""


def layout(tokens: int, widths: Widths) -> tuple[bytes, dict[str, Region]]:
    """The head of a shard (length and JSON), and where its tensors lie."""
    name, _, numpy = FORMATS[widths.store]
    parts = {"x": (name, [widths.d_in], numpy.itemsize), "y": (name, [widths.d_out], numpy.itemsize), "first": ("BOOL", [], 1)}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    rows: dict[str, tuple[int, int]] = {}
    end = 0
    for part, (dtype, width, itemsize) in parts.items():
        row_bytes = itemsize * (width[0] if width else 1)
        rows[part] = (end, row_bytes)
        header[part] = {"dtype": dtype, "shape": [tokens, *width], "data_offsets": [end, end + tokens * row_bytes]}
        end += tokens * row_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of eight bytes, as readers that map the file expect
    head = len(text).to_bytes(8, "little") + text
    return head, {part: Region(len(head) + start, row_bytes) for part, (start, row_bytes) in rows.items()}


class ShardWriter:
    """A shard being written under a temporary name beside its place; it takes its name when it is whole.

    Args:
        path: where it will lie.
        tokens: rows to come; fewer are allowed.
        widths: what they look like.
    """

    def __init__(self, path: Path, tokens: int, widths: Widths) -> None:
        self.path, self.tokens, self.widths = path, tokens, widths
        self.written = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}")
        self._file = self._temporary.open("w+b", buffering=0)
        head, self._regions = layout(tokens, widths)
        self._put(0, memoryview(head))

    def add(self, batch: Batch) -> None:
        """Append the rows of a batch; there must be room for them.

        Raises:
            ConfigError: a value too large for the number format.
        """
        n = len(batch.y)
        if self.written + n > self.tokens:
            raise ValueError(f"{n} rows for a shard with room for {self.tokens - self.written}")
        for part, tensor in batch._asdict().items():
            region = self._regions[part]
            self._put(region.start + self.written * region.row_bytes, _raw(tensor, self.widths.store))
        self.written += n

    def finish(self, root: Path) -> Shard:
        """Put the shard in its place under `root`; one that got fewer rows than planned is cut to what it got."""
        if self.written < self.tokens:
            short = self._shorter()
            try:
                return short.finish(root)
            except BaseException:
                short.drop()
                raise
        self._file.flush()
        os.fsync(self._file.fileno())
        # Hashed as it lies on disk, not as it was meant to: rows of the three tensors come in turns.
        sha256, size = sha256_of(self._file), os.fstat(self._file.fileno()).st_size
        self._file.close()
        os.replace(self._temporary, self.path)
        return Shard(self.path.relative_to(root).as_posix(), self.tokens, size, sha256)

    def drop(self) -> None:
        """Forget the shard."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _shorter(self) -> ShardWriter:
        full = self._temporary.with_name(f"{self._temporary.name}.full")
        os.replace(self._temporary, full)
        short = ShardWriter(self.path, self.written, self.widths)
        try:
            piece = np.empty(PIECE_BYTES, np.uint8)
            for part, region in self._regions.items():
                size = self.written * region.row_bytes
                for done in range(0, size, PIECE_BYTES):
                    rows = piece[: min(PIECE_BYTES, size - done)]
                    _fill(self._file, region.start + done, rows)
                    short._put(short._regions[part].start + done, rows.data)
            short.written = self.written
            return short
        except BaseException:
            short.drop()
            raise
        finally:
            self._file.close()
            full.unlink()

    def _put(self, offset: int, data: memoryview) -> None:
        self._file.seek(offset)
        while len(data):  # an unbuffered write may take less than it is given
            data = data[self._file.write(data) :]


class ShardReader:
    """A shard opened for reading, as a context manager; its size, header and checksum are checked before it gives a row.

    Raises:
        RunError: missing, truncated, changed, or not what the manifest says; names the file.
    """

    def __init__(self, root: Path, shard: Shard, widths: Widths) -> None:
        self.path, self.shard, self.widths = root / shard.file, shard, widths
        check_size(root, shard)
        self._file = self.path.open("rb", buffering=0)
        try:
            found = sha256_of(self._file)
            if found != shard.sha256:
                raise RunError(f"{self.path} was changed", expected=f"sha256 {shard.sha256[:12]}…", got=f"{found[:12]}…", next=MEND)
            self._regions = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def rows(self, start: int, tokens: int, *, pinned: bool = False) -> Batch:
        """`tokens` rows from `start` on, float32 on the CPU; in page-locked memory if `pinned`, for a fast copy to a GPU.

        Copies and widens with numpy, so that it can run beside torch's own threads without a second pool of them.
        """
        x = torch.empty((tokens, self.widths.d_in), pin_memory=pinned)
        y = torch.empty((tokens, self.widths.d_out), pin_memory=pinned)
        first = torch.empty(tokens, dtype=torch.bool, pin_memory=pinned)
        for part, tensor in (("x", x), ("y", y)):
            self._floats(part, start, tensor.numpy())
        region = self._regions["first"]
        _fill(self._file, region.start + start, first.numpy())
        return Batch(x, y, first)

    def _floats(self, part: str, start: int, out: np.ndarray[Any, np.dtype[Any]]) -> None:
        region = self._regions[part]
        offset = region.start + start * region.row_bytes
        if self.widths.store == "float32":
            return _fill(self._file, offset, out)
        narrow = np.empty(out.shape, FORMATS[self.widths.store].numpy)
        _fill(self._file, offset, narrow)
        if self.widths.store == "bfloat16":
            bits = out.view(np.uint32)
            np.copyto(bits, narrow)
            np.left_shift(bits, 16, out=bits)
        else:
            np.copyto(out, narrow)

    def _read_header(self) -> dict[str, Region]:
        """Where the tensors lie, by the file's own header; their shapes and formats must be the manifest's."""
        length = np.empty(8, np.uint8)
        _fill(self._file, 0, length)
        size = int.from_bytes(length.tobytes(), "little")
        expected, _ = layout(self.shard.tokens, self.widths)
        want = json.loads(expected[8:])
        try:
            if size > HEADER_BYTES:
                raise ValueError(f"a header of {size:,} bytes")
            text = np.empty(size, np.uint8)
            _fill(self._file, 8, text)
            header = json.loads(text.tobytes())
            found = {part: (header[part]["dtype"], header[part]["shape"]) for part in ("x", "y", "first")}
            offsets = {part: header[part]["data_offsets"][0] for part in found}
            for part, offset in offsets.items():
                if not isinstance(offset, int) or not 0 <= offset <= self.shard.bytes:
                    raise ValueError(f"{part} at {offset}")
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise RunError(f"{self.path} cannot be read", expected="safetensors with x, y and first", got=str(error), next=MEND) from None
        for part, got in found.items():
            wanted = (want[part]["dtype"], want[part]["shape"])
            if got != wanted:
                raise RunError(f"{self.path} is not what its manifest says", expected=f"{part} {wanted}", got=str(got), next=MEND)
        row_bytes = {part: region.row_bytes for part, region in layout(self.shard.tokens, self.widths)[1].items()}
        return {part: Region(8 + size + offsets[part], row_bytes[part]) for part in found}


def check_size(root: Path, shard: Shard) -> None:
    """Raise `RunError` unless the file of `shard` is there and as long as the manifest says."""
    path = root / shard.file
    try:
        size = path.stat().st_size
    except OSError as error:
        raise RunError(f"{path} is missing", expected=f"a file of {shard.bytes:,} bytes", got=error.strerror or "none", next=MEND) from None
    if size != shard.bytes:
        raise RunError(f"{path} is truncated or was changed", expected=f"{shard.bytes:,} bytes", got=f"{size:,}", next=MEND)


def sha256_of(file: Any) -> str:
    """SHA-256 of an open file from its beginning, in hexadecimal."""
    digest = hashlib.sha256()
    piece = bytearray(PIECE_BYTES)
    file.seek(0)
    while n := file.readinto(piece):
        digest.update(memoryview(piece)[:n])
    return digest.hexdigest()


def _raw(tensor: Tensor, store: str) -> memoryview:
    """The bytes of a tensor as they stand in a shard: floats in the number format `store`, booleans as they are."""
    if tensor.dtype != torch.bool:
        rounded = tensor.detach().to(FORMATS[store].torch)
        if store == "float16" and not bool(rounded.isfinite().all()):
            raise ConfigError(
                "these activations do not fit float16",
                expected=f"values up to {torch.finfo(torch.float16).max:,.0f}",
                got=f"{float(tensor.abs().max()):,.0f}",
                next="--store bfloat16 or float32",
            )
        tensor = rounded
    return tensor.cpu().contiguous().view(torch.uint8).flatten().numpy().data


def _fill(file: Any, offset: int, out: np.ndarray[Any, np.dtype[Any]]) -> None:
    """Read straight into `out`, all of it."""
    rest = out.reshape(-1).view(np.uint8).data
    file.seek(offset)
    while len(rest):
        n = file.readinto(rest)
        if not n:
            raise RunError(f"{file.name} is truncated", expected=f"{len(rest):,} more bytes", got="its end", next=MEND)
        rest = rest[n:]
