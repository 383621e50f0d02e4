"""What identifies a host's weights: sha256 of its files, or of its tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import assets


def weight_files(folder: Path) -> list[Path]:
    """The weights in a model's folder, in order: safetensors if there are any, else GGUF, else PyTorch's; empty for none."""
    for pattern in ("*.safetensors", "*.gguf", "*.bin"):
        if files := sorted(folder.glob(pattern)):
            return files
    return []


def of_files(files: Sequence[Path]) -> str:
    """sha256 of one file; of several, that of their sums."""
    digests = [assets.sha256_of(file) for file in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()


def of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of names, dtypes, shapes and contents, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
