"""What the page may ask of the live model: JSON bodies, checked before anything is tokenised or waits in the queue."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from ..edits import Edit, as_json
from .replies import Refusal

MOST_CHARACTERS = 20_000
"""Of a prompt or a text; what is too long in tokens is found out before that many."""
MOST_TOKENS = 512
"""Tokens of a prompt or a text, BOS included."""
MOST_NEW = 256
MOST_EDITS = 8
MOST_STUDENTS = 4
STRONGEST = 1e4
"""Largest activation that may be set or added, and largest factor."""
LANES = ("host", "replaced", "steered", "control")
OPERATIONS = ("add", "set", "scale", "remove")
WHERE = ("generated", "all")

Body = dict[str, Any]


@dataclass(frozen=True)
class Change:
    """One unit's activation after TopK, changed."""

    unit: int
    op: str
    """add: a + value. set: value at every token. scale: a × value. remove: 0."""
    value: float
    at: str
    """generated: only where a token was generated. all: in the prompt too."""


@dataclass(frozen=True)
class Generation:
    """A continuation in several lanes."""

    student: str
    prompt: str
    edits: tuple[Change, ...]
    lanes: tuple[str, ...]
    temperature: float
    """0 is greedy."""
    top_p: float
    seed: int
    tokens: int
    special: bool
    """Whether the names of special tokens in the prompt are those tokens, and not plain text."""


@dataclass(frozen=True)
class Dose:
    """The next token's probabilities as a unit is pushed up and down."""

    student: str
    prompt: str
    unit: int
    at: str
    max: float
    """Activation that strengths are multiples of."""
    special: bool


@dataclass(frozen=True)
class Reading:
    """A text, or a sequence that was collected, read by the host and some students."""

    text: str | None
    seq: int | None
    students: tuple[str, ...]
    special: bool


def body_of(data: bytes) -> Body:
    """
    Raises:
        Refusal: not a JSON object.
    """
    try:
        found: Any = json.loads(data)
    except (ValueError, RecursionError):
        raise Refusal(400, "the body of a request is not JSON", expected="a JSON object") from None
    if not isinstance(found, dict):
        raise Refusal(400, "the body of a request is not what it must be", expected="a JSON object", got=type(found).__name__)
    return cast(Body, found)


def generation(body: Body, students: dict[str, int]) -> Generation:
    """
    Args:
        students: units of each student of the run, by name.

    Raises:
        Refusal: something is missing, of another type, or outside its limits.
    """
    student = named(body, students)
    lanes = body.get("lanes", list(LANES[:3]))
    if not isinstance(lanes, list) or not lanes or len({*map(str, lanes)}) < len(lanes) or not set(map(str, lanes)) <= set(LANES):
        raise _wrong("lanes", f"different ones of {', '.join(LANES)}", lanes)
    greedy = flag(body, "greedy", True)
    temperature = number(body, "temperature", 0.01, 10, 1.0)
    return Generation(
        student=student,
        prompt=text(body, "prompt"),
        edits=changes(body, students[student]),
        lanes=tuple(lane for lane in LANES if lane in lanes),
        temperature=0.0 if greedy else temperature,
        top_p=number(body, "top_p", 1e-6, 1, 1.0),
        seed=whole(body, "seed", 0, 2**53, 0),
        tokens=whole(body, "tokens", 1, MOST_NEW, 64),
        special=flag(body, "special", False),
    )


def dose(body: Body, students: dict[str, int]) -> Dose:
    """
    Raises:
        Refusal: as `generation`.
    """
    student = named(body, students)
    most = number(body, "max", 1e-12, STRONGEST / 4, None)
    return Dose(student, text(body, "prompt"), unit(body, students[student]), where(body), most, flag(body, "special", False))


def reading(body: Body, students: dict[str, int], names: Sequence[str] | None = None) -> Reading:
    """A text or a collected sequence, and students (`names`, or those in the body).

    Raises:
        Refusal: as `generation`.
    """
    asked = body.get("students", []) if names is None else list(names)
    if not isinstance(asked, list) or not len(asked) <= MOST_STUDENTS or not all(isinstance(name, str) for name in asked):
        raise _wrong("students", f"at most {MOST_STUDENTS} names", asked)
    chosen = tuple(dict.fromkeys(cast("list[str]", asked)))
    for name in chosen:
        named({"student": name}, students)
    seq = whole(body, "seq", 0, 2**31, None) if body.get("seq") is not None else None
    return Reading(text(body, "text") if seq is None else None, seq, chosen, flag(body, "special", False))


