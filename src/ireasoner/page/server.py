"""`ireasoner view`: the page about a run on this machine's own address, following the run while it goes."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from copy import copy
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ireasoner.method.types import UsageError
from ireasoner.page.curves import PANELS, draw_panel
from ireasoner.page.page import FILES, Page, Query
from ireasoner.page.run import Run

HOSTS = ("127.0.0.1", "localhost")
PARTS = ("working", "episodes", "agreement", "change", "ran")  # that the page asks for again
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
# A picture has a style of its own, and is asked for once: its address names the version that it shows.
PICTURE = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'",
    "Cache-Control": "private, max-age=86400, immutable",
}


async def _guarded(request: Request, answer: RequestResponseEndpoint) -> Response:
    """Every answer, refusals too, with the headers that it does not set itself."""
    response = await answer(request)
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)
    return response


class Viewer:
    """The answers to a browser's requests about one run, which is only read."""

    def __init__(self, run: Run) -> None:
        self.run, self.page = run, Page(run)
        self.lock = threading.Lock()  # requests come on several threads
        self.drawn: dict[int, tuple[str, str]] = {}  # each panel, and of which version of the run

    def app(self) -> Starlette:
        """As an ASGI application, which answers to loopback names alone: no other site can make its name mean this."""
        routes = [
            Route("/", self.whole),
            *[Route(f"/part/{part}", self.part) for part in PARTS],
            Route("/pulse", self.pulse),
            Route("/curves/{number:int}.svg", self.curve),
            Route("/images/{name}", self.image),
            Route("/style.css", self.style),
            Route("/page.js", self.script),
        ]
        hosts = Middleware(TrustedHostMiddleware, allowed_hosts=list(HOSTS), www_redirect=False)
        return Starlette(routes=routes, middleware=[Middleware(BaseHTTPMiddleware, dispatch=_guarded), hosts])

    def whole(self, request: Request) -> Response:
        """The page."""
        return self._render("page.html", request)

    def part(self, request: Request) -> Response:
        """One section of it, anew."""
        return self._render(f"{request.url.path.rpartition('/')[2]}.html", request)

    def _render(self, template: str, request: Request) -> Response:
        with self.lock:
            self.run.refresh()
            text = self.page.render(template, Query.read(request.query_params))
        return Response(text, media_type="text/html")

    def pulse(self, request: Request) -> Response:
        """Whether there is something new."""
        with self.lock:
            self.run.refresh()
            run = self.run
            state = "gone" if run.gone else run.state()
            found = {"version": run.version, "state": state, "step": run.step, "episodes": len(run.entries)}
        return JSONResponse(found)

    def curve(self, request: Request) -> Response:
        """A panel as it is now."""
        number = request.path_params["number"]
        if number >= len(PANELS):
            raise HTTPException(404)
        return Response(self._draw(number), media_type="image/svg+xml", headers=PICTURE)

    def _draw(self, number: int) -> str:
        with self.lock:  # lists that grow meanwhile are copied, so that no page waits for a drawing
            version, run = self.run.version, copy(self.run)
            run.metrics, run.entries = [*run.metrics], [*run.entries]
        known, drawn = self.drawn.get(number, ("", ""))
        if known != version:
            drawn = draw_panel(run, number)
            self.drawn[number] = version, drawn
        return drawn

    def image(self, request: Request) -> Response:
        """A thumbnail of the run."""
        path = self.run.thumbnail(request.path_params["name"])
        try:
            data = path.read_bytes() if path else None
        except OSError:
            data = None
        if data is None:
            raise HTTPException(404)
        return Response(data, media_type="image/png", headers=PICTURE)

    def style(self, request: Request) -> Response:
        """The style sheet."""
        return Response(FILES.joinpath("style.css").read_bytes(), media_type="text/css")

    def script(self, request: Request) -> Response:
        """The script."""
        return Response(FILES.joinpath("page.js").read_bytes(), media_type="text/javascript")


def open_port(port: int) -> socket.socket:
    """A loopback socket at this port (0: any that is free).

    Raises:
        UsageError: somebody else has it.
    """
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
        listener.listen(64)  # from now on a browser waits instead of being turned away
    except OSError as error:
        listener.close()
        raise UsageError(
            f"port {port} cannot be used ({error.strerror}): choose another --port, or leave it out"
        ) from None
    return listener


def serve(path: Path, truth: Path | None, port: int, on_ready: Callable[[str], None]) -> None:
    """Show a run until Ctrl-C; `on_ready` is told the address.

    Raises:
        UsageError: no run, or no such port.
    """
    viewer, listener = Viewer(Run(path, truth)), open_port(port)
    server = uvicorn.Server(
        uvicorn.Config(viewer.app(), log_level="error", lifespan="off", timeout_graceful_shutdown=1)
    )
    with listener:
        on_ready(f"http://127.0.0.1:{listener.getsockname()[1]}/")
        server.run(sockets=[listener])
