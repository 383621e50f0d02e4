"""Whether ablating the units tied to a class hurts that class, and only it."""

from .measure import PART

__all__ = ["PART"]
