"""What stands in the SQLite files of ``runs/NAME/explore``: tables, and the binary form of contexts.

``text.sqlite`` is shared by all students, ``STUDENT.sqlite`` is derived from it and can be made again, ``notes.sqlite`` is the user's own.
All numbers in blobs are little-endian. Databases may come from strangers: `unpack` checks every count before it is used.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import RunError

APPLICATION_ID = 0x6D786465
"""SQLite's ``application_id`` of our files: "mxde"."""
VERSION = 1
"""SQLite's ``user_version``: raised when a table changes."""

META = "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)"
TEXT: dict[str, str] = {
    "meta": META,
    "doc": "CREATE TABLE doc (doc INTEGER PRIMARY KEY, source TEXT NOT NULL, name TEXT NOT NULL, split TEXT NOT NULL)",
    "seq": "CREATE TABLE seq (seq INTEGER PRIMARY KEY, doc INTEGER NOT NULL, ids BLOB NOT NULL, text TEXT NOT NULL, cuts BLOB NOT NULL, "
    "host_loss BLOB NOT NULL)",
    "token": "CREATE TABLE token (id INTEGER PRIMARY KEY, text TEXT NOT NULL, special INTEGER NOT NULL)",
}
"""doc: in the order of the text; of a sequence, the one that it begins in. ids u32[L];
cuts u32[L + 1], offsets into `text` in UTF-16 units; host_loss f32[L] in nats, NaN where it was not measured."""

COLUMNS: tuple[str, ...] = (
    *("state", "fires", "max_a", "mean_a", "p50", "p99", "effect", "effect_se", "effect_n", "share"),
    *("steadiness", "top_token", "top_token_share", "token_entropy", "partner", "partner_lift", "bias", "probe_f1", "score", "score_n"),
)
"""Numeric columns of the table `unit`; NULL is unknown."""
UNITS: dict[str, str] = {
    "meta": META,
    "unit": f"CREATE TABLE unit (unit INTEGER PRIMARY KEY, {', '.join(f'{name} REAL' for name in COLUMNS)})",
    "unit_blob": "CREATE TABLE unit_blob (unit INTEGER PRIMARY KEY, hist BLOB NOT NULL, band_edges BLOB NOT NULL, promoted BLOB NOT NULL, "
    "suppressed BLOB NOT NULL, peak_tokens BLOB NOT NULL, partners BLOB NOT NULL)",
    "example": "CREATE TABLE example (unit INTEGER NOT NULL, band INTEGER NOT NULL, fires INTEGER NOT NULL, n INTEGER NOT NULL, "
    "data BLOB NOT NULL, PRIMARY KEY (unit, band)) WITHOUT ROWID",
    "label": "CREATE TABLE label (unit INTEGER NOT NULL, author TEXT NOT NULL, text TEXT NOT NULL, method TEXT NOT NULL, "
    "model TEXT NOT NULL, detection REAL, detection_n INTEGER, fuzzing REAL, fuzzing_n INTEGER, created TEXT NOT NULL, "
    "PRIMARY KEY (unit, author))",
    "match": "CREATE TABLE match (unit INTEGER NOT NULL, student TEXT NOT NULL, rank INTEGER NOT NULL, other INTEGER NOT NULL, "
    "jaccard REAL NOT NULL, corr REAL, PRIMARY KEY (unit, student, rank)) WITHOUT ROWID",
    "probe": "CREATE TABLE probe (unit INTEGER NOT NULL, task TEXT NOT NULL, class TEXT NOT NULL, f1 REAL NOT NULL, n INTEGER NOT NULL, "
    "PRIMARY KEY (unit, task, class)) WITHOUT ROWID",
}
"""hist u32[64]; band_edges f32[7]; promoted, suppressed (u32 token, f32 mean, f32 sd)[≤ 20]; peak_tokens (u32 token, u32 firings)[≤ 16];
partners (u32 unit, f32 lift, f32 jaccard)[≤ 16]; example.data: see `pack`."""
NOTES: dict[str, str] = {
    "meta": META,
    "note": "CREATE TABLE note (weights_sha TEXT NOT NULL, unit INTEGER NOT NULL, student TEXT NOT NULL, star INTEGER NOT NULL, "
    "text TEXT NOT NULL, tags TEXT NOT NULL, updated TEXT NOT NULL, PRIMARY KEY (weights_sha, unit))",
    "bench": "CREATE TABLE bench (id TEXT PRIMARY KEY, student TEXT NOT NULL, request TEXT NOT NULL, result TEXT NOT NULL, "
    "created TEXT NOT NULL)",
    "sentence": "CREATE TABLE sentence (id TEXT PRIMARY KEY, request TEXT NOT NULL, text TEXT NOT NULL, students TEXT NOT NULL, "
    "answer TEXT NOT NULL, created TEXT NOT NULL)",
}
"""tags: a JSON list; updated, created: ISO 8601 in UTC."""

