"""The page's server: which address is answered by what. No work is done here, and none of it in the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import struct
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from .._version import __version__
from ..errors import MxdError
from . import unit_page
from .answers import SEARCHED, Answers
from .collector import Collector
from .live import Cancelled, Job, Worker
from .replies import Refusal, refused, status_of, to_json, told
from .shelf import Shelf

PAGE = Path(__file__).with_name("page")
STATIC: dict[str, str] = {
    "style.css": "text/css; charset=utf-8",
    **dict.fromkeys(
        (
            *("base.js", "source.js", "heat.js", "table.js", "charts.js", "overview.js"),
            *("units.js", "unit.js", "sentence.js", "bench.js", "compare.js", "notes.js"),
        ),
        "text/javascript; charset=utf-8",
    ),
}
"""Every file that is served, and its type."""
PING_SECONDS = 10.0
LOOK_SECONDS = 0.2
"""How often it is looked whether the browser still waits."""

Made = TypeVar("Made")
Answer = Callable[[Request], Awaitable[Response]]


class Site:
    """What a server knows."""

    def __init__(self, shelf: Shelf, worker: Worker, collector: Collector | None = None, *, veil: bool = False) -> None:
        """`veil`: contexts are blurred until they are looked at, for shared screens."""
        self.shelf, self.worker, self.collector, self.veil = shelf, worker, collector, veil
        self.answers = Answers(shelf)

    def students(self) -> dict[str, int]:
        """Units of every student, by name."""
        return {record.name: record.n_units for record in self.shelf.run.students}

    def awake(self) -> None:
        """The page has been shown: now the host may be loaded, and what is missing collected."""
        self.worker.go()
        if self.collector is not None:
            self.collector.go()

    def close(self) -> bool:
        """End everything that was started; False if the host's thread could not be ended yet."""
        if self.collector is not None:
            self.collector.close()
        ended = self.worker.close()
        self.shelf.close()
        return ended


def application(site: Site) -> Starlette:
    """The server, without its guards."""
    from .live_routes import routes as live_routes
    from .note_routes import routes as note_routes

    known = [
        Route("/", _answering(_shell)),
        Route("/static/{name}", _answering(_static)),
        Route("/api/status", _answering(_status)),
        Route("/api/run", _answering(_run)),
        Route("/api/s/{student}/columns", _answering(_columns)),
        Route("/api/s/{student}/rows", _answering(_rows)),
        Route("/api/s/{student}/search", _answering(_search)),
        Route("/api/s/{student}/matches", _answering(_matches)),
        Route("/api/s/{student}/units/{unit:int}", _answering(_unit)),
        *(Route(path, _answering(answer), methods=[method]) for method, path, answer in (*note_routes(), *live_routes())),
    ]
    made = Starlette(routes=known, exception_handlers={HTTPException: _http_error})
    made.state.site = site
    return made


def site_of(request: Request) -> Site:
    return request.app.state.site


def reply(value: Any, status: int = 200, background: BackgroundTask | None = None) -> Response:
    """JSON."""
    return Response(to_json(value), status, media_type="application/json", background=background)


async def apart(work: Callable[[], Made]) -> Made:
    """Do it in another thread."""
    return await run_in_threadpool(work)


async def result(request: Request, job: Job) -> Any:
    """What a job of the host's thread gives; it is cancelled when the browser is gone.

    Raises:
        Refusal: the host is not there, too many jobs wait, or this one was stopped.
    """
    future = asyncio.wrap_future(site_of(request).worker.submit(job).future)
    try:
        while not (await asyncio.wait({future}, timeout=LOOK_SECONDS))[0]:
            if await request.is_disconnected():
                raise Cancelled
        return future.result()
    except Cancelled:
        raise Refusal(409, "this was stopped", next="ask again") from None
    finally:
        job.cancel()
        future.cancel()


def event(name: str, data: Any) -> bytes:
    """One server-sent event."""
    return b"event: " + name.encode() + b"\ndata: " + to_json(data) + b"\n\n"


