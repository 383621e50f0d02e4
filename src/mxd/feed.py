"""Where a training run gets its activations: from the host as it reads text, or from a folder that ``mxd harvest`` wrote.

Both give the same batches in the same order, so that the students are the same, bit for bit, where the cache is in float32.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, Protocol, TypeVar

import torch

from .ahead import ahead
from .cache import Cache
from .config import HarvestConfig, TrainConfig
from .errors import ConfigError, TextError, TooLittleText
from .harvest import Batch, collect, read_blocks
from .host import Host, find_device
from .sites import MLPSite, MLPWeights
from .sources import CORPORA
from .text import Corpus, TokenBlock

T = TypeVar("T")

log = logging.getLogger("mxd")

PROBE_TOKENS = 4096
"""Validation tokens on which the routing is measured while training."""

Batches = Generator[dict[str, Batch]]
Wanted = Callable[[int], bool]
"""Says of a read, by its number from 0 on, whether it is wanted."""


def every(number: int) -> bool:
    """Wants every read."""
    return True


class Feed(Protocol):
    """A source of activations for one run."""

    @property
    def device(self) -> torch.device:
        """Where the batches lie."""
        ...

    @property
    def sites(self) -> list[MLPSite]:
        """The MLPs asked for, in that order."""
        ...

    def pin(self, text: Mapping[str, Any]) -> None:
        """Read the text as it was when run.json said this of it; called before `prepare`."""
        ...

    def prepare(self) -> None:
        """Find out that there is as much as asked for; called before anything is written.

        Raises:
            TextError, ConfigError, RunError: there is not.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Entries of run.json: host, text and, from a cache, activations."""
        ...

    def weights(self, hookpoint: str) -> MLPWeights:
        """The host MLP's own weights, float32."""
        ...

    def held_out(self) -> dict[str, Batch] | None:
        """Activations on a little validation text, by hookpoint; None where there is none."""
        ...

    def lengths(self) -> Iterator[int]:
        """Tokens of every read of the training text, in order, found without the activations."""
        ...

    def batches(self, wanted: Wanted = every) -> Batches:
        """The wanted reads of the training activations in the order of the text, by hookpoint; to be closed."""
        ...


class HostFeed:
    """Activations straight from the host.

    Raises:
        TextError, HostError, ConfigError, AssetError: the text, the host or the layers cannot be had.
    """

    def __init__(self, config: TrainConfig | HarvestConfig) -> None:
        self._config = config
        self.corpus = Corpus(config.text, column=config.text_column, seed=config.seed)
        self.host = Host.load(config.host, revision=config.revision, device=config.device, dtype=config.dtype)
        self.device = self.host.device
        self.sites = _different([self.host.site(key) for key in config.layers], config.layers)
        self._blocks: Callable[[], Iterable[TokenBlock]] = tuple
        self._probe: TokenBlock | None = None

    def pin(self, text: Mapping[str, Any]) -> None:
        self.corpus.pin(text)

    def prepare(self) -> None:
        self._blocks = _train_blocks(self._config, self.corpus, self.host)
        self._probe = _probe_block(self._config, self.corpus, self.host)

    def describe(self) -> dict[str, Any]:
        host = {"name": self.host.name, "revision": self.host.revision, "fingerprint": self.host.fingerprint}
        return {"host": host, "text": self.corpus.describe()}

    def weights(self, hookpoint: str) -> MLPWeights:
        return self.host.weights(hookpoint)

    def held_out(self) -> dict[str, Batch] | None:
        return collect(self.host, [self._probe], self._hookpoints, self._probe.ids.numel()) if self._probe else None

    @property
    def held_out_tokens(self) -> int:
        """Tokens that `held_out` will hold."""
        return self._probe.ids.numel() if self._probe else 0

    def lengths(self) -> Iterator[int]:
        return (block.ids.numel() for block in self._blocks())

    def batches(self, wanted: Wanted = every) -> Batches:
        blocks = (block for number, block in enumerate(self._blocks()) if wanted(number))
        read = read_blocks(self.host, blocks, self._hookpoints)
        if self.device.type == "cuda":
            # The CPU only drives the GPU here. Where the host itself runs on the CPU, it and the students need the same cores: reading
            # ahead would make both slower and nobody faster.
            return ahead(read, _depth(self._config))
        return (batches for batches in read)

    @property
    def _hookpoints(self) -> list[str]:
        return [site.hookpoint for site in self.sites]


