"""`ireasoner view`: serves the page about a run on this machine's loopback address, and follows the run."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
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
from ireasoner.page.run import FindTruth, RecordedRun

HOSTS = ("127.0.0.1", "localhost")
PARTS = ("working", "episodes", "agreement", "change", "ran")  # sections that the page asks for again
ASSETS = {"style.css": "text/css", "page.js": "text/javascript"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
# An SVG has inline styles. A picture may be kept for ever, because its address names the version that it shows.
PICTURE = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'",
    "Cache-Control": "private, max-age=86400, immutable",
}


async def _guarded(request: Request, answer: RequestResponseEndpoint) -> Response:
    """Add the headers to every answer, refusals too, that does not set them itself."""
    response = await answer(request)
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)
    return response


class Viewer:
    """Answers a browser's requests about one run, which is only read."""

    def __init__(self, run: RecordedRun) -> None:
        self.run, self.page = run, Page(run)
        self.lock = threading.Lock()  # requests are answered by several threads
        self.drawing = threading.Lock()  # matplotlib's caches are not thread-safe

    def app(self) -> Starlette:
        """The ASGI application. It answers to loopback names alone, so that no site can reach it by DNS rebinding."""
        routes = [
            *[Route(path, self.html) for path in ("/", *(f"/part/{part}" for part in PARTS))],
            Route("/pulse", self.pulse),
            Route("/curves/{number:int}.svg", self.curve),
            Route("/images/{name}", self.image),
            *[Route(f"/{name}", self.asset) for name in ASSETS],
        ]
        hosts = Middleware(TrustedHostMiddleware, allowed_hosts=list(HOSTS), www_redirect=False)
        return Starlette(routes=routes, middleware=[Middleware(BaseHTTPMiddleware, dispatch=_guarded), hosts])

    def html(self, request: Request) -> Response:
        """The page, or one section of it."""
        template = f"{request.url.path.rpartition('/')[2] or 'page'}.html"
        with self.lock:
            self.run.refresh()
            text = self.page.render(template, Query.read(request.query_params))
        return Response(text, media_type="text/html")

    def pulse(self, request: Request) -> Response:
        """Whether there is something new."""
        with self.lock:
            run = self.run
            run.refresh()
            state = "gone" if run.gone else run.state
            found = {"version": run.version, "state": state, "step": run.step, "episodes": len(run.entries)}
        return JSONResponse(found)

    def curve(self, request: Request) -> Response:
        """A panel as it is now."""
        number = request.path_params["number"]
        if number >= len(PANELS):
            raise HTTPException(404)
        with self.lock:  # the lists that may grow are copied, so that other requests need not wait for the drawing
            run = copy(self.run)
            run.metrics, run.entries = [*run.metrics], [*run.entries]
        with self.drawing:
            svg = draw_panel(run, number)
        return Response(svg, media_type="image/svg+xml", headers=PICTURE)

    def image(self, request: Request) -> Response:
        """A thumbnail of the run."""
        with suppress(OSError):
            if path := self.run.thumbnail(request.path_params["name"]):
                return Response(path.read_bytes(), media_type="image/png", headers=PICTURE)
        raise HTTPException(404)

    def asset(self, request: Request) -> Response:
        """The style sheet or the script."""
        name = request.url.path[1:]
        return Response(FILES.joinpath(name).read_bytes(), media_type=ASSETS[name])


def serve(path: Path, port: int, on_ready: Callable[[str], None], find_truth: FindTruth | None = None) -> None:
    """Show a run until Ctrl-C.

    Args:
        path: the run directory.
        port: on the loopback address; 0: any free one.
        on_ready: called with the address once it can be opened.
        find_truth: as for `RecordedRun`.

    Raises:
        UsageError: this is no run directory, its config or its truth cannot be read, or the port cannot be used.
    """
    viewer = Viewer(RecordedRun.open(path, find_truth))
    try:
        listener = socket.create_server(("127.0.0.1", port), backlog=64)  # from now on a browser waits for the server
    except OSError as error:
        problem = (
            f"port {port} cannot be used ({os.strerror(error.errno or 0)}): choose another --port, or leave it out"
        )
        raise UsageError(problem) from None
    config = uvicorn.Config(viewer.app(), log_level="error", lifespan="off", timeout_graceful_shutdown=1)
    with listener:
        on_ready(f"http://127.0.0.1:{listener.getsockname()[1]}/")
        uvicorn.Server(config).run(sockets=[listener])
