"""What a run folder says about how it came to be: configuration, source of the activations, versions, machine, commit."""

from __future__ import annotations

import dataclasses
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from . import recipes
from .checkpoint import StudentRecord
from .config import TrainConfig
from .train import Student
from .typed import plain


def describe(config: TrainConfig, device: torch.device, source: dict[str, Any]) -> dict[str, Any]:
    """The head of run.json.

    Args:
        config: the whole configuration.
        device: where the students are trained.
        source: host and text, as `Feed.describe` gives them.
    """
    return {
        "config": plain(config),
        "recipes": {kind: [dataclasses.asdict(recipe) for recipe in recipes.chosen(config, kind)] for kind in config.kinds},
        **source,
        **made_with(device),
        "seed": config.seed,
    }


def made_with(device: torch.device) -> dict[str, Any]:
    """Versions, machine and commit."""
    machine = {"processor": platform.machine(), "threads": torch.get_num_threads(), "device": str(device)}
    return {"versions": versions(), "machine": machine, "git_commit": _git_commit()}


def record(student: Student) -> StudentRecord:
    """What the run keeps of a student beside its weights."""
    layer, spec = student.layer, student.spec
    return StudentRecord(
        name=spec.name,
        hookpoint=spec.hookpoint,
        kind=spec.kind,
        k=layer.k,
        d_in=layer.d_in,
        d_out=layer.d_out,
        n_units=layer.n_units,
        params=layer.budget(),
        recipe=spec.recipe.name,
        seed=spec.seed,
        tokens_trained=student.tokens,
        steps=student.steps,
        train_seconds=round(student.seconds, 3),
        tokens_per_second=round(student.tokens / student.seconds, 1) if student.seconds else 0.0,
        is_control=layer.is_control,
        stopped=student.stopped,
    )


def versions() -> dict[str, str]:
    """Versions of mxd and of what its numbers depend on."""
    packages = ("mxd", "torch", "transformers", "safetensors", "numpy")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}


def _git_commit() -> str | None:
    """The commit of mxd's own source tree, where it is one."""
    try:
        here = Path(__file__).resolve().parent
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
