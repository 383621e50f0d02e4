"""The host and the students of a run, in the thread that owns them."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import StudentRecord
from ..devices import layer_device
from ..host import Host
from ..layers import SparseLayer
from ..written import Written
from . import asks
from .replies import Refusal
from .shelf import Shelf
from .spans import spans

LAYERS = 4
"""Students kept in memory."""
SHARE = 0.8
"""Of the free memory, at most, that one piece of work may need."""


class Model:
    """A run's host, and its students as they are asked for.

    Attributes:
        host: the host.
        shelf: the run's files.
        keeps_logits: whether the host can be asked for the scores of the last token alone.
    """

    def __init__(self, shelf: Shelf, host: Host) -> None:
        self.shelf, self.host = shelf, host
        self.keeps_logits = "logits_to_keep" in inspect.signature(host.model.forward).parameters
        self._layers: OrderedDict[tuple[str, str], SparseLayer] = OrderedDict()
        self._special = set(host.tokenizer.all_special_ids)
        self.token = lru_cache(maxsize=100_000)(self._token)

    @classmethod
    def load(cls, shelf: Shelf, device: str) -> Model:
        """Load the run's host.

        Raises:
            HostError, ConfigError, AssetError: see `Host.load`.
        """
        made = shelf.run.info["config"]
        return cls(shelf, Host.load(made["host"], revision=made["revision"], device=device, dtype=made["dtype"]))

    def student(self, name: str) -> StudentRecord:
        return self.shelf.run.student(name)

    def layer(self, name: str) -> SparseLayer:
        """A student's layer, on the host's device.

        Raises:
            RunError: its weights are missing or damaged.
        """
        run = self.shelf.run
        key = (name, run.weights_sha256(name))
        if key not in self._layers:
            self._layers[key] = run.load(name, self.host.device)
            while len(self._layers) > LAYERS:
                self._layers.popitem(last=False)
        self._layers.move_to_end(key)
        return self._layers[key]

    def written(self, layer: SparseLayer, sample: Tensor) -> Written:
        """What the units of a layer write; `sample` are a few of its inputs."""
        return Written(layer, sample)

    def ids(self, text: str, *, special: bool) -> list[int]:
        """Token ids of a text, BOS first where the tokenizer has one; with `special`, the names of special tokens are those tokens.

        Raises:
            Refusal: longer than `asks.MOST_TOKENS`.
        """
        tokenizer = self.host.tokenizer
        begin = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
        found = begin + list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=not special))
        if not found:
            raise Refusal(422, "the text holds no token", expected="at least 1")
        if len(found) > asks.MOST_TOKENS:
            raise Refusal(
                422, "the text is too long", expected=f"at most {asks.MOST_TOKENS} tokens", got=str(len(found)), next="shorten it"
            )
        self.check_length(len(found))
        return found

    def check_length(self, tokens: int) -> None:
        """
        Raises:
            Refusal: longer than the host can read.
        """
        most = self.host.max_tokens
        if most is not None and tokens > most:
            raise Refusal(422, "longer than the host can read", expected=f"at most {most} tokens", got=str(tokens))

    def read_again(self, ids: Sequence[int]) -> dict[str, Any]:
        """Tokens as the page draws them: their text, where each begins in it, and which are special, with their names."""
        text, cuts = spans(ids, self.host.decode)
        special = [at for at, token in enumerate(ids) if token in self._special]
        names = {str(at): self.token(ids[at]) for at in special}
        return {"text": text, "cuts": cuts, "ids": list(ids), "special": special, "names": names}

    def is_special(self, token: int) -> bool:
        return token in self._special

    def _token(self, token: int) -> str:
        """The text of one token; the vocabulary's own name of it where it is special or no whole character."""
        text = self.host.decode([token])
        if text and "\ufffd" not in text:
            return text
        named = self.host.tokenizer.convert_ids_to_tokens(token)
        return named if isinstance(named, str) else text

    def check_room(self, numbers: float) -> None:
        """Find out before, not in the middle, that memory is too small for so many float32 numbers.

        Raises:
            Refusal: it is.
        """
        free = free_bytes(self.host.device)
        if free is not None and 4 * numbers > SHARE * free:
            needed = f"about {4 * numbers / 2**20:,.0f} MiB"
            raise Refusal(503, "too little memory for this", expected=needed, got=f"{free / 2**20:,.0f} MiB free", next="ask for less")

    def cache_numbers(self, rows: int, tokens: int) -> int:
        """Numbers in a KV cache."""
        config = self.host.model.config.get_text_config()
        heads = getattr(config, "num_attention_heads", 1)
        width = getattr(config, "head_dim", None) or self.host.d_model // max(heads, 1)
        kept = getattr(config, "num_key_value_heads", None) or heads
        return 2 * rows * tokens * len(self.host.sites) * kept * width

    def source(self, layer: SparseLayer, hookpoint: str, ids: Tensor) -> Tensor:
        """What a layer reads in the host [token, d_in] on one sequence [1, token]."""
        found = self.host.read(ids, [hookpoint])[self.host.site(hookpoint).hookpoint]
        return (found.y if layer.reads == "output" else found.x)[0].to(layer_device(layer))


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a device; None where that cannot be told."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return None
