"""Gather-and-sum of table rows: the sparse side of every decoder.

`naive.py` is the specification, `eager.py` runs anywhere and is what `expert_mix` is today; a Triton version takes its place
beside them.
"""

from .eager import expert_mix

__all__ = ["expert_mix"]
