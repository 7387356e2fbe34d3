"""Sampling on servers over HTTP, on a stand-in for vLLM (`stand_in`). `make test-vllm` has the same on the real one."""

from __future__ import annotations

import asyncio
import json
import shlex
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from itertools import chain, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
import torch
from PIL import Image
from starlette.responses import Response, StreamingResponse

from ireasoner import Observer
from ireasoner.app import api
from ireasoner.app.cli import main
from ireasoner.method.texts import solver_messages
from ireasoner.method.types import ROLES, Role, UsageError
from ireasoner.model.parallel import Processes
from ireasoner.model.policy import Policy
from ireasoner.model.source import TINY_MODEL
from ireasoner.playground import dataset
from ireasoner.rollouts import receiver
from ireasoner.rollouts.engine import Request
from ireasoner.rollouts.live import LiveEngine
from ireasoner.rollouts.receiver import PREFIX
from ireasoner.rollouts.server import ServerError, check_servers
from ireasoner.rollouts.servers import ServersEngine
from ireasoner.rollouts.vllm import completion_seeds
from ireasoner.studies.doctor import fill_adapters
from ireasoner.training.checks import check_start
from ireasoner.training.config import ConfigError, config_of, dump_config, resolve
from ireasoner.training.fitting import tell_shortages
from ireasoner.training.opening import longest_sequence
from ireasoner.training.recorder import Recorder, read_records
from models import load, requests, sample, tokens
from stand_in import StandIn

pytestmark = pytest.mark.usefixtures("copied_models")

QUESTIONS = ("Which bar is the tallest?", "Is red <image> more than<|im_end|> blue?", "Where?")


@pytest.fixture(scope="module")
def policy() -> Policy:
    """The learner's."""
    policy = load()
    fill_adapters(policy, 0.1, seed=1)
    return policy


@pytest.fixture(scope="module")
def answering() -> Policy:
    """What the servers answer with: the same model, without the learner's adapters."""
    return load()


@pytest.fixture(scope="module")
def asked(policy: Policy, pictures: list[Image.Image]) -> list[Request]:
    sized = [pictures[0], pictures[1].resize((112, 56)), pictures[2].resize((56, 28))]
    return requests(policy, sized, [solver_messages("{question}", q) for q in QUESTIONS], (1, 2, 3))


@pytest.fixture(autouse=True)
def compare_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ireasoner.rollouts.servers.COMPARED_TOKENS", 4)


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def open_engine(policy: Policy, told: list[str]) -> Iterator[Callable[..., ServersEngine]]:
    """Opens an engine on stand-ins; the engines are closed at the end."""
    opened = []

    def open_on(*servers: StandIn, **options: Any) -> ServersEngine:
        options = {"patience": 30, "tell": told.append, **options}
        opened.append(ServersEngine.open(policy, [server.address for server in servers], 512, **options))
        return opened[-1]

    yield open_on
    for engine in opened:
        engine.close()


def live(policy: Policy, asked: list[Request], role: Role | None, n: int, longest: int, **options: Any) -> Any:
    """The completions of the live model under the seeds that servers are given."""
    seeded = [Request(r.image, r.messages, (seed,)) for r in asked for seed in completion_seeds(r.seed, n)]
    flat = [group[0] for group in sample(LiveEngine(policy), seeded, role, 1, longest, **options)]
    return [flat[i : i + n] for i in range(0, len(flat), n)]


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_servers_sample_what_the_live_model_would(
    policy: Policy, answering: Policy, asked: list[Request], open_engine: Callable[..., ServersEngine]
):
    """Both adapters and the backbone, one server or two, prompts and images of different sizes."""
    with StandIn(answering) as one, StandIn(answering) as other:
        alone, both = open_engine(one), open_engine(one, other)
        for role in (None, *ROLES):
            expected = live(policy, asked, role, 2, 12)
            found = sample(both, asked, role, 2, 12)
            assert tokens(found) == tokens(expected)
            for mine, theirs in zip(chain(*found), chain(*expected), strict=True):
                assert (mine.text, mine.finish_reason) == (theirs.text, theirs.finish_reason)
                assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
        mixed = sample(alone, asked, "solver", 2, 12, temperature=(0, 1))  # as an evaluation draws
        greedy = live(policy, asked, "solver", 1, 12, temperature=0)
        drawn = live(policy, asked, "solver", 2, 12)
        assert tokens(mixed) == [[a[0].token_ids, b[1].token_ids] for a, b in zip(greedy, drawn, strict=True)]
        assert sample(both, [], "solver", 2, 16) == []
        assert other.asked >= 8  # both have done their part