def streamed(request: Request, make: Callable[[Callable[[str, Any], None]], Job]) -> Response:
    """Events of a job as they come, and a comment when there was none for a while. The job ends when the browser goes.

    Args:
        make: makes the job, given what tells of an event from any thread.

    Raises:
        Refusal: as `Worker.submit`.
    """
    loop, waiting = asyncio.get_running_loop(), asyncio.Queue[bytes | None]()

    def put(item: bytes | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
            loop.call_soon_threadsafe(waiting.put_nowait, item)

    job = make(lambda name, data: put(event(name, data)))
    site_of(request).worker.submit(job)
    job.future.add_done_callback(lambda _: put(None))

    async def events() -> AsyncIterator[bytes]:
        try:
            while True:
                try:
                    item = await asyncio.wait_for(waiting.get(), PING_SECONDS)
                except asyncio.TimeoutError:
                    yield b": ping\n\n"
                    continue
                if item is None:
                    break
                yield item
            if (error := job.future.exception()) is not None:
                stopped = Refusal(409, "this was stopped before it began", next="run it again")
                yield event("error", told(error if isinstance(error, MxdError) else stopped))
        finally:
            job.cancel()

    return StreamingResponse(events(), media_type="text/event-stream", headers={"x-accel-buffering": "no"})


def whole(request: Request, name: str, default: int | None = None) -> int | None:
    """A whole number in the address.

    Raises:
        Refusal: it is none.
    """
    text = request.query_params.get(name)
    if text is None or text == "":
        return default
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise Refusal(400, f"{name}: not what it must be", expected="a whole number", got=text[:20])
    return int(text)


def words(request: Request, name: str, default: Sequence[str] = ()) -> list[str]:
    """Words with commas between them in the address."""
    text = request.query_params.get(name, "")
    return [word for word in text.split(",") if word] or list(default)


# ---- what needs no host -----------------------------------------------------------------------------------------------------


async def _shell(request: Request) -> Response:
    return await _file(request, "index.html", "text/html; charset=utf-8")


async def _static(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in STATIC:
        raise Refusal(404, "no such file", got=name[:80])
    return await _file(request, name, STATIC[name])


async def _file(request: Request, name: str, kind: str) -> Response:
    """A file of the page: asked for again each time, sent again only when it changed."""
    data = await apart((PAGE / name).read_bytes)
    tag = f'"{hashlib.sha256(data).hexdigest()[:24]}"'
    headers = {"etag": tag, "cache-control": "no-cache"}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(data, headers={**headers, "content-type": kind})


async def _status(request: Request) -> Response:
    site = site_of(request)

    def status() -> dict[str, Any]:
        live = site.worker.status()
        try:
            name: str | None = site.shelf.run.info["host"]["name"]
        except MxdError:
            name = None
        nothing = {"state": "none", "stage": None, "done": None, "total": None, "seconds_left": None, "why": None}
        return {
            "host": {"state": live["state"], "name": name, "progress": None, "why": live["why"]},
            "queue": live["queue"],
            "job": live["job"],
            "collect": site.collector.status() if site.collector else nothing,
            "version": __version__,
            "veil": site.veil,
        }

    return reply(await apart(status))


async def _run(request: Request) -> Response:
    site = site_of(request)
    return reply(await apart(site.answers.run), background=BackgroundTask(site.awake))


async def _columns(request: Request) -> Response:
    site, student, names = site_of(request), request.path_params["student"], words(request, "names")

    def columns() -> Response:
        site.shelf.units(student)
        tag = f'"{site.shelf.stamp(student)}-{hashlib.sha256(",".join(names).encode()).hexdigest()[:16]}"'
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers={"etag": tag})
        header, numbers = site.answers.columns(student, names)
        head = to_json(header)
        start = struct.pack("<I", len(head)) + head
        body = start + bytes(-len(start) % 8) + numbers.astype("<f4").tobytes()
        return Response(body, media_type="application/octet-stream", headers={"etag": tag})

    return await apart(columns)


async def _rows(request: Request) -> Response:
    site, student, units = site_of(request), request.path_params["student"], words(request, "units")
    if not all(unit.isascii() and unit.isdigit() and len(unit) < 10 for unit in units):
        raise Refusal(400, "units: not what it must be", expected="numbers with commas between them")
    return reply(await apart(lambda: site.answers.rows(student, [int(unit) for unit in units])))


async def _search(request: Request) -> Response:
    site, student, q = site_of(request), request.path_params["student"], request.query_params.get("q", "")
    where = words(request, "in", SEARCHED)
    found = await apart(lambda: site.answers.search(student, q, where))
    if found["host_needed"] and q.strip() and site.worker.status()["state"] == "ready":
        from .live_routes import firing_on

        found["by"]["text"] = await firing_on(request, student, q)
        found["units"] = list(dict.fromkeys([*found["units"], *found["by"]["text"]]))
        found["host_needed"] = False
    return reply(found)


async def _matches(request: Request) -> Response:
    site, student = site_of(request), request.path_params["student"]
    return reply(await apart(lambda: site.answers.matches(student)))


async def _unit(request: Request) -> Response:
    site, student, unit = site_of(request), request.path_params["student"], request.path_params["unit"]
    band, start, n = whole(request, "band"), whole(request, "from", 0) or 0, whole(request, "n")
    return reply(await apart(lambda: unit_page.unit(site.answers, student, unit, band=band, start=start, n=n)))


# ---- errors -----------------------------------------------------------------------------------------------------------------


def _answering(answer: Answer) -> Answer:
    """`answer`, with every error as JSON. Of a bug, the log names the place and nothing that somebody wrote."""

    async def wrapped(request: Request) -> Response:
        try:
            return await answer(request)
        except MxdError as error:
            return reply(refused(error), status_of(error))
        except Exception as error:
            if os.environ.get("MXD_DEBUG", "0") not in ("", "0"):
                traceback.print_exc()
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{last.filename.rpartition('/')[2]}:{last.lineno}"
            print(f"mxd: unexpected {type(error).__name__} at {where}", file=sys.stderr, flush=True)
            bug = Refusal(503, f"unexpected {type(error).__name__} at {where}", next="report it, with what MXD_DEBUG=1 mxd explore says")
            return reply(refused(bug), 503)

    return wrapped


async def _http_error(_: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 404
    what = "this is not answered that way" if status == 405 else "there is nothing here"
    return reply(refused(Refusal(status, what, next="reload the page")), status)
