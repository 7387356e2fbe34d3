"""A stand-in for the hub on the loopback address: it serves folders as models, and fails as the real one does."""

from __future__ import annotations

import hashlib
import importlib
import json
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from huggingface_hub import constants

from forked import Forked
from ireasoner.app.cli import main

COMMIT, OLDER = "a" * 40, "b" * 40


@dataclass
class Hub:
    """What the stand-in serves.

    Attributes:
        models: folders by hub id and commit.
        main: the commit of every model's main branch.
        gated, broken, cut: ids of models whose files nobody may read, whose every request is answered by the status
            500, and of whose weights only half is sent.
        asked: the paths of all requests.
        address: where it is served.
    """

    models: dict[str, dict[str, Path]] = field(default_factory=dict)
    main: str = COMMIT
    gated: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)
    cut: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    address: str = ""

    def call(self, home: Path, function: Callable[[], int], **variables: str) -> subprocess.CompletedProcess[str]:
        """Call a function of a module in a process of its own, whose hub this is and whose cache is in `home`."""
        known = {"HF_ENDPOINT": self.address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        home.mkdir(exist_ok=True)
        output = Path(tempfile.mkdtemp(dir=home, prefix="printed-"))
        return Forked(partial(in_this_environment, function), output, {**known, **variables}).wait()

    def ireasoner(self, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command of ireasoner against this hub."""
        return self.call(home, partial(main, list(arguments)))


def in_this_environment(function: Callable[[], int]) -> int:
    """Call a function in a process where `huggingface_hub` was imported in another environment than there is now."""
    importlib.reload(constants)  # which the library reads whenever it needs them
    return function()


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub without models, served by a thread."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def do_HEAD(self) -> None:  # the name that http.server looks for
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, with_body: bool) -> None:
            path = unquote(urlparse(self.path).path)
            hub.asked.append(path)
            kind, model, revision, name = split(path)
            commits = hub.models.get(model)
            if model in hub.broken:
                return self.send(500, b"", {})
            if commits is None:
                return self.send(404, b"", {"X-Error-Code": "RepoNotFound"})
            commit = hub.main if revision == "main" else revision
            if commit not in commits:
                return self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            folder = commits[commit]
            if kind == "revision":
                return self.send(200, json.dumps({"id": model, "sha": commit, "siblings": []}).encode(), {})
            if kind == "tree":
                return self.send(200, json.dumps([entry(p) for p in sorted(folder.iterdir())]).encode(), {})
            if model in hub.gated:
                return self.send(401, b"", {"X-Error-Code": "GatedRepo"})
            if not (folder / name).is_file():
                return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
            body = (folder / name).read_bytes()
            headers = {"X-Repo-Commit": commit, "ETag": f'"{digest(body)}"'}
            cut = model in hub.cut and name.endswith(".safetensors")
            self.send(200, body if with_body else b"", headers, length=len(body), cut=cut)

        def send(
            self, status: int, body: bytes, headers: dict[str, str], length: int | None = None, cut: bool = False
        ) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body) if length is None else length), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if cut else body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub.address = f"http://127.0.0.1:{server.server_port}"
        try:
            yield hub
        finally:
            server.shutdown()


def split(path: str) -> tuple[str, str, str, str]:
    """The kind of a request, the model's id, the revision and the file's name."""
    parts = path.strip("/").split("/")
    if parts[:2] == ["api", "models"]:
        return (parts[4] if len(parts) > 4 else "revision"), "/".join(parts[2:4]), (parts[5:6] or ["main"])[0], ""
    return "file", "/".join(parts[:2]), "".join(parts[3:4]), "/".join(parts[4:])


def digest(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()


def entry(path: Path) -> dict[str, Any]:
    """A file as the hub lists it."""
    return {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": digest(path.read_bytes())}