def test_a_picture_is_sent_where_features_cannot_be(
    policy: Policy,
    answering: Policy,
    asked: list[Request],
    open_engine: Callable[..., ServersEngine],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("ireasoner.rollouts.servers.takes_features", lambda image: False)
    with StandIn(answering, features=False) as server:
        assert tokens(sample(open_engine(server), asked, None, 1, 8)) == tokens(live(policy, asked, None, 1, 8))


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["sent", "shared folder", "same machine"])
def test_adapters_are_served_after_they_were_handed_over(
    way: str,
    policy: Policy,
    answering: Policy,
    asked: list[Request],
    open_engine: Callable[..., ServersEngine],
    tmp_path: Path,
):
    """And every version has a name of its own, the version before is forgotten, and no files are left."""
    asked = asked[:1]
    with StandIn(answering, receives=way == "sent") as server:
        engine = open_engine(server, folder=tmp_path if way == "shared folder" else None)
        before = live(policy, asked, "solver", 2, 8)
        fill_adapters(policy, 0.1, seed=2)
        try:
            assert tokens(sample(engine, asked, "solver", 2, 8)) == tokens(before)
            engine.refresh()
            after = live(policy, asked, "solver", 2, 8)
            assert tokens(sample(engine, asked, "solver", 2, 8)) == tokens(after) != tokens(before)
        finally:
            fill_adapters(policy, 0.1, seed=1)
        assert len(server.names) == len(set(server.names)) == 4
        assert len(server.adapters) == 2
        places = {path.parent if way == "sent" else path.parents[1] for path in server.adapters.values()}
        assert (places == {engine.adapters.folder}) == (way != "sent")
        engine.close()
        assert not server.adapters
        assert [path for place in places for path in place.iterdir()] == []


def test_two_runs_do_not_use_the_same_names(answering: Policy, open_engine: Callable[..., ServersEngine]):
    with StandIn(answering) as server:
        open_engine(server), open_engine(server)
        assert len(set(server.names)) == len(server.names) == 4


# --- servers that do not answer ---------------------------------------------------------------------------------------


def test_a_lost_server_is_told_once_and_taken_back_with_the_current_adapters(
    policy: Policy,
    answering: Policy,
    asked: list[Request],
    open_engine: Callable[..., ServersEngine],
    told: list[str],
):
    with StandIn(answering) as one, StandIn(answering) as other:
        engine = open_engine(one, other)
        expected = tokens(live(policy, asked, "solver", 2, 8))
        one.down = True
        assert tokens(sample(engine, asked, "solver", 2, 8)) == expected
        engine.refresh()
        assert tokens(sample(engine, asked, "solver", 2, 8)) == expected
        assert told == [
            f"The server {one.address} does not answer (HTTP 503: the engine is dead): the others take its share."
        ]
        one.stop()
        before = other.asked
        with StandIn(answering, one.port) as anew:  # which has no adapters
            deadline = time.monotonic() + 20
            while not anew.asked and time.monotonic() < deadline:
                assert tokens(sample(engine, asked, "solver", 2, 8)) == expected
            assert anew.names == [engine.adapters.name(role) for role in ROLES]
            assert other.asked > before
            assert told[1:] == [f"The server {one.address} answers again."]


def test_a_lost_server_is_tried_again_before_patience_runs_out(policy: Policy):
    """However many requests it was lost with, and however long it has been away."""
    engine = ServersEngine(policy, ["http://127.0.0.1:9"], patience=100)
    (server,) = engine.servers
    for _ in range(32):
        engine._lose(server, "it is gone")
    assert server.failures == 1
    for _ in range(2000):
        engine._pause(server, "it is gone")
    assert 0 < server.retry_at - time.monotonic() <= 10


