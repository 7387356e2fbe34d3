"""One vLLM server as it is reached over HTTP: its address, its key, and what it may reply.

What a server sends is not trusted: replies have a largest size, and are read as the records below. Torch is not
imported here, so that servers can be asked before a model is loaded.
"""

from __future__ import annotations

import asyncio
import os
import re
import ssl
from collections.abc import AsyncIterator, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import cache
from typing import Annotated, Any, TypeVar

import httpx2
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from ireasoner.method.types import UsageError

KEYS = ("IREASONER_SERVER_KEY", "VLLM_API_KEY")  # variables of the environment, of which the first that is set counts
OLDEST = (0, 32)  # the version of vLLM that this was tried with
LARGEST_REPLY = 2**26  # bytes
CONNECT_SECONDS = 5.0  # a machine that is there answers in a fraction of one
LOOK_SECONDS = 20.0  # for a reply that takes no computation
T = TypeVar("T")
Model = TypeVar("Model", bound=BaseModel)


class ServerError(UsageError):
    """A server refuses what the run needs, or replies what no vLLM server would; the message names the server."""


class LostServerError(Exception):
    """A server does not answer now, for the reason in the message; another may."""


class Version(BaseModel):
    """The reply to `GET /version`."""

    version: str


class Served(BaseModel):
    """An entry of the models of a server: the one it was started with, or an adapter, which has a parent."""

    id: str
    parent: str | None = None
    max_model_len: int | None = None


class Models(BaseModel):
    """The reply to `GET /v1/models`."""

    data: Annotated[list[Served], Field(max_length=10_000)]

    @property
    def base(self) -> Served:
        """The model that the server was started with. Raises `StopIteration` if there is none."""
        return next(model for model in self.data if model.parent is None)


def http_address(address: str, path: str) -> str:
    """An address of a server as it is typed, with or without `/v1`, and a path behind it."""
    return address.rstrip("/").removesuffix("/v1").rstrip("/") + path


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end; also where an event loop is running already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


@asynccontextmanager
async def connections(addresses: Sequence[str]) -> AsyncIterator[httpx2.AsyncClient]:
    """A client for these servers, with the key of the environment. It keeps its connections while the block lasts.

    Raises:
        ServerError: the environment holds what cannot be a key, or names certificates that cannot be read.
    """
    name, key = next(((name, os.environ[name]) for name in KEYS if os.environ.get(name)), ("", ""))
    if not re.fullmatch(r"[!-~]*", key):
        raise ServerError(f"{name} is no key: it may have letters, digits and signs of ASCII, and no blanks")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    secure = any(address.startswith("https:") for address in addresses)
    limits = httpx2.Limits(max_connections=None)  # the callers bound how much they ask at a time
    async with httpx2.AsyncClient(verify=_trusted() if secure else False, headers=headers, limits=limits) as client:
        yield client


@cache
def _trusted() -> ssl.SSLContext:
    """The authorities of the system, or those in the file that SSL_CERT_FILE names."""
    try:
        return httpx2.create_ssl_context()
    except OSError as error:  # ssl's own errors are among them
        raise ServerError(f"the file or folder of SSL_CERT_FILE or SSL_CERT_DIR cannot be read: {error}") from None


