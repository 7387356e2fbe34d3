"""A server that speaks the routes of vLLM over the tiny model, so that tests need no vLLM.

It answers as vLLM 0.32 does, in a thread of the tests: the same replies, the same errors with the same texts.
"""

from __future__ import annotations

import base64
import io
import os
import re
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Self

import torch
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ireasoner.method.types import Completion
from ireasoner.model.inputs import EncodedImage, SeenImage, build_prompts, encode_images
from ireasoner.model.policy import Policy
from ireasoner.rollouts.engine import Request
from ireasoner.rollouts.live import LiveEngine
from ireasoner.rollouts.receiver import AdapterReceiver

# The model's attention is chosen in a place of the whole process, so that one thread may compute at a time.
COMPUTES = threading.Lock()
Answer = Callable[[HttpRequest, dict[str, Any]], Awaitable[Response]]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def error(status: int, message: str, kind: str = "BadRequestError") -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": status}}, status)


class StandIn:
    """A server; a context manager, which starts and ends it.

    Args:
        policy: answers, and is given the adapters that it is asked for; the learner's policy would be changed by that.
        port: to listen on at 127.0.0.1; None: a free one.
        key: which requests must bear.
        loads: whether adapters may be loaded.
        receives: whether it has the part that takes adapters which are sent.
        features: whether it takes image features.
        context: the most tokens of a prompt and its completion.

    Attributes:
        change: what is done to each reply before it is sent, for tests of what a server may send.
        asked: how many completions it has given.
        adapters: the folder of each adapter by its name.
        down: whether it says that it cannot serve.
    """

    def __init__(
        self, policy: Policy, port: int | None = None, *, key: str | None = None, loads: bool = True,
        receives: bool = True, features: bool = True, context: int = 1024, version: str = "0.32.0",
    ) -> None:  # fmt: skip
        self.policy, self.port, self.key, self.loads = policy, port or free_port(), key, loads
        self.features, self.context, self.version = features, context, version
        self.address = f"http://127.0.0.1:{self.port}"
        self.change: Callable[[dict[str, Any]], Any] = lambda reply: reply
        self.asked, self.down, self.names = 0, False, list[str]()
        self.adapters: dict[str, Path] = {}
        routes = {"/v1/chat/completions": self._chat}
        if loads:
            routes |= {"/v1/load_lora_adapter": self._load, "/v1/unload_lora_adapter": self._unload}
        app = Starlette(
            routes=[
                Route("/health", lambda _: Response(status_code=503 if self.down else 200)),
                Route("/version", lambda _: JSONResponse({"version": self.version})),
                Route("/v1/models", self._models),
                *(Route(path, self._guarded(answer), methods=["POST"]) for path, answer in routes.items()),
            ],
            middleware=[Middleware(AdapterReceiver)] if receives else [],
        )
        config = uvicorn.Config(app, host="127.0.0.1", port=self.port, log_level="error", lifespan="off", workers=1)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self) -> Self:
        os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"
        self.thread.start()
        while not self.server.started:
            time.sleep(0.005)
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End it as a signal would, without waiting for what it is asked."""
        self.server.should_exit = self.server.force_exit = True
        self.thread.join()

    def _refuses(self, request: HttpRequest) -> Response | None:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": "Unauthorized"}, 401)
        return error(503, "the engine is dead") if self.down else None

    def _guarded(self, answer: Answer) -> Callable[[HttpRequest], Awaitable[Response]]:
        async def guarded(request: HttpRequest) -> Response:
            return self._refuses(request) or await answer(request, await request.json())

        return guarded

    async def _models(self, request: HttpRequest) -> Response:
        base = {"id": "tiny", "root": "tiny", "parent": None, "max_model_len": self.context}
        adapters = [{"id": name, "root": str(path), "parent": "tiny"} for name, path in self.adapters.items()]
        reply = JSONResponse({"object": "list", "data": [base, *adapters]})
        return self._refuses(request) or reply

    async def _load(self, request: HttpRequest, body: dict[str, Any]) -> Response:
        name, path = body["lora_name"], Path(body["lora_path"])
        if name in self.adapters:
            return error(400, f"The lora adapter '{name}' has already been loaded.", "InvalidUserInput")
        if not (path / "adapter_model.safetensors").is_file():
            return error(404, f"Loading lora {name} failed: No adapter found for {path}", "NotFoundError")
        self.adapters[name] = path
        self.names.append(name)
        return Response(f"Success: LoRA adapter '{name}' added successfully.")

    async def _unload(self, request: HttpRequest, body: dict[str, Any]) -> Response:
        if self.adapters.pop(body["lora_name"], None) is None:
            return error(404, f"The lora adapter '{body['lora_name']}' cannot be found.", "NotFoundError")
        return Response("Success")

    async def _chat(self, request: HttpRequest, body: dict[str, Any]) -> Response:
        if body["model"] not in ("tiny", *self.adapters):
            return error(404, f"The model `{body['model']}` does not exist.", "NotFoundError")
        parts = [part for turn in body["messages"] for part in turn["content"]]
        if not self.features and any(part["type"] == "image_embeds" for part in parts):
            return error(400, "You must set `--enable-mm-embeds` to input `image_embeds`")
        with COMPUTES:
            ids, done = self._complete(body)
        if done is None:
            return error(400, f"This model's maximum context length is {self.context} tokens, and {len(ids)} are asked")
        self.asked += 1
        content = [{"token": "", "logprob": logprob, "bytes": None, "top_logprobs": []} for logprob in done.logprobs]
        choice = {"index": 0, "message": {"role": "assistant", "content": done.text}, "logprobs": {"content": content}}
        choice |= {"finish_reason": done.finish_reason, "token_ids": list(done.token_ids), "stop_reason": None}
        reply = self.change({"id": "chatcmpl-1", "prompt_token_ids": ids, "choices": [choice]})
        return reply if isinstance(reply, Response) else JSONResponse(reply)

    def _complete(self, body: dict[str, Any]) -> tuple[list[int], Completion | None]:
        """The ids of the prompt, and what the model says to it; None if there is no room for that."""
        policy, messages, image = self.policy, [], None
        for turn in body["messages"]:
            content = []
            for part in turn["content"]:
                image = image or self._image(part)
                content.append(part if part["type"] == "text" else {"type": "image"})
            messages.append({**turn, "content": content})
        assert image is not None
        (ids,) = build_prompts(policy, [image], [messages]).text["input_ids"].tolist()
        if len(ids) + body["max_tokens"] > self.context:
            return ids, None
        assert sorted(body["stop_token_ids"]) == sorted(policy.end_tokens)
        assert (body["top_p"], body["top_k"], body["min_p"], body["repetition_penalty"]) == (1, 0, 0, 1)
        role = None
        if body["model"] != "tiny":
            policy.load_adapter(self.adapters[body["model"]], role := "solver")
        request = Request(image, messages, (body["seed"],))
        options = {"max_tokens": body["max_tokens"], "temperature": body["temperature"]}
        ((done,),) = LiveEngine(policy).sample([request], role, **options)
        return ids, done

    def _image(self, part: dict[str, Any]) -> EncodedImage | None:
        """What a part of a message shows, as the model sees it."""
        if part["type"] == "image_url":
            data = re.fullmatch(r"data:image/png;base64,(.*)", part["image_url"]["url"])
            assert data is not None
            (encoded,) = encode_images(self.policy, [Image.open(io.BytesIO(base64.b64decode(data[1])))])
            return encoded
        if part["type"] == "image_embeds":
            tensors = {name: _tensor(text) for name, text in part["image_embeds"].items()}
            grid = tensors["image_grid_thw"]
            assert grid.shape == (3,)
            _, rows, columns = grid.tolist()
            patch = self.policy.processor.image_processor.patch_size
            seen = SeenImage(self.policy.processor, Image.new("RGB", (columns * patch, rows * patch)))
            return EncodedImage(seen, {"pooler_output": [tensors["image_embeds"]]}, {"image_grid_thw": grid[None]})
        return None


def _tensor(text: str) -> torch.Tensor:
    return torch.load(io.BytesIO(base64.b64decode(text)), weights_only=True)