def test_a_server_that_was_started_anew_is_handed_the_adapters(
    policy: Policy, answering: Policy, asked: list[Request], open_engine: Callable[..., ServersEngine]
):
    """Also if nobody noticed that it was gone."""
    with StandIn(answering) as server:
        engine = open_engine(server)
        server.adapters.clear()
        assert tokens(sample(engine, asked, "solver", 1, 8)) == tokens(live(policy, asked, "solver", 1, 8))


def test_a_request_is_asked_elsewhere_if_it_breaks_off(
    policy: Policy, answering: Policy, asked: list[Request], open_engine: Callable[..., ServersEngine]
):
    """As from a server that is ending: by an error of its engine, an aborted completion, or half a reply."""

    def aborted(reply: dict[str, Any]) -> dict[str, Any]:
        reply["choices"][0]["finish_reason"] = "abort"
        return reply

    failing: list[Callable[[dict[str, Any]], Any]] = [
        lambda reply: Response("no", 500),
        aborted,
        lambda reply: Response("{", headers={"Content-Length": "100"}),
    ]
    with StandIn(answering) as one, StandIn(answering) as other:
        engine = open_engine(one, other)
        for one.change in failing:
            assert tokens(sample(engine, asked, None, 1, 8)) == tokens(live(policy, asked, None, 1, 8))
            assert engine.servers[0].failures > 0  # it was lost, and may have been taken back since
            engine.servers[0].lost, engine.servers[0].failures = False, 0


def test_patience_runs_out(answering: Policy, asked: list[Request], open_engine: Callable[..., ServersEngine]):
    with StandIn(answering) as server:
        engine = open_engine(server, patience=0.5)
        server.down = True
        for work in (lambda: sample(engine, asked, "solver", 2, 8), engine.refresh):
            with pytest.raises(ServerError, match=r"within 0\.5 seconds \(--patience\): http.*resume"):
                work()


def test_a_reply_without_end_is_not_waited_for(
    answering: Policy, asked: list[Request], open_engine: Callable[..., ServersEngine]
):
    async def drops() -> AsyncIterator[bytes]:
        while True:
            yield b" "
            await asyncio.sleep(0.05)

    with StandIn(answering) as server:
        engine = open_engine(server, patience=1)
        server.change = lambda reply: StreamingResponse(drops())
        with pytest.raises(ServerError, match=r"within 1 seconds .*no reply within 0\.5 seconds"):
            sample(engine, asked[:1], "solver", 1, 8)


# --- refusals ---------------------------------------------------------------------------------------------------------

REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"loads": False}, "does not let adapters be loaded"),
    ({"features": False}, "--enable-mm-embeds"),
    ({"context": 500}, r"holds 500 tokens .* has up to 512: start it with --max-model-len 512"),
    ({"key": "secret"}, "does not accept the key: set IREASONER_SERVER_KEY"),
    ({"version": "0.11.2"}, r"is vLLM 0\.11\.2: at least 0\.32 is needed"),
]


@pytest.mark.parametrize(("options", "sentence"), REFUSALS)
def test_refusals_are_one_sentence(
    options: dict[str, Any], sentence: str, answering: Policy, open_engine: Callable[..., ServersEngine]
):
    with StandIn(answering, **options) as server, pytest.raises(ServerError, match=sentence) as refusal:
        open_engine(server)
    assert server.address in str(refusal.value)
    assert "secret" not in str(refusal.value)


