"""`ireasoner serve`: the command of a vLLM server that samples for a run, printed or started."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Group
from pydantic import Field

from ireasoner.app.options import WHOLE, Count, Device
from ireasoner.app.training_options import with_training_options
from ireasoner.method.types import UsageError
from ireasoner.training import config as configs

# What decides on how the model is served.
SERVED_WITH = (
    "preset", "revision", "dtype", "lora_rank", "max_image_tokens", "max_image_pixels", "items",
    "images_per_item", "max_question_tokens", "max_solution_tokens", "solution_form", "proposer_prompt",
    "solver_prompt", "domain",
)  # fmt: skip
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM may be told as the largest
RECEIVER = "ireasoner.rollouts.receiver.AdapterReceiver"
HERE = ("127.0.0.1", "localhost", "::1")  # hosts that no other machine reaches
Port = Annotated[int, Field(ge=1, le=65535), WHOLE]


@with_training_options({Group.create_ordered("What train is given: the same"): SERVED_WITH})
def serve(
    model: str,
    /,
    *,
    config: Path | None = None,
    host: str = "127.0.0.1",
    port: Port = 8000,
    device: Device = "auto",
    tensor_parallel_size: Count = 1,
    data_parallel_size: Count = 1,
    run: bool = False,
    **flags: Any,
) -> int:
    """Print the command of a vLLM server that samples for a run of train --servers, or start it. Give it on the machine
    of the server, in an environment that has vLLM and this package, and with the options of the run. What it prints can
    be given more of vLLM's options, such as --ssl-keyfile and --ssl-certfile.

    Args:
        model: A folder, a hub id, or 'tiny'; the run's.
        config: YAML file of options, or the config.yaml of a run.
        host: Address to listen on; 0.0.0.0 is every one that this machine has.
        port: Port to listen on.
        tensor_parallel_size: GPUs that share one copy of the model.
        data_parallel_size: Copies of the model.
        run: Start the server in place of this command.
    """
    if config is not None:
        # A reward does not matter here; the recipe's options, of which it is one, are left out of the file.
        flags = configs.with_options_of(config, {"recipe": "default", **flags})
    options = configs.resolve({"images": ".", **flags, "model": model})
    words = _command(options, device)
    words += ["--host", host, "--port", str(port)]
    for flag, count in (("tensor", tensor_parallel_size), ("data", data_parallel_size)):
        words += [f"--{flag}-parallel-size", str(count)] if count > 1 else []
    environment = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    if run:
        _start(words, environment, host)
    assigned = " ".join(f"{name}={value}" for name, value in environment.items())
    print(f"{assigned} python {_wrapped(words)}")
    print(_then(host, port), file=sys.stderr)
    return 0


def _command(options: configs.Config, device: str) -> list[str]:
    """The words behind `python`, without those on addresses and GPUs."""
    from ireasoner.model.backbone import load_processor, resolve_device
    from ireasoner.model.source import find_model
    from ireasoner.training.opening import longest_sequence

    source, backbone = find_model(options.model, options.revision), options.backbone
    processor = load_processor(source, backbone.max_image_tokens)
    rank = next((rank for rank in RANKS if rank >= backbone.lora_rank), None)
    if rank is None:
        raise UsageError(f"--lora-rank {backbone.lora_rank}: vLLM serves adapters of rank {RANKS[-1]} at most")
    words = ["-m", "vllm.entrypoints.openai.api_server"]
    if source.commit is None:
        words += ["--model", os.path.abspath(source.folder)]
    else:
        words += ["--model", options.model, "--revision", source.commit]
    words += ["--served-model-name", options.model, "--dtype", backbone.dtype]
    words += ["--max-model-len", str(longest_sequence(options, processor))]
    words += ["--enable-lora", "--max-lora-rank", str(rank), "--max-loras", "2", "--middleware", RECEIVER]
    words += [
        "--enable-mm-embeds",
        "--limit-mm-per-prompt",
        f'{{"image": {options.most_images}}}',
        "--generation-config",
        "vllm",
    ]
    if resolve_device(device) == "cpu":
        # A prompt that is computed in parts ends vLLM's engine for CPUs if the request has a seed.
        words += ["--enforce-eager", "--max-num-batched-tokens", "16384"]
    return words


def _wrapped(words: list[str]) -> str:
    """A command line over several lines, which break before its options."""
    lines = [""]
    for word in words:
        lines += [""] if word.startswith("--") else []
        lines[-1] += f" {shlex.quote(word)}"
    return " \\\n   ".join(line.strip() for line in lines)


def _then(host: str, port: int) -> str:
    """What to do with the server, as comments of a shell."""
    if host in HERE:
        reached = f"http://127.0.0.1:{port}   (this machine alone reaches it; with --host 0.0.0.0, others do)"
    else:
        reached = f"http://THIS_MACHINE:{port}   (others reach it: unless the network is yours alone, also add"
        reached += " --ssl-keyfile and --ssl-certfile)"
    key = "a key: any text of your own, as VLLM_API_KEY here and as IREASONER_SERVER_KEY where train runs"
    return f"# then: ireasoner train ... --servers {reached}\n# {key}"


def _start(words: list[str], environment: dict[str, str], host: str) -> None:
    """Become the server; does not return."""
    from ireasoner.training.checks import installed

    if not installed("vllm"):
        raise UsageError("--run needs vLLM: pip install 'ireasoner[vllm]', or start what this prints elsewhere")
    kept = dict(os.environ)
    if key := kept.get("VLLM_API_KEY") or kept.get("IREASONER_SERVER_KEY"):
        environment = {**environment, "VLLM_API_KEY": key}
    elif host not in HERE:
        raise UsageError(f"--host {host} opens the server to other machines: set a key of your own as VLLM_API_KEY")
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *words], {**kept, **environment})
