"""Scores -> ReLU -> the K largest, with gradients only where a unit is active.

`naive.py` is the specification, `eager.py` runs anywhere and is what `topk_gate` is today; a Triton version takes its place
beside them.
"""

from .eager import topk_gate

__all__ = ["topk_gate"]
