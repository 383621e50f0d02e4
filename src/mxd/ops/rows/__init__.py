"""Weighted sums and dot products of gathered rows, the inner loops of every sparse op: `eager.py`, `triton.py`; `crowded.py` where a
dense product is faster."""
