"""An edit of a student as a small JSON file: units ablated, scaled or added to.

::

    {"format_version": 1, "kind": "mxd-edit", "student": "mxd-k32", "hookpoint": "layers.8.mlp", "weights_sha256": "…",
     "scale": {"17": 0.0}, "add": {"4711": 3.5}}
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from .checkpoint import read_json
from .errors import RunError
from .layers import Edited, SparseLayer

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Edit:
    """What is changed in one student's activations, after its gate."""

    student: str
    """Name of the student in its run."""
    hookpoint: str
    """The MLP it stands in for."""
    weights_sha256: str
    """Checksum of its weights: unit numbers mean nothing in another layer."""
    scale: dict[int, float] = field(default_factory=dict)
    """Factor by unit; 0 ablates."""
    add: dict[int, float] = field(default_factory=dict)
    """What is added to the unit's activation at every token."""

    def apply(self, layer: SparseLayer) -> Edited:
        """The edited layer; `layer` stays as it is."""
        return Edited(layer, scale=self.scale, add=self.add)


def read(path: Path) -> Edit:
    """The edit in a file.

    Raises:
        RunError: there is none, or it is damaged or of a newer format.
    """
    found = read_json(path)
    try:
        return Edit(
            str(found["student"]),
            str(found["hookpoint"]),
            str(found["weights_sha256"]),
            {int(unit): float(value) for unit, value in found.get("scale", {}).items()},
            {int(unit): float(value) for unit, value in found.get("add", {}).items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"{path} is not an edit", expected="the JSON that mxd edit writes", got=str(error), next="mxd edit --help") from None
