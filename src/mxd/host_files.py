"""The files of a host, checked before transformers builds what they describe: numbers, names of other files, and room in the weights."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from torch import nn

from .errors import HostError

LAYERS = 1_000
"""Most layers; the deepest public models have about 130. A module is built for each before anything can be compared."""
MODULES = 100_000
"""Layers times experts, at most; Kimi K2 has 23,424."""
LISTS = ("num_labels", "attention_types", "vision_feature_layer")
"""Fields by whose numbers transformers makes lists and names, or counts layers."""
CONFIG_BYTES = 16 * 2**20
"""Largest config.json that is read."""
ELEMENTS_PER_BYTE = 8
"""Weights in a byte of file, at most: the densest quantisation has 5."""
SPARE_ELEMENTS = 2**28
"""Elements that need not be in the files: buffers such as masks, and tied weights. 1 GiB in float32."""

_LAYERS = re.compile(r"(.*_)?(layers?|n_layers?)")
_EXPERTS = re.compile(r"(.*_)?(n_|num_)?(routed_|local_)?experts")


def check_config(name: str, path: Path) -> None:
    """Look at a config.json before transformers does: it makes lists and modules by the numbers in it.

    Raises:
        HostError: not JSON, absurd numbers of layers or experts, or code to be fetched from elsewhere.
    """
    try:
        with path.open("rb") as file:
            text = file.read(CONFIG_BYTES + 1)
        found: Any = json.loads(text) if len(text) <= CONFIG_BYTES else None
    except (OSError, ValueError, RecursionError) as error:
        raise HostError(f"host {name} has an unreadable config.json", expected="JSON", got=f"{type(error).__name__}: {error}") from error
    if not isinstance(found, dict):
        raise HostError(
            f"host {name} has no usable config.json", expected="a JSON object", got=f"{type(found).__name__}, {len(text)} bytes"
        )
    fields = list(_fields(found))
    numbers = [(key, value) for key, value in fields if isinstance(value, int)]
    layers = max((value for key, value in numbers if _LAYERS.fullmatch(key)), default=1)
    experts = max((value for key, value in numbers if _EXPERTS.fullmatch(key)), default=1)
    longest = max((number for key, value in fields if key in LISTS for number in _values(value) if isinstance(number, int)), default=1)
    if longest > MODULES:
        raise HostError(
            f"host {name}: absurd number in config.json", expected=f"at most {MODULES} for {', '.join(LISTS)}", got=f"{longest}"
        )
    if layers > LAYERS:
        raise HostError(f"host {name}: absurd number of layers in config.json", expected=f"at most {LAYERS}", got=f"{layers}")
    if layers * experts > MODULES:
        expected = f"at most {MODULES} in all layers"
        raise HostError(f"host {name}: absurd number of experts in config.json", expected=expected, got=f"{experts} in {layers} layers")
    for key, value in fields:
        if "attn_implementation" in key and "/" in str(value):
            # transformers would download code of that name from the hub, and run it.
            raise HostError(f"host {name} wants code from elsewhere", expected=f"no {key} in config.json", got=f"{value}"[:200])


def check_index(name: str, folder: Path) -> None:
    """Refuse an index of weights that names a file outside the host's folder.

    Raises:
        HostError: it does, or it is no index.
    """
    for path in sorted(folder.glob("*.index.json")):
        try:
            found: Any = json.loads(path.read_bytes())
            files = {str(file) for file in found["weight_map"].values()}
        except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise HostError(f"host {name} has an unreadable {path.name}", expected="a weight_map", got=type(error).__name__) from error
        if strange := [file for file in sorted(files) if file in ("", "..") or "/" in file or "\\" in file or "\0" in file]:
            raise HostError(f"host {name}: {path.name} leads elsewhere", expected="names of files beside it", got=repr(strange[0])[:200])


def check_size(name: str, model: nn.Module, files: Sequence[Path]) -> None:
    """Refuse a description of far more weights than the files can hold, which would be allocated before one is found missing.

    Args:
        name: of the host.
        model: as described, on the meta device, which takes no memory.
        files: its weights.

    Raises:
        HostError: there is not room for them.
    """
    described = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    held = sum(file.stat().st_size for file in files)
    if described > held * ELEMENTS_PER_BYTE + SPARE_ELEMENTS:
        got = f"{described:.3g} weights described and {held} bytes of them"
        raise HostError(f"host {name} describes more than it holds", expected="weights for all of the model", got=got)


def code_refused(name: str, error: BaseException) -> HostError | None:
    """In our words, an error of transformers or torch about code in a host's files; theirs end in how to run it."""
    if "weights_only" in str(error):
        what = f"host {name} has weights in a file that could run code"
        return HostError(what, expected="safetensors, or nothing but tensors in .bin files", next="ask its author for safetensors")
    if "trust_remote_code" in str(error) or "custom code" in str(error):
        what = f"host {name} needs code of its own, which is never run"
        return HostError(what, expected="a model that transformers knows", next="choose another host, or use Host.from_model")
    return None


def _fields(value: object) -> Iterator[tuple[str, object]]:
    """Every field of a JSON value, at any depth."""
    for found in _values(value):
        if isinstance(found, dict):
            yield from cast(dict[str, object], found).items()


def _values(value: object) -> Iterator[object]:
    """A JSON value and every value in it, at any depth."""
    left: list[object] = [value]
    while left:
        yield (found := left.pop())
        if isinstance(found, dict):
            left += cast(dict[str, object], found).values()
        elif isinstance(found, list):
            left += cast(list[object], found)
