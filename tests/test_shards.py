"""Cached activations on disk: what goes in comes out, anyone can open it, and what is damaged or foreign is named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from mxd import cache as cache_module
from mxd import shards
from mxd.cache import Cache, CacheWriter, check_writable, disk_bytes
from mxd.errors import ConfigError, RunError
from mxd.harvest import Batch
from mxd.sealed import read_json, write_sealed
from mxd.shards import FORMATS, Shard, ShardReader, ShardWriter, Widths
from mxd.sites import MLPSite, MLPWeights

SITES = [MLPSite(f"layers.{i}.mlp", i, 5, 3 + i, 7, "silu", i == 2, f"model.layers.{i}.mlp") for i in (0, 2)]
HOOKPOINTS = [site.hookpoint for site in SITES]


def rows(tokens: int, d_in: int = 5, d_out: int = 3, seed: int = 0) -> Batch:
    dice = torch.Generator().manual_seed(seed)
    return Batch(torch.randn(tokens, d_in, generator=dice), torch.randn(tokens, d_out, generator=dice), torch.arange(tokens) % 4 == 0)


def write_shard(folder: Path, batch: Batch, store: str = "float32", *, planned: int | None = None) -> tuple[Shard, Widths]:
    widths = Widths(batch.x.shape[1], batch.y.shape[1], store)
    writer = ShardWriter(folder / "a" / "0.safetensors", planned or len(batch.y), widths)
    for start in range(0, len(batch.y), 7):
        writer.add(batch.at(slice(start, start + 7)))
    return writer.finish(folder), widths


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(left, right) and left.dtype == right.dtype for left, right in zip(a, b, strict=True))


# one shard


@pytest.mark.parametrize("store", FORMATS)
@pytest.mark.parametrize("planned", [23, 100])
def test_rows_come_back_rounded_once_and_any_safetensors_reader_opens_them(tmp_path: Path, store: str, planned: int) -> None:
    batch = rows(23)
    shard, widths = write_shard(tmp_path, batch, store, planned=planned)
    rounded = FORMATS[store].torch
    expected = Batch(batch.x.to(rounded).float(), batch.y.to(rounded).float(), batch.first)
    assert store == "float32" or not torch.equal(expected.x, batch.x)
    with ShardReader(tmp_path, shard, widths) as reader:
        assert same(reader.rows(0, 23), expected)
        assert same(reader.rows(9, 5), expected.at(slice(9, 14)))
    path = tmp_path / "a" / "0.safetensors"
    assert [p.name for p in path.parent.iterdir()] == ["0.safetensors"], "no temporary file is left"
    assert shard == Shard("a/0.safetensors", 23, path.stat().st_size, shard.sha256)
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert set(tensors) == {"x", "y", "first"}
    assert tensors["x"].dtype == tensors["y"].dtype == rounded
    assert same(Batch(tensors["x"].float(), tensors["y"].float(), tensors["first"]), expected)


def test_values_at_the_edges_of_the_formats(tmp_path: Path) -> None:
    values = torch.tensor([[0.0, -0.0, 1e-40, 3.3e38, -65504.0]])
    for store in ("float32", "bfloat16"):
        shard, widths = write_shard(tmp_path, Batch(values, values[:, :3], torch.tensor([True])), store)
        with ShardReader(tmp_path, shard, widths) as reader:
            expected = values.to(FORMATS[store].torch).float()
            assert torch.equal(reader.rows(0, 1).x.view(torch.int32), expected.view(torch.int32)), "the same bits, signs of zeros included"


def test_what_does_not_fit_float16_is_refused(tmp_path: Path) -> None:
    batch = Batch(torch.tensor([[70_000.0]]), torch.tensor([[1.0]]), torch.tensor([True]))
    writer = ShardWriter(tmp_path / "0.safetensors", 1, Widths(1, 1, "float16"))
    with pytest.raises(ConfigError, match=r"do not fit float16 \| expected values up to 65,504 \| got 70,000 \| next: --store bfloat16"):
        writer.add(batch)
    writer.drop()
    writer = writer_at(tmp_path / "c", store="float16")
    with pytest.raises(ConfigError, match="do not fit float16"):
        writer.add_validation({"layers.0.mlp": Batch(torch.full((1, 5), 1e5), torch.zeros(1, 3), batch.first)})
    assert writer.stop() == 0 and not (tmp_path / "c").exists()


def test_a_shard_is_on_disk_as_it_comes_and_takes_no_more_than_planned(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "0.safetensors", 10, Widths(5, 3, "float32"))
    writer.add(rows(6))
    (temporary,) = tmp_path.iterdir()
    assert temporary.name != "0.safetensors" and temporary.stat().st_size > 6 * 8 * 4
    with pytest.raises(ValueError, match="7 rows for a shard with room for 4"):
        writer.add(rows(7))
    writer.drop()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("truncate", r"0\.safetensors is truncated or was changed \| expected \d+ bytes \| got \d+ \| next: copy the folder again"),
        ("flip", r"0\.safetensors was changed \| expected sha256 .* \| next: copy the folder again"),
        ("remove", r"0\.safetensors is missing \| expected a file of \d+ bytes \| got No such file"),
    ],
)
def test_a_damaged_shard_is_named(tmp_path: Path, damage: str, words: str) -> None:
    shard, widths = write_shard(tmp_path, rows(23))
    path = tmp_path / shard.file
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        data[-1] ^= 1
        path.write_bytes(data[:-9] if damage == "truncate" else data)
    with pytest.raises(RunError, match=words):
        ShardReader(tmp_path, shard, widths)


def test_a_shard_cut_short_while_it_is_read_is_named(tmp_path: Path) -> None:
    shard, widths = write_shard(tmp_path, rows(23))
    with ShardReader(tmp_path, shard, widths) as reader:
        (tmp_path / shard.file).write_bytes(b"")
        with pytest.raises(RunError, match=r"0\.safetensors is truncated \| expected 460 more bytes"):
            reader.rows(0, 23)


@pytest.mark.parametrize("content", [b"", b"\x05\0\0\0\0\0\0\0{}", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]", b'\x0a\0\0\0\0\0\0\0{"x": {}}\n'])
def test_a_file_that_is_no_shard_of_ours_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f").write_bytes(content)
    with (tmp_path / "f").open("rb") as file:
        shard = Shard("f", 3, len(content), shards.sha256_of(file))
    with pytest.raises(RunError, match=r"f (cannot be read|is truncated)"):
        ShardReader(tmp_path, shard, Widths(5, 3, "float32"))


def test_a_shard_of_another_shape_or_format_than_the_manifest_says(tmp_path: Path) -> None:
    shard, widths = write_shard(tmp_path, rows(23))
    for wrong in (widths._replace(d_in=4), widths._replace(store="bfloat16")):
        with pytest.raises(RunError, match=r"is not what its manifest says \| expected x \('.*', \[23, \d\]\) \| got \('F32', \[23, 5\]\)"):
            ShardReader(tmp_path, shard, wrong)
    with pytest.raises(RunError, match=r"expected x \('F32', \[22, 5\]\)"):
        ShardReader(tmp_path, shard._replace(tokens=22), widths)


# a folder


def weights(site: MLPSite) -> MLPWeights:
    dice = torch.Generator().manual_seed(site.layer)
    E, D = torch.randn(site.d_in, site.d_hidden, generator=dice), torch.randn(site.d_hidden, site.d_out, generator=dice)
    return MLPWeights(E, None, E + 1 if site.glu else None, None, D, D[0].clone())


def stream(tokens: int, per_read: int = 8) -> Iterator[dict[str, Batch]]:
    whole = {site.hookpoint: rows(tokens, site.d_in, site.d_out, seed=site.layer) for site in SITES}
    for start in range(0, tokens, per_read):
        yield {hookpoint: batch.at(slice(start, start + per_read)) for hookpoint, batch in whole.items()}


def writer_at(path: Path, *, tokens: int = 48, store: str = "float32", per_shard: int = 16) -> CacheWriter:
    info = {
        "config": {"host": "tiny", "text": ["news"], "tokens_per_sequence": 4, "sequences_per_read": 2},
        "host": {"name": "tiny"},
        "text": {"seed": 0},
    }
    writer = CacheWriter(path, sites=SITES, store=store, tokens=tokens, tokens_per_shard=per_shard, info=info)
    for site in SITES:
        writer.add_weights(site.hookpoint, weights(site))
    return writer


def write_cache(path: Path, *, tokens: int = 48, found: int | None = None, store: str = "float32", validation: int = 11) -> Cache:
    writer = writer_at(path, tokens=tokens, store=store)
    if validation:
        writer.add_validation(next(stream(validation, validation)))
    for batches in stream(found or tokens):
        writer.add(batches)
    writer.finish()
    return Cache.open(path)


@pytest.mark.parametrize(("tokens", "files"), [(48, [16, 16, 16]), (40, [16, 16, 8]), (8, [8]), (37, [16, 16, 5])])
def test_a_cache_gives_the_batches_that_were_put_in(tmp_path: Path, tokens: int, files: list[int]) -> None:
    cache = write_cache(tmp_path / "c", tokens=tokens)
    assert cache.finished and cache.tokens == tokens and cache.sites == SITES
    assert [shard["tokens"] for shard in cache.info["hookpoints"]["layers.2.mlp"]["train"]] == files
    made = list(cache.batches(HOOKPOINTS, tokens))
    expected = list(stream(tokens))
    assert len(made) == len(expected)
    for got, put in zip(made, expected, strict=True):
        assert list(got) == HOOKPOINTS and all(same(got[h], put[h]) for h in HOOKPOINTS)


def test_only_what_is_asked_for_is_read_in_whole_reads(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "c")
    for asked, given in ((1, 8), (8, 8), (9, 16), (17, 24), (48, 48)):
        made = list(cache.batches(["layers.2.mlp"], asked))
        assert sum(len(batches["layers.2.mlp"].y) for batches in made) == given
        assert [list(batches) for batches in made] == [["layers.2.mlp"]] * len(made)
    last = tmp_path / "c" / "train" / "layers.2.mlp" / "00002.safetensors"
    last.write_bytes(b"x" * last.stat().st_size)
    assert len(list(cache.batches(HOOKPOINTS, 32))) == 4, "a damaged shard matters when its rows are needed"
    with pytest.raises(RunError, match=r"layers\.2\.mlp/00002\.safetensors was changed"):
        list(cache.batches(HOOKPOINTS, 33))


def test_a_text_that_ends_early_gives_a_shorter_last_shard(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "c", tokens=48, found=21)
    assert cache.finished and cache.tokens == 21
    assert [len(batches["layers.0.mlp"].y) for batches in cache.batches(HOOKPOINTS, 21)] == [8, 8, 5]
    for got, put in zip(cache.batches(HOOKPOINTS, 21), stream(21), strict=True):
        assert all(same(got[h], put[h]) for h in HOOKPOINTS)


def test_validation_and_weights_come_back(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "c")
    found = cache.validation(HOOKPOINTS)
    assert found is not None
    assert all(same(found[h], batch) for h, batch in next(stream(11, 11)).items())
    for site in SITES:
        for got, put in zip(cache.weights(site.hookpoint), weights(site), strict=True):
            assert (got is None and put is None) or (got is not None and put is not None and torch.equal(got, put))
    assert write_cache(tmp_path / "d", validation=0).validation(HOOKPOINTS) is None


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "c")
    path = tmp_path / "c" / "layers.0.mlp" / "mlp.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"\xff")
    with pytest.raises(RunError, match=r"mlp\.safetensors was changed"):
        cache.weights("layers.0.mlp")
    path.write_bytes(data[:-1])
    with pytest.raises(RunError, match=r"mlp\.safetensors is truncated"):
        cache.weights("layers.0.mlp")
    with pytest.raises(RunError, match=r"mlp\.safetensors is truncated"):
        cache.check_files(["layers.0.mlp"])
    cache.check_files(["layers.2.mlp"])


def test_weights_that_are_no_safetensors_or_lack_a_matrix(tmp_path: Path) -> None:
    from safetensors.torch import save

    for content in (b"nothing", save({"E": torch.zeros(1)})):
        write_cache(tmp_path / "c")
        path = tmp_path / "c" / "layers.0.mlp" / "mlp.safetensors"
        path.write_bytes(content)
        with path.open("rb") as file:
            shard = Shard("layers.0.mlp/mlp.safetensors", 0, len(content), shards.sha256_of(file))
        cache = Cache.open(change(tmp_path / "c", ["hookpoints", "layers.0.mlp", "weights"], shard._asdict()))
        with pytest.raises(RunError, match=r"mlp\.safetensors cannot be read \| expected safetensors with E and D"):
            cache.weights("layers.0.mlp")


def test_sites_are_found_by_number_and_name(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "c")
    for key in ("2", "layers.2.mlp", "model.layers.2.mlp"):
        assert cache.site(key) == SITES[1]
    with pytest.raises(ConfigError, match=r"holds no activations of 1 \| expected layers.0.mlp, layers.2.mlp \| got 1 \| next: harvest"):
        cache.site("1")


def test_what_a_harvest_leaves_when_it_is_stopped(tmp_path: Path) -> None:
    writer = writer_at(tmp_path / "c")
    for batches in stream(29):
        writer.add(batches)
    assert writer.stop() == 16
    cache = Cache.open(tmp_path / "c")
    assert not cache.finished and cache.tokens == 16
    assert len(list(cache.batches(HOOKPOINTS, 16))) == 2
    assert sorted(p.name for p in (tmp_path / "c" / "train").rglob("*.*")) == ["00000.safetensors"] * 2 + HOOKPOINTS
    assert "interrupted" in cache.summary()

    writer = writer_at(tmp_path / "d")
    writer.add(next(stream(8)))
    assert writer.stop() == 0
    assert not (tmp_path / "d").exists()


def test_a_shard_of_one_hookpoint_alone_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = writer_at(tmp_path / "c")
    for batches in stream(16):
        writer.add(batches)
    real = ShardWriter.finish

    def full(self: ShardWriter, root: Path) -> Shard:
        if "layers.2" in str(self.path):
            raise OSError(28, "No space left on device")
        return real(self, root)

    monkeypatch.setattr(ShardWriter, "finish", full)
    with pytest.raises(OSError, match="No space left"):
        for batches in stream(16):
            writer.add(batches)
    assert writer.stop() == 16
    assert sorted(p.name for p in (tmp_path / "c").rglob("0*")) == ["00000.safetensors"] * 2
    assert [p.name for p in (tmp_path / "c").rglob(".*")] == []


# the manifest


def change(path: Path, keys: list[str], value: Any) -> Path:
    """The folder, with one entry of its manifest set to something else."""
    manifest = read_json(path / "manifest.json")
    at = manifest
    for key in keys[:-1]:
        at = at[int(key)] if isinstance(at, list) else at[key]
    at[int(keys[-1]) if isinstance(at, list) else keys[-1]] = value
    write_sealed(path / "manifest.json", manifest)
    return path


def test_what_is_not_a_cache_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"nowhere does not exist \| expected a folder with manifest.json \| next: mxd harvest --out"):
        Cache.open(tmp_path / "nowhere")
    with pytest.raises(RunError, match="holds no cached activations"):
        Cache.open(tmp_path)
    for content in ("[]", '{"format_version": 1}', '{"what": "luggage"}'):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(RunError, match=r"manifest.json was not written by mxd harvest"):
            Cache.open(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(RunError, match=r"manifest.json is damaged"):
        Cache.open(tmp_path)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    write_cache(tmp_path / "c")
    with pytest.raises(RunError, match=r"by a newer mxd \| expected format version up to 1 \| got 2 \| next: pip install --upgrade mxd"):
        Cache.open(change(tmp_path / "c", ["format_version"], 2))
    with pytest.raises(RunError, match="has no format version"):
        Cache.open(change(tmp_path / "c", ["format_version"], "1"))


@pytest.mark.parametrize("file", ["../outside", "/etc/passwd", "train/../../outside", "C:\\outside", "..\\outside", "train/link/outside"])
@pytest.mark.parametrize("keys", [["train", "1"], ["validation", "0"], ["weights"]])
def test_paths_that_lead_out_of_the_folder_are_refused(tmp_path: Path, keys: list[str], file: str) -> None:
    write_cache(tmp_path / "c")
    (tmp_path / "outside").write_text("x")
    (tmp_path / "c" / "train" / "link").symlink_to(tmp_path)
    with pytest.raises(RunError, match=r"names a file outside its folder \| expected paths inside it \| got "):
        Cache.open(change(tmp_path / "c", ["hookpoints", "layers.0.mlp", *keys, "file"], file))


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (["tokens"], 47),
        (["dtype"], "float8"),
        (["split"], "test"),
        (["finished"], "yes"),
        (["hookpoints"], {}),
        (["hookpoints"], []),
        (["config", "sequences_per_read"], 0),
        (["config"], {}),
        (["hookpoints", "layers.0.mlp", "train"], []),
        (["hookpoints", "layers.0.mlp", "train", "0", "tokens"], "16"),
        (["hookpoints", "layers.0.mlp", "train", "0"], {"file": "x"}),
        (["hookpoints", "layers.0.mlp", "weights"], None),
        (["hookpoints", "layers.0.mlp", "site", "hookpoint"], "layers.1.mlp"),
        (["hookpoints", "layers.0.mlp", "site", "colour"], "red"),
    ],
)
def test_a_manifest_that_cannot_be_right_is_refused(tmp_path: Path, keys: list[str], value: Any) -> None:
    write_cache(tmp_path / "c")
    with pytest.raises(RunError, match=r"manifest.json is damaged \| expected what mxd harvest writes"):
        Cache.open(change(tmp_path / "c", keys, value))


def test_hookpoints_divided_differently_are_refused(tmp_path: Path) -> None:
    write_cache(tmp_path / "c")
    train = json.loads((tmp_path / "c" / "manifest.json").read_text())["hookpoints"]["layers.0.mlp"]["train"]
    other = [{**shard, "tokens": tokens} for shard, tokens in zip(train, (16, 15, 17), strict=True)]
    with pytest.raises(RunError, match="2 different divisions"):
        Cache.open(change(tmp_path / "c", ["hookpoints", "layers.0.mlp", "train"], other))


# writing where something is


def test_what_is_there_is_replaced_only_when_asked_for(tmp_path: Path) -> None:
    check_writable(tmp_path / "new", overwrite=False)
    check_writable(tmp_path, overwrite=False)
    write_cache(tmp_path / "c")
    with pytest.raises(RunError, match=r"holds finished cached activations \| .* next: choose another --out, or add --overwrite"):
        check_writable(tmp_path / "c", overwrite=False)
    check_writable(tmp_path / "c", overwrite=True)
    writer_at(tmp_path / "d")
    with pytest.raises(RunError, match="holds interrupted cached activations"):
        check_writable(tmp_path / "d", overwrite=False)
    with pytest.raises(RunError, match="is not empty and holds no cached activations"):
        check_writable(tmp_path, overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="is a file"):
        check_writable(tmp_path / "file", overwrite=True)


def test_replacing_leaves_nothing_of_the_old_and_follows_a_linked_folder(tmp_path: Path) -> None:
    write_cache(tmp_path / "disk", tokens=48)
    (tmp_path / "c").symlink_to(tmp_path / "disk")
    assert write_cache(tmp_path / "c", tokens=8, validation=0).tokens == 8
    assert (tmp_path / "c").is_symlink()
    assert sorted(p.name for p in (tmp_path / "disk").rglob("*.safetensors")) == ["00000.safetensors"] * 2 + ["mlp.safetensors"] * 2


@pytest.mark.parametrize("store", FORMATS)
def test_the_disk_needed_is_what_is_written_to_within_headers(tmp_path: Path, store: str) -> None:
    cache = write_cache(tmp_path / "c", tokens=4800, store=store)
    estimate = disk_bytes(SITES, store, 4800 + 11)
    found = sum(shard["bytes"] for h in cache.info["hookpoints"].values() for shard in (*h["train"], *h["validation"], h["weights"]))
    headers = 280 * sum(len(h["train"]) + 2 for h in cache.info["hookpoints"].values())
    assert estimate < found < estimate + headers
    assert cache_module.bytes_in(tmp_path / "c") > found
    assert cache_module.bytes_in(tmp_path / "nowhere") == 0
