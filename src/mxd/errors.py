"""Errors a user can act on: each is one line that says what was expected, what was given and what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MxdError(Exception):
    """Base of every error the user can mend. The command line prints it as one line and exits with 1.

    Args:
        what: what went wrong, naming the file, option or object.
        expected: what would have been right.
        got: what was given instead.
        next: the next thing to do, as a command where there is one.
    """

    def __init__(self, what: str, *, expected: str = "", got: str = "", next: str = "") -> None:
        self.what, self.expected, self.got, self.next = what, expected, got, next
        parts = [what]
        if expected:
            parts.append(f"expected {expected}")
        if got:
            parts.append(f"got {got}")
        if next:
            parts.append(f"next: {next}")
        super().__init__(" | ".join(" ".join(part.split()) for part in parts))


class ConfigError(MxdError):
    """An option, or a combination of options, that cannot work."""


class AssetError(MxdError):
    """Something of the built-in host or texts could not be fetched or failed its checksum."""


class TextError(MxdError):
    """A text source is unknown, unreadable, empty, or too small for what is asked."""


class TooLittleText(TextError):
    """A text source was read to its end, and holds less than what is asked for."""


class HostError(MxdError):
    """A host model could not be loaded, or has no MLP at the place asked for."""


class LayerError(MxdError):
    """A sparse layer was asked for sizes that make no sense, or given the wrong shape."""


class RunError(MxdError):
    """A run folder is missing, damaged, finished already, or of a newer format."""


def nearest(name: str, options: Iterable[str], n: int = 3) -> str:
    """The `n` options closest to `name`, as ``a, b or c``; all of them (at most 12) when none is close."""
    known = list(options)
    close = difflib.get_close_matches(name.lower(), known, n=n, cutoff=0.5) or known[:12]
    if not close:
        return "nothing known"
    return close[0] if len(close) == 1 else f"{', '.join(close[:-1])} or {close[-1]}"
