"""Freed memory is kept for the next tensor of its size, instead of going back to the system and being zeroed again page by page."""

from __future__ import annotations

import ctypes
import os

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Of glibc's mallopt(3)."""
KEPT_BYTES = 2**30
"""A larger block is mapped by itself and given back at once, as by default all above 128 KiB to 32 MiB are."""
OWN_CHOICES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")
"""Environment variables by which a user chooses an allocator or tunes it: then nothing is changed."""


def keep_freed_memory() -> bool:
    """Have glibc's malloc keep freed blocks of up to `KEPT_BYTES`; of no effect elsewhere.

    A forward pass allocates and frees the same large activations again and again. On two cores the built-in host read 1.4 times
    as many tokens a second at 1,024 tokens at once, and 1.9 times as many at 8,192. It holds for the whole process, which is why only the
    command line does it and importing the package does not.

    Returns:
        Whether it is so.
    """
    if any(os.environ.get(name) for name in OWN_CHOICES):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    return bool(mallopt(MMAP_THRESHOLD, KEPT_BYTES)) and bool(mallopt(TRIM_THRESHOLD, 2**31 - 1))
