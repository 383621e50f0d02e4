"""The published frontier: cross-entropy of hosts with one MLP replaced, Oldfield et al. 2025 (arXiv 2505.21364), figure 3.

Nats per token, read off the vector figure; measured by the authors on their own text, so levels are to be compared with care and
differences to the host less so. One layer of each host.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import NamedTuple

K = (16, 32, 64, 128, 256)


class _Host(NamedTuple):
    hookpoint: str
    original: float
    replaced: dict[str, tuple[float, ...]]
    """By kind, for each of `K`."""


_HOSTS = {
    "gpt2": _Host(
        "layers.8.mlp",
        3.60108,
        {
            "transcoder": (3.6352, 3.62595, 3.61519, 3.61011, 3.60634),
            "skip-transcoder": (3.63167, 3.62222, 3.61347, 3.60911, 3.60584),
            "mxd": (3.60429, 3.60394, 3.60325, 3.60281, 3.60323),
        },
    ),
    "pythia-410m": _Host(
        "layers.15.mlp",
        3.32221,
        {
            "transcoder": (3.34748, 3.34341, 3.33937, 3.33447, 3.32986),
            "skip-transcoder": (3.33826, 3.33603, 3.33352, 3.33066, 3.32787),
            "mxd": (3.32416, 3.32487, 3.32316, 3.32303, 3.32265),
        },
    ),
    "pythia-1.4b": _Host(
        "layers.12.mlp",
        3.09904,
        {
            "transcoder": (3.12229, 3.11698, 3.1125, 3.10948, 3.10624),
            "skip-transcoder": (3.11297, 3.1093, 3.10743, 3.10576, 3.10392),
            "mxd": (3.10073, 3.10024, 3.10031, 3.09977, 3.09967),
        },
    ),
    "llama-3.2-3b": _Host(
        "layers.12.mlp",
        3.01981,
        {
            "transcoder": (3.04139, 3.03845, 3.03565, 3.03289, 3.03029),
            "skip-transcoder": (3.0317, 3.0294, 3.02729, 3.02549, 3.02421),
            "mxd": (3.02119, 3.02093, 3.02078, 3.02061, 3.02043),
        },
    ),
}


def frontier(host: str, hookpoints: set[str]) -> dict[str, object] | None:
    """Excess cross-entropy over the host, nats, by kind for each `k`; None unless the run is of a host and layer that was published.

    Args:
        host: name on the hub, with or without an owner, or a folder of that name.
    """
    found = _HOSTS.get(PurePath(host).name.lower())
    if found is None or hookpoints != {found.hookpoint}:
        return None
    return {"k": list(K), "excess": {kind: [round(ce - found.original, 5) for ce in each] for kind, each in found.replaced.items()}}
