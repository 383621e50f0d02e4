"""Freed memory is kept: counted in page faults of a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mxd.memory import OWN_CHOICES

SCRIPT = """
import resource, sys, torch
if "main" in sys.argv:
    from mxd.cli import main
    main(["--version"])
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    torch.ones(2**24)  # 64 MiB, 16,384 pages of 4 KiB
print("faults", resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(monkeypatch: pytest.MonkeyPatch, *args: str, **environment: str) -> int:
    for name in OWN_CHOICES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run([sys.executable, "-c", SCRIPT, *args], capture_output=True, text=True, check=True)
    return int(done.stdout.split("faults ")[1])


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_the_command_line_keeps_freed_memory_and_a_users_own_setting_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = _faults(monkeypatch)
    if plain < 10_000:
        pytest.skip("this machine's allocator keeps freed memory by itself, or its pages are huge")
    assert _faults(monkeypatch, "main") < plain / 10
    assert _faults(monkeypatch, "main", MALLOC_MMAP_THRESHOLD_="131072") > plain / 2