async def ask(
    client: httpx2.AsyncClient, address: str, method: str, path: str, *, seconds: float, **content: Any
) -> tuple[int, bytes]:
    """Send a request; gives the HTTP status and the body of the reply.

    Args:
        client: from `connections`.
        address: of the server.
        method, path: such as GET and /v1/models.
        seconds: in which the reply has to be there; of something that is sent in parts, in which the next part goes.
        content: `json` or `content`, as `httpx2.AsyncClient.stream` takes them.

    Raises:
        LostServerError: it cannot be reached, breaks off, takes too long, or says that it cannot serve now.
        ServerError: it does not accept the key, it is not trusted, or it replies without end.
    """
    timeout, body = httpx2.Timeout(seconds, connect=min(seconds, CONNECT_SECONDS)), bytearray()
    url, in_all = http_address(address, path), None if "content" in content else seconds
    try:
        async with asyncio.timeout(in_all), client.stream(method, url, timeout=timeout, **content) as response:
            async for part in response.aiter_bytes():
                body += part
                if len(body) > LARGEST_REPLY:
                    raise ServerError(f"{address} replies more than {LARGEST_REPLY:,} bytes: it is no vLLM server")
    except (TimeoutError, httpx2.ReadTimeout):
        raise LostServerError(f"no reply within {seconds:g} seconds") from None
    except (httpx2.HTTPError, httpx2.StreamError, OSError) as error:
        reason = _printable(f"{type(error).__name__} {error}".removesuffix(" "))
        if "CERTIFICATE_VERIFY_FAILED" in reason:
            raise ServerError(
                f"{address} has a certificate that is not trusted here: name the file with that of its authority in "
                f"SSL_CERT_FILE ({reason})"
            ) from None
        raise LostServerError(reason) from None
    status = response.status_code
    if status in (401, 403):
        raise ServerError(f"{address} does not accept the key: set {KEYS[0]} to the one it was started with")
    if status in (408, 429, 502, 503, 504):
        raise LostServerError(f"HTTP {status}: {said(bytes(body))}")
    return status, bytes(body)


def said(body: bytes) -> str:
    """The message of an error as vLLM replies it, or else the beginning of the reply."""
    try:
        found: Any = TypeAdapter(dict[str, Any]).validate_json(body)
    except ValidationError:
        return _printable(body[:300].decode("utf-8", "replace"))
    error = found.get("error", found)
    message = error.get("message", error.get("detail", error)) if isinstance(error, dict) else error
    return _printable(str(message))


def _printable(text: str) -> str:
    """The beginning of a text of somebody else's, on one line and without signs that a terminal obeys."""
    return "".join(sign if sign.isprintable() else " " for sign in text[:300])


def read_reply(address: str, body: bytes, kind: type[Model]) -> Model:
    """A reply as a record. Raises `ServerError` in a sentence if it is none."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ServerError(f"{address} replies what no vLLM server does: {place or 'it'}: {first['msg']}") from None


async def look(client: httpx2.AsyncClient, address: str, seconds: float = LOOK_SECONDS) -> Models:
    """Ask a server what it is and what it serves; each of its two replies may take so many seconds.

    Raises:
        LostServerError: it does not answer now.
        ServerError: it is no vLLM server or too old a one, it does not accept the key, or it serves no model.
    """
    status, body = await ask(client, address, "GET", "/version", seconds=seconds)
    if status != 200:
        raise ServerError(f"{address} is no vLLM server: it replies HTTP {status} to GET /version")
    version = read_reply(address, body, Version).version
    numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
    if len(numbers) == 2 and numbers < OLDEST and "dev" not in version:
        raise ServerError(f"{address} is vLLM {_printable(version)}: at least {'.'.join(map(str, OLDEST))} is needed")
    status, body = await ask(client, address, "GET", "/v1/models", seconds=seconds)
    if status != 200:
        raise ServerError(f"{address} is no vLLM server: it replies HTTP {status} to GET /v1/models: {said(body)}")
    models = read_reply(address, body, Models)
    if all(model.parent is not None for model in models.data):
        raise ServerError(f"{address} serves no model")
    return models


def check_servers(addresses: Sequence[str], *, all_needed: bool) -> None:
    """Ask servers what they are, before anything slow is done.

    Args:
        addresses: of the servers.
        all_needed: whether each of them has to answer, as at the beginning of a run. If not, one has to.

    Raises:
        ServerError: as `look`, or for a server that does not answer.
    """

    async def answer(client: httpx2.AsyncClient, address: str) -> str | None:
        """Why the server does not answer, or None."""
        try:
            await look(client, address)
        except LostServerError as error:
            return f"{address} does not answer ({error})"
        return None

    async def everything() -> list[str | BaseException | None]:
        async with connections(addresses) as client:
            return await asyncio.gather(*(answer(client, address) for address in addresses), return_exceptions=True)

    found = run_async(everything())
    if refusal := next((each for each in found if isinstance(each, BaseException)), None):
        raise refusal
    silent = [each for each in found if isinstance(each, str)]
    if silent and (all_needed or len(silent) == len(addresses)):
        raise ServerError(f"{silent[0]}: start it with the command that ireasoner serve prints, or leave it out")
