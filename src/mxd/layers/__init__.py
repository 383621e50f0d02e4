"""The sparse layers: what can stand in for a host's MLP. They need torch and nothing else of mxd's weight."""

from .base import Code, Output, SparseLayer
from .build import LAYERS, Sizes, build, from_description
from .controls import Additive, Dense
from .mxd import MxD, MxDConfig
from .sae import TopKSAE, TopKSAEConfig
from .transcoder import SkipTranscoder, Transcoder, TranscoderConfig

__all__ = [
    "LAYERS",
    "Additive",
    "Code",
    "Dense",
    "MxD",
    "MxDConfig",
    "Output",
    "Sizes",
    "SkipTranscoder",
    "SparseLayer",
    "TopKSAE",
    "TopKSAEConfig",
    "Transcoder",
    "TranscoderConfig",
    "build",
    "from_description",
]
