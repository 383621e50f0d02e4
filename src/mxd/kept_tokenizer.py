"""The tokenizer of a local folder, read once as long as its files stay as they are.

Not for the time it saves: tokenizers 0.23 never frees the cache of words of a tokenizer that is dropped, about 7 MB for one that has read
a corpus, and a process that loads hosts again and again would grow for ever.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

SUFFIXES = (".json", ".txt", ".model", ".jinja")
"""Of the files of a tokenizer."""


def load(source: str, gguf: str | None) -> Any:
    """The tokenizer in the folder `source`, or of the .gguf file in it; the same object each time. Nobody may change it.

    Raises:
        whatever transformers raises.
    """
    files = [Path(source) / gguf] if gguf else sorted(path for path in Path(source).iterdir() if path.suffix in SUFFIXES)
    return _read(source, gguf, tuple((path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in files))


@lru_cache(maxsize=4)
def _read(source: str, gguf: str | None, _: tuple[tuple[str, int, int], ...]) -> Any:
    from transformers import AutoTokenizer

    given = {"gguf_file": gguf} if gguf else {}
    return AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False, **given)
