"""The sparse operations under every layer. Each is a folder: what it means (naive), how it runs (eager, triton), which is chosen.

``with ops.using(precision="bf16", scores_mib=64): ...`` changes how they run (`mxd.ops.settings`).
"""

from .expert_mix import expert_mix
from .linear import linear
from .settings import Settings, current, using
from .topk_gate import topk_gate

__all__ = ["Settings", "current", "expert_mix", "linear", "topk_gate", "using"]
