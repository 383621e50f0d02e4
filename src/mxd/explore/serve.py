"""``mxd explore RUN``: a port, a key, a browser, and an end on Ctrl-C. The page is there before PyTorch is."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import sys
import threading
import webbrowser
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from ..errors import ConfigError
from ..unit_config import ExploreConfig
from .collector import Collector
from .guards import OWN_NAMES, Guards, Keys
from .live import Worker, loader
from .routes import Site, application
from .shelf import Shelf

MOST_TRIES = 50
"""Ports that are tried, from the one asked for."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
END_SECONDS = 2
"""So long answers on their way may take at the end."""


def serve(path: Path, config: ExploreConfig, say: Callable[[str], None] = print) -> None:
    """Serve the page of a run until Ctrl-C.

    Args:
        path: the run folder.
        config: see there.
        say: told the link, and what differs from what was asked for.

    Raises:
        RunError: no run there, or no such student.
        ConfigError: the address cannot be served at.
        KeyboardInterrupt: after Ctrl-C, everything ended.
    """
    shelf = Shelf(path)
    for name in config.students:
        shelf.run.student(name)
    listener = listen(config.host, config.port)
    port = int(listener.getsockname()[1])
    if config.port not in (0, port):
        say(f"mxd: port {config.port} is taken, this is {port}")
    if config.host not in LOOPBACK:
        say(f"mxd: WARNING: {config.host} can be reached from other machines, without encryption; who has the link below reads this run")
    keys = Keys(port)
    worker = Worker(loader(shelf, config.device))
    site = Site(shelf, worker, Collector(shelf, students=config.students, device=config.device), veil=config.veil)
    named = f"[{config.host}]" if ":" in config.host else config.host
    own = [] if config.host in ("0.0.0.0", "::") else [named]
    link = f"http://{named if own else OWN_NAMES[0]}:{port}/?key="
    server = Server(guarded(site, keys, names=(*own, *config.allow_host)))
    server.on_start = lambda: say(f"{path}: {link}{keys.secret}\nCtrl-C ends it")
    if not config.no_browser:
        server.on_start = _both(server.on_start, lambda: open_browser(link + keys.ticket()))
    with ended_by_signals(server):
        worker.start()
        try:
            server.run([listener])
        finally:
            listener.close()
            if not site.close():
                leave()
    if server.stopped:
        raise KeyboardInterrupt("stopped")


def guarded(site: Site, keys: Keys, *, names: tuple[str, ...] = ()) -> Guards:
    """The whole application."""
    return Guards(application(site), keys, names=names)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket at the address, or at the next free port.

    Raises:
        ConfigError: no such address, or no port that may be used.
    """
    if not 0 <= port < 65536:
        raise ConfigError("no such port", expected="0 to 65535 (0: any free one)", got=str(port))
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError("no such address on this machine", expected="127.0.0.1", got=host, next="leave out --host") from error
    for number in range(port, min(port + MOST_TRIES, 65536)):
        # The protocol by its number: asyncio sends small answers at once only through sockets that say they are TCP.
        made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            if os.name == "posix":  # on Windows it would let two servers share a port
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind((address[0], number, *address[2:]))
            made.listen(128)
            return made
        except OSError as error:
            made.close()
            if error.errno != errno.EADDRINUSE:
                why = error.strerror or str(error)
                raise ConfigError(f"cannot serve at {host}, port {number}", got=why, next="another --port or --host") from None
    raise ConfigError("no free port", expected=f"one from {port} to {port + MOST_TRIES - 1}", next="another --port")


class Server(uvicorn.Server):
    """uvicorn, quiet, ended by Ctrl-C or SIGTERM without dying of them: what it started is ended after it.

    Attributes:
        on_start: called when it answers.
        stopped: whether a signal ended it.
    """

    def __init__(self, app: Any) -> None:
        quiet: dict[str, Any] = {"log_config": None, "log_level": "critical", "access_log": False, "server_header": False}
        plain: dict[str, Any] = {"http": "h11", "ws": "none", "lifespan": "off", "loop": "asyncio", "proxy_headers": False}
        super().__init__(uvicorn.Config(app, **quiet, **plain, timeout_keep_alive=30, timeout_graceful_shutdown=END_SECONDS))
        self.on_start: Callable[[], None] = lambda: None
        self.stopped = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self.on_start()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are caught by `ended_by_signals`, which lasts longer."""
        yield


@contextlib.contextmanager
def ended_by_signals(server: Server) -> Iterator[None]:
    """Inside, a first Ctrl-C or SIGTERM asks the server for an end, a second one does not wait for answers on their way.

    None of them ends anything else, so that what was started is put away in peace.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        server.force_exit = server.should_exit
        server.should_exit = server.stopped = True

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave() -> None:
    """End the process at once: a thread that is inside PyTorch, importing it for instance, would be torn out of it and abort."""
    print("mxd: stopped", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(130)


def open_browser(link: str) -> None:
    """Open the page, if there is a screen to open it on."""
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return  # a browser in the terminal would take the place of this program

    def work() -> None:
        with contextlib.suppress(Exception):  # without one, the link that was printed does
            webbrowser.open(link)

    threading.Thread(target=work, name="mxd-browser", daemon=True).start()


def _both(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        first()
        second()

    return run
