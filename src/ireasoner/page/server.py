"""`ireasoner view`: serves the page about a run, or about several, on this machine's loopback address."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlencode

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route, Router
from starlette.types import Receive, Scope, Send

from ireasoner.method.types import UsageError
from ireasoner.page.curves import Chart, Panel, chart, draw_svg, overlay, panels, panels_together
from ireasoner.page.many import ManyRuns
from ireasoner.page.overview import Found, find_runs
from ireasoner.page.page import FILES, NoSuchEpisodeError, Page, Query
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
DRAWING = threading.Lock()  # matplotlib's caches are not thread-safe
MOST_OPEN = 8  # of several runs, how many are kept in memory with their episodes
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


def application(routes: Sequence[BaseRoute]) -> Starlette:
    """What answers a browser, to loopback names alone, so that no site can reach it by DNS rebinding."""
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=list(HOSTS), www_redirect=False)
    assets = [Route(f"/{name}", _asset) for name in ASSETS]
    return Starlette(routes=[*routes, *assets], middleware=[Middleware(BaseHTTPMiddleware, dispatch=_guarded), hosts])


def _asset(request: Request) -> Response:
    """The style sheet or the script."""
    name = request.url.path[1:]
    return Response(FILES.joinpath(name).read_bytes(), media_type=ASSETS[name])


class Viewer:
    """Answers a browser's requests about one run, which is only read.

    Args:
        run: what is shown.
        home: the address of the list of runs that it belongs to, if there is one.
    """

    def __init__(self, run: RecordedRun, home: str = "") -> None:
        self.run, self.page = run, Page(run, home=home)
        self.lock = threading.Lock()  # requests are answered by several threads

    def routes(self) -> list[BaseRoute]:
        """What is answered, below an address that ends with a slash."""
        return [
            *[Route(path, self.html) for path in ("/", *(f"/part/{part}" for part in PARTS))],
            Route("/pulse", self.pulse),
            Route("/curves/{number:int}.svg", self.curve),
            Route("/images/{name}", self.image),
        ]

    def html(self, request: Request) -> Response:
        """The page, one section of it, or an episode alone."""
        query, part = Query.read(request.query_params), request.url.path.rpartition("/")[2]
        template = f"{part or ('alone' if query.episode else 'page')}.html"
        with self.lock:
            self.run.refresh()
            try:
                text = self.page.render(template, query)
            except NoSuchEpisodeError:
                raise HTTPException(404, "There is no such episode.") from None
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
        """A chart as it is now."""
        with self.lock:
            found = chart(self.run, _chosen(panels(self.run), request))
        return _picture_of(found)

    def image(self, request: Request) -> Response:
        """A thumbnail of the run."""
        with suppress(OSError):
            if path := self.run.thumbnail(request.path_params["name"]):
                kind = path.suffix.removeprefix(".")
                return Response(path.read_bytes(), media_type=f"image/{kind}", headers=PICTURE)
        raise HTTPException(404)


class Shelf:
    """Answers a browser's requests about several runs: their list, some of them laid over each other, and each alone.

    Args:
        paths: run directories, and folders that hold some.
        find_truth: gives for a run's directory what `RecordedRun` takes.
    """

    def __init__(self, paths: Sequence[Path], find_truth: Callable[[Path], FindTruth | None]) -> None:
        self.paths, self.find_truth = paths, find_truth
        self.page = ManyRuns()
        self.found: dict[str, Found] = {}
        self.viewers: dict[Path, Viewer] = {}  # of the runs that were opened, the latest last
        self.lock = threading.Lock()

    def routes(self) -> list[BaseRoute]:
        """What is answered."""
        return [
            *[Route(path, self.html) for path in ("/", "/part/runs", "/part/overlay")],
            Route("/pulse", self.pulse),
            Route("/curves/{number:int}.svg", self.curve),
            Mount("/run/{key}", app=self.one_run),
        ]

    def html(self, request: Request) -> Response:
        """The list of runs, or those that the address names laid over each other; or the one section of this page."""
        part = request.url.path.rpartition("/")[2]
        with self.lock:
            self.found = find_runs(self.paths)
            text = self.page.render(self.found, _keys(request), whole=not part)
        return Response(text, media_type="text/html")

    def pulse(self, request: Request) -> Response:
        """Whether there is something new."""
        with self.lock:
            self.found = find_runs(self.paths)
            version = self.page.version(self.found, _keys(request))
        return JSONResponse({"version": version, "state": ""})

    def curve(self, request: Request) -> Response:
        """A chart of the runs that the address names, as it is now."""
        with self.lock:
            runs = self.page.opened(self.found or find_runs(self.paths), _keys(request))
            found = overlay(runs, _chosen(panels_together(runs), request))
        return _picture_of(found)

    async def one_run(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request about one run on to its viewer."""
        viewer = await run_in_threadpool(self.viewer, scope["path_params"]["key"])
        await Router(viewer.routes())(scope, receive, send)

    def viewer(self, key: str) -> Viewer:
        """The viewer of a run, which is opened at the first request."""
        with self.lock:
            if key not in self.found:
                self.found = find_runs(self.paths)
            if key not in self.found:
                raise HTTPException(404, "There is no such run.")
            path = self.found[key].path
            if path not in self.viewers:
                try:
                    self.viewers[path] = Viewer(RecordedRun.open(path, self.find_truth(path)), home="/")
                except UsageError as error:
                    raise HTTPException(404, str(error)) from None
            for oldest in [*self.viewers][:-MOST_OPEN]:
                del self.viewers[oldest]
            return self.viewers[path]


def _keys(request: Request) -> list[str]:
    return request.query_params.getlist("run")


def _chosen(panels: Sequence[Panel], request: Request) -> Panel:
    number = request.path_params["number"]
    if number >= len(panels):
        raise HTTPException(404)
    return panels[number]


def _picture_of(found: Chart) -> Response:
    with DRAWING:
        svg = draw_svg(found)
    return Response(svg, media_type="image/svg+xml", headers=PICTURE)


def serve(
    paths: Sequence[Path],
    port: int,
    on_ready: Callable[[str], None],
    find_truth: Callable[[Path], FindTruth | None] = lambda _: None,
) -> None:
    """Show a run, or several, until Ctrl-C.

    Args:
        paths: run directories, and folders that hold some.
        port: on the loopback address; 0: any free one.
        on_ready: called with the address once it can be opened.
        find_truth: gives for a run's directory what `RecordedRun` takes.

    Raises:
        UsageError: there is no run, its config or its truth cannot be read, or the port cannot be used.
    """
    if empty := [path for path in paths if not find_runs([path])]:
        raise UsageError(f"{empty[0]} is not a run directory, and holds none: there is no config.yaml of a run")
    address = ""
    if len(paths) == 1 and (paths[0] / "config.yaml").is_file():
        routes = Viewer(RecordedRun.open(paths[0], find_truth(paths[0]))).routes()
    else:
        routes = Shelf(paths, find_truth).routes()
        address = f"?{urlencode([('run', key) for key in find_runs(paths)])}" if len(paths) > 1 else ""
    try:
        listener = socket.create_server(("127.0.0.1", port), backlog=64)  # from now on a browser waits for the server
    except OSError as error:
        problem = (
            f"port {port} cannot be used ({os.strerror(error.errno or 0)}): choose another --port, or leave it out"
        )
        raise UsageError(problem) from None
    config = uvicorn.Config(application(routes), log_level="error", lifespan="off", timeout_graceful_shutdown=1)
    with listener:
        on_ready(f"http://127.0.0.1:{listener.getsockname()[1]}/{address}")
        uvicorn.Server(config).run(sockets=[listener])
