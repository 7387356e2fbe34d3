"""A stand-in for the hub on the loopback address: it serves folders as models, takes uploads, and fails as the real one
does."""

from __future__ import annotations

import base64
import hashlib
import importlib
import json
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlparse

from huggingface_hub import constants, file_download

from forked import Forked
from ireasoner.app.cli import main

COMMIT, OLDER = "a" * 40, "b" * 40


@dataclass
class Hub:
    """What the stand-in serves.

    Attributes:
        models: folders by hub id and commit; the id of a data set begins with `datasets/`.
        main: the commit of every model's main branch.
        gated, broken, cut: ids of models whose files nobody may read, whose every request is answered by the status
            500, and of whose weights only half is sent.
        token: the one that may write.
        uploaded: the files of each repository that was written to, by their names there.
        private: ids of the repositories that are private.
        asked: the paths of all requests.
        address: where it is served.
    """

    models: dict[str, dict[str, Path]] = field(default_factory=dict)
    main: str = COMMIT
    gated: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)
    cut: set[str] = field(default_factory=set)
    token: str = "hf_of_the_owner"
    uploaded: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    address: str = ""

    def call(self, home: Path, function: Callable[[], int], **variables: str) -> subprocess.CompletedProcess[str]:
        """Call a function of a module in a process of its own, whose hub this is and whose cache is in `home`."""
        known = {"HF_ENDPOINT": self.address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        home.mkdir(exist_ok=True)
        output = Path(tempfile.mkdtemp(dir=home, prefix="printed-"))
        return Forked(partial(in_this_environment, function), output, {**known, **variables}).wait()

    def ireasoner(self, home: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a command of ireasoner against this hub."""
        return self.call(home, partial(main, list(arguments)), **variables)


def in_this_environment(function: Callable[[], int]) -> int:
    """Call a function in a process where `huggingface_hub` was imported in another environment than there is now."""
    importlib.reload(constants)  # which the library reads whenever it needs them
    file_download.time = SimpleNamespace(sleep=lambda seconds: None)  # after which a download that broke off goes on
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

        def do_POST(self) -> None:
            self.take()

        def do_PUT(self) -> None:
            self.take()

        def take(self) -> None:
            path = unquote(urlparse(self.path).path)
            hub.asked.append(path)
            status, said = taken(hub, path, self.rfile.read(int(self.headers["Content-Length"])), self.allowed())
            self.send(status, json.dumps(said).encode(), {"Content-Type": "application/json"})

        def allowed(self) -> bool:
            return self.headers["Authorization"] == f"Bearer {hub.token}"

        def answer(self, with_body: bool) -> None:
            path = unquote(urlparse(self.path).path)
            hub.asked.append(path)
            if path == "/api/whoami-v2":
                return self.send(200 if self.allowed() else 401, b'{"name": "owner", "type": "user"}', {})
            kind, model, revision, name = split(path)
            if model in hub.uploaded and kind in ("revision", "tree"):
                names = [{"rfilename": each} for each in hub.uploaded[model]]
                about = {"id": model, "sha": COMMIT, "private": model in hub.private, "siblings": names}
                files = [{"type": "file", "path": n, "size": len(b)} for n, b in hub.uploaded[model].items()]
                files = [{**file, "oid": digest(hub.uploaded[model][file["path"]])} for file in files]
                return self.send(200, json.dumps(files if kind == "tree" else about).encode(), {})
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
                names = [{"rfilename": str(path.relative_to(folder))} for path in folder.rglob("*") if path.is_file()]
                names = names if model.startswith("datasets/") else []  # models are listed by their tree
                return self.send(200, json.dumps({"id": model, "sha": commit, "siblings": names}).encode(), {})
            if kind == "tree":
                files = [entry(path, folder) for path in sorted(folder.rglob("*")) if path.is_file()]
                return self.send(200, json.dumps(files).encode(), {})
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
        poll_seconds = 0.01  # between two looks at whether it is to end
        threading.Thread(target=server.serve_forever, args=(poll_seconds,), daemon=True).start()
        hub.address = f"http://127.0.0.1:{server.server_port}"
        try:
            yield hub
        finally:
            server.shutdown()


def taken(hub: Hub, path: str, body: bytes, allowed: bool) -> tuple[int, Any]:
    """Take what is sent; the status, and the answer."""
    if path.startswith("/upload/"):  # a large file, under its hash; as on the real hub, with a signed address
        hub.uploaded.setdefault("", {})[path.removeprefix("/upload/")] = body
        return 200, {}
    if path == "/api/validate-yaml":
        return 200, {"errors": [], "warnings": []}
    if not allowed:
        return 401, {"error": "Invalid credentials"}
    if path == "/api/repos/create":
        return created(hub, json.loads(body))
    if path.endswith("/info/lfs/objects/batch"):
        objects = json.loads(body)["objects"]
        upload = [{"upload": {"href": f"{hub.address}/upload/{each['oid']}"}} for each in objects]
        found = [{**each, "actions": actions} for each, actions in zip(objects, upload, strict=True)]
        return 200, {"transfer": "basic", "objects": found}
    if "/preupload/" in path:
        names = [file["path"] for file in json.loads(body)["files"]]
        modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
        files = [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]
        return 200, {"files": files}
    if "/commit/" in path:
        model = "/".join(path.split("/")[3:5])
        commit(hub, model, [json.loads(line) for line in body.splitlines()])
        return 200, {"success": True, "commitUrl": f"{hub.address}/{model}/commit/{COMMIT}", "commitOid": COMMIT}
    return 404, {"error": path}


def created(hub: Hub, asked: dict[str, Any]) -> tuple[int, Any]:
    """Make a repository, unless it is there or belongs to somebody else."""
    model = f"{asked['organization']}/{asked['name']}"
    if asked["organization"] != "owner":
        return 403, {"error": "You don't have the rights to create a model under this namespace"}
    if model in hub.uploaded:
        return 409, {"error": "You already created this model repo", "url": f"{hub.address}/{model}"}
    hub.uploaded[model] = {}
    if asked.get("private") or asked.get("visibility") == "private":
        hub.private.add(model)
    return 200, {"url": f"{hub.address}/{model}"}


def commit(hub: Hub, model: str, lines: Sequence[dict[str, Any]]) -> None:
    """Take over the files that a commit names."""
    files = hub.uploaded[model]
    for line in lines:
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            files[value["path"]] = hub.uploaded[""][value["oid"]]
        elif line["key"] == "deletedFile":
            del files[value["path"]]


def split(path: str) -> tuple[str, str, str, str]:
    """The kind of a request, the model's id, the revision and the file's name."""
    parts = path.strip("/").split("/")
    if parts[0] == "api":
        model = "/".join(parts[2:4])
        model = f"datasets/{model}" if parts[1] == "datasets" else model
        return (parts[4] if len(parts) > 4 else "revision"), model, (parts[5:6] or ["main"])[0], ""
    owner = 1 if parts[0] == "datasets" else 0
    return "file", "/".join(parts[: owner + 2]), "".join(parts[owner + 3 : owner + 4]), "/".join(parts[owner + 4 :])


def digest(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()


def entry(path: Path, folder: Path) -> dict[str, Any]:
    """A file of a folder as the hub lists it."""
    return {
        "type": "file",
        "path": str(path.relative_to(folder)),
        "size": path.stat().st_size,
        "oid": digest(path.read_bytes()),
    }