STATES = ("dead", "rare", "live", "shared")
"""`state`: 0 fired on no token, 1 on fewer than `RARE`, 3 on more than half of them, 2 the rest."""
RARE = 30
BINS = 64
"""Bins of a unit's histogram: equal parts of (0, its largest activation]."""
BANDS = ("max", "9–10", "7–8", "5–6", "3–4", "1–2", "silent twins")
"""By rank of the unit's own firings: the strongest, then double deciles from the top; last, tokens like its peaks where it is off."""
TWINS = 6
"""Band of the silent twins."""

PAIRS = np.dtype([("token", "<u4"), ("count", "<u4")])
PARTNERS = np.dtype([("unit", "<u4"), ("lift", "<f4"), ("jaccard", "<f4")])
WRITTEN = np.dtype([("token", "<u4"), ("mean", "<f4"), ("sd", "<f4")])
HEAD = np.dtype(
    [
        ("seq", "<u4"),
        ("start", "<u2"),
        ("length", "u1"),
        ("peak", "u1"),
        ("repeats", "<u2"),
        ("rank", "<u4"),
        ("a", "<f4"),
        ("delta", "<f4"),
    ]
)
"""The fixed part of a context in a blob; then a byte k, k offsets and k levels, a byte each."""
_HEAD = struct.Struct("<IHBBHIff")
LONGEST = 128
"""Tokens of a context, at most."""


class Context(NamedTuple):
    """A stretch of one sequence around a token where a unit fired (or, for a silent twin, did not)."""

    seq: int
    """Which sequence."""
    start: int
    """Position of the context's first token in it."""
    length: int
    """Tokens, at most `LONGEST`."""
    peak: int
    """The token it is about, counted from `start`."""
    repeats: int
    """Firings of this unit and band with the same tokens around them; 1 where it is the only one."""
    rank: int
    """Rank of the peak among the unit's firings, 0 the strongest; 0 for a twin."""
    a: float
    """Activation at the peak."""
    delta: float
    """Nats that the following tokens lose if the unit is removed there, to first order; NaN where not measured."""
    offsets: NDArray[np.uint8]
    """Tokens of the context where the unit is active, counted from `start`."""
    levels: NDArray[np.uint8]
    """Their activations in 255ths of the unit's largest, rounded up: never 0."""


def pack(contexts: list[Context]) -> bytes:
    """The contexts of one unit and band as one blob."""
    parts: list[bytes] = []
    for c in contexts:
        parts.append(_HEAD.pack(c.seq, c.start, c.length, c.peak, min(c.repeats, 65535), c.rank, c.a, c.delta))
        parts.append(bytes([len(c.offsets)]) + c.offsets.astype(np.uint8).tobytes() + c.levels.astype(np.uint8).tobytes())
    return b"".join(parts)


def unpack(data: bytes, n: int) -> list[Context]:
    """What `pack` made of `n` contexts.

    Raises:
        RunError: the blob is not that.
    """
    found: list[Context] = []
    at = 0
    for _ in range(n):
        if len(data) < at + _HEAD.size + 1:
            raise _damaged("a blob of contexts that ends early")
        head = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        active = data[at]
        at += 1
        if len(data) < at + 2 * active:
            raise _damaged("a blob of contexts that ends early")
        offsets = np.frombuffer(data, np.uint8, active, at)
        levels = np.frombuffer(data, np.uint8, active, at + active)
        at += 2 * active
        length, peak = head[2], head[3]
        if not 0 < length <= LONGEST or peak >= length or (active and int(offsets.max()) >= length):
            raise _damaged("a context with a token outside itself")
        seq, start, _, _, repeats, rank, a, delta = head
        found.append(Context(seq, start, length, peak, repeats, rank, a, delta, offsets, levels))
    if at != len(data):
        raise _damaged("a blob with more than its contexts")
    return found


def _damaged(what: str) -> RunError:
    return RunError("the explore database is damaged", expected="what mxd collect writes", got=what, next="mxd collect RUN --overwrite")
