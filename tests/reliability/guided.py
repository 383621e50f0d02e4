"""Fuzzing guided by coverage (atheris, of the extra ``fuzz``): ``python -m tests.reliability.guided PARSER SEEDS -runs=N``.

A process of its own: libFuzzer ends it itself, with 0 after N inputs, and with something else at the first that raises anything but our
errors, takes more than ten seconds or more than 2 GiB.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

atheris: Any = importlib.import_module("atheris")  # not everywhere, and without types
with atheris.instrument_imports(include=["mxd.gguf_header", "mxd.parquet_footer", "mxd.interop.reference", "pickle", "pickletools"]):
    from mxd import gguf_header, parquet_footer
    from mxd.interop import reference

from mxd.errors import MxdError  # noqa: E402

LIMITS = ["-timeout=10", "-rss_limit_mb=2048", "-max_len=4096", "-seed=1"]


def gguf(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    gguf_header.check(path)


def parquet(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    try:
        found = parquet_footer.chunks(path, "text")
    except ValueError:
        return
    parquet_footer.batch_rows(path, found)


def pickles(path: Path, data: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("layer/data.pkl", data)
        archive.writestr("layer/data/0", bytes(64))
    reference.read(path)


@atheris.instrument_func
def planted(path: Path, data: bytes) -> None:
    """Fails where no random input would: a guided one gets there."""
    if len(data) > 3 and data[0] == 0x6F and data[1] == 0xF0 and data[2] == 0x00 and data[3] == 0x6F:
        raise ZeroDivisionError(path)


PARSERS: dict[str, Callable[[Path, bytes], None]] = {"gguf": gguf, "parquet": parquet, "pickles": pickles, "planted": planted}


def main() -> None:
    parse, folder = PARSERS[sys.argv.pop(1)], tempfile.mkdtemp()

    def one(data: bytes) -> None:
        try:
            parse(Path(folder) / "x", data)
        except MxdError as error:
            assert len(str(error).splitlines()) == 1, error

    atheris.Setup([*sys.argv, *LIMITS], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
