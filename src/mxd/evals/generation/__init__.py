"""For how many tokens a host with a student in place writes what it writes by itself."""

from .measure import PART

__all__ = ["PART"]
