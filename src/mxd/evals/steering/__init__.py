"""What the texts of one unit have in common when it is held up, and what that costs."""

from .measure import PART

__all__ = ["PART"]