def named(body: Body, students: dict[str, int]) -> str:
    """The name of a student of the run."""
    student = body.get("student")
    if not isinstance(student, str) or student not in students:
        raise Refusal(404, "no student of that name", expected=", ".join(students), got=str(student)[:80])
    return student


def unit(body: Body, n_units: int) -> int:
    """The number of a unit."""
    found = body.get("unit")
    if not isinstance(found, int) or isinstance(found, bool) or not 0 <= found < n_units:
        raise Refusal(
            422, "no such unit", expected=f"a number from 0 to {n_units - 1}" if n_units else "a student with units", got=_cut(found)
        )
    return found


def changes(body: Body, n_units: int) -> tuple[Change, ...]:
    """Edits, each of another unit."""
    found = body.get("edits", [])
    if not isinstance(found, list) or len(found) > MOST_EDITS or not all(isinstance(edit, dict) for edit in found):
        raise _wrong("edits", f"at most {MOST_EDITS}", found)
    made = tuple(_change(edit, n_units) for edit in cast("list[Body]", found))
    if len({change.unit for change in made}) < len(made):
        raise _wrong("edits", "each unit once", [change.unit for change in made])
    return made


def _change(edit: Body, n_units: int) -> Change:
    op = edit.get("op")
    if op not in OPERATIONS:
        raise _wrong("op", ", ".join(OPERATIONS), op)
    value = 0.0 if op == "remove" else number(edit, "value", -STRONGEST, STRONGEST, None)
    return Change(unit(edit, n_units), op, value, where(edit))


def factors(edits: Sequence[Change]) -> tuple[dict[int, float], dict[int, float]]:
    """The edits as factors s_n and additions λ_n by unit: a_n ← s_n a_n + λ_n."""
    scale = {edit.unit: edit.value if edit.op == "scale" else 0.0 for edit in edits if edit.op != "add"}
    add = {edit.unit: edit.value for edit in edits if edit.op in ("add", "set")}
    return scale, add


def edit_file(edits: Sequence[Change], student: str, hookpoint: str, weights_sha256: str, host: str) -> Body:
    """The JSON that `mxd edit` writes for these edits, at every token.

    Raises:
        Refusal: they change nothing.
    """
    scale, add = factors(edits)
    if all(factor == 1 for factor in scale.values()) and not any(add.values()):
        raise Refusal(422, "these edits change nothing", expected="a unit removed, scaled by other than 1, or added other than 0 to")
    return as_json(Edit(student, hookpoint, weights_sha256, host, scale, add))


def text(body: Body, name: str) -> str:
    """A text, not empty, at most `MOST_CHARACTERS` characters."""
    found = body.get(name)
    if not isinstance(found, str):
        raise _wrong(name, "a text", found)
    if not found or len(found) > MOST_CHARACTERS:
        raise Refusal(422, f"{name}: empty or too long", expected=f"1 to {MOST_CHARACTERS:,} characters", got=f"{len(found):,}")
    # Half a surrogate pair, as JavaScript's strings may hold, is no text to a tokeniser.
    return found.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def where(body: Body) -> str:
    """Where an edit holds."""
    found = body.get("at", "generated")
    if found not in WHERE:
        raise _wrong("at", " or ".join(WHERE), found)
    return found


def number(body: Body, name: str, low: float, high: float, default: float | None) -> float:
    """A finite number from `low` to `high`; required where there is no `default`."""
    found = body.get(name, default)
    if isinstance(found, bool) or not isinstance(found, int | float) or not low <= found <= high:
        raise _wrong(name, f"a number from {low:g} to {high:g}", found)
    return float(found)


def whole(body: Body, name: str, low: int, high: int, default: int | None) -> int:
    """A whole number from `low` to `high`."""
    found = body.get(name, default)
    if isinstance(found, float) and found.is_integer():
        found = int(found)
    if isinstance(found, bool) or not isinstance(found, int) or not low <= found <= high:
        raise _wrong(name, f"a whole number from {low} to {high}", found)
    return found


def flag(body: Body, name: str, default: bool) -> bool:
    found = body.get(name, default)
    if not isinstance(found, bool):
        raise _wrong(name, "true or false", found)
    return found


def _wrong(name: str, expected: str, got: Any) -> Refusal:
    return Refusal(422, f"{name}: not what it must be", expected=expected, got=_cut(got))


def _cut(value: Any) -> str:
    """What was sent, short: never a text that somebody wrote."""
    return type(value).__name__ if isinstance(value, str) and len(value) > 20 else str(value)[:80]
