"""Running a model from the middle: what the blocks below an MLP gave is kept, and given again instead of computing it.

Conditions that differ from one layer on (stand-ins for its MLP, edits of a stand-in) share everything below that layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


def below(model: nn.Module, path: str) -> list[nn.Module]:
    """The blocks before the one that holds the module at `path`, in order; none if the model does not keep its blocks in a list.

    Blocks are the entries of the outermost `ModuleList` on the way to the module (``model.layers`` of ``model.layers.8.mlp``).
    """
    parts = path.split(".")
    for end, part in enumerate(parts):
        if isinstance(blocks := model.get_submodule(".".join(parts[:end])), nn.ModuleList):
            return list(blocks)[: int(part)]
    return []


@contextmanager
def recording(blocks: Sequence[nn.Module]) -> Iterator[dict[nn.Module, Any]]:
    """Collects what each of `blocks` returns when the model runs, by block."""
    found: dict[nn.Module, Any] = {}
    with ExitStack() as hooks:
        for block in blocks:
            hooks.callback(block.register_forward_hook(lambda module, _args, output: found.__setitem__(module, output)).remove)
        yield found


@contextmanager
def giving(blocks: Sequence[nn.Module], output: Any) -> Iterator[None]:
    """Every one of `blocks` returns `output` at once. The last one's is what the next block reads; the others' nobody reads.

    The blocks stay where they are (models ask them for attributes such as their kind of attention): only what they compute is left out.
    """

    def give(*_args: Any, **_kwargs: Any) -> Any:
        return output

    try:
        for block in blocks:
            block.forward = give
        yield
    finally:
        for block in blocks:
            del block.forward  # the instance's own; the class's is there again
