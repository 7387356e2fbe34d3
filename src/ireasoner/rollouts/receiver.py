"""Part of a vLLM server, in which it is started by `ireasoner serve`: takes the adapters that a run sends it.

vLLM itself only loads adapters that lie in a folder of its own machine. This is an ASGI middleware for it, so that
what is sent goes the same way as every other request, behind the same key and certificate:

    PUT    /v1/ireasoner/adapters/NAME/adapter_config.json         and adapter_model.safetensors, as PEFT writes them
    DELETE /v1/ireasoner/adapters/NAME

Nothing else is written, of a largest size, and into one folder that is removed when the server ends.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any

PREFIX = "/v1/ireasoner/adapters/"
LARGEST = {"adapter_config.json": 2**20, "adapter_model.safetensors": 2**33}  # bytes; a 72B's takes 0.9 GB
MOST = 16  # adapters at a time; of more, the oldest is dropped: a run that was killed leaves its last ones behind
_PATH = re.compile(re.escape(PREFIX) + r"(?P<name>[a-z0-9][a-z0-9-]{0,79})(?:/(?P<file>[a-z_]+\.[a-z]+))?")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class AdapterReceiver:
    """The middleware, for vLLM's option --middleware. Active where vLLM allows adapters to be loaded at all."""

    def __init__(self, app: App, folder: Path | None = None) -> None:
        self.app = app
        self.folder = folder or Path(tempfile.mkdtemp(prefix="ireasoner-adapters-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = str(scope.get("path", "")).removeprefix(str(scope.get("root_path", "")))
        if scope["type"] != "http" or not path.startswith(PREFIX):
            await self.app(scope, receive, send)
            return
        status, reply = await self._answer(scope, path, receive)
        body = json.dumps(reply).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        if status != 200:
            headers.append((b"connection", b"close"))  # the rest of what is sent is not read
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, scope: Scope, path: str, receive: Receive) -> tuple[int, dict[str, str]]:
        """The status and the reply."""
        if (status := await self._asked_with_key(scope)) != 200:
            return status, {"error": "Unauthorized"}
        if os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "").lower() not in ("1", "true"):
            return 404, {"error": "this server does not let adapters be loaded"}
        found = _PATH.fullmatch(path)
        if found is None:
            return 400, {"error": "no name of an adapter"}
        folder, file = self.folder / found["name"], found["file"]
        if scope["method"] == "DELETE" and file is None:
            shutil.rmtree(folder, ignore_errors=True)
            return 200, {}
        if scope["method"] == "PUT" and file in LARGEST:
            return await self._keep(folder, file, receive)
        return 405, {"error": f"only {' and '.join(LARGEST)} are taken"}

    async def _asked_with_key(self, scope: Scope) -> int:
        """The status with which the server replies to a question for its models that has the same headers.

        vLLM puts this middleware before the one that checks keys, so that one is asked.
        """
        statuses = []

        async def nothing() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def note(message: Message) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        headers = [(name, value) for name, value in scope["headers"] if name.lower() == b"authorization"]
        root = str(scope.get("root_path", ""))
        inner = {**scope, "method": "GET", "path": f"{root}/v1/models", "raw_path": b"/v1/models", "query_string": b""}
        await self.app({**inner, "headers": headers}, nothing, note)
        return statuses[0] if statuses else 503

    async def _keep(self, folder: Path, file: str, receive: Receive) -> tuple[int, dict[str, str]]:
        """Write a file of an adapter; it gets its name when it is complete and sound."""
        part = folder / f"{file}.part"
        try:
            self._make_room(folder)
            size = await _write(part, LARGEST[file], receive)
            if size is None:
                return 413, {"error": f"{file} has more than {LARGEST[file]:,} bytes, or did not arrive completely"}
            if not _is_sound(part, file):
                return 400, {"error": f"{file} is not what PEFT writes"}
            part.replace(folder / file)
        except OSError as error:
            return 507, {"error": f"{file} cannot be written: {error.strerror or error}"}
        finally:
            part.unlink(missing_ok=True)
        return 200, {"folder": str(folder)}

    def _make_room(self, folder: Path) -> None:
        others = [each for each in self.folder.iterdir() if each != folder]
        for old in sorted(others, key=lambda each: each.stat().st_mtime)[: max(0, len(others) - MOST + 1)]:
            shutil.rmtree(old, ignore_errors=True)
        folder.mkdir(exist_ok=True)


async def _write(path: Path, largest: int, receive: Receive) -> int | None:
    """Write the body of a request; gives its size, or None if it is larger than `largest` or breaks off."""
    size, more = 0, True
    with path.open("wb") as file:
        while more:
            message = await receive()
            if message["type"] != "http.request":  # the sender has gone
                return None
            size += len(message.get("body", b""))
            if size > largest:
                return None
            file.write(message.get("body", b""))
            more = message.get("more_body", False)
    return size


def _is_sound(path: Path, file: str) -> bool:
    """Whether a file holds the settings of a LoRA adapter, or a complete file of tensors."""
    if file == "adapter_config.json":
        with suppress(ValueError, RecursionError):
            settings = json.loads(path.read_bytes())
            return isinstance(settings, dict) and settings.get("peft_type") == "LORA"
        return False
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np"):  # reads the header, and compares the length that it tells with the file's
            return True
    except SafetensorError:
        return False
