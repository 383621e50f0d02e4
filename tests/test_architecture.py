"""The laws of the tree: who may import whom, and how long a file or a function may get. A walk over the source, nothing is imported."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "src" / "mxd"
FILE_LINES = 400
FUNCTION_LINES = 80

OWNERS: dict[str, str] = {
    "transformers": r"host|kept_tokenizer|text|assets|bench/whole",
    "datasets": r"host|text|assets",
    "tokenizers": r"host|text|assets",
    "huggingface_hub": r"assets|interop/.*",
    "triton": r"ops/.*/triton",
    "wandb": r"tracking",
    "tensorboard": r"tracking",
    "sparsify": r"interop/.*|bench/peers",
    "sae_lens": r"interop/.*|bench/peers",
    "circuit_tracer": r"interop/.*",
    "tyro": r"cli|options",
    "starlette": r"explore/(serve|guards|(live_|note_)?routes)",
    "uvicorn": r"explore/serve",
    "rich": r"progress|tables",
    "sklearn": r"evals/.*",
    "matplotlib": r"evals/.*",
    "transformer_lens": r"$^",
    "nnsight": r"$^",
}
"""Package -> the only files that may import it."""

EVERYWHERE = r"errors|config|unit_config|_version|typed"
LAWS: dict[str, str] = {
    r"errors|config|unit_config|_version|typed|lanes|clock": r"$^",
    r"ops/.*": r"ops/.*",
    r"layers/.*": r"layers/.*|ops/.*",
    r"objectives": r"layers/.*|ops/.*",
    r"tracking": r"layers/.*",
    r"optim": r"$^",
    r"slices": r"layers/.*",
    r"train": r"clock|objectives|optim|layers/.*|slices|tracking|recipes",
    r"one_pass": r"slices|tracking|train",
    r"interop/.*": r"interop/.*|layers/.*",
    r"sealed": r"$^",
    r"checkpoint": r"layers/.*|interop/.*|sealed",
    r"assets": r"$^",
    r"gguf_header|host_files|parquet_footer": r"$^",
    r"sources": r"assets|parquet_footer",
    r"text": r"sources",
    r"labelled": r"assets|sources|text",
    r"labelled_.*": r"assets|sources|text|labelled",
    r"sites": r"$^",
    r"decoding": r"$^",
    r"products": r"ops/gemm",
    r"fingerprints": r"assets",
    r"blocks|devices|kept_tokenizer|locks|memory|threads|timing": r"$^",
    r"host": r"sites|assets|blocks|decoding|devices|products|fingerprints|gguf_header|host_files|kept_tokenizer",
    r"ahead": r"$^",
    r"harvest": r"text|host",
    r"shards|shuffle": r"harvest",
    r"cache": r"checkpoint|sealed|harvest|shards|sites",
    r"feed": r"ahead|cache|harvest|host|sites|sources|text",
    r"endpoint": r"$^",
    r"edits": r"checkpoint|sealed|layers/.*",
    r"written": r"devices|layers/.*|ops/.*",
    r"evals/.*": r"evals/.*|endpoint|devices|edits|written|host|text|labelled|harvest|layers/.*|ops/.*|checkpoint|sealed|recipes|timing"
    r"|__init__",
    r"explore/.*": r"explore/.*|endpoint|host|text|harvest|layers/.*|ops/.*|checkpoint|sealed|written|devices|interop/.*|edits|decoding",
    r"recipes|options|progress": r"$^",
    r"tables": r"lanes",
    r"printing": r"tables|checkpoint|evals/.*",
    r"clock": r"$^",
    r"plan": r"recipes|layers/.*|ops/.*|objectives|sites|train",
    r"run_info": r"checkpoint|sealed|recipes|train",
    r"signals": r"$^",
    r"footprint": r"layers/.*|ops/.*|sites|train",
    r"resume": r"checkpoint|sealed|train",
    r"verify": r"cache|checkpoint|sealed|resume",
    r"run_writer": r"checkpoint|sealed|layers/.*",
    r"course": r"checkpoint|sealed|plan|resume|run_info|run_writer|train",
    r"pipeline|training": r"(?!cli|options|tables|lanes|printing|study).*",
    r"studies": r"$^",
    r"study": r"cache|checkpoint|sealed|course|resume|devices|evals/brief|ops/.*|pipeline|plan|recipes|run_info|studies",
    r"bench/(__init__|rows)": r"$^",
    r"bench/.*": r"(?!cli|options|tables|lanes|printing).*",
    r"cli|unit_verbs|__init__|__main__": r".*",
}
"""File -> what of the package it may import besides `EVERYWHERE`; the first that matches holds."""

LIGHT: dict[str, str] = {
    r"(layers|ops)/.*": "torch jaxtyping triton",
    r"errors|config|unit_config|_version|lanes|memory|recipes|studies": "",
}
"""File -> the only packages, besides the standard library, that it may import."""


def tree() -> dict[str, str]:
    return {path.relative_to(ROOT).with_suffix("").as_posix(): path.read_text(encoding="utf-8") for path in sorted(ROOT.rglob("*.py"))}


def imports(name: str, source: str, names: set[str]) -> Iterator[tuple[str, str]]:
    """("outside", package) or ("inside", file) for everything that a file imports, inside functions and for types as well."""
    package = ["mxd", *name.split("/")[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            targets = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for target in targets:
            if target[0] != "mxd":
                yield "outside", target[0]
            else:
                yield "inside", _file(target[1:], names)


def _file(path: list[str], names: set[str]) -> str:
    """The file that a dotted path inside the package comes from: the longest part of it that is a file or a package."""
    for length in range(len(path), 0, -1):
        joined = "/".join(path[:length])
        if joined in names:
            return joined
        if f"{joined}/__init__" in names:
            return f"{joined}/__init__"
    return "__init__"


def violations(files: Mapping[str, str], names: set[str] | None = None) -> list[str]:
    """What breaks a law in `files` (path without suffix -> source), one line each."""
    found: list[str] = []
    names = names or set(files)
    for name, source in files.items():
        allowed = next((inside for pattern, inside in LAWS.items() if re.fullmatch(pattern, name)), None)
        if allowed is None:
            found.append(f"{name}: no law says what it may import; add one")
            continue
        light = next((packages for pattern, packages in LIGHT.items() if re.fullmatch(pattern, name)), None)
        for kind, target in imports(name, source, names):
            if kind == "inside":
                if target == "cli" and name != "__main__":
                    found.append(f"{name} imports cli")
                elif not re.fullmatch(f"{EVERYWHERE}|{allowed}", target):
                    found.append(f"{name} imports {target}")
            elif target not in sys.stdlib_module_names and not (
                re.fullmatch(OWNERS.get(target, ".*"), name) and (light is None or target in light.split())
            ):
                found.append(f"{name} imports {target}")
        found += sizes(name, source)
    return found


def sizes(name: str, source: str) -> list[str]:
    """Files and functions that are too long."""
    lines = len(source.splitlines())
    found = [f"{name} has {lines} lines"] if lines > FILE_LINES else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LINES:
                found.append(f"{name}: {node.name} has {length} lines")
    return found


def test_the_tree_keeps_the_laws() -> None:
    files = tree()
    assert len(files) > 20, "the walk must find the package"
    assert violations(files) == []


NAMES = set(tree())
PLANTED: list[tuple[str, str, str]] = [
    ("layers/planted", "import transformers", "layers/planted imports transformers"),
    ("layers/planted", "import numpy as np", "layers/planted imports numpy"),
    ("layers/planted", "from ..host import Host", "layers/planted imports host"),
    ("layers/planted", "def f():\n    from mxd.checkpoint import Run", "layers/planted imports checkpoint"),
    ("ops/planted", "from ..layers import MxD", "ops/planted imports layers/__init__"),
    ("ops/planted/eager", "import triton", "ops/planted/eager imports triton"),
    ("evals/planted", "from datasets import load_dataset", "evals/planted imports datasets"),
    ("evals/planted", "from .. import pipeline", "evals/planted imports pipeline"),
    ("evals/planted", "from .. import cli", "evals/planted imports cli"),
    ("pipeline", "from .cli import main", "pipeline imports cli"),
    ("host", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .layers import MxD", "host imports layers/__init__"),
    ("host", "from .ops import topk_gate", "host imports ops/topk_gate/__init__"),
    ("train", "import transformers.models.llama", "train imports transformers"),
    ("train", "import mxd.host", "train imports host"),
    ("train", "import wandb", "train imports wandb"),
    ("harvest", "from . import train", "harvest imports train"),
    ("checkpoint", "import sparsify", "checkpoint imports sparsify"),
    ("errors", "import torch", "errors imports torch"),
    ("config", "from .host import Host", "config imports host"),
    ("elsewhere", "import torch", "elsewhere: no law says what it may import; add one"),
    ("sites", "\n" * FILE_LINES + "x = 1", f"sites has {FILE_LINES + 1} lines"),
    ("sites", "def long():\n" + "    x = 1\n" * FUNCTION_LINES, f"sites: long has {FUNCTION_LINES + 1} lines"),
]


@pytest.mark.parametrize(("name", "source", "expected"), PLANTED, ids=[expected for _, _, expected in PLANTED])
def test_the_walk_finds_a_planted_violation(name: str, source: str, expected: str) -> None:
    assert violations({name: source}, NAMES | {name}) == [expected]


def test_the_allowed_passes() -> None:
    allowed = {
        "layers/planted": "import torch\nimport math\nimport jaxtyping\nfrom ..errors import LayerError\nfrom ..ops import topk_gate",
        "ops/planted/triton": "import torch\nimport triton",
        "tracking": "import wandb",
        "host": "from transformers import AutoModel\nfrom .decoding import Decoder",
        "products": "from .ops import gemm\nfrom .ops.gemm import linear",
    }
    assert violations(allowed, NAMES | set(allowed)) == []
