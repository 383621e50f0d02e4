"""Addresses of what the user keeps: notes, bench runs, sentences, and the exported file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, cast

from starlette.requests import Request
from starlette.responses import Response

from . import asks, export, kept
from .answers import check_unit
from .notes import LONGEST_NOTE, MOST_TAGS
from .replies import Refusal
from .routes import Answer, Site, apart, reply, site_of

MOST_UNITS = 20_000
LONGEST_TAG = 60
MOST_CONTEXTS = 50
MOST_KEPT = 200 * 1024
"""Bytes of one bench run."""


def routes() -> list[tuple[str, str, Answer]]:
    """Method, path and answer."""
    return [
        ("GET", "/api/notes", _notes),
        ("GET", "/api/s/{student}/notes/{unit:int}", _note),
        ("PUT", "/api/s/{student}/notes/{unit:int}", _save_note),
        ("GET", "/api/bench", _benches),
        ("POST", "/api/bench", _save_bench),
        ("DELETE", "/api/bench/{id}", _delete_bench),
        ("GET", "/api/sentences", _sentences),
        ("DELETE", "/api/sentences/{id}", _delete_sentence),
        ("POST", "/api/export", _export),
        ("POST", "/api/export/size", _export_size),
    ]


async def _notes(request: Request) -> Response:
    return reply(await apart(site_of(request).answers.notes))


async def _note(request: Request) -> Response:
    site, student, unit = site_of(request), request.path_params["student"], request.path_params["unit"]

    def note() -> dict[str, Any]:
        check_unit(site.shelf.units(student), unit)
        none = {"unit": unit, "student": student, "star": False, "text": "", "tags": [], "updated": None}
        return site.answers.noted(student).get(unit) or {**none, "weights_sha": site.shelf.run.weights_sha256(student)}

    return reply(await apart(note))


async def _save_note(request: Request) -> Response:
    site, student, unit = site_of(request), request.path_params["student"], request.path_params["unit"]
    body = asks.body_of(await request.body())
    star, text, tags = asks.flag(body, "star", False), body.get("text", ""), body.get("tags", [])
    if not isinstance(text, str) or not isinstance(tags, list) or not all(isinstance(tag, str) for tag in cast("list[Any]", tags)):
        raise Refusal(422, "a note of another form", expected="star true or false, text a text, tags a list of texts")
    words = cast("list[str]", tags)
    if len(text) > LONGEST_NOTE or len(words) > MOST_TAGS or any(len(tag) > LONGEST_TAG for tag in words):
        most = f"at most {LONGEST_NOTE:,} characters and {MOST_TAGS} tags of {LONGEST_TAG}"
        raise Refusal(413, "this note is too long", expected=most, got=f"{len(text):,} characters, {len(words)} tags", next="shorten it")
    expected = request.headers.get("if-match", "").strip().strip('"') or None

    def save() -> dict[str, Any] | None:
        check_unit(site.shelf.units(student), unit)
        weights = site.shelf.run.weights_sha256(student)
        return site.shelf.notes.put(
            weights, unit, student, star=star, text=_whole(text), tags=[_whole(tag) for tag in words], expected=expected
        )

    return reply(await apart(save))


def _whole(text: str) -> str:
    """Without half surrogate pairs, which no file can hold."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


async def _benches(request: Request) -> Response:
    site = site_of(request)
    return reply({"runs": await apart(site.answers.benches)})


async def _save_bench(request: Request) -> Response:
    site, body = site_of(request), asks.body_of(await request.body())
    students = await apart(site.students)
    student = asks.named(body, students)
    asked, result = body.get("request"), body.get("result")
    if len(json.dumps([asked, result])) > MOST_KEPT:
        raise Refusal(413, "this bench run is too large to be kept", expected=f"at most {MOST_KEPT:,} bytes")
    fault = kept.bench(student, asked, result, students[student])
    if fault is not None:
        raise Refusal(422, "a bench run of another form", expected="request and result as the bench makes them", got=fault)
    run = cast("tuple[asks.Body, asks.Body]", (asked, result))
    return reply({"id": await apart(lambda: site.shelf.notes.save_bench(student, *run))})


async def _delete_bench(request: Request) -> Response:
    site, name = site_of(request), request.path_params["id"]
    await apart(lambda: site.shelf.notes.delete_bench(name))
    return reply({"deleted": True})


async def _sentences(request: Request) -> Response:
    site = site_of(request)
    return reply({"sentences": await apart(lambda: site.shelf.notes.sentences())})


async def _delete_sentence(request: Request) -> Response:
    site, name = site_of(request), request.path_params["id"]
    await apart(lambda: site.shelf.notes.delete_sentence(name))
    return reply({"deleted": True})


async def _export(request: Request) -> Response:
    site, how = await _choice(request)
    page = await apart(lambda: export.html(site.answers, **how))
    name = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "-" for c in site.shelf.path.resolve().name).lstrip(".") or "run"
    headers = {"content-disposition": f'attachment; filename="{name}.html"'}
    return Response(page, media_type="text/html", headers=headers)


async def _export_size(request: Request) -> Response:
    site, how = await _choice(request)
    found = await apart(lambda: export.size(site.answers, **how))
    return reply({"bytes": found.bytes, "units": found.units})


async def _choice(request: Request) -> tuple[Site, dict[str, Any]]:
    """What of the run is exported."""
    site, body = site_of(request), asks.body_of(await request.body())
    known = await apart(site.students)
    asked = body.get("students", body.get("student"))
    names: list[Any] = [asked] if isinstance(asked, str) else asked or []
    for name in names if isinstance(names, Sequence) else [None]:
        asks.named({"student": name}, known)
    what = body.get("what", "top")
    if what not in ("starred", "filter", "top"):
        raise Refusal(422, "what: not what it must be", expected="starred, filter or top", got=str(what)[:40])
    units: Any = None
    if what == "filter":
        units = body.get("units")
        fine = isinstance(units, list) and 0 < len(cast("list[Any]", units)) <= MOST_UNITS
        if not fine or not all(isinstance(u, int) and not isinstance(u, bool) for u in units):
            raise Refusal(422, "units: not what it must be", expected=f"1 to {MOST_UNITS:,} numbers of units")
    by = body.get("by", "effect")
    how: dict[str, Any] = {
        "students": [str(name) for name in names] or None,
        "units": "starred" if what == "starred" else units,
        "top": asks.whole(body, "n", 1, MOST_UNITS, export.TOP),
        "by": by if isinstance(by, str) else "",
        "contexts": asks.whole(body, "contexts", 1, MOST_CONTEXTS, export.CONTEXTS),
    }
    return site, how
