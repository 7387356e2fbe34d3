"""Sampling on vLLM servers, anywhere, over HTTP: nothing but the adapters moves to them.

Every process of a run asks for its own share. A completion goes to the least busy server, and to another one if that
one does not answer. So it depends on its own seed, and on where it was sampled only as far as batches round.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import torch
from PIL import Image

from ireasoner.method.texts import solver_messages
from ireasoner.method.types import Completion, Role
from ireasoner.model.forward import completion_hidden
from ireasoner.model.inputs import build_prompts, encode_images
from ireasoner.model.parallel import ALONE, Processes
from ireasoner.model.policy import Policy
from ireasoner.rollouts.adapters import Adapters
from ireasoner.rollouts.chat import Reply, chat_body, completion_of
from ireasoner.rollouts.engine import Request, temperatures
from ireasoner.rollouts.server import (
    LOOK_SECONDS,
    LostServerError,
    ServerError,
    ask,
    connections,
    look,
    read_reply,
    run_async,
    said,
)
from ireasoner.rollouts.vllm import completion_seeds, prompt_ids, takes_features

IN_FLIGHT = (
    32  # requests of one process that a server has at a time: vLLM batches them, and more would only queue there
)
LONGEST_PAUSE = 60.0  # seconds until a lost server is tried again
# Tokens that each server samples at the start, and how far their log-probabilities may be from the learner's on
# average. On a CPU, rounding makes 1e-5 of that where both see the same features, and 4e-3 where the server reads the
# picture with code of its own.
COMPARED_TOKENS = 16
LARGEST_GAP, LARGEST_GAP_OF_PICTURES, LARGEST_GAP_IN_HALF_PRECISION = 0.005, 0.05, 0.15
T = TypeVar("T")


@dataclass
class Server:
    """What a process knows of a server.

    Attributes:
        address: where it is.
        serves: the name of the model that it was started with; empty until it has answered.
        busy: how many requests of this process it has.
        failures: in a row; 0 once it has completed a request.
        lost: whether it is not asked at present.
        retry_at: when a lost server is tried again, by `time.monotonic`.
        reason: why it was lost last.
    """

    address: str
    serves: str = ""
    busy: int = 0
    failures: int = 0
    lost: bool = False
    retry_at: float = 0.0
    reason: str = ""

    @property
    def due(self) -> bool:
        """Whether it is lost, and is to be tried again now."""
        return self.lost and time.monotonic() >= self.retry_at


class ServersEngine:
    """An engine (`ireasoner.rollouts.engine`) that samples on vLLM servers. Made by `ServersEngine.open`.

    Args:
        policy: whose adapters are served.
        addresses: of the servers.
        patience: seconds in which one of the servers must complete a request. A server may take half of them, so that
            there is time for another one.
        folder: one that the servers can read too, for the adapters; None: as `Adapters` says.
        processes: those of the run. The main one hands the adapters over.
        tell: is told in a sentence when a server is lost, and when it is back.
        ahead: whether the policy learns while it is sampled from, as it was at the last `refresh`.
    """

    def __init__(
        self,
        policy: Policy,
        addresses: Sequence[str],
        *,
        patience: float,
        folder: Path | None = None,
        processes: Processes = ALONE,
        tell: Callable[[str], None] = lambda line: None,
        ahead: bool = False,
    ) -> None:
        self.policy, self.patience, self.processes, self.tell = policy, patience, processes, tell
        self.servers = [Server(address) for address in addresses]
        self.adapters = Adapters(policy, processes, folder, patience / 2, ahead=ahead)

    @classmethod
    def open(cls, policy: Policy, addresses: Sequence[str], longest: int, **options: Any) -> ServersEngine:
        """Check that the servers serve the policy's backbone as the learner sees it, and hand the adapters over.

        A server that does not answer is told and left for later, unless none does. Every process must call this.

        Args:
            policy, addresses: as for `ServersEngine`, and `options` are its other arguments.
            longest: the largest number of tokens of a prompt and its completion together.

        Raises:
            ServerError: a server refuses what the run needs, or serves another model; or none answers.
        """
        engine = cls(policy, addresses, **options)
        engine._look(longest)
        engine._check_same_model()
        engine.refresh()
        return engine

    def _look(self, longest: int) -> None:
        """Find out what the servers serve; each process needs their names for it."""

        async def see(client: httpx2.AsyncClient, server: Server) -> None:
            base = (await look(client, server.address)).base
            server.serves = base.id
            if base.max_model_len is not None and base.max_model_len < longest:
                raise ServerError(
                    f"{server.address} holds {base.max_model_len} tokens of a prompt and its completion, and this run "
                    f"has up to {longest}: start it with --max-model-len {longest}"
                )

        self._with_each(self.servers, see)
        if all(server.lost for server in self.servers):
            raise ServerError(f"no server answers: {self._reasons()}")

    def refresh(self) -> None:
        """Serve the policy's adapters as they are now, under new names. Every process must call this.

        Raises:
            ServerError: a server refuses them, or none answers within `patience`.
        """
        self.processes.wait()  # until no process samples with the old ones
        self.adapters.next_version()
        if self.processes.is_main:
            deadline = time.monotonic() + self.patience
            self._with_each([server for server in self.servers if not server.lost], self._replace)
            self._with_each([server for server in self.servers if server.due], self._take_back)
            while all(server.lost for server in self.servers):
                if time.monotonic() >= deadline:
                    raise self._none_answers()
                time.sleep(0.1)
                self._with_each([server for server in self.servers if server.due], self._take_back)
        self.processes.wait()
        self.adapters.forget_files(self.adapters.version - 1)

    async def _replace(self, client: httpx2.AsyncClient, server: Server) -> None:
        """Hand the newest adapters over, and have those before forgotten."""
        await self._hand_over(client, server)
        await self.adapters.drop(client, server.address, self.adapters.version - 1)

    async def _take_back(self, client: httpx2.AsyncClient, server: Server) -> None:
        """Try a lost server: if it answers, hand the adapters over, so that it can be asked again."""
        try:
            await self._hand_over(client, server)
            server.lost = False
        except (LostServerError, ServerError) as error:
            self._pause(server, str(error))

    async def _hand_over(self, client: httpx2.AsyncClient, server: Server) -> None:
        models = await look(client, server.address, min(LOOK_SECONDS, self.patience / 2))
        if server.serves not in ("", models.base.id):
            raise LostServerError(f"it serves {models.base.id} now, and not {server.serves}")
        server.serves = models.base.id
        await self.adapters.hand_over(client, server.address, models)

    def close(self) -> None:
        """Have the servers forget this run's adapters, as far as they answer."""
        if not self.processes.is_main:
            return

        async def drop_all() -> None:
            async with self._connections() as client:
                there = [server.address for server in self.servers if not server.lost]
                drops = (self.adapters.drop(client, address, self.adapters.version) for address in there)
                await asyncio.gather(*drops, return_exceptions=True)

        with suppress(TimeoutError):
            run_async(asyncio.wait_for(drop_all(), 10))
        self.adapters.forget_files(self.adapters.version)

    # --- sampling -----------------------------------------------------------------------------------------------------

    def sample(
        self,
        requests: Sequence[Request],
        role: Role | None,
        *,
        n: int = 1,
        max_tokens: int,
        temperature: float | Sequence[float] = 1.0,
    ) -> list[list[Completion]]:
        """Sample n completions of each request, as described in `Engine.sample`.

        The log-probabilities are those at temperature 1, whatever the temperature. The seeds are those of `VllmEngine`.

        Raises:
            ServerError: no server completes a request within `patience`; or one refuses it, reads a prompt differently
                from the learner, or replies what cannot be a completion.
        """
        if not requests:
            return []
        policy = self.policy
        bodies = [
            {**body, "seed": seed, "temperature": each}
            for request in requests
            for body in [chat_body(policy, request, takes_features(request.image), max_tokens)]
            for seed, each in zip(completion_seeds(request.seed, n), temperatures(temperature, n), strict=True)
        ]
        replies = run_async(self._complete_all(bodies, role))
        learner_ids = prompt_ids(build_prompts(policy, [r.image for r in requests], [r.messages for r in requests]))
        flat = [
            completion_of(policy, server.address, reply, learner_ids[k // n], max_tokens)
            for k, (server, reply) in enumerate(replies)
        ]
        return [flat[i : i + n] for i in range(0, len(flat), n)]

    async def _complete_all(self, bodies: Sequence[dict[str, Any]], role: Role | None) -> list[tuple[Server, Reply]]:
        """Each reply with the server that it is from."""
        places = asyncio.Semaphore(IN_FLIGHT * len(self.servers))

        async def one(client: httpx2.AsyncClient, body: dict[str, Any]) -> tuple[Server, Reply]:
            async with places:
                return await self._complete(client, body, role)

        async with self._connections() as client:
            watch = asyncio.create_task(self._watch(client))
            try:
                return await _together(one(client, body) for body in bodies)
            finally:
                watch.cancel()
                await asyncio.gather(watch, return_exceptions=True)

    async def _watch(self, client: httpx2.AsyncClient) -> None:
        """Take lost servers back when they answer, for as long as there is work."""
        while True:
            await _together(self._take_back(client, server) for server in self.servers if server.due)
            await asyncio.sleep(0.1)

    async def _complete(
        self, client: httpx2.AsyncClient, body: dict[str, Any], role: Role | None
    ) -> tuple[Server, Reply]:
        """A completion from the least busy server, or from another one if that one is lost."""
        deadline = time.monotonic() + self.patience
        while True:
            there = [server for server in self.servers if not server.lost]
            if there:
                server = min(there, key=lambda each: each.busy)
                try:
                    return server, await self._complete_on(client, server, body, role)
                except LostServerError as error:
                    self._lose(server, str(error))
            if time.monotonic() >= deadline:
                raise self._none_answers()
            if not there:
                await asyncio.sleep(0.1)

    async def _complete_on(
        self, client: httpx2.AsyncClient, server: Server, body: dict[str, Any], role: Role | None
    ) -> Reply:
        """A completion from one server.

        Raises:
            LostServerError: it does not answer, or does not know the adapter.
            ServerError: it refuses the request.
        """
        name, seconds = self.adapters.name(role) if role else server.serves, self.patience / 2
        server.busy += 1
        try:
            status, reply = await ask(
                client, server.address, "POST", "/v1/chat/completions", json={"model": name, **body}, seconds=seconds
            )
        finally:
            server.busy -= 1
        if status >= 500 or status == 404:  # 404: it was started anew, and does not know this run's adapters
            raise LostServerError(f"HTTP {status}: {said(reply)}")
        if status != 200:
            raise ServerError(f"{server.address} refuses a prompt: {said(reply)}")
        read = read_reply(server.address, reply, Reply)
        if read.choices[0].finish_reason not in ("stop", "length"):  # such as 'abort' from a server that is ending
            raise LostServerError(f"it ended a completion by {str(read.choices[0].finish_reason)[:40]!r}")
        if server.failures:
            self.tell(f"The server {server.address} answers again.")
        server.failures = 0
        return read

    # --- servers that do not answer -----------------------------------------------------------------------------------

    def _connections(self) -> AbstractAsyncContextManager[httpx2.AsyncClient]:
        return connections([server.address for server in self.servers])

    def _with_each(
        self, servers: Sequence[Server], work: Callable[[httpx2.AsyncClient, Server], Coroutine[Any, Any, None]]
    ) -> None:
        """Do something with several servers at the same time; those that do not answer are lost."""

        async def one(client: httpx2.AsyncClient, server: Server) -> None:
            try:
                await work(client, server)
            except LostServerError as error:
                self._lose(server, str(error))

        async def every_one() -> None:
            async with self._connections() as client:
                await _together(one(client, server) for server in servers)

        if servers:
            run_async(every_one())

    def _lose(self, server: Server, reason: str) -> None:
        """Do not ask a server until it is taken back; tell so if it served until now."""
        if server.lost:
            return  # by another one of the requests that were under way
        if server.failures == 0:
            self.tell(f"The server {server.address} does not answer ({reason}): the others take its share.")
        server.lost = True
        self._pause(server, reason)

    def _pause(self, server: Server, reason: str) -> None:
        """Try a lost server again after a while, which doubles with every failure, and is over before patience is."""
        server.failures, server.reason = server.failures + 1, reason
        pause = 2.0 ** min(server.failures - 2, 10)
        server.retry_at = time.monotonic() + min(pause, LONGEST_PAUSE, self.patience / 10)

    def _none_answers(self) -> ServerError:
        return ServerError(
            f"no server has answered within {self.patience:g} seconds (--patience): {self._reasons()}; what is saved "
            "is safe: start the servers again, and go on with train --resume RUN"
        )

    def _reasons(self) -> str:
        return "; ".join(f"{server.address}: {server.reason or 'it is busy'}" for server in self.servers)

    # --- the model ----------------------------------------------------------------------------------------------------

    def _check_same_model(self) -> None:
        """Compare a few tokens that each server samples without an adapter with the learner's log-probabilities.

        The image is sent as a picture first: features of the wrong width, as of another model, can end a server.

        Raises:
            ServerError: a server refuses the request, reads the prompt differently, or serves another model.
        """
        image = Image.linear_gradient("L").resize((112, 84)).convert("RGB")
        (encoded,) = encode_images(self.policy, [image])
        request = Request(encoded, solver_messages("{question}", "What is brighter, the top or the bottom?"))
        for as_features in (False, True) if takes_features(encoded) else (False,):
            largest = LARGEST_GAP if as_features else LARGEST_GAP_OF_PICTURES
            if self.policy.backbone.dtype != torch.float32:
                largest = LARGEST_GAP_IN_HALF_PRECISION
            sampled = self._sample_everywhere(request, as_features) if self.processes.is_main else []
            # Each process computes the same, because those that share the model out compute together.
            for address, ids, logprobs in self.processes.gather([sampled], self.processes.count)[0]:
                gap = (self._learner_logprobs(request, ids) - torch.tensor(logprobs)).abs().mean().item()
                if not gap <= largest:
                    raise ServerError(
                        f"{address} serves another model than this run's: their log-probabilities of the same tokens "
                        f"differ by {gap:.2g} on average"
                    )

    def _sample_everywhere(self, request: Request, as_features: bool) -> list[tuple[str, list[int], list[float]]]:
        """The address, the tokens and their log-probabilities of each server that answers."""
        body = chat_body(self.policy, request, as_features, COMPARED_TOKENS) | {"seed": 0, "temperature": 1.0}
        (ids,) = prompt_ids(build_prompts(self.policy, [request.image], [request.messages]))
        found = []

        async def sample(client: httpx2.AsyncClient, server: Server) -> None:
            reply = await self._complete_on(client, server, body, None)
            done = completion_of(self.policy, server.address, reply, ids, COMPARED_TOKENS)
            found.append((server.address, list(done.token_ids), list(done.logprobs)))

        self._with_each([server for server in self.servers if not server.lost], sample)
        return found

    @torch.no_grad()
    def _learner_logprobs(self, request: Request, token_ids: Sequence[int]) -> torch.Tensor:
        """The log-probability of each of these tokens behind the request, without an adapter."""
        policy = self.policy
        prompts, ids = build_prompts(policy, [request.image], [request.messages]), torch.tensor([token_ids])
        ids = ids.to(policy.device)
        hidden = completion_hidden(policy, prompts, ids, torch.ones_like(ids, dtype=torch.bool), None)
        return policy.output_layer(hidden).float().log_softmax(-1).gather(-1, ids[0][:, None])[:, 0].cpu()


async def _together(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of coroutines that run at the same time; the first error ends all of them."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each) for each in work]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
