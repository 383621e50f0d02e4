"""The sparse operations under every layer. Each is a folder: what it means (naive), how it runs (eager), which is chosen."""

from .expert_mix import expert_mix
from .topk_gate import topk_gate

__all__ = ["expert_mix", "topk_gate"]
