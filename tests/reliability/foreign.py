"""Files that lie: what is said of them, and how they are made of honest ones."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

import pytest

from mxd.errors import HostError


def refused(work: Callable[[], object]) -> str:
    """The one line of the error that `work` ends in."""
    with pytest.raises(HostError) as caught:
        work()
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


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
