"""Files that are written whole or not at all, and JSON that carries its own checksum."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import RunError

MEND = "copy the run folder again, whole, or train again with --overwrite"
UNFINISHED = ".writing"
"""End of the names of files that are being written; after a crash they mean nothing."""


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write beside, flush to disk, then rename: a reader sees the old file or the new one, never half of either."""
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=UNFINISHED)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Flush to disk which files are in a folder, where the system knows how."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


SEAL = "sha256"
"""Key of a JSON file under which the checksum of all the rest of it stands."""


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, atomically; numbers that are not finite are refused."""
    write_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """As `write_json`, with a checksum of the rest under `SEAL`, by which `read_json` knows a file that was changed."""
    write_atomic(path, sealed(value))


def sealed(value: Mapping[str, Any]) -> str:
    """What `write_sealed` writes."""
    plain = json.loads(json.dumps(value, allow_nan=False))  # keys and tuples as they come back
    return json.dumps({**plain, SEAL: _digest(plain)}, indent=2, ensure_ascii=False) + "\n"


def read_json(path: Path) -> Any:
    """The JSON in `path`, without its seal if it has one.

    Raises:
        RunError: the file is missing, is not JSON, or is not what was sealed.
    """
    found = _read_json(path)
    if not isinstance(found, dict) or SEAL not in found:
        return found
    seal = found.pop(SEAL)
    if seal != _digest(found):
        raise RunError(f"{path} was changed", expected=f"{SEAL} {str(seal)[:12]}…", got=f"{_digest(found)[:12]}…", next=MEND)
    return found


def check_sum(path: Path, expected: str, *, what: str = "was changed", mend: str = MEND) -> bytes:
    """What is in a file. Raise `RunError`, which says `what` of it and how to `mend` it, unless it has this sha256."""
    data = path.read_bytes() if path.is_file() else None
    found = "no file" if data is None else hashlib.sha256(data).hexdigest()
    if data is None or found != expected:
        raise RunError(f"{path} {what}", expected=f"sha256 {str(expected)[:12]}…", got=f"{found[:12]}…", next=mend)
    return data


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError("a file of the run is missing", expected=str(path), next=MEND) from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise RunError(f"{path} is damaged", expected="JSON", got=str(error), next=MEND) from None


def check_version(version: Any, path: Path, newest: int) -> None:
    """Raise `RunError` unless `version` is a format version that this mxd reads."""
    if not isinstance(version, int):
        raise RunError(f"{path} has no format version", expected=f"format_version up to {newest}", got=str(version))
    if version > newest:
        raise RunError(
            f"{path} was written by a newer mxd",
            expected=f"format version up to {newest}",
            got=str(version),
            next="pip install --upgrade mxd",
        )
