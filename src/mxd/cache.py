"""A folder of cached activations: what MLPs of a host received and returned on a run of text, and all that training needs beside it.

::

    DIR/manifest.json                            format_version, host, text, hookpoints, every file with its size and checksum
    DIR/train/HOOKPOINT/00000.safetensors        x [token, d_in], y [token, d_out], first [token] (see `mxd.shards`)
    DIR/validation/HOOKPOINT/00000.safetensors   the same of a little validation text, on which the routing is followed while training
    DIR/HOOKPOINT/mlp.safetensors                the MLP's own weights, float32, under the names of `MLPWeights`
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from .checkpoint import check_origin
from .config import HarvestConfig
from .errors import ConfigError, RunError
from .harvest import Batch
from .sealed import check_sum, check_version, read_json, write_atomic, write_sealed
from .shards import FORMATS, MEND, Shard, ShardReader, ShardWriter, Widths, check_size
from .sites import MLPSite, MLPWeights
from .typed import leads_out, options, wrong

FORMAT_VERSION = 1
"""Version of the folder; a newer one is refused."""
WHAT = "mxd activations"
"""Says in the manifest what the folder is."""
MANIFEST = "manifest.json"


class Stored(NamedTuple):
    """One hookpoint of a cache."""

    site: MLPSite
    """The MLP, as the host described it."""
    weights: Shard
    """Its weights; tokens is 0."""
    train: list[Shard]
    """Activations on training text, in the order of the text."""
    validation: list[Shard]
    """Activations on validation text; empty where there was none."""


class Read(NamedTuple):
    """Rows of a shard that the host read at once."""

    number: int
    """From 0 on, over all shards."""
    start: int
    """First row in its shard."""
    tokens: int
    """How many rows."""


class Cache:
    """A folder of cached activations, opened for reading.

    Attributes:
        path: the folder.
        info: its manifest.
        sha256: of the manifest, so that a run can say what it was trained on.
        tokens: training tokens that are there.
        finished: False if the harvest was interrupted.
        sites: the MLPs, in the order of the harvest.
    """

    def __init__(self, path: Path, info: dict[str, Any], sha256: str, hookpoints: dict[str, Stored]) -> None:
        self.path, self.info, self.sha256 = path, info, sha256
        self._hookpoints = hookpoints
        self.tokens: int = info["tokens"]
        self.finished: bool = info["finished"]
        self._store: str = info["dtype"]

    @classmethod
    def open(cls, path: str | Path) -> Cache:
        """Open a folder that `mxd harvest` wrote.

        Raises:
            RunError: there is none, it is something else, of a newer format, or its manifest is damaged or names files outside it.
        """
        path = Path(path).expanduser()
        manifest = path / MANIFEST
        if not manifest.is_file():
            what = "holds no cached activations" if path.exists() else "does not exist"
            raise RunError(f"{path} {what}", expected=f"a folder with {MANIFEST}", next=f"mxd harvest --out {path}")
        info = read_json(manifest)
        if not isinstance(info, dict) or info.get("what") != WHAT:
            raise RunError(f"{manifest} was not written by mxd harvest", expected=f'"what": "{WHAT}"', next="mxd harvest --out DIR")
        check_version(info.get("format_version"), path, FORMAT_VERSION)
        try:
            hookpoints = _stored(path, info)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RunError(f"{manifest} is damaged", expected="what mxd harvest writes", got=repr(error), next=MEND) from None
        return cls(path, info, hashlib.sha256(manifest.read_bytes()).hexdigest(), hookpoints)

    @property
    def sites(self) -> list[MLPSite]:
        return [stored.site for stored in self._hookpoints.values()]

    @property
    def tokens_per_read(self) -> int:
        """Tokens that the host read at once; what reading gives at once as well."""
        return self.info["config"]["tokens_per_sequence"] * self.info["config"]["sequences_per_read"]

    def site(self, key: str) -> MLPSite:
        """The cached MLP at a layer number or hookpoint.

        Raises:
            ConfigError: it is not cached; says which are.
        """
        for site in self.sites:
            if key in (str(site.layer), site.hookpoint, site.module):
                return site
        known = ", ".join(site.hookpoint for site in self.sites)
        raise ConfigError(
            f"{self.path} holds no activations of {key}", expected=known, got=key, next="harvest that layer, or leave out --layers"
        )

    def weights(self, hookpoint: str) -> MLPWeights:
        """The weights of one MLP, float32.

        Raises:
            RunError: the file is missing or damaged.
        """
        shard = self._hookpoints[hookpoint].weights
        check_size(self.path, shard)
        path = self.path / shard.file
        data = check_sum(path, shard.sha256, mend=MEND)
        try:
            tensors = load_tensors(data)
            rest = {name: tensors.get(name) for name in ("b_E", "E_gate", "b_gate", "b_D")}
            return MLPWeights(E=tensors["E"], D=tensors["D"], **rest)
        except (SafetensorError, KeyError) as error:
            raise RunError(f"{path} cannot be read", expected="safetensors with E and D", got=str(error), next=MEND) from None

    def summary(self) -> str:
        """One line: how much of what is there."""
        state = "finished" if self.finished else "interrupted"
        sites = ", ".join(site.hookpoint for site in self.sites)
        return f"{self.path}: {state}, host {self.info['host']['name']}, {self.tokens:,} tokens of {sites} in {self._store}"

    def check_files(self, hookpoints: Sequence[str]) -> None:
        """Raise `RunError` unless every file of these hookpoints is there and has its size. Checksums are looked at when rows are read."""
        for hookpoint in hookpoints:
            stored = self._hookpoints[hookpoint]
            for shard in (stored.weights, *stored.train, *stored.validation):
                check_size(self.path, shard)

    def checks(self) -> Iterator[tuple[Path, Callable[[], Any]]]:
        """Every file beside the manifest, and what raises `RunError` if it is not what was written."""
        for hookpoint, stored in self._hookpoints.items():
            yield self.path / stored.weights.file, lambda hookpoint=hookpoint: self.weights(hookpoint)
            for shard in (*stored.train, *stored.validation):
                yield self.path / shard.file, lambda s=shard, h=hookpoint: ShardReader(self.path, s, self._widths(h)).__exit__()

    def batches(
        self, hookpoints: Sequence[str], tokens: int, *, pinned: bool = False, wanted: Callable[[int], bool] | None = None
    ) -> Iterator[dict[str, Batch]]:
        """The first `tokens` training tokens in the order of the text, in the batches in which the host read them (the last is a whole one
        too): what `harvest.read_blocks` gives, on the CPU. Lazy; the checksum of a shard is checked before its first row is given.

        Args:
            hookpoints: MLPs to read.
            tokens: training tokens to read.
            pinned: put them into page-locked memory.
            wanted: says of a batch, by its number, whether to read it; default: all. A shard of which none is wanted is not opened.

        Raises:
            RunError: a shard is missing, truncated or changed.
        """
        widths = {hookpoint: self._widths(hookpoint) for hookpoint in hookpoints}
        for shard, reads in self._reads(tokens):
            chosen = [read for read in reads if wanted is None or wanted(read.number)]
            if not chosen:
                continue
            with contextlib.ExitStack() as files:
                readers = {h: files.enter_context(ShardReader(self.path, self._hookpoints[h].train[shard], widths[h])) for h in hookpoints}
                for read in chosen:
                    yield {h: reader.rows(read.start, read.tokens, pinned=pinned) for h, reader in readers.items()}

    def lengths(self, tokens: int) -> Iterator[int]:
        """Tokens of every batch that `batches` gives."""
        return (read.tokens for _, reads in self._reads(tokens) for read in reads)

    def _reads(self, tokens: int) -> Iterator[tuple[int, list[Read]]]:
        """By shard, its batches among the first `tokens` tokens; the division into shards is the same for every hookpoint."""
        done, number = 0, 0
        for index, shard in enumerate(next(iter(self._hookpoints.values())).train):
            reads: list[Read] = []
            for start in range(0, shard.tokens, self.tokens_per_read):
                if done >= tokens:
                    break
                n = min(self.tokens_per_read, shard.tokens - start)
                reads.append(Read(number, start, n))
                done, number = done + n, number + 1
            if not reads:
                return
            yield index, reads

    def validation(self, hookpoints: Sequence[str]) -> dict[str, Batch] | None:
        """All cached validation tokens, as one batch per hookpoint; None where there was no validation text."""
        found: dict[str, Batch] = {}
        for hookpoint in hookpoints:
            for shard in self._hookpoints[hookpoint].validation:
                with ShardReader(self.path, shard, self._widths(hookpoint)) as reader:
                    found[hookpoint] = reader.rows(0, shard.tokens)
        return found or None

    def _widths(self, hookpoint: str) -> Widths:
        site = self._hookpoints[hookpoint].site
        return Widths(site.d_in, site.d_out, self._store)


def _stored(path: Path, info: dict[str, Any]) -> dict[str, Stored]:
    """The hookpoints of a manifest, checked against each other and for paths that lead out of the folder."""
    info["config"] = options(HarvestConfig, info["config"], ("host", "text", "tokens_per_sequence", "sequences_per_read"))
    check_origin(info)
    if info["dtype"] not in FORMATS or info["split"] != "train" or not isinstance(info["finished"], bool):
        raise ValueError(f"dtype {info['dtype']}, split {info['split']}, finished {info['finished']}")
    found: dict[str, Stored] = {}
    for hookpoint, entry in info["hookpoints"].items():
        site = MLPSite(**entry["site"])
        if unfit := wrong(MLPSite, entry["site"]):
            raise ValueError(", ".join(unfit))
        lists = {name: [_shard(shard) for shard in entry[name]] for name in ("train", "validation")}
        stored = Stored(site, _shard(entry["weights"]), lists["train"], lists["validation"])
        for shard in (stored.weights, *stored.train, *stored.validation):
            _check_inside(path, shard.file)
        if site.hookpoint != hookpoint or len(stored.validation) > 1 or sum(shard.tokens for shard in stored.train) != info["tokens"]:
            raise ValueError(f"{hookpoint} holds {sum(shard.tokens for shard in stored.train)} of {info['tokens']} tokens")
        found[hookpoint] = stored
    runs = {tuple(shard.tokens for shard in stored.train) for stored in found.values()}
    if len(runs) != 1 or min(info["config"][name] for name in ("tokens_per_sequence", "sequences_per_read")) < 1:
        raise ValueError(f"{len(found)} hookpoints in {len(runs)} different divisions")
    return found


def _shard(about: dict[str, Any]) -> Shard:
    shard, unfit = Shard(**about), wrong(Shard, about)
    if unfit or min(shard.tokens, shard.bytes) < 0:
        raise ValueError(", ".join(unfit) or f"{shard.tokens} tokens in {shard.bytes} bytes")
    return shard


def _check_inside(root: Path, file: str) -> None:
    """Raise `RunError` if a path of the manifest leads out of the folder: the folder may come from someone else."""
    if leads_out(file) or not (root / file).resolve().is_relative_to(root.resolve()):
        raise RunError(f"{root / MANIFEST} names a file outside its folder", expected="paths inside it", got=file, next="do not use it")


class CacheWriter:
    """A cache being written. The folder's old cache, if it may be replaced, goes first: two would rarely fit a disk.

    Args:
        path: the folder; see `check_writable`.
        sites: the MLPs.
        store: number format of the activations, a key of `FORMATS`.
        tokens: training tokens to come; fewer are allowed.
        tokens_per_shard: tokens in one file.
        info: what the manifest says beside the files (host, text, config, ...).
    """

    def __init__(
        self, path: Path, *, sites: Sequence[MLPSite], store: str, tokens: int, tokens_per_shard: int, info: Mapping[str, Any]
    ) -> None:
        self.path, self.tokens, self.kept = path, tokens, 0
        self._widths = {site.hookpoint: Widths(site.d_in, site.d_out, store) for site in sites}
        self._tokens_per_shard, self._info, self._store = tokens_per_shard, info, store
        self._entries: dict[str, dict[str, Any]] = {s.hookpoint: {"site": s._asdict(), "train": [], "validation": []} for s in sites}
        self._open: dict[str, ShardWriter] = {}
        path.mkdir(parents=True, exist_ok=True)
        _empty(path)
        self._write_manifest(finished=False)  # so that a folder left by a crash can be told from someone's own files, and replaced

    def add_weights(self, hookpoint: str, weights: MLPWeights) -> None:
        """Store the weights of one MLP."""
        tensors = {name: tensor.cpu().contiguous() for name, tensor in weights._asdict().items() if tensor is not None}
        data = save_tensors(tensors, metadata={"format": "pt"})
        file = f"{hookpoint}/mlp.safetensors"
        write_atomic(self.path / file, data)
        self._entries[hookpoint]["weights"] = Shard(file, 0, len(data), hashlib.sha256(data).hexdigest())._asdict()

    def add_validation(self, batches: Mapping[str, Batch]) -> None:
        """Store the validation activations, one batch per hookpoint."""
        for hookpoint, batch in batches.items():
            writer = self._writer("validation", hookpoint, len(batch.y))
            try:
                writer.add(batch)
                self._entries[hookpoint]["validation"] = [writer.finish(self.path)._asdict()]
            except BaseException:
                writer.drop()
                raise

    def add(self, batches: Mapping[str, Batch]) -> None:
        """Append training tokens, the same ones for every hookpoint."""
        start, end = 0, len(next(iter(batches.values())).y)
        while start < end:
            if not self._open:
                planned = max(1, min(self._tokens_per_shard, self.tokens - self.kept))
                self._open = {hookpoint: self._writer("train", hookpoint, planned) for hookpoint in self._entries}
            one = next(iter(self._open.values()))
            stop = min(end, start + one.tokens - one.written)
            for hookpoint, writer in self._open.items():
                writer.add(batches[hookpoint].at(slice(start, stop)))
            start = stop
            if one.written == one.tokens:
                self._close_shards()

    def finish(self) -> None:
        """The text is at its end: the last shard is what it is, and the cache is whole."""
        if self._open:
            self._close_shards()
        self._write_manifest(finished=True)

    def stop(self) -> int:
        """Something went wrong: keep whole shards only, and nothing at all if there is none. Returns the tokens kept."""
        for writer in self._open.values():
            writer.drop()
            writer.path.unlink(missing_ok=True)  # whole already, while that of another hookpoint was not
        self._open = {}
        if not self.kept:
            _empty(self.path)
            with contextlib.suppress(OSError):
                self.path.rmdir()
        return self.kept

    def _close_shards(self) -> None:
        done = {hookpoint: writer.finish(self.path) for hookpoint, writer in self._open.items()}
        self._open = {}
        for hookpoint, shard in done.items():
            self._entries[hookpoint]["train"].append(shard._asdict())
        self.kept += next(iter(done.values())).tokens
        self._write_manifest(finished=False)

    def _writer(self, split: str, hookpoint: str, tokens: int) -> ShardWriter:
        number = len(self._entries[hookpoint][split])
        return ShardWriter(self.path / split / hookpoint / f"{number:05}.safetensors", tokens, self._widths[hookpoint])

    def _write_manifest(self, *, finished: bool) -> None:
        head = {"format_version": FORMAT_VERSION, "what": WHAT, "finished": finished, "tokens": self.kept, "dtype": self._store}
        write_sealed(self.path / MANIFEST, {**head, "split": "train", **self._info, "hookpoints": self._entries})


def check_writable(path: Path, *, overwrite: bool) -> None:
    """Raise `RunError` if `path` holds a cache that would be lost, or something that is not a cache."""
    if not path.exists():
        return
    if not path.is_dir():
        raise RunError(f"{path} is a file", expected="a folder for the activations", next="choose another --out")
    if not any(path.iterdir()):
        return
    manifest = path / MANIFEST
    info = read_json(manifest) if manifest.is_file() else None
    if not isinstance(info, dict) or info.get("what") != WHAT:
        raise RunError(
            f"{path} is not empty and holds no cached activations", expected="a new or empty folder", next="choose another --out"
        )
    if not overwrite:
        state = "finished" if info.get("finished") else "interrupted"
        raise RunError(
            f"{path} holds {state} cached activations",
            expected="a folder without any",
            next="choose another --out, or add --overwrite to replace them",
        )


def disk_bytes(sites: Sequence[MLPSite], store: str, tokens: int) -> int:
    """Bytes on disk of `tokens` tokens (validation included) of all `sites`, with the MLPs' weights; headers and manifest left out."""
    rows = sum(Widths(site.d_in, site.d_out, store).row_bytes for site in sites)
    weights = sum(4 * site.d_hidden * (site.d_in * (2 if site.glu else 1) + site.d_out) for site in sites)
    return tokens * rows + weights


def bytes_in(path: Path) -> int:
    """Size of all files in a folder; 0 if there is none."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else 0


def _empty(path: Path) -> None:
    """Remove what is in a folder and keep the folder, which may be a link to another disk."""
    for child in path.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()
