"""Whether a single unit knows a property of the text."""

from .measure import PART

__all__ = ["PART"]
