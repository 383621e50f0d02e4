"""The run folder: what is written comes back, what is damaged is named, what is finished stays."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from mxd import checkpoint, run_writer
from mxd.checkpoint import Run, StudentRecord, load, save_layer
from mxd.errors import RunError
from mxd.layers import LAYERS, Edited, Sizes, SparseLayer, build
from mxd.run_writer import RunWriter, check_writable
from mxd.sealed import read_json, write_atomic, write_sealed

SIZES = Sizes(d_in=6, d_out=6, n_units=16, k=3, d_hidden=8, activation="silu", glu=True)
ABOUT = {"config": {"host": "tiny", "text": ["news"], "tokens_per_sequence": 16}, "host": {"name": "tiny"}, "text": {"seed": 0}}
"""What a run.json says besides its students."""


def record(layer: SparseLayer, name: str = "mxd-k3", hookpoint: str = "layers.1.mlp") -> StudentRecord:
    return StudentRecord(
        name, hookpoint, layer.kind, layer.k, layer.d_in, layer.d_out, layer.n_units, layer.budget(),
        "paper", 0, 640, 10, 1.5, 426.7, layer.is_control,
    )  # fmt: skip


def write_run(path: Path, kind: str = "mxd", *, finished: bool = True) -> SparseLayer:
    layer = build(kind, SIZES)
    about = record(layer, f"{kind}-k3")
    writer = RunWriter(path, overwrite=False)
    writer.save([layer], [about], ABOUT, finished=finished)
    writer.finish()
    return layer


def test_an_edited_layer_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"^an edited layer is not saved .* \| next: keep the edit: mxd edit RUN --out FILE$"):
        save_layer(tmp_path / "layer", Edited(build("mxd", SIZES), scale={3: 0.0}))
    assert not (tmp_path / "layer").exists()


@pytest.mark.parametrize("kind", LAYERS)
def test_every_kind_comes_back_bit_for_bit(kind: str, tmp_path: Path) -> None:
    layer = write_run(tmp_path / "run", kind)
    run = Run.open(tmp_path / "run")
    assert [s.kind for s in run.students] == [kind]
    again = run.load(f"{kind}-k3")
    assert again.describe() == layer.describe() and not again.training
    x = torch.randn(5, 6)
    assert torch.equal(again(x).y, layer(x).y)
    for path in (tmp_path / "run" / f"{kind}-k3", tmp_path / "run" / f"{kind}-k3" / "layers.1.mlp"):
        assert torch.equal(load(path)(x).y, layer(x).y)


@pytest.mark.parametrize("kind", ["transcoder", "skip-transcoder", "topk-sae"])
def test_sparsify_finds_its_own_names_and_keys(kind: str, tmp_path: Path) -> None:
    from safetensors import safe_open

    layer = write_run(tmp_path / "run", kind)
    folder = tmp_path / "run" / f"{kind}-k3" / "layers.1.mlp"
    cfg = json.loads((folder / "cfg.json").read_text())
    assert {k: cfg[k] for k in ("activation", "num_latents", "k", "d_in", "normalize_decoder", "multi_topk")} == {
        "activation": "topk", "num_latents": 16, "k": 3, "d_in": 6, "normalize_decoder": False, "multi_topk": False,
    }  # fmt: skip
    assert cfg["skip_connection"] is (kind == "skip-transcoder")
    assert cfg["transcode"] is (kind != "topk-sae")
    with safe_open(folder / "sae.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    shapes = {"encoder.weight": (16, 6), "encoder.bias": (16,), "W_dec": (16, 6), "b_dec": (6,)}
    if kind == "skip-transcoder":
        shapes["W_skip"] = (6, 6)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == shapes
    # sparsify's forward, spelled out
    x = torch.randn(4, 6)
    inner = x - tensors["b_dec"] if kind == "topk-sae" else x
    top = torch.relu(inner @ tensors["encoder.weight"].T + tensors["encoder.bias"]).topk(3)
    out = torch.einsum("tk,tko->to", top.values, tensors["W_dec"][top.indices]) + tensors["b_dec"]
    if kind == "skip-transcoder":
        out = out + x @ tensors["W_skip"].T
    assert torch.allclose(out, layer(x).y, atol=1e-6)


def test_a_wider_output_is_kept(tmp_path: Path) -> None:
    layer = build("transcoder", SIZES._replace(d_out=9))
    save_layer(tmp_path / "x", layer)
    assert load(tmp_path / "x")(torch.randn(2, 6)).y.shape == (2, 9)


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_damaged_weights_are_named(damage: str, tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    path = tmp_path / "run" / "mxd-k3" / "layers.1.mlp" / "mxd.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        data[-1] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()
    with pytest.raises(RunError, match=r"mxd\.safetensors.*next: copy the run folder again"):
        Run.open(tmp_path / "run").load("mxd-k3")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is damaged"),
        ("[]", "a JSON object"),
        ('{"students": []}', "no format version"),
        (
            '{"format_version": 1, HEAD}',
            "a list of students",
        ),
        (
            '{"format_version": 1, HEAD, "students": [{"name": "x"}]}',
            "a list of students",
        ),
        ('{"format_version": 1, HEAD, "students": []}', "holds no student yet"),
        ('{"format_version": 1, HEAD, "students": [], "host": {}}', r"what mxd train writes .* got 'name'"),
        ('{"format_version": 1, HEAD, "students": [], "text": {"seed": 0, "sources": null}}', r"what mxd train writes .* got sources"),
        ('{"format_version": 1, HEAD, "students": [], "config": {}}', r"what mxd train writes .* got no host, text"),
        ('{"format_version": 99, "students": []}', r"written by a newer mxd .* got 99 \| next: pip install --upgrade mxd"),
    ],
)
def test_a_run_json_that_cannot_be_right_is_refused(content: str, words: str, tmp_path: Path) -> None:
    head = '"host": {"name": "x"}, "text": {"seed": 0}, "config": {"host": "x", "text": [], "tokens_per_sequence": 2}'
    (tmp_path / "run.json").write_text(content.replace("HEAD", head))
    with pytest.raises(RunError, match=words):
        Run.open(tmp_path)


def test_what_is_not_a_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"does not exist .*next: mxd train --out"):
        Run.open(tmp_path / "nowhere")
    with pytest.raises(RunError, match="is not a run folder"):
        Run.open(tmp_path)
    with pytest.raises(RunError, match="holds 0 layers"):
        load(tmp_path)
    with pytest.raises(RunError, match="a file of the run is missing"):
        checkpoint.load_layer(tmp_path)
    (tmp_path / "cfg.json").write_text('{"k": 3}')
    with pytest.raises(RunError, match=r"was not saved by mxd .* got k"):
        load(tmp_path)


def test_weights_that_do_not_fit_their_description_are_refused(tmp_path: Path) -> None:
    save_layer(tmp_path, build("mxd", SIZES))
    cfg = read_json(tmp_path / "cfg.json")
    cfg["mxd"]["layer"]["n_units"] = 17
    write_sealed(tmp_path / "cfg.json", cfg)
    with pytest.raises(RunError, match=r"does not fit its cfg\.json"):
        load(tmp_path)


def test_an_unknown_student_gets_the_nearest(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    with pytest.raises(RunError, match=r"expected mxd-k3 \| got mxd-k4"):
        Run.open(tmp_path / "run").load("mxd-k4")


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_with_students_is_not_overwritten_unless_told(finished: bool, tmp_path: Path) -> None:
    layer = write_run(tmp_path / "run", finished=finished)
    with pytest.raises(RunError, match=r"(finished|interrupted) run .*--overwrite"):
        RunWriter(tmp_path / "run", overwrite=False)
    writer = RunWriter(tmp_path / "run", overwrite=True)
    assert not (tmp_path / "run" / "run.json").exists()
    writer.abandon()  # the new run came to nothing: the old one is back
    again = Run.open(tmp_path / "run").load("mxd-k3")
    assert torch.equal(again.get_parameter("G"), layer.get_parameter("G"))
    RunWriter(tmp_path / "run", overwrite=True).finish()
    assert [p.name for p in tmp_path.iterdir()] == ["run"] and not any((tmp_path / "run").iterdir())


def test_a_disk_that_fills_while_saving_costs_only_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [build("mxd", SIZES), build("transcoder", SIZES)]
    real = run_writer.save_layer

    def save(folder: Path, layer: SparseLayer, about: StudentRecord | None = None) -> None:
        if layer is layers[1]:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(folder, layer, about)

    monkeypatch.setattr(run_writer, "save_layer", save)
    writer = RunWriter(tmp_path / "run", overwrite=False)
    records = [record(layers[0]), record(layers[1], "transcoder-k3")]
    with pytest.raises(OSError, match="No space"):
        writer.save(layers, records, ABOUT, finished=True)
    writer.abandon()
    run = Run.open(tmp_path / "run")
    assert [s.name for s in run.students] == ["mxd-k3"] and run.info["finished"] is False
    assert torch.equal(run.load("mxd-k3").get_parameter("G"), layers[0].get_parameter("G"))


def test_other_peoples_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunError, match="not empty and not a run folder"):
        check_writable(tmp_path, overwrite=True)
    with pytest.raises(RunError, match="is a file"):
        check_writable(tmp_path / "thesis.tex", overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "x"


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_atomic(path, "old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_metrics_forgive_a_last_line_cut_short_and_nothing_else(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    run = Run.open(tmp_path / "run")
    assert run.metrics() == []
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st')
    assert run.metrics() == [{"step": 1}]
    path.write_text('{"st\n{"step": 2}\n')
    with pytest.raises(RunError, match=r"metrics.jsonl:1 is damaged"):
        run.metrics()
