"""The K largest of every row: `eager.py` with PyTorch's operators, `triton.py` on GPUs."""
