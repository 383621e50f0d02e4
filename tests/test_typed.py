"""Types of what comes out of files: by hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import pytest

from mxd.typed import leads_out, options, wrong


@dataclass(frozen=True)
class Made:
    name: str = "x"
    number: int = 1
    rate: float = 0.5
    whether: bool = False
    out: Path = Path("out")
    maybe: int | None = None
    many: tuple[int, ...] = (1, 2)


class Inner(TypedDict):
    sums: dict[str, str]
    lists: list[list[int]]
    free: dict[str, Any]


@pytest.mark.parametrize(
    ("field", "right", "not_right"),
    [
        ("name", ["", "y"], [None, 1, ["y"]]),
        ("number", [0, -3], [1.0, True, "1", None]),
        ("rate", [1, 0.25], ["0.5", False, None]),
        ("whether", [True, False], [0, 1, "no"]),
        ("out", ["a/b"], [None, 3]),
        ("maybe", [None, 4], [4.0, True, "4"]),
        ("many", [[], [3], (3, 4)], [3, ["3"], [3.0], [None], "34"]),
    ],
)
def test_a_value_is_of_the_type_of_its_field_or_named(field: str, right: list[Any], not_right: list[Any]) -> None:
    assert all(wrong(Made, {field: value}) == [] for value in right)
    for value in not_right:
        (said,) = wrong(Made, {field: value})
        assert said.startswith(f"{field}: ")


def test_inner_values_count_too() -> None:
    assert wrong(Inner, {"sums": {"a": "b"}, "lists": [[1], []], "free": {"a": [None, 2.5]}}) == []
    assert [said.split(":")[0] for said in wrong(Inner, {"sums": {"a": 1}, "lists": [[1], ["2"]], "free": []})] == ["sums", "lists", "free"]


def test_options_of_a_file_take_the_defaults_of_what_it_does_not_know() -> None:
    assert options(Made, {"number": 7, "more": None}, ("number",)) == {
        "name": "x", "number": 7, "rate": 0.5, "whether": False, "out": "out", "maybe": None, "many": (1, 2), "more": None,
    }  # fmt: skip
    for values, words in (([], "options: "), ({"number": "7"}, "number: '7'"), ({"name": "y"}, "no number")):
        with pytest.raises(ValueError, match=words):
            options(Made, values, ("number",))


@pytest.mark.parametrize("path", ["", "..", "a/../../b", "/a", "C:\\a", "C:a", "a\\b", "a\x00b"])
def test_paths_that_leave_their_folder(path: str) -> None:
    assert leads_out(path)


@pytest.mark.parametrize("path", ["a", "a/b.c", "..a", "a..b/c"])
def test_paths_that_stay(path: str) -> None:
    assert not leads_out(path)