def test_another_model_is_refused(
    answering: Policy, open_engine: Callable[..., ServersEngine], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("ireasoner.rollouts.servers.COMPARED_TOKENS", 16)
    layer = answering.decoder.layers[0].mlp.down_proj.base_layer.weight
    with StandIn(answering) as server, torch.no_grad():
        try:
            layer.mul_(0.8)
            with pytest.raises(ServerError, match=r"serves another model than this run's: .* differ by"):
                open_engine(server)
        finally:
            layer.div_(0.8)


def test_adapters_that_a_server_cannot_read_are_told(
    answering: Policy, open_engine: Callable[..., ServersEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As on another machine."""
    monkeypatch.setattr("ireasoner.rollouts.adapters.Adapters.files", lambda self, role: Path("/elsewhere"))
    with StandIn(answering) as server, pytest.raises(ServerError, match="cannot read the adapters in /elsewhere: name"):
        open_engine(server, folder=tmp_path)


def test_a_prompt_that_is_too_long_is_refused(
    answering: Policy, asked: list[Request], open_engine: Callable[..., ServersEngine]
):
    with StandIn(answering) as server:
        engine = open_engine(server)
        with pytest.raises(ServerError, match=f"{server.address} refuses a prompt: This model's maximum context"):
            sample(engine, asked, None, 1, 2000)


def put(path: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    """Puts a value at a place of a reply, such as `choices.0.token_ids`."""

    def change(reply: dict[str, Any]) -> dict[str, Any]:
        place: Any = reply
        *before, last = [int(step) if step.isdigit() else step for step in path.split(".")]
        for step in before:
            place = place[step]
        place[last] = value
        return reply

    return change


GARBAGE: list[Callable[[dict[str, Any]], Any]] = [
    lambda reply: Response("<html>"),
    lambda reply: Response("[" * 100_000),
    lambda reply: {},
    lambda reply: {**reply, "choices": reply["choices"] * 2},
    lambda reply: {**reply, "choices": []},
    put("prompt_token_ids", [1, 2, 3]),
    put("choices.0.token_ids", []),
    put("choices.0.token_ids", [10**6] * 8),
    put("choices.0.token_ids", [-1] * 8),
    put("choices.0.token_ids", ["a"]),
    put("choices.0.token_ids", [5] * 9),
    put("choices.0.token_ids", [5] * 3),
    put("choices.0.logprobs", None),
    put("choices.0.logprobs.content.0.logprob", 0.1),
    put("choices.0.logprobs.content.0.logprob", "NaN"),
    put("choices.0.logprobs.content", []),
    put("choices.0.finish_reason", 5),
]


def test_what_no_model_of_vllm_replies_is_refused(
    answering: Policy, asked: list[Request], open_engine: Callable[..., ServersEngine]
):
    with StandIn(answering) as server:
        engine = open_engine(server)
        for server.change in GARBAGE:
            with pytest.raises(ServerError, match=server.address) as refusal:
                sample(engine, asked[:1], None, 1, 8)
            assert len(str(refusal.value)) < 400
        server.change = lambda reply: Response(b" " * (2**26 + 1))
        with pytest.raises(ServerError, match="replies more than 67,108,864 bytes"):
            sample(engine, asked[:1], None, 1, 8)


# --- before a run -----------------------------------------------------------------------------------------------------


def test_servers_are_checked_before_anything_slow(answering: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    dataset.write_unlabeled(tmp_path / "images", 2, "chalk")
    nobody = "http://127.0.0.1:9"

    def check(*addresses: str) -> None:
        flags = {"images": str(tmp_path / "images"), "model": "no/such/model", "servers": addresses}
        check_start(resolve(flags), tmp_path / "run")

    with pytest.raises(UsageError, match=f"--servers: {nobody} does not answer .*ireasoner serve"):
        check(nobody)
    with StandIn(answering, key="secret") as server:
        with pytest.raises(UsageError, match=f"--servers: {server.address} does not accept the key"):
            check(server.address)
        monkeypatch.setenv("IREASONER_SERVER_KEY", "secret")
        with pytest.raises(UsageError, match="no such folder"):
            check(server.address)
        check_servers([f"{server.address}/v1/", nobody], all_needed=False)  # as a run that goes on
        with pytest.raises(UsageError, match=f"{nobody} does not answer"):
            check_servers([server.address, nobody], all_needed=True)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [("SSL_CERT_FILE", "/no/such/file", "SSL_CERT_FILE .* cannot be read"), ("VLLM_API_KEY", "a b", "is no key")],
)
def test_what_the_environment_says_of_servers_is_checked(
    name: str, value: str, sentence: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(name, value)
    with pytest.raises(ServerError, match=sentence):
        check_servers(["https://127.0.0.1:9"], all_needed=True)


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("gpu2:8000", "no address such as"),
        ("ftp://gpu2", "no address such as"),
        ("http://", "no address such as"),
        ("http://gpu2:99999", "no address"),
        ("http://gpu2?key=1", "no address such as"),
        ("http://me:secret@gpu2:8000", "leave that out, and put the key in IREASONER_SERVER_KEY"),
    ],
)
def test_addresses_of_servers_are_checked(address: str, problem: str):
    with pytest.raises(ConfigError, match=problem) as refusal:
        config_of({"images": ".", "model": "tiny", "servers": f"http://gpu1:8000,{address}"})
    assert "secret" not in str(refusal.value)


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_report")
def test_a_run_goes_on_when_a_server_ends_and_is_resumed_when_all_do(
    answering: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its episodes are those of a run on a server that does not end."""
    engines, open_on = [], ServersEngine.open

    def noted(*arguments: Any, **options: Any) -> ServersEngine:
        engines.append(open_on(*arguments, **options))
        return engines[-1]

    monkeypatch.setattr(ServersEngine, "open", noted)
    dataset.write_unlabeled(tmp_path / "images", 4, "chalk")
    options: dict[str, Any] = {
        "steps": 3, "images_per_step": 1, "group_size": 2, "save_every": 1, "gate_low": 0, "gate_high": 1,
        "max_solution_tokens": 16, "max_question_tokens": 24, "probe_every": 0, "blank_every": 0, "watch": False,
        "device": "cpu", "patience": 60,
    }  # fmt: skip
    told: list[str] = []

    def train(name: str, *servers: StandIn, on_step: Callable[[int], object] = int) -> None:
        observer = Observer(on_step=lambda step, *_: on_step(step), on_message=told.append)
        addresses = [server.address for server in servers]
        api.train(tmp_path / "images", "tiny", tmp_path / name, observer=observer, servers=addresses, **options)

    with StandIn(answering) as one, StandIn(answering) as other:
        train("whole", one)

        def end_servers(step: int) -> None:
            (one if step == 1 else other).stop()
            engines[-1].patience = 60 if step == 1 else 1

        with pytest.raises(ServerError, match="no server has answered within 1 seconds"):
            train("ended", one, other, on_step=end_servers)
        assert sum("does not answer" in line for line in told) == 2
    with StandIn(answering, other.port):
        api.resume(tmp_path / "ended", observer=Observer())
    files = [tmp_path / name / "episodes.jsonl" for name in ("whole", "ended")]
    episodes = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    texts = [[[t["text"] for t in row["trajectories"]] for row in rows] for rows in episodes]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 3
    metrics = [json.loads(line) for line in (tmp_path / "ended" / "metrics.jsonl").read_text().splitlines()]
    assert all(row.get("sampler_gap/solver", 0) < 1e-4 for row in metrics)
    assert any("sampler_gap/solver" in row for row in metrics)
    events = list(read_records(tmp_path / "ended" / "events.jsonl"))
    assert [row["step"] for row in events if f"{one.address} does not answer" in row["text"]] == [2, 3]


def test_what_processes_tell_of_a_server_is_recorded_once(tmp_path: Path):
    lost = "The server a does not answer ({}): the others take its share."
    back, other = "The server a answers again.", "The server b does not answer (x): the others take its share."

    class Two(Processes):
        def gather(self, items: Sequence[Any], total: int) -> list[Any]:
            return [*items, ([], [lost.format("z"), other])]

    said, recorder, own = list[str](), Recorder.open(tmp_path), [lost.format("x"), back, lost.format("y")]
    run: Any = SimpleNamespace(news=own[:], shortages=[], step=4, processes=Two(0, 2), recorder=recorder)
    run.observer = Observer(on_message=said.append)
    tell_shortages(run)
    events = [(row["step"], row["text"]) for row in read_records(tmp_path / "events.jsonl")]
    assert events == [(4, text) for text in (*own, other)]
    assert said == [other]  # the others were told at once
    assert run.news == []


# --- the part that takes adapters -------------------------------------------------------------------------------------


def test_the_receiver_writes_nothing_but_adapters_and_only_with_the_key(
    policy: Policy, answering: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(receiver.LARGEST, "adapter_config.json", 10_000)
    policy.save_adapters(tmp_path)
    config, tensors = ((tmp_path / "solver" / name).read_bytes() for name in receiver.LARGEST)
    with StandIn(answering, key="secret") as server:
        stranger = httpx2.Client(base_url=server.address)
        client = httpx2.Client(base_url=server.address, headers={"Authorization": "Bearer secret"})
        assert stranger.put(f"{PREFIX}a/adapter_config.json", content=config).status_code == 401
        folder = Path(client.put(f"{PREFIX}a/adapter_config.json", content=config).json()["folder"])
        assert client.put(f"{PREFIX}a/adapter_model.safetensors", content=tensors).status_code == 200
        for path, content, status in [
            ("a/adapter_model.safetensors", tensors[:-1], 400),
            ("a/adapter_model.safetensors", b"no tensors", 400),
            ("a/adapter_config.json", b"{}", 400),
            ("a/adapter_config.json", b"[" * 9_000, 400),
            ("a/adapter_config.json", b" " * 10_001, 413),
            ("a/code.py", b"", 405),
            ("A/adapter_config.json", config, 400),
            ("..%2Fa/adapter_config.json", config, 400),
            ("a/b/adapter_config.json", config, 400),
            ("", config, 400),
        ]:
            assert client.put(PREFIX + path, content=content).status_code == status, path
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
            "adapter_config.json": config,
            "adapter_model.safetensors": tensors,
        }
        assert [path.name for path in folder.parent.iterdir()] == ["a"]
        for number in range(receiver.MOST):
            client.put(f"{PREFIX}b{number}/adapter_config.json", content=config)
        assert len(list(folder.parent.iterdir())) == receiver.MOST
        assert not folder.exists()
        assert client.delete(f"{PREFIX}b1").status_code == 200
        assert not (folder.parent / "b1").exists()
        stranger.close(), client.close()
    monkeypatch.delenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING")


# --- ireasoner serve --------------------------------------------------------------------------------------------------


def printed(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, str]:
    """The options of the command that is printed, by name."""
    assert main(["serve", "tiny", "--device", "cpu", *options]) == 0
    words = shlex.split(capsys.readouterr().out.replace("\\\n", " "))
    assert words[:4] == ["VLLM_ALLOW_RUNTIME_LORA_UPDATING=True", "python", "-m", "vllm.entrypoints.openai.api_server"]
    pairs = [*words[4:], "--"]
    flags = [(word, after) for word, after in pairwise(pairs) if word.startswith("--")]
    return {word: "" if after.startswith("--") else after for word, after in flags}


def test_serve_prints_the_command_for_the_run(capsys: pytest.CaptureFixture[str], policy: Policy, tmp_path: Path):
    plain = printed(capsys)
    assert plain["--model"] == str(TINY_MODEL)
    assert (plain["--host"], plain["--port"], plain["--dtype"]) == ("127.0.0.1", "8000", "float32")
    assert plain["--max-model-len"] == str(
        longest_sequence(resolve({"images": ".", "model": "tiny"}), policy.processor)
    )
    changed = {"max_image_tokens": 16, "max_solution_tokens": 212, "lora_rank": 20, "dtype": "bfloat16"}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in changed.items()]
    other = printed(capsys, *options, "--tensor-parallel-size", "2", "--port", "8001")
    assert int(other["--max-model-len"]) == int(plain["--max-model-len"]) - 48 + 100
    assert other["--max-lora-rank"] == "32"
    assert (other["--dtype"], other["--port"], other["--tensor-parallel-size"]) == ("bfloat16", "8001", "2")
    (tmp_path / "reward.py").write_text("def pay(group, context): return [0.0] * len(group.texts)")
    of_run = resolve({"images": ".", "model": "tiny", "reward": f"{tmp_path}/reward.py:pay", **changed})
    (tmp_path / "config.yaml").write_text(dump_config(of_run))
    from_run = printed(capsys, "--config", str(tmp_path / "config.yaml"))
    assert from_run | {"--port": "8001", "--tensor-parallel-size": "2"} == other


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--lora-rank", "600"], "rank 512 at most"),
        (["--run"], "--run needs vLLM"),
        (["--run", "--host", "0.0.0.0"], "set a key of your own as VLLM_API_KEY"),
    ],
)
def test_serve_says_in_a_sentence_what_it_cannot_do(
    options: list[str], sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("ireasoner.training.checks.installed", lambda package: "0.0.0.0" in options)
    assert main(["serve", "tiny", "--device", "cpu", *options]) == 2
    assert sentence in capsys.readouterr().err
