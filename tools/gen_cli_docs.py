"""Writes docs/cli.md from the help texts: ``python tools/gen_cli_docs.py``, or with ``--check`` only says whether it is up to date."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path
from unittest import mock

from mxd import cli
from mxd.options import OPTIONS

TARGET = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
WIDTH = 100
HEAD = """# Command line

<!-- Written by `make docs` out of the typed options in src/mxd/config.py and src/mxd/options.py; do not edit. -->

Every failure is one line on standard error that starts with `mxd: error: ` and says what was expected, what was given and what to
do next; the exit code is 1. Ctrl-C ends with 130, with what was trained so far saved. `--debug` anywhere on the line (or
`MXD_DEBUG=1`) adds the traceback.

Environment: `MXD_CACHE` is the folder for the built-in host and texts (default: `mxd` in the user's cache folder); `MXD_ASSETS` is a
folder with copies of their archives, read before anything is fetched.
"""


def help_of(*args: str) -> str:
    """What ``mxd ARGS --help`` prints at a fixed width, without colour."""
    said = io.StringIO()
    with mock.patch.dict(os.environ, {"COLUMNS": str(WIDTH), "LINES": "50", "NO_COLOR": "1"}), contextlib.redirect_stdout(said):
        code = cli.main([*args, "--help"])
    assert code == 0, args
    return "\n".join(line.rstrip() for line in said.getvalue().strip().splitlines())


def render() -> str:
    """The whole page."""
    parts = [HEAD, f"```text\n{help_of()}\n```\n"]
    parts += [f"## mxd {verb}\n\n```text\n{help_of(verb)}\n```\n" for verb in OPTIONS]
    return "\n".join(parts)


def main() -> int:
    page = render()
    if "--check" in sys.argv[1:]:
        return 0 if TARGET.is_file() and TARGET.read_text(encoding="utf-8") == page else 1
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
