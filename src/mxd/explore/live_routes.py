"""Addresses that are answered by the live model: sentence, heat, dose, ablation, generation. PyTorch stays in the host's thread."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response

from ..errors import MxdError
from . import asks, schema
from .live import Job
from .replies import Refusal, finite, to_json
from .routes import Answer, Site, apart, reply, result, site_of, streamed

if TYPE_CHECKING:
    from .model import Model

FIRINGS = 60
"""Firings, at most, that an exact ablation measures: ten of each of six strata."""
LABELS_AT_ONCE = 500
MOST_KEPT = 2 * 2**20
"""Bytes of one kept sentence."""
SHOWN = 300
"""Characters by which a kept sentence is listed."""


def routes() -> list[tuple[str, str, Answer]]:
    """Method, path and answer."""
    return [
        ("POST", "/api/sentence", _sentence),
        ("POST", "/api/sentences", _keep_sentence),
        ("POST", "/api/heat", _heat),
        ("POST", "/api/dose", _dose),
        ("POST", "/api/ablate", _ablate),
        ("POST", "/api/generate", _generate),
        ("POST", "/api/edit", _edit),
        ("DELETE", "/api/jobs/{job}", _cancel),
    ]


async def _body(request: Request) -> tuple[Site, asks.Body, dict[str, int], str]:
    """The site, the body, units by student, and the part of the page that asks."""
    site, body = site_of(request), asks.body_of(await request.body())
    pane = body.get("pane", "")
    return site, body, await apart(site.students), pane if isinstance(pane, str) and len(pane) <= 64 else ""


async def _sentence(request: Request) -> Response:
    return reply((await _read(request))[1])


async def _keep_sentence(request: Request) -> Response:
    """Read it once more, and keep what was read: for exported files, which have no model."""
    site = site_of(request)
    ask, read = await _read(request)
    found = finite(read)
    if len(to_json(found)) > MOST_KEPT:
        raise Refusal(413, "this sentence is too large to be kept", expected=f"at most {MOST_KEPT:,} bytes", next="keep a shorter one")
    about: dict[str, Any] = {"text": ask.text} if ask.seq is None else {"seq": ask.seq}
    about |= {"special": True} if ask.special else {}
    text = found["tokens"]["text"][:SHOWN]
    return reply({"id": await apart(lambda: site.shelf.notes.save_sentence(about, text, list(ask.students), found))})


async def _read(request: Request) -> tuple[asks.Reading, dict[str, Any]]:
    """A text under the host and some students, with labels."""
    site, body, students, pane = await _body(request)
    ask = asks.reading(body, students)
    ids = await _collected(site, ask)

    def work(model: Model, job: Job) -> dict[str, Any]:
        from . import reads

        return reads.sentence(model, reads.Tokens(ids, ask.text or "", ask.special), ask.students, job)

    found = await result(request, Job("reading a sentence", work, pane=pane))
    for student in found["students"]:
        student["labels"] = await apart(partial(_labels, site, student["name"], sorted(set(student["units"]["unit"]))))
    return ask, found


async def _collected(site: Site, ask: asks.Reading) -> list[int] | None:
    """The tokens of a collected sequence; None for a text."""
    seq = ask.seq
    return None if seq is None else (await apart(lambda: site.shelf.text().store.sequence(seq))).ids.tolist()


def _labels(site: Site, student: str, units: list[int]) -> dict[str, str]:
    """The first label of each unit that has one."""
    found: dict[str, str] = {}
    try:
        store = site.shelf.units(student).store
        for start in range(0, len(units), LABELS_AT_ONCE):
            labels = store.labels(units[start : start + LABELS_AT_ONCE])
            found |= {str(unit): own[0]["text"] for unit, own in labels.items()}
    except MxdError:
        return found  # nothing was collected: then nothing has a label
    return found


async def _heat(request: Request) -> Response:
    _, body, students, pane = await _body(request)
    student = asks.named(body, students)
    unit, text, special = asks.unit(body, students[student]), asks.text(body, "text"), asks.flag(body, "special", False)

    def work(model: Model, _: Job) -> dict[str, Any]:
        from . import reads

        return reads.heat(model, reads.Tokens(None, text, special), student, unit)

    return reply(await result(request, Job("reading a sentence", work, pane=pane)))


async def firing_on(request: Request, student: str, text: str) -> list[int]:
    """Units that fire most on a text."""

    def work(model: Model, _: Job) -> list[int]:
        from . import reads

        return reads.firing_on(model, reads.Tokens(None, text), student)

    return await result(request, Job("searching by a text", work))


async def _dose(request: Request) -> Response:
    _, body, students, pane = await _body(request)
    ask = asks.dose(body, students)

    def work(model: Model, job: Job) -> dict[str, Any]:
        from . import trials

        return trials.dose(model, ask, job)

    return reply(await result(request, Job("sweeping a dose", work, long=True, pane=pane)))


async def _ablate(request: Request) -> Response:
    site, body, students, pane = await _body(request)
    student = asks.named(body, students)
    unit = asks.unit(body, students[student])
    firings, sizes, columns = await apart(lambda: _firings(site, student, unit))

    def work(model: Model, job: Job) -> dict[str, Any]:
        from . import trials

        return trials.ablate(model, student, unit, [trials.Firing(*firing) for firing in firings], sizes, job)

    found = await result(request, Job("ablating a unit", work, long=True, pane=pane))
    return reply({**found, "effect": columns["effect"], "firings": columns["fires"]})


def _firings(site: Site, student: str, unit: int) -> tuple[list[tuple[list[int], int, int]], dict[int, int], dict[str, float | None]]:
    """Stored firings of a unit as (tokens, position, stratum), firings of each stratum, and the unit's columns.

    Strata are the strongest firings, all of which are stored, and what the double deciles hold beside them, from which some were drawn.
    """
    store, text = site.shelf.units(student).store, site.shelf.text().store
    columns, examples = store.row(unit), store.examples(unit)
    count = int(columns["fires"] or 0)
    if not count or not any(band < schema.TWINS for band in examples):
        raise Refusal(422, "the unit fires on no token that was collected", expected="a live unit", got=f"unit {unit}")
    strongest = [1 + 5 * context.rank // count for context in examples.get(0, (0, []))[1]]
    sizes = {0: len(strongest), **{band: fires - strongest.count(band) for band, (fires, _) in examples.items() if 0 < band < schema.TWINS}}
    strata = {band: examples[band][1] for band in sizes if sizes[band] > 0 and examples[band][1]}
    chosen = [contexts[:: -(-len(contexts) * len(strata) // FIRINGS)] for contexts in strata.values()]
    firings: list[tuple[list[int], int, int]] = []
    for turn in zip_longest(*chosen):
        for band, context in zip(strata, turn, strict=True):
            ids = [] if context is None else text.sequence(context.seq).ids.tolist()
            if context is not None and context.start + context.peak < len(ids):
                firings.append((ids, context.start + context.peak, band))
    return firings, sizes, columns


async def _generate(request: Request) -> Response:
    _, body, students, pane = await _body(request)
    ask = asks.generation(body, students)

    def make(tell: Callable[[str, Any], None]) -> Job:
        def work(model: Model, job: Job) -> None:
            from . import lanes

            lanes.generate(model, ask, job, tell)

        return Job("generating", work, long=True, pane=pane)

    return streamed(request, make)


async def _edit(request: Request) -> Response:
    site, body, students, _ = await _body(request)
    student = asks.named(body, students)
    changes = asks.changes(body, students[student])
    run = await apart(lambda: site.shelf.run)
    weights = await apart(lambda: run.weights_sha256(student))
    return reply(asks.edit_file(changes, student, run.student(student).hookpoint, weights, run.info["host"]["name"]))


async def _cancel(request: Request) -> Response:
    return reply({"cancelled": site_of(request).worker.cancel(request.path_params["job"])})
