"""What the units of a student are made of, when they fire, and what each of them does."""

from .measure import PART

__all__ = ["PART"]
