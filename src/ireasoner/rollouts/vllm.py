"""Sampling with vLLM, in the learner's process: both roles as LoRA adapters, handed over after each update.

Of several processes, each has an engine of its own, which samples that process's share.

vLLM has kernels of its own, and computes adapters in the backbone's precision, too. So its log-probability of a token
differs from the learner's by rounding, which every step logs as `sampler_gap`. Each completion has its own seed, but a
resumed run draws the same tokens only as far as vLLM makes the same batches.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ireasoner.method.seeds import uniforms
from ireasoner.method.types import ROLES, Completion, Role, UsageError
from ireasoner.model.inputs import EncodedImage, Prompts, build_prompts
from ireasoner.model.parallel import ALONE, Processes
from ireasoner.model.policy import Policy
from ireasoner.model.source import brief, find_model
from ireasoner.rollouts.engine import Request, temperatures
from ireasoner.rollouts.live import completion


class VllmError(UsageError):
    """vLLM is missing, or cannot serve this model as the learner sees it; the message says why."""


class VllmEngine:
    """An engine (`ireasoner.rollouts.engine`) that samples with vLLM. Made by `VllmEngine.load`."""

    def __init__(self, policy: Policy, llm: Any, adapters: Path) -> None:
        self.policy, self.llm, self.version = policy, llm, 0
        self._adapters = adapters  # a folder for those that are handed over

    @classmethod
    def load(
        cls,
        policy: Policy,
        model: str,
        longest: int,
        gpu_share: float = 0.45,
        processes: Processes = ALONE,
        most_images: int = 1,
    ) -> VllmEngine:
        """Load the backbone into vLLM, in this process, and hand the adapters over.

        Several processes must all call this. vLLM then joins the group of processes that exists, as it does under
        torchrun, and takes the GPU of LOCAL_RANK, which is the learner's (not tried on GPUs).

        Args:
            policy: whose adapters are served.
            model: the policy's backbone: 'tiny', a folder or a hub id.
            longest: the largest number of tokens of a prompt and its completion together.
            gpu_share: the share of a GPU's memory that vLLM takes. The learner's own copy of the weights, activations
                and logits need the rest.
            processes: those of the run.
            most_images: that a prompt shows.

        Raises:
            VllmError: vLLM is not installed, or does not serve the model, or not on the learner's GPU.
        """
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in this process, no worker can be lost
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        try:
            from vllm import LLM  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]
        except ImportError:
            raise VllmError("--engine vllm needs vLLM: pip install 'ireasoner[vllm]', or leave it out") from None
        on_gpu = policy.device.type == "cuda"
        options: dict[str, Any] = {"gpu_memory_utilization": gpu_share} if on_gpu else {"enforce_eager": True}
        if processes.count > 1:
            options["distributed_executor_backend"] = "external_launcher"
        elif policy.device.index:
            raise VllmError(
                f"--engine vllm samples on the first GPU: instead of --device {policy.device}, set "
                f"CUDA_VISIBLE_DEVICES={policy.device.index}"
            )
        try:
            llm = LLM(
                model=str(find_model(model, policy.commit).folder),
                dtype=str(policy.backbone.dtype).removeprefix("torch."),
                enable_lora=True,
                max_loras=len(ROLES),
                max_lora_rank=max(config.r for config in policy.model.peft_config.values()),  # type: ignore[union-attr]
                max_model_len=longest,
                limit_mm_per_prompt={"image": most_images},
                enable_mm_embeds=True,
                generation_config="vllm",  # not the checkpoint's, which may ask for top-k or a repetition penalty
                **options,
            )
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise VllmError(f"vLLM cannot serve {model}: {brief(error)}") from error
        adapters = Path(tempfile.mkdtemp(prefix="ireasoner-"))
        engine = cls(policy, llm, adapters)
        weakref.finalize(engine, shutil.rmtree, adapters, ignore_errors=True)
        engine.refresh()
        return engine

    def close(self) -> None:
        """End vLLM: it must not outlive the group of processes."""
        self.llm.llm_engine.engine_core.shutdown()

    @property
    def _folder(self) -> Path:
        return self._adapters / str(self.version)

    def refresh(self) -> None:
        """Serve the policy's adapters as they are now, as a new version: vLLM does not read the same path twice."""
        before = self._folder
        self.version += 1
        self.policy.save_adapters(self._folder)
        shutil.rmtree(before, ignore_errors=True)

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

        The log-probabilities are those at temperature 1, whatever the temperature.

        Raises:
            VllmError: vLLM refuses a prompt, or reads it differently from the learner.
        """
        if not requests:
            return []
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

        prompts = build_prompts(self.policy, [r.image for r in requests], [r.messages for r in requests])
        vllm_prompts: list[Any] = []
        params: list[Any] = []
        for request in requests:
            # In the prompt, each image is still one token.
            ids = self.policy.processor.tokenizer(request.prompt, add_special_tokens=False)["input_ids"]
            prompt = {"prompt_token_ids": ids, "multi_modal_data": {"image": _image(request.image)}}
            # One vLLM request for each completion, so that each has its own seed; vLLM caches what they share.
            for seed, heat in zip(completion_seeds(request.seed, n), temperatures(temperature, n), strict=True):
                vllm_prompts.append({**prompt})
                params.append(
                    SamplingParams(
                        temperature=heat,
                        seed=seed,
                        max_tokens=max_tokens,
                        logprobs=0,  # of the sampled token alone
                        stop_token_ids=list(self.policy.end_tokens),
                        detokenize=False,
                    )
                )
        try:
            outputs = self.llm.generate(vllm_prompts, params, lora_request=self._adapter(role), use_tqdm=False)
        except ValueError as error:  # usually a prompt that is too long for `longest`
            raise VllmError(f"vLLM refuses a prompt: {brief(error)}") from error
        for ours, output in zip(prompt_ids(prompts), outputs[::n], strict=True):
            if (theirs := list(output.prompt_token_ids)) != ours:
                raise VllmError(
                    f"vLLM reads a prompt as {len(theirs)} tokens that the learner reads as {len(ours)}: its processor "
                    "treats images differently; leave out --engine vllm for this model"
                )
        flat = [self._completion(output.outputs[0]) for output in outputs]
        return [flat[i : i + n] for i in range(0, len(flat), n)]

    def _adapter(self, role: Role | None) -> Any:
        """How vLLM is asked for the newest version of a role's adapter."""
        from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

        if role is None:
            return None
        number = self.version * len(ROLES) + ROLES.index(role)  # a number of its own for each version
        return LoRARequest(f"{role}-{self.version}", number, str(self._folder / role))

    def _completion(self, output: Any) -> Completion:
        logprobs = [entry[token].logprob for entry, token in zip(output.logprobs, output.token_ids, strict=True)]
        return completion(self.policy, list(output.token_ids), logprobs)


def completion_seeds(request_seed: Sequence[int], n: int) -> list[int]:
    """A seed below 2^31 for each of n completions; the k-th follows from the request's seed and k alone."""
    return [int(number * 2**31) for number in uniforms([request_seed], n, 1)[0, :, 0]]


def prompt_ids(prompts: Prompts) -> list[list[int]]:
    """The token ids of each prompt as the learner reads it, without padding."""
    rows = zip(prompts.text["input_ids"], prompts.mask_BP, strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in rows]


def takes_features(image: EncodedImage) -> bool:
    """Whether vLLM can be given our features instead of the picture: all they need is a grid, as in Qwen's models."""
    return set(image.features) == {"pooler_output"} and set(image.extras) == {"image_grid_thw"}


def _image(image: EncodedImage) -> Any:
    """The images of a prompt for vLLM: our features, so that both see the same, or else the pictures."""
    return {"image_embeds": image.pooled, **image.extras} if takes_features(image) else list(image.seen.images)
