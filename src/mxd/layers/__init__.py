"""The sparse layers: what can stand in for a host's MLP. They need torch and nothing else of mxd's weight."""

from .aux import aux_output
from .base import Code, Output, SparseLayer, Units
from .build import LAYERS, Sizes, build, from_description
from .controls import Additive, Dense
from .cp import CPMuMoE, CPMuMoEConfig
from .edited import Edited
from .mov import MoV
from .mxd import MxD, MxDConfig
from .product_key import MxDProductKey
from .sae import TopKSAE, TopKSAEConfig
from .transcoder import SkipTranscoder, Transcoder, TranscoderConfig

MixtureOfDecoders = MxD | MxDProductKey
"""Every layer of the form y = (Cᵀa) * (Dᵀz) + b, whatever its gate."""

__all__ = [
    "LAYERS",
    "Additive",
    "CPMuMoE",
    "CPMuMoEConfig",
    "Code",
    "Dense",
    "Edited",
    "MixtureOfDecoders",
    "MoV",
    "MxD",
    "MxDConfig",
    "MxDProductKey",
    "Output",
    "Sizes",
    "SkipTranscoder",
    "SparseLayer",
    "TopKSAE",
    "TopKSAEConfig",
    "Transcoder",
    "TranscoderConfig",
    "Units",
    "aux_output",
    "build",
    "from_description",
]