class CacheFeed:
    """Activations from disk, without the host; a thread reads ahead, so that the students do not wait for the disk.

    Raises:
        ConfigError: a layer that is not cached, more tokens than there are, or an absent device.
    """

    def __init__(self, config: TrainConfig, cache: Cache) -> None:
        self._config, self._cache = config, cache
        self.device = find_device(config.device)
        self.sites = _different([cache.site(key) for key in config.layers], config.layers)
        if config.tokens > cache.tokens:
            raise ConfigError(
                f"{cache.path} holds too few tokens" + ("" if cache.finished else " (its harvest was interrupted)"),
                expected=f"--tokens of at most {cache.tokens:,}",
                got=f"{config.tokens:,}",
                next="lower --tokens (and raise --passes), or harvest more",
            )

    def pin(self, text: Mapping[str, Any]) -> None:
        """Cached activations are what they are."""

    def prepare(self) -> None:
        self._cache.check_files(self._hookpoints)
        if self._cache.validation(self._hookpoints[:1]) is None:
            log.warning("no validation text: the routing is not followed while training")

    def describe(self) -> dict[str, Any]:
        made, cache = self._cache.info, self._cache
        about = {"path": str(cache.path), "manifest_sha256": cache.sha256, "dtype": made["dtype"], "tokens": cache.tokens}
        return {"host": made["host"], "text": made["text"], "activations": about}

    def weights(self, hookpoint: str) -> MLPWeights:
        weights = self._cache.weights(hookpoint)
        return MLPWeights(*(None if part is None else part.to(self.device) for part in weights))  # pyright: ignore[reportArgumentType]

    def held_out(self) -> dict[str, Batch] | None:
        found = self._cache.validation(self._hookpoints)
        return {hookpoint: batch.to(self.device) for hookpoint, batch in found.items()} if found else None

    def lengths(self) -> Iterator[int]:
        return self._cache.lengths(self._config.tokens)

    def batches(self, wanted: Wanted = every) -> Batches:
        on_gpu = self.device.type == "cuda"
        read = self._cache.batches(self._hookpoints, self._config.tokens, pinned=on_gpu, wanted=wanted)
        return _on(self.device, ahead(read, _depth(self._config)))

    @property
    def _hookpoints(self) -> list[str]:
        return [site.hookpoint for site in self.sites]


def open_feed(config: TrainConfig, cache: Cache | None) -> Feed:
    """The source of activations that `config` (as `plan.settled`) asks for."""
    return CacheFeed(config, cache) if cache is not None else HostFeed(config)


def until(items: Iterator[T], tokens: int, size: Callable[[T], int]) -> Iterator[T]:
    """Items from the front that hold `tokens` tokens together, the last one whole, or all of them; `size` counts those of one."""
    seen = 0
    while seen < tokens and (item := next(items, None)) is not None:
        seen += size(item)
        yield item


def _on(device: torch.device, stream: Batches) -> Batches:
    with closing(stream):
        for batches in stream:
            yield {hookpoint: batch.to(device) for hookpoint, batch in batches.items()}


def _depth(config: TrainConfig | HarvestConfig) -> int:
    """Reads to be ahead: half a shuffle buffer, which is what a refill takes at once; a harvest takes them one by one."""
    tokens = config.buffer_tokens // 2 if isinstance(config, TrainConfig) else 0
    return max(2, -(-tokens // (config.tokens_per_sequence * config.sequences_per_read)))


def _different(sites: list[MLPSite], layers: Sequence[str]) -> list[MLPSite]:
    if len({site.hookpoint for site in sites}) != len(sites):
        raise ConfigError("--layers names an MLP twice", got=" ".join(layers))
    return sites


def _train_blocks(config: TrainConfig | HarvestConfig, corpus: Corpus, host: Host) -> Callable[[], Iterable[TokenBlock]]:
    """Makes the blocks of training tokens; for texts that are at hand, made now, so that too little text is known at once."""
    per_block = config.tokens_per_sequence * config.sequences_per_read

    def wanted() -> Iterator[TokenBlock]:
        made = corpus.blocks(
            host.tokenizer, "train", tokens_per_sequence=config.tokens_per_sequence, sequences_per_block=config.sequences_per_read
        )
        return itertools.islice(made, -(-config.tokens // per_block))

    if corpus.streamed:
        return wanted
    blocks = list(wanted())
    found = sum(block.ids.numel() for block in blocks)
    if found < config.tokens:
        raise TextError(
            "too little training text",
            expected=f"{config.tokens:,} tokens (--tokens)",
            got=f"{found:,} in {' '.join(config.text)}",
            next=f"lower --tokens (and raise --passes), or add to --text: {', '.join(CORPORA)}, or files of your own",
        )
    return lambda: blocks


def _probe_block(config: TrainConfig | HarvestConfig, corpus: Corpus, host: Host) -> TokenBlock | None:
    """Validation text on which the routing is followed in training: about `PROBE_TOKENS`, fewer where there is less, or none."""
    sequences = max(1, PROBE_TOKENS // config.tokens_per_sequence)
    while sequences:
        try:
            return corpus.sample(
                host.tokenizer, "validation", sequences=sequences, tokens_per_sequence=config.tokens_per_sequence, seed=config.seed
            )
        except TooLittleText:
            sequences //= 2
    log.warning("no validation text: the routing is not followed while training")
    return None
