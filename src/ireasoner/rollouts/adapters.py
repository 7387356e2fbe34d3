"""Handing a policy's adapters to vLLM servers, as a new version after every update.

vLLM reads adapters from a folder of its own machine. They go through a folder that both sides can read, or are sent to
the part of the server that takes them (`receiver`).
"""

from __future__ import annotations

import secrets
import shutil
import tempfile
import weakref
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated

import httpx2
from pydantic import BaseModel, Field

from ireasoner.method.types import ROLES, Role
from ireasoner.model.parallel import Processes
from ireasoner.model.policy import Policy
from ireasoner.rollouts.receiver import LARGEST, PREFIX
from ireasoner.rollouts.server import LostServerError, Models, ServerError, ask, read_reply, said


class Received(BaseModel):
    """The reply of the receiver to a file: the folder that it lies in."""

    folder: Annotated[str, Field(max_length=4096)]


class Adapters:
    """The newest version of both adapters, under names of its own.

    A server keeps the names that it was told beyond a run's end, and old results under a name or folder that it is told
    twice. So no run and no version has the names of another.

    Args:
        policy: whose adapters they are.
        processes: those of the run, which all use the same names.
        shared: a folder that all processes and servers can read. None: what is not sent lies in a temporary folder of
            this machine, where servers of the same machine find it.
        seconds: in which a server must take each of them.
        ahead: whether the policy learns while a version is sampled with. Each is then written at once, and not when a
            server asks for it.
    """

    def __init__(
        self, policy: Policy, processes: Processes, shared: Path | None, seconds: float, *, ahead: bool = False
    ) -> None:
        self.policy, self.shared, self.seconds, self.ahead = policy, shared, seconds, ahead
        self.writes = shared is None or processes.is_main
        self.run = processes.gather([secrets.token_hex(4)], processes.count)[0]
        self.version = 0
        self.folder = (shared or Path(tempfile.mkdtemp(prefix="ireasoner-"))).absolute()
        if shared is None:
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    def name(self, role: Role) -> str:
        """What servers call the newest version of a role's adapter."""
        return self._name(role, self.version)

    def _name(self, role: Role, version: int) -> str:
        return f"{role}-{self.run}-{version}"

    def _folder(self, version: int) -> Path:
        return self.folder / f"{self.run}-{version}"

    def next_version(self) -> None:
        """From now on, the policy's adapters as they are now. Raises `ServerError` if they cannot be written."""
        self.version += 1
        if self.ahead:
            self.files("solver")  # and the proposer's beside them

    def files(self, role: Role) -> Path:
        """The folder of a role's adapter, written if it is not there yet.

        Raises:
            ServerError: it cannot be written.
        """
        folder = self._folder(self.version)
        if self.writes and not folder.exists():
            try:
                part = folder.with_suffix(".part")
                self.policy.save_adapters(part)
                part.rename(folder)  # a server may look at any moment
            except OSError as error:
                reason = error.strerror or error
                raise ServerError(f"the adapters cannot be written to {self.folder}: {reason}") from None
        return folder / role

    def forget_files(self, version: int) -> None:
        """Remove what this process wrote of a version."""
        if self.writes:
            shutil.rmtree(self._folder(version), ignore_errors=True)

    async def hand_over(self, client: httpx2.AsyncClient, address: str, models: Models) -> None:
        """Let a server load what it does not have yet of the newest version.

        Raises:
            LostServerError: it does not answer now.
            ServerError: it refuses them.
        """
        has = {model.id for model in models.data}
        for role in ROLES:
            if self.name(role) not in has:
                await self._load(client, address, role)

    async def _load(self, client: httpx2.AsyncClient, address: str, role: Role) -> None:
        files, name = self.files(role), self.name(role)
        sent = None if self.shared else await self._send(client, address, files, name)
        body = {"lora_name": name, "lora_path": sent or str(files)}
        status, reply = await ask(client, address, "POST", "/v1/load_lora_adapter", json=body, seconds=self.seconds)
        message = said(reply)
        if status == 200 or (status == 400 and "already been loaded" in message):  # by another process of this run
            return
        if status >= 500:
            health, _ = await ask(client, address, "GET", "/health", seconds=self.seconds)
            if health != 200:  # it has died, which says nothing about the adapters
                raise LostServerError(message)
        if status == 404 and "adapter" not in message.lower():
            raise ServerError(
                f"{address} does not let adapters be loaded: start it as ireasoner serve says, with --enable-lora and "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment"
            )
        if status == 404 and sent is None:
            raise ServerError(
                f"{address} cannot read the adapters in {files}: name a folder that its machine shares with this one "
                "as --adapters-folder, or start it with the --middleware that ireasoner serve prints to have them sent"
            )
        raise ServerError(f"{address} does not load the adapters: {message}")

    async def _send(self, client: httpx2.AsyncClient, address: str, files: Path, name: str) -> str | None:
        """Send an adapter to a server; gives its folder there, or None if the server does not take any.

        Raises:
            LostServerError: it does not answer now.
            ServerError: it refuses the adapter.
        """
        folder = None
        for file in LARGEST:
            path = files / file
            headers = {"Content-Length": str(path.stat().st_size)}
            status, reply = await ask(
                client,
                address,
                "PUT",
                f"{PREFIX}{name}/{file}",
                seconds=self.seconds,
                content=_parts(path),
                headers=headers,
            )
            if status == 404:
                return None
            if status != 200:
                raise ServerError(f"{address} does not take the adapters that are sent to it: {said(reply)}")
            folder = read_reply(address, reply, Received).folder
        return folder

    async def drop(self, client: httpx2.AsyncClient, address: str, version: int) -> None:
        """Have a server forget a version; whether it knows it makes no difference.

        Raises:
            LostServerError: it does not answer now.
        """
        for role in ROLES:
            name = self._name(role, version)
            body = {"lora_name": name}
            await ask(client, address, "POST", "/v1/unload_lora_adapter", json=body, seconds=self.seconds)
            if self.shared is None:
                await ask(client, address, "DELETE", PREFIX + name, seconds=self.seconds)


async def _parts(path: Path) -> AsyncIterator[bytes]:
    with path.open("rb") as file:
        while part := file.read(2**20):
            yield part
