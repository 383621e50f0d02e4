"""Folders of hosts from anywhere: pickles, own code, absurd numbers, names of other files."""

from __future__ import annotations

import json
import os
import pickle
import resource
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mxd import host_files
from mxd.host import Host
from tests.reliability.foreign import refused
from tests.small import save_host

pytestmark = pytest.mark.usefixtures("one_thread")


class _Malicious:
    """Whoever unpickles this runs a command."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_host(tmp_path / "host", layers=2)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """A file that is there once somebody else's code has run."""
    return tmp_path / "ran"


def change(folder: Path, name: str = "config.json", **fields: object) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def as_bin(folder: Path, **more: object) -> Path:
    """The weights as a pickle, with something else among them."""
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({**weights, **more}, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def test_honest_bin_files_are_read(folder: Path) -> None:
    before = Host.load(str(folder), device="cpu").logits(torch.tensor([[1, 2]]))
    as_bin(folder)
    assert torch.equal(Host.load(str(folder), device="cpu").logits(torch.tensor([[1, 2]])), before)


@pytest.mark.parametrize("form", ["within", "bare", "sharded"])
def test_malicious_bin_files_do_not_run(folder: Path, mark: Path, form: str) -> None:
    path = as_bin(folder, evil=_Malicious(mark))
    if form == "bare":
        path.write_bytes(pickle.dumps(_Malicious(mark)))
    elif form == "sharded":
        index = {"metadata": {}, "weight_map": {"lm_head.weight": path.rename(folder / "part.bin").name}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert "could run code | expected safetensors" in refused(lambda: Host.load(str(folder)))
    assert not mark.exists()
    pickle.loads(pickle.dumps(_Malicious(mark)))
    assert mark.exists(), "it would have run"


@pytest.mark.parametrize(
    ("name", "fields"), [("config.json", {"model_type": "evil"}), ("tokenizer_config.json", {"tokenizer_class": "Evil"})]
)
def test_code_in_a_hosts_folder_does_not_run_whatever_is_answered(
    folder: Path, mark: Path, name: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoConfig, AutoTokenizer

    (folder / "evil.py").write_text(
        f"open({str(mark)!r}, 'w').close()\nfrom transformers import LlamaConfig\nclass Evil(LlamaConfig): pass\n"
    )
    change(folder, name, auto_map={"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}, **fields)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    assert "needs code of its own, which is never run" in refused(lambda: Host.load(str(folder)))
    assert not mark.exists()
    loader = AutoConfig if name == "config.json" else AutoTokenizer
    loader.from_pretrained(folder, trust_remote_code=True)
    assert mark.exists(), "it would have run"


def test_a_known_model_that_brings_its_own_class_does_not_run_it_either(folder: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A type of model that transformers knows, and has no causal language model for: there it would ask for the class of the folder."""
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\nfrom transformers import LlamaForCausalLM as Evil\n")
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 300}
    config = {"model_type": "clip_text_model", "auto_map": {"AutoModelForCausalLM": "evil.Evil"}, **small}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    refused(lambda: Host.load(str(folder)))
    assert not mark.exists()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_hidden_layers": 10**9}, "absurd number of layers in config.json | expected at most 1000 | got 1000000000"),
        ({"text_config": {"n_layer": 10**9}}, "absurd number of layers"),
        ({"num_local_experts": 10**9}, "absurd number of experts in config.json | expected at most 100000"),
        ({"hidden_size": 10**9}, "describes more than it holds"),
        ({"vocab_size": 10**12}, "describes more than it holds"),
        ({"intermediate_size": 10**8}, "describes more than it holds"),
        ({"hidden_size": 10**30}, "could not be loaded"),
        ({"_attn_implementation": "evil/kernel"}, "wants code from elsewhere"),
        ({"num_labels": 10**9}, "absurd number in config.json | expected at most 100000 for num_labels"),
        ({"attention_types": [[["global"], 10**9]]}, "absurd number in config.json"),
        ({"vision_config": {"vision_feature_layer": [1, 10**9]}}, "absurd number in config.json"),
    ],
    ids=str,
)
def test_absurd_numbers_in_a_config_are_refused_before_anything_is_built(folder: Path, fields: dict[str, Any], words: str) -> None:
    change(folder, **fields)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    assert words in refused(lambda: Host.load(str(folder)))
    assert time.perf_counter() - began < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19, "KiB"


@pytest.mark.parametrize("text", ["[]", "{", "[" * 10**5, "\xff", '{"a":' * 900 + "1" + "}" * 900])
def test_a_config_that_is_none(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text, encoding="latin-1")
    refused(lambda: Host.load(str(folder)))


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
@pytest.mark.parametrize("file", ["../outside.safetensors", "/etc/passwd", "..\\x", "deep/x", "\0"])
def test_an_index_that_leads_elsewhere_is_refused(folder: Path, name: str, file: str) -> None:
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": file}}))
    assert f"{name} leads elsewhere" in refused(lambda: Host.load(str(folder)))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": 1}'])
def test_an_index_that_is_none_is_refused(folder: Path, text: str) -> None:
    (folder / "model.safetensors.index.json").write_text(text)
    assert "unreadable model.safetensors.index.json" in refused(lambda: host_files.check_index("x", folder))
