"""Threads: as many as there are cores or as the user says, and not more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mxd import threads
from mxd.threads import limit_threads, quota
from tests.small import save_host, save_texts

PROGRAM = """
import json, os, sys
from pathlib import Path
from mxd import cli, threads
if sys.argv[1]:
    threads.quota = lambda _=None: float(sys.argv[1])
    threads.cores = lambda: 64
code = cli.main(sys.argv[2:])
import torch
print(json.dumps({"code": code, "torch": torch.get_num_threads(), "tasks": len(os.listdir("/proc/self/task"))}))
"""


def write(folder: Path, **files: str) -> Path:
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_max", ".max").replace("cpu/", "cpu/cpu.")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


@pytest.mark.parametrize(
    ("files", "share"),
    [
        ({"cpu_max": "200000 100000\n"}, 2.0),
        ({"cpu_max": "150000 100000\n"}, 1.5),
        ({"cpu_max": "max 100000\n"}, None),
        ({"cpu_max": "nonsense"}, None),
        ({"cpu__cfs_quota_us": "400000\n", "cpu__cfs_period_us": "100000\n"}, 4.0),
        ({"cpu__cfs_quota_us": "-1\n", "cpu__cfs_period_us": "100000\n"}, None),
        ({"cpu__cfs_quota_us": "-1\n"}, None),
        ({"cpu_max": "100000 0\n"}, None),
        ({}, None),
    ],
)
def test_the_share_of_a_container(tmp_path: Path, files: dict[str, str], share: float | None) -> None:
    assert quota(write(tmp_path, **files)) == share


@pytest.mark.parametrize(
    ("granted", "before", "after"),
    [
        ("200000", None, "2"),
        ("250000", None, "2"),
        ("50000", None, "1"),
        ("6400000", None, None),
        ("max", None, None),
        ("200000", "7", "7"),
    ],
)
def test_threads_are_limited_where_nothing_else_does_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, granted: str, before: str | None, after: str | None
) -> None:
    monkeypatch.setattr(threads, "cores", lambda: 64)
    environ = {"OMP_NUM_THREADS": before} if before else {}
    limit_threads(environ, write(tmp_path, cpu_max=f"{granted} 100000"))
    assert environ.get("OMP_NUM_THREADS") == after


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
@pytest.mark.parametrize(("own", "share", "number"), [("1", "", 1), ("2", "", 2), (None, "1.0", 1), ("2", "1.0", 2)])
def test_a_training_has_the_threads_it_was_given(tmp_path: Path, own: str | None, share: str, number: int) -> None:
    environ = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    environ |= {"OMP_NUM_THREADS": own} if own else {}
    host, text = save_host(tmp_path / "host", layers=2), save_texts(tmp_path / "texts", number=60)
    command = ["train", "--out", tmp_path / "run", "--host", host, "--text", text, "--layers", "1", "--kinds", "mxd", "--k", "2"]
    command += ["--tokens", "512", "--tokens-per-step", "256", "--buffer-tokens", "512", "--tokens-per-sequence", "32", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, share, *map(str, command)], env=environ, capture_output=True, text=True, check=True
    )
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert said["code"] == 0 and said["torch"] == number
    assert json.loads((tmp_path / "run" / "run.json").read_text())["machine"]["threads"] == number
    assert said["tasks"] <= number + 2, "besides them, the one that reads ahead and the one of the backward pass"
