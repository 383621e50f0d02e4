"""What a student costs beside the MLP that it replaces."""

from .measure import PART

__all__ = ["PART"]
